"""The items drawn beside each positive.

Legend: B positives, J items drawn for each, I items, P of them present.
"""

import numpy as np

from recsys_dist.errors import DataError


class Negatives:
    """Draws present items with probability proportional to (1 + positives)^power, never the positive itself.

    Args:
        counts: [I] positive train events of the items 1 to I.
        present: [I] bool: may the item be drawn?
        power: 0 is uniform.

    Raises:
        DataError: fewer than two items are present.
    """

    def __init__(self, counts: np.ndarray, present: np.ndarray, power: float) -> None:
        self.items = np.flatnonzero(present) + 1
        if len(self.items) < 2:
            raise DataError(
                f"DeepFM draws other items beside each positive, and there is {len(self.items)} item."
            )
        weights = (1.0 + counts) ** power * present
        self.probability = weights / weights.sum()
        self.cumulative = np.concatenate([[0.0], np.cumsum(self.probability[self.items - 1])])

    def draw(
        self, positives: np.ndarray, number: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items [B, J] and the log of their probability given the positive [B, J], float32.

        A point is drawn on the line of the present items' cumulated probabilities without the positive's
        stretch, so one draw is always enough.

        Args:
            positives: [B] items.
            number: J.
            generator: the only source of chance.
        """
        own = self.probability[positives - 1][:, None]
        # [B, 1]: the positive's place among the present items; that of the next one for an absent one.
        place = np.searchsorted(self.items, positives)[:, None]
        point = generator.random((len(positives), number)) * (1 - own)
        point += own * (point >= self.cumulative[place])
        drawn = np.searchsorted(self.cumulative[1:-1], point, side="right")
        # Rounding at the stretch's ends.
        drawn = np.where(self.items[drawn] == positives[:, None], (drawn + 1) % len(self.items), drawn)
        items = self.items[drawn]
        return items, np.log(self.probability[items - 1] / (1 - own)).astype(np.float32)
