"""What a list must obey besides its scores: allowed and denied items, at most so many of a kind, diversity, a
floor, and places that are given to chance, with the odds written down.

Legend: B users, C candidates a user, K list length, I items (index 0 is unknown), V values an item, D numbers
of an item's vector, N values of a field.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys_dist import config
from recsys_dist.deepfm.items import Items
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.recall.inner_product import Lists
from recsys_dist.schema import UNKNOWN
from recsys_dist.scoring.chosen import few, read_ids
from recsys_dist.scoring.scorers import TwoStage, taken
from recsys_dist.scoring.users import Users


@dataclass(frozen=True)
class Chosen:
    """Which candidates make the lists."""

    places: Tensor
    """[B, K] int64, columns of the candidates, -1 where a list ends early."""
    propensity: Tensor
    """[B, K] float32: 1, and where chance chose, the probability of this candidate at this place, given the
    places before; 0 where a list ends early."""
    explored: Tensor
    """[B, K] bool: did chance choose?"""


class Rules:
    """The rules of a configuration, for the items of a features run.

    Args:
        settings: the section score.rules.
        items: of the features run.
        seed: of what is given to chance; with the date in it, another draw every night.

    Raises:
        ConfigError: a field that is none of the items'.
        DataError: a file of ids that cannot be read, or has none that is known.
    """

    def __init__(self, settings: config.Rules, items: Items, seed: int = 0) -> None:
        self.settings, self.seed = settings, seed
        self.allowed_I = torch.ones(len(items) + 1, dtype=torch.bool)
        """May the item be listed at all?"""
        self.files: list[dict[str, Any]] = []
        """Path and sha256 of each file of ids, and how many of these are no item's, with a few of them."""
        for key, path in (("allow", settings.allow), ("deny", settings.deny)):
            if path is not None:
                named_I, file = _indices(items, key, path)
                self.allowed_I &= named_I if key == "allow" else ~named_I
                self.files.append(file)
        limited = items.spec.attributes(settings.at_most, "score.rules.at_most")
        self.values_IV = {name: items.values(name) for name in limited}

    @property
    def only_scores_count(self) -> bool:
        """Is the list just the best candidates?"""
        chosen = self.settings
        return not (chosen.at_most or chosen.diversity or chosen.explore) and chosen.least_score is None

    def limit(self, users: Users) -> Users:
        """The batch, with no item listable but those that are allowed."""
        return dataclasses.replace(users, listable=users.listable & self.allowed_I)

    def ranked(self, stage: TwoStage, users: Users, k: int) -> tuple[Lists, Tensor, Chosen]:
        """The lists of a batch under all rules: as `TwoStage.rank`, and how each place was filled.

        Args:
            stage: whose candidates the lists are made of.
            users: limited to the allowed items (`limit`), all of the same day.
            k: list length.

        Raises:
            ConfigError: diversity is asked of a model that has no item vectors.
        """
        if self.only_scores_count:
            lists, scores_BKS = stage.rank(users, k)
            places = torch.arange(k).expand(len(users), -1)
            listed = lists.items != UNKNOWN
            return lists, scores_BKS, Chosen(places, listed.float(), torch.zeros_like(listed))
        model = stage.ranker.model
        if self.settings.diversity and not model.factorised:
            raise ConfigError(
                f"score.rules.diversity={self.settings.diversity} needs the items' vectors, and a "
                f"{model.settings.model} has none. Set it to 0, or train another deepfm.model."
            )
        candidates, scores_BCS = stage.rank(users, stage.width)
        vectors_ID = stage.ranker.catalogue(int(users.days[0])).sum
        chosen = self.choose(candidates, k, users.indices, vectors_ID)
        return *taken(chosen.places, candidates, scores_BCS), chosen

    def choose(self, candidates: Lists, k: int, users_B: Tensor, vectors_ID: Tensor) -> Chosen:
        """Fill the lists place by place.

        A place goes to the candidate with the greatest (1 - d) score - d similarity among those that the
        rules still allow: the score between 0 and 1 from the user's last candidate to his first, the
        similarity the greatest cosine with an item that is listed already, and 0 at least (maximal marginal
        relevance: Carbonell, Goldstein 1998). The last `explore` places (where there are fewer candidates
        than places, of so many) are drawn, without replacement, from
        the candidates that are left, with probability proportional to exp(score / temperature).

        Args:
            candidates: [B, C], best first.
            k: list length.
            users_B: [B] the users' indices: a user's draws do not depend on who else is in the batch.
            vectors_ID: [I, D] what items' similarity is measured by.
        """
        rules = self.settings
        items_BC, scores_BC = candidates.items, candidates.scores
        rows = torch.arange(len(items_BC))
        left_BC = items_BC != UNKNOWN
        if rules.least_score is not None:
            left_BC = left_BC & (scores_BC >= rules.least_score)
        unit_BC = _between_0_and_1(scores_BC)
        likeness_BC = torch.zeros_like(scores_BC)
        vectors_ID = torch.nn.functional.normalize(vectors_ID, dim=1)
        values_BCV = {name: values[items_BC] for name, values in self.values_IV.items()}
        counts_BN = {
            name: torch.zeros(len(items_BC), int(values.max()) + 1) for name, values in self.values_IV.items()
        }
        first_B = torch.full((len(items_BC),), k)
        if rules.explore:
            # A list with few candidates ends early.
            first_B = left_BC.sum(1).clamp(max=k) - rules.explore
            gumbel_BC = self._gumbel(users_B, items_BC)
            weight_BC = scores_BC / rules.temperature if rules.temperature else torch.zeros_like(scores_BC)
        places, odds, explored = [], [], []
        for place in range(k):
            open_BC = left_BC.clone()
            for name, most in rules.at_most.items():
                full_BN = counts_BN[name] >= most
                full_BN[:, UNKNOWN] = False
                flat = full_BN.gather(1, values_BCV[name].flatten(1))
                open_BC &= ~flat.view(values_BCV[name].shape).any(2)
            draws_B = place >= first_B
            worth_BC = (1 - rules.diversity) * unit_BC - rules.diversity * likeness_BC
            odds_BC = torch.ones(()).expand_as(worth_BC)
            if draws_B.any():
                logits_BC = weight_BC.masked_fill(~open_BC, -torch.inf)
                worth_BC = torch.where(draws_B[:, None], logits_BC + gumbel_BC, worth_BC)
                odds_BC = torch.where(draws_B[:, None], logits_BC.softmax(1), odds_BC)
            best_B = worth_BC.masked_fill(~open_BC, -torch.inf).argmax(1)
            found_B = open_BC[rows, best_B]
            places.append(torch.where(found_B, best_B, -1))
            odds.append(torch.where(found_B, odds_BC[rows, best_B], 0.0))
            explored.append(found_B & draws_B)
            left_BC[rows, best_B] = False
            for name, counts in counts_BN.items():
                values_BV = values_BCV[name][rows, best_B]
                counts.scatter_add_(1, values_BV, found_B[:, None].float().expand_as(values_BV))
            if rules.diversity:
                listed_BD = vectors_ID[items_BC[rows, best_B]] * found_B[:, None]
                alike_BC = torch.einsum("bcd,bd->bc", vectors_ID[items_BC], listed_BD)
                likeness_BC = torch.maximum(likeness_BC, alike_BC)
        return Chosen(torch.stack(places, 1), torch.stack(odds, 1), torch.stack(explored, 1))

    def _gumbel(self, users_B: Tensor, items_BC: Tensor) -> Tensor:
        """[B, C] a draw of the Gumbel distribution for each user and item, always the same one. The greatest
        of these plus log weights is a draw with these weights (Gumbel 1954).
        """
        mixed_B = _mix(users_B.numpy(force=True).astype(np.uint64) ^ _mix(np.array([self.seed], np.uint64)))
        mixed_BC = _mix(items_BC.numpy(force=True).astype(np.uint64) ^ mixed_B[:, None])
        uniform_BC = ((mixed_BC >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
        return torch.as_tensor(-np.log(-np.log(uniform_BC))).float()


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, by which neighbouring numbers get unrelated bits (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _between_0_and_1(scores_BC: Tensor) -> Tensor:
    known = scores_BC > -torch.inf
    high = scores_BC.amax(1, keepdim=True)
    low = scores_BC.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    return ((scores_BC - low) / (high - low).clamp(min=1e-12)).masked_fill(~known, 0.0)


def _indices(items: Items, key: str, path: str) -> tuple[Tensor, dict[str, Any]]:
    """[I] bool: which items a file of raw ids names; and what tells whether it has changed."""
    found, sha256 = read_ids(f"score.rules.{key}", path)
    wanted = set(found)
    ids = items.table["item_id"].to_pylist()
    named = np.array([False, *(item in wanted for item in ids)])
    unknown = sorted(wanted - set(ids))
    some = few(unknown)
    if (wanted or key == "allow") and not named.any():
        raise DataError(
            f"score.rules.{key}={path}: none of its {len(wanted)} ids ({some}) is an item's. Ids are those "
            f"of the raw log, one a line."
        )
    return torch.as_tensor(named), {
        "path": path, "sha256": sha256, "unknown": len(unknown), "such_as": some,
    }  # fmt: skip
