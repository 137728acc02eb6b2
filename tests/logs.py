"""Small logs on disk, and features runs made of them in the tests' own process."""

import json

from recsys_dist.config import Config
from recsys_dist.workspace import Workspace

FIELDS = (
    {"name": "recent", "kind": "history", "last": 3},
    {"name": "last_any", "kind": "history", "when": "any", "last": 2},
    {"name": "activity", "kind": "aggregate", "measure": "count"},
    {"name": "likes", "kind": "aggregate", "measure": "count", "when": "positive"},
    {"name": "hour", "kind": "time", "part": "hour"},
    {"name": "weekday", "kind": "time", "part": "weekday"},
)


def log_config(root, lines, *, header="user,item,timestamp,value", **settings):
    """Write events.csv under `root` and return a configuration that reads it.

    `settings` are merged over the sections by name; a nested mapping over the section's own.
    """
    (root / "events.csv").write_text("\n".join([header, *lines]) + "\n")
    columns = {"user": "user", "item": "item", "timestamp": "timestamp", "value": "value"}
    sections = {
        "storage": {"root": str(root / "runs")},
        "data": {"events": {"path": str(root / "events.csv"), "columns": columns}},
        "label": {"positive_when": "value >= 4"},
        "fields": FIELDS,
    }
    for name, value in settings.items():
        both = isinstance(value, dict) and isinstance(sections.get(name), dict)
        sections[name] = {**sections[name], **value} if both else value
    return Config.model_validate(json.loads(json.dumps(sections)))


def events_of(config):
    """The examples with raw ids: (user, item, seconds) to the row, histories as raw ids too."""
    run = Workspace(config).runs("features")[-1]
    names = {
        kind: {row["index"]: row["token"] for row in run.table(f"vocab/{kind}").to_pylist()}
        for kind in ("user", "item")
    }
    found = {}
    for row in run.table("examples").to_pylist():
        for field in run.spec().fields:
            if field.kind == "history":
                row[field.name] = [names["item"][index] for index in row[field.name]]
        key = (names["user"][row["user"]], names["item"][row["item"]], int(row["timestamp"].timestamp()))
        found[key] = row
    return found


def featurized(config):
    """Make and commit a features run in this process, in the running Spark session."""
    from recsys_dist.features.featurize import featurize

    run = Workspace(config).new("features", {}, {})
    return run.commit(config, featurize(config, run))
