"""Items drawn beside each positive of which half are what next items proposes for the example's history.

The loss estimates a sum over all items; items of no chance add next to nothing to it, and those that are
proposed nearly everything, so that few draws say more. The odds are exact, and the loss divides by them.

Legend: B positives, J items drawn for each, H history positions, L items left out, I items (index 0 is
unknown), N others of an item.
"""

import numpy as np
import torch
from torch import Tensor

from recsys_dist.deepfm.negatives import Distribution
from recsys_dist.recall.related import RelatedItems, recent_share

HALF = 0.5
FULL = 1 - 1e-4
"""Where so much of the probability is of items that are left out, next to nothing would be left."""
ROOM = 1 << 22
"""Numbers of the array [B, I] that odds are looked up in: a few examples at a time where I is large."""


class Proposed:
    """Draws from one half the catalogue's distribution, one half what the history proposes: an item of it by
    how recent it is, then an item that it speaks for by its weight. Without such an item from the catalogue.

    Args:
        catalogue: of all items that may be drawn.
        related: the table of next items.
        recency: an item of the history counts exp(-age / recency).
    """

    def __init__(self, catalogue: Distribution, related: RelatedItems, recency: float) -> None:
        self.n, self.recency = len(related.others_IN) - 1, recency
        self.catalogue_I = torch.zeros(self.n + 1)
        self.catalogue_I[torch.from_numpy(catalogue.items)] = torch.from_numpy(
            catalogue.probability[:-1]
        ).float()
        self.cumulative_I = self.catalogue_I.double().cumsum(0)
        may_IN = self.catalogue_I[related.others_IN.long()] > 0
        weights_IN = torch.where(may_IN, related.weights_IN, 0.0)
        total_I = weights_IN.sum(1, keepdim=True)
        self.speaks_I = total_I[:, 0] > 0
        self.related = related.with_weights(weights_IN / total_I.clamp(min=1e-30))
        self.cumulative_IN = self.related.weights_IN.cumsum(1)
        self.cumulative_IN[:, -1] = 1

    def draw(
        self,
        left_out: np.ndarray,
        number: int,
        generator: np.random.Generator,
        history_BH: Tensor,
        age_BH: Tensor,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items [B, J] and the log of their probability [B, J], float32.

        Args:
            left_out: [B, L] items that are not drawn, the positive first; 0 is no item. Where they are all
                that can be, only the positive is left out.
            number: J.
            generator: the only source of chance.
            history_BH: the examples' histories, of `latest_of`.
            age_BH: likewise.
        """
        share_BH = recent_share(age_BH, self.recency) * self.speaks_I[history_BH]
        total_B1 = share_BH.sum(1, keepdim=True)
        half_B = HALF * (total_B1[:, 0] > 0)
        share_BH = share_BH / total_B1.clamp(min=1e-30)
        out_BL = torch.from_numpy(left_out.astype(np.int64))
        size = max(1, ROOM // (self.n + 1))
        parts = []
        for start in range(0, len(out_BL), size):
            rows = slice(start, start + size)
            liked = history_BH[rows], share_BH[rows], half_B[rows]
            parts.append(self._draw(out_BL[rows], *liked, number, generator))
        items_BJ = torch.cat([torch.empty(0, number, dtype=torch.int64), *(items for items, _ in parts)])
        odds_BJ = torch.cat([torch.empty(0, number), *(odds for _, odds in parts)])
        return items_BJ.numpy(), odds_BJ.log().numpy()

    def _draw(
        self,
        first_BL: Tensor,
        history_BH: Tensor,
        share_BH: Tensor,
        half_B: Tensor,
        number: int,
        generator: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Items and their probability, [B, J] each."""
        odds_BI = torch.zeros(len(first_BL), self.n + 1)
        self.related.add(odds_BI, history_BH, share_BH)
        odds_BI[:, 0] = 0

        def odds(items_BC: Tensor) -> Tensor:
            half_B1 = half_B[:, None]
            return half_B1 * odds_BI.gather(1, items_BC) + (1 - half_B1) * self.catalogue_I[items_BC]

        out_BL = first_BL.sort(1).values
        out_BL[:, 1:][out_BL[:, 1:] == out_BL[:, :-1]] = 0
        gone_B = odds(out_BL).sum(1)
        full_B = gone_B > FULL
        if full_B.any():
            out_BL[full_B] = 0
            out_BL[full_B, 0] = first_BL[full_B, 0]
            gone_B = odds(out_BL).sum(1)
        items_BJ = torch.zeros(len(out_BL), number, dtype=torch.int64)
        rows = torch.arange(len(out_BL)).repeat_interleave(number)
        columns = torch.arange(number).repeat(len(out_BL))
        while len(rows):
            chance = torch.from_numpy(generator.random((3, len(rows))))
            found = self._one_each(chance, history_BH[rows], share_BH[rows], half_B[rows])
            items_BJ[rows, columns] = found
            again = (found[:, None] == out_BL[rows]).any(1)
            rows, columns = rows[again], columns[again]
        return items_BJ, odds(items_BJ) / (1 - gone_B)[:, None]

    def _one_each(self, chance: Tensor, history_MH: Tensor, share_MH: Tensor, half_M: Tensor) -> Tensor:
        """[M] an item for each of M rows, by three numbers [3, M] between 0 and 1 of each."""
        which, place, point = chance
        found = torch.searchsorted(self.cumulative_I, point * self.cumulative_I[-1], right=True)
        proposed = torch.nonzero(which < half_M).squeeze(1)
        slot = (share_MH[proposed].double().cumsum(1) < place[proposed, None]).sum(1)
        slot = slot.clamp(max=share_MH.shape[1] - 1)
        speaker = history_MH[proposed, slot]
        cumulative = self.cumulative_IN[speaker]
        other = (cumulative.double() <= point[proposed, None]).sum(1).clamp(max=cumulative.shape[1] - 1)
        found[proposed] = self.related.others_IN[speaker, other].long()
        return found.clamp(max=self.n)
