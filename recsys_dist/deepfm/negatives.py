"""The items drawn beside each positive.

Legend: B positives, J items drawn for each, H items of a history, I items, P of them present.
"""

import numpy as np

from recsys_dist.errors import DataError


class Negatives:
    """Draws present items with probability proportional to (1 + positives)^power, or as often as they are
    positives of the same part of a batch; never the positive itself.

    Args:
        counts: [I] positive train events of the items 1 to I.
        present: [I] bool: may the item be drawn?
        power: 0 is uniform.
        in_batch: draw from the positives of the batch.

    Raises:
        DataError: fewer than two items are present.
    """

    def __init__(self, counts: np.ndarray, present: np.ndarray, power: float, in_batch: bool = False) -> None:
        items = np.flatnonzero(present) + 1
        if len(items) < 2:
            raise DataError(
                f"DeepFM draws other items beside each positive, and of the log's items {len(items)} "
                f"may be listed. Give it a longer log, or learn labels: deepfm.negatives=0."
            )
        weights = (1.0 + counts) ** power * present
        self.catalogue = Distribution(items, weights[items - 1])
        # What is met in a batch is met as often as it is positive.
        self.frequency = np.concatenate([[0.0], np.maximum(counts, 1) / max(1, counts.sum())])
        self.in_batch = in_batch

    def draw(
        self,
        positives: np.ndarray,
        number: int,
        generator: np.random.Generator,
        history: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items [B, J] and the log of their probability given the positive [B, J], float32.

        Args:
            positives: [B] items.
            number: J.
            generator: the only source of chance.
            history: [B, H] items that are not drawn either, unless that leaves none; 0 is no item.
        """
        left_out = positives[:, None] if history is None else np.column_stack([positives, history])
        if not self.in_batch:
            return self.catalogue.draw(left_out, number, generator)
        met, counts = np.unique(positives, return_counts=True)
        if len(met) < 2:
            return self.catalogue.draw(left_out, number, generator)
        items, _ = Distribution(met, counts).draw(left_out, number, generator)
        left_out = np.sort(left_out, axis=1)
        known = np.where((left_out >= 0) & (left_out < len(self.frequency)), left_out, 0)
        gone = self.frequency[known]
        gone[:, 1:][left_out[:, 1:] == left_out[:, :-1]] = 0
        drawn = self.frequency[items]
        others = np.maximum(1 - gone.sum(1), drawn.max(1))
        return items, np.log(drawn / others[:, None]).astype(np.float32)

    def draw_for_all(self, number: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Items [J] of the catalogue and the log of their probability [J], float32.

        Where that would be as many as there are, all of them, once each: what is estimated from draws with
        such probabilities is then exact.

        Args:
            number: J, at most.
            generator: the only source of chance.
        """
        items = self.catalogue.items
        if number >= len(items):
            return items, np.full(len(items), -np.log(len(items)), np.float32)
        nothing = np.zeros((1, 1), items.dtype)
        drawn, odds = self.catalogue.draw(nothing, number, generator)
        return drawn[0], odds[0]


class Distribution:
    """Items that are drawn in proportion to weights.

    Args:
        items: [P] ascending.
        weights: [P] above 0.
    """

    def __init__(self, items: np.ndarray, weights: np.ndarray) -> None:
        self.items = items
        self.cumulative = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
        self.cumulative[-1] = 1.0
        # After the last item there is nothing: where what is left out and is not there is put.
        self.probability = np.append(np.diff(self.cumulative), 0.0)

    def draw(
        self, left_out: np.ndarray, number: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items [B, number] and the log of their probability [B, number], float32.

        A point is drawn on the line of the items' cumulated probabilities without the stretches of what is
        left out, so one draw is always enough.

        Args:
            left_out: [B, H + 1] items that are not drawn; if that is all of them, only the first is left out.
            number: of items.
            generator: the only source of chance.
        """
        none = len(self.items)
        place = np.searchsorted(self.items, left_out)
        place = np.where(np.append(self.items, 0)[place] == left_out, place, none)
        own = place[:, :1].copy()
        place.sort(axis=1)
        place[:, 1:][place[:, 1:] == place[:, :-1]] = none
        full = (place < none).sum(1) == none
        place[full, 1:] = none
        place[full, :1] = own[full]
        stretch = self.probability[place]
        room = 1 - stretch.sum(1, keepdims=True)
        point = generator.random((len(place), number)) * room
        for column in range(place.shape[1]):
            start, length = self.cumulative[place[:, column]], stretch[:, column]
            point += length[:, None] * (point >= start[:, None])
        drawn = np.searchsorted(self.cumulative[1:-1], point, side="right")
        # Rounding at the stretches' ends.
        while (wrong := (drawn[:, :, None] == place[:, None]).any(2)).any():
            drawn = np.where(wrong, (drawn + 1) % none, drawn)
        return self.items[drawn], np.log(self.probability[drawn] / room).astype(np.float32)
