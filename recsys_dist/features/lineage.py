"""The run before: what its log looked like, and the vocabularies that are continued."""

from collections.abc import Mapping

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recsys_dist.config import Config
from recsys_dist.errors import DataError
from recsys_dist.features.drift import require_same
from recsys_dist.features.encode import Parent
from recsys_dist.features.session import read_table
from recsys_dist.features.source import Opened
from recsys_dist.schema import VOCAB
from recsys_dist.workspace import OpenRun, Run

SAME = ("kind", "side", "column", "delimiter", "list", "hash_buckets")
"""Settings of a field that its vocabulary depends on."""


def run_before(config: Config, run: OpenRun) -> Run | None:
    """The pinned features run, or the latest, that was made from a log of the same description: format and
    columns of the events. Where the latest was not, that is told.
    """
    pinned = run.workspace.pinned("features")
    runs = [found for found in run.workspace.runs("features") if pinned in (None, found.run_id)]
    if not runs:
        return None
    asked = config.section("data.events")

    def changed(other: Run) -> list[str]:
        events = other.manifest["config"]["data"]["events"]
        return [f"data.events.{key}" for key in ("format", "columns") if events.get(key) != asked[key]]

    found = next((other for other in reversed(runs) if not changed(other)), None)
    if found is not runs[-1]:
        how = "begin anew" if found is None else f"continue those of {found.run_id}"
        print(
            f"features: the vocabularies {how}: {runs[-1].run_id}, the latest run, was made from a log of "
            f"other {' and '.join(changed(runs[-1]))}",
            flush=True,
        )
    if found is None:
        return None
    try:
        return found if found.spec().vocabularies else None
    except DataError as error:
        print(f"features: the vocabularies begin anew: {error}", flush=True)
        return None


def new_columns(opened: Mapping[str, Opened], before: Run | None) -> dict[str, list[str]]:
    """The columns that a source did not have in the run before; they are ignored.

    Raises:
        DataError: a column that is used is missing or of another type.
    """
    known = before.manifest["figures"].get("columns", {}) if before else {}
    news = {name: require_same(name, found, known[name]) for name, found in opened.items() if name in known}
    for name, columns in news.items():
        if columns:
            print(f"features: data.{name} has new columns, which are ignored: {', '.join(columns)}")
    return {name: columns for name, columns in news.items() if columns}


def parents(config: Config, before: Run | None, events: DataFrame) -> dict[str, Parent]:
    """The vocabularies of the run before that are continued, by name.

    None where it knew no user and no item of this log: it was of another log altogether. Not those of fields
    that are declared in another way now.
    """
    if before is None:
        return {}
    described = {field["name"]: field for field in before.manifest["config"]["fields"]}
    specs = before.spec().vocabularies
    names = ["user", "item"]
    for field in config.section("fields"):
        known = described.get(field["name"], {})
        if field["name"] in specs and all(field.get(key) == known.get(key) for key in SAME):
            names.append(field["name"])
    found = {}
    for name in names:
        if specs[name].size:
            uri = f"{before.uri}/vocab/{name}"
            rows = read_table(events.sparkSession, uri, VOCAB).select("index", "token")
            found[name] = Parent(rows, specs[name], uri)
    for key in ("user", "item"):
        own = events.select(F.col(key).alias("token"))
        if key in found and not found[key].rows.join(own, "token", "left_semi").isEmpty():
            return found
    print(
        f"features: the vocabularies begin anew: {before.run_id} knew no user and no item of this log",
        flush=True,
    )
    return {}
