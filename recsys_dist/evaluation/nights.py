"""Earlier nights: the evaluations that tonight's can be compared with."""

import datetime as dt
from dataclasses import dataclass
from typing import Any

from recsys_dist.evaluation.significance import fallen
from recsys_dist.scoring.publish import is_whole_night
from recsys_dist.workspace import RUN_ID, OpenRun, Run, Workspace

MOST = 30
"""Nights that are shown."""
COMPARABLE = ("label", "users", "relevant", "candidates")
"""What of a protocol decides, beside the split, whether two evaluations measure the same."""


@dataclass(frozen=True)
class Night:
    """An evaluation, tonight's or an earlier one."""

    run_id: str
    figures: dict[str, dict[str, float]]
    """Of the model whose lists are published: metric to value and, where there is one, low and high."""
    published: bool
    """Has the table the lists that were made after it?"""

    @property
    def moment(self) -> dt.datetime:
        """When it began, UTC."""
        return moment_of(self.run_id)


@dataclass(frozen=True)
class Change:
    """A metric tonight and another night."""

    before: float
    now: float
    chance: float
    """So much of the difference may be chance (significance.fallen)."""

    @property
    def difference(self) -> float:
        """Above 0 where tonight's is greater."""
        return self.now - self.before

    @property
    def beyond_chance(self) -> bool:
        """Is the difference more than what may be chance?"""
        return abs(self.difference) > self.chance


def moment_of(run_id: str) -> dt.datetime:
    """When a run was started, UTC, from its id."""
    return dt.datetime.strptime(run_id.rpartition("-")[0], RUN_ID).replace(tzinfo=dt.UTC)


def published_last(workspace: Workspace) -> Run | None:
    """The evaluation of the lists of all users that were published last and were not rolled back, if any
    still is there.
    """
    evaluations = {run.run_id: run for run in workspace.runs("evaluation")}
    for scored in reversed(workspace.runs("score")):
        found = evaluations.get(scored.inputs["evaluation"])
        if found and is_whole_night(scored):
            return found
    return None


def measured_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Do two metrics.json hold figures that can be compared? Later dates, more lengths, other intervals and
    models that were fitted on more make no difference; another kind of split, another label, or other items
    left out, does.
    """

    def of(metrics: dict[str, Any]) -> dict[str, Any]:
        protocol = metrics.get("protocol", {})
        split = {"events": "any"} | protocol.get("split", {})  # runs of older versions do not name it
        if dates := split.get("dates"):  # each night's are later; the days between them are the same
            first, second = map(dt.date.fromisoformat, dates)
            split["dates"] = (second - first).days
        return {"split": split, **{key: protocol.get(key) for key in COMPARABLE}}

    return of(one) == of(other)


def earlier_nights(run: OpenRun, metrics: dict[str, Any], model: str) -> tuple[list[Night], int]:
    """The latest evaluations before this one that measured the same way, oldest first, at most MOST; and how
    many there were that measured in another way.

    Args:
        run: tonight's evaluation.
        metrics: its metrics.json; see `measured_alike`.
        model: whose figures are wanted.
    """
    before = [other for other in run.workspace.runs("evaluation") if other.run_id < run.run_id][-MOST:]
    shown = {other.run_id for other in before}
    published = {
        scored.inputs["evaluation"]
        for scored in run.workspace.runs("score")
        if scored.inputs["evaluation"] in shown and is_whole_night(scored)
    }
    nights = []
    for other in before:
        found = other.json("metrics.json")
        if measured_alike(found, metrics) and model in found["models"]:
            nights.append(Night(other.run_id, found["models"][model], other.run_id in published))
    return nights, len(before) - len(nights)


def change(before: Night, now: Night, metric: str) -> Change | None:
    """How a metric differs between two nights; None where one of them does not have it."""
    if metric not in before.figures or metric not in now.figures:
        return None
    intervals = [interval(night.figures[metric]) for night in (before, now)]
    _, chance = fallen(*intervals)
    return Change(intervals[0][0], intervals[1][0], chance)


def interval(figure: dict[str, float]) -> tuple[float, float, float]:
    """Value, low and high of a figure; where it has no interval, three times the value."""
    value = figure["value"]
    return value, figure.get("low", value), figure.get("high", value)
