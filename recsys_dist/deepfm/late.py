"""Users and events of which some tables of a recall run, or ALS' factors, know nothing: on them a model
learns what the pair fields are worth, beside a logit that knows nothing of them either. They are the late
events of train, or those of the valid part.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.config import Config
from recsys_dist.deepfm.held_out import HeldOut
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.pairs import Knows, tables_folder
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.schema import LATE, SEEN_COLUMN
from recsys_dist.workspace import STAGES, Run

OF_TABLES: dict[Knows, str] = {"early": "late", "train": "before_valid"}
"""Where a recall run's figures tell of its tables that know so much, if these are not its own."""
NEVER = np.iinfo(np.int64).max


class Early:
    """Which train examples are before their users' late ones (see ingest.Keep).

    Args:
        features: the features run.
        recall: the recall run, which says from when on a user's events are late.

    Raises:
        ConfigError: it says nothing of the kind.
    """

    columns: tuple[str, ...] = ("user", "timestamp")

    def __init__(self, features: Run, recall: Run) -> None:
        try:
            moments = recall.table(f"{LATE}/late_from")
        except FileNotFoundError:
            raise ConfigError(
                f"{recall.uri} has no {LATE}, which pair fields are learned with. Run jobs/recall.py with "
                f"recall.late above 0, for example 0.2."
            ) from None
        self.from_U = np.full(features.spec().n_users + 1, NEVER)
        """[U] microseconds from which on a user's train events are late."""
        self.from_U[moments["user"].to_numpy()] = moments["late_from"].cast(pa.int64()).to_numpy()

    def __call__(self, table: pa.Table) -> np.ndarray:
        """[N] bool of train examples, by their `user` and `timestamp`."""
        moments: np.ndarray = table["timestamp"].cast(pa.int64()).to_numpy()
        early: np.ndarray = moments < self.from_U[table["user"].to_numpy()]
        return early


def require_tables(inputs: Mapping[str, Run], fit_on: str) -> None:
    """Raise a ConfigError where the runs lack tables that know nothing of the events on which pair fields are
    learned.

    Args:
        inputs: by stage: recall, and als where pair fields are of it.
        fit_on: `deepfm.fit_on`: of train, the late ones are learned on; else those of valid.
    """
    recall, als = inputs["recall"], inputs.get("als")
    knows: Knows = "early" if fit_on == "train" else "train"
    where = tables_folder(recall, knows)
    if where and OF_TABLES[knows] not in recall.manifest["figures"]:
        raise ConfigError(
            f"{recall.uri} has no {where.rstrip('/')}, which pair fields are learned with. Run "
            f"jobs/recall.py with recall.late above 0, for example 0.2."
        )
    if als is None:
        return
    made = als.manifest["config"]
    wanted = {"als.earlier": True, "als.fit_on": fit_on}
    found = {"als.earlier": made["als"].get("earlier", False), "als.fit_on": made["als"]["fit_on"]}
    if knows == "early":
        for key in ("late", "events"):
            wanted[f"recall.{key}"] = recall.manifest["config"]["recall"][key]
            found[f"recall.{key}"] = made["recall"][key]
    if found != wanted:
        raise ConfigError(
            f"{als.uri} was made with {_told(found)}, and pair fields of measure als are learned with "
            f"{_told(wanted)}. Run jobs/train_als.py with these."
        )


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={str(of).lower()}" for key, of in settings.items())


def require_earlier(inputs: Mapping[str, Run], early: Early | None) -> None:
    """Raise a DataError where the tables that know no late events, or (without `early`) no valid ones, were
    made from other train events.

    Args:
        inputs: by stage: features, recall, and als where pair fields are of it.
        early: which events are not late.
    """
    features, recall, als = inputs["features"], inputs["recall"], inputs.get("als")
    knows: Knows = "early" if early else "train"
    counted = recall.manifest["figures"]
    known = counted[OF_TABLES[knows]] if tables_folder(recall, knows) else counted
    events = recall.manifest["config"]["recall"]["events"]
    _require_known(features, recall, known["known"], events, early)
    if als:
        fitted = als.manifest["figures"]
        known = fitted["earlier"] if tables_folder(als, knows) else fitted
        events = "positive" if fitted["implicit"] else "any"
        _require_known(features, als, known["ratings"], events, early)


def _require_known(features: Run, of: Run, known: int, events: str, early: Early | None) -> None:
    wanted = pc.field("split") == "train"
    if events == "positive":
        wanted &= pc.field("label") > 0
    if early:
        batches = features.dataset("examples").to_batches(columns=list(Early.columns), filter=wanted)
        found = sum(int(early(pa.table(batch)).sum()) for batch in batches)
    else:
        found = features.dataset("examples").count_rows(filter=wanted)
    if found != known:
        where = f"{of.uri}/{tables_folder(of, 'early' if early else 'train')}".rstrip("/")
        raise DataError(
            f"{where} was made from {known} events, and {found} train events are earlier than its users' "
            f"{'late' if early else 'valid'} ones: what the ranking model learns of such tables would not "
            f"hold for new events. Run jobs/{STAGES[of.manifest['stage']].job} --force."
        )


def late_users(items: Items, features: Run, recall: Run, early: Early, config: Config, most: int) -> HeldOut:
    """Users as of when their late events began, and the positive ones of these.

    Args:
        items: of the features run, with the model's fields.
        features: that run.
        recall: whose late events they are.
        early: which are not late.
        config: seed, and which items are left out of the lists.
        most: users are drawn where there are more.

    Raises:
        DataError: nobody has one of an item that he had not seen.
    """
    state, filter_seen = recall.table(f"{LATE}/users"), config.score.filter_seen
    if len(state) > most:
        chosen = np.random.default_rng([config.seed, 2]).choice(len(state), most, replace=False)
        state = state.take(pa.array(np.sort(chosen)))
    users = state["user"]
    wanted = (pc.field("split") == "train") & pc.field("user").isin(users.combine_chunks())
    columns = ["user", "item", "timestamp", "label"]
    events = features.table("examples", columns=columns, filter=wanted)
    is_early, positive = pa.array(early(events)), pc.greater(events["label"], 0)
    if filter_seen != "none":
        before = events.filter(is_early if filter_seen == "all" else pc.and_(is_early, positive))
        before = before.sort_by("user")
        owners = before["user"].to_numpy()
        ends = np.searchsorted(owners, np.sort(users.to_numpy()), side="right")
        state = state.sort_by("user")
        offsets = pa.array(np.append([0], ends), pa.int32())
        seen = pa.ListArray.from_arrays(offsets, before["item"].combine_chunks())
        state = state.append_column(SEEN_COLUMN[filter_seen], seen)
    later = events.filter(pc.and_(pc.invert(is_early), positive))
    found = HeldOut(items, state, later, filter_seen, most, config.seed)
    if not len(found):
        raise DataError(
            f"{recall.uri}/{LATE}: of {len(state)} users none has a late positive event of an item that was "
            f"new to them, and pair fields are learned on those. Leave deepfm.pair out, or set "
            f"score.filter_seen=none."
        )
    return found
