"""report.html: one page that says how good tonight's models are, and shows some of their lists."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.evaluation.labels import LABELS, summary_columns
from recsys_dist.schema import UNKNOWN
from recsys_dist.workspace import OpenRun

SAMPLE_USERS = 20


def write_report(run: OpenRun, metrics: dict[str, Any], verdict: dict[str, Any], lists: pa.Table) -> None:
    """Write the page from the evaluation's results and the runs it reads; `lists` has schema LISTS."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    features, deepfm = run.inputs["features"], run.inputs["deepfm"]
    columns = summary_columns(metrics["protocol"]["k"])
    with deepfm.filesystem.open_input_stream(f"{deepfm.path}/history.jsonl") as stream:
        history = [json.loads(line) for line in stream.read().decode().splitlines()]
    page = environment.get_template("report.html.j2").render(
        run_id=run.run_id,
        metrics=metrics,
        columns=columns,
        labels=LABELS,
        verdict=verdict,
        best=max(figures[next(iter(columns))]["high"] for figures in metrics["models"].values()) or 1,
        history=history,
        figures=features.manifest["figures"],
        runs={name: other.run_id for name, other in run.inputs.items()},
        users=_sample(run, verdict["model"], lists),
    )
    with run.filesystem.open_output_stream(f"{run.path}/report.html") as stream:
        stream.write(page.encode())


def _sample(run: OpenRun, model: str, lists: pa.Table) -> list[dict[str, Any]]:
    """Some test users: raw id, titles of the latest liked items, titles of the model's list."""
    features = run.inputs["features"]
    items = features.table("items").sort_by("item")
    names = zip(items["title"].to_pylist(), items["item_id"].to_pylist(), strict=True)
    titles = ["", *(title or item for title, item in names)]
    rows = lists.filter((pc.field("model") == model) & (pc.field("rank") <= 10)).sort_by("rank")
    users = sorted(set(rows["user"].to_pylist()))
    chosen = users[:: max(1, len(users) // SAMPLE_USERS)]
    state = features.table("users/as_of=test", filter=pc.field("user").isin(chosen))
    history = features.spec().shown_history
    sample = []
    for user in state.sort_by("user").to_pylist():
        listed = rows.filter(pc.equal(rows["user"], user["user"]))
        sample.append(
            {
                "id": user["user_id"],
                "history": [titles[item] for item in reversed(user[history]) if item != UNKNOWN][:10],
                "list": [titles[item] for item in listed["item"].to_pylist()],
            }
        )
    return sample[:SAMPLE_USERS]
