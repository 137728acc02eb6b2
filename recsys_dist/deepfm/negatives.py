"""The items drawn beside each positive.

Legend: B positives, J items drawn for each, I items.
"""

import numpy as np

from recsys_dist.errors import DataError


class Negatives:
    """Draws items with probability proportional to (1 + positives)^power, never the positive itself.

    Args:
        counts: [I] positive train events of the items 1 to I.
        power: 0 is uniform.

    Raises:
        DataError: there are fewer than two items.
    """

    def __init__(self, counts: np.ndarray, power: float) -> None:
        if len(counts) < 2:
            raise DataError(
                f"DeepFM draws other items beside each positive, and there is {len(counts)} item."
            )
        weights = (1.0 + counts) ** power
        self.probability = weights / weights.sum()
        self.cumulative = np.concatenate([[0.0], np.cumsum(self.probability)])

    def draw(
        self, positives: np.ndarray, number: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items [B, J] and the log of their probability given the positive [B, J], float32.

        A point is drawn on the line of cumulated probabilities without the positive's stretch, so one draw is
        always enough.

        Args:
            positives: [B] items.
            number: J.
            generator: the only source of chance.
        """
        own = self.probability[positives - 1][:, None]
        point = generator.random((len(positives), number)) * (1 - own)
        point += own * (point >= self.cumulative[positives - 1][:, None])
        items = np.searchsorted(self.cumulative[1:-1], point, side="right") + 1
        # Rounding at the stretch's ends.
        items = np.where(items == positives[:, None], items % len(self.probability) + 1, items)
        return items, np.log(self.probability[items - 1] / (1 - own)).astype(np.float32)
