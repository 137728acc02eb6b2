"""The parts of report.html: each a plot, or several, with their numbers.

Legend: I items, K list length.
"""

import datetime as dt
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_dist.config import Config
from recsys_dist.deepfm.items import Items
from recsys_dist.evaluation.curves import coverage_by_length, of_model, share_of_popular, source_shares
from recsys_dist.evaluation.labels import figure, metric_label, model_label, ranked
from recsys_dist.evaluation.nights import Night, interval
from recsys_dist.evaluation.plots import Interval, Line, Plot, bars, intervals, lines
from recsys_dist.workspace import STAGES, OpenRun, Run

STAGE_LABELS = {
    "features": "Features",
    "als": "ALS",
    "recall": "Recall",
    "deepfm": "DeepFM training",
    "evaluation": "Evaluation",
}
SEGMENT_LABELS = {
    ("users", "new"): "New users",
    ("users", "light"): "Light users",
    ("users", "heavy"): "Heavy users",
    ("items", "head"): "Popular items",
    ("items", "tail"): "Rare items",
}
CURVES = ("two_stage", "als", "next_items", "popularity")
"""Models that curves show, if they are there; the one whose lists are published comes first."""
SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
"""Of the catalogue, at which the popularity curve is drawn."""
TABLES = {"events": "Events", "items": "Items", "users": "Users"}


def models(metrics: dict[str, Any], metric: str, ours: str) -> Plot:
    """Every model's figure of the metric that decides, with its interval."""
    found = {name: metrics["models"][name][metric] for name in ranked(metrics["models"], metric)}
    rows = [
        Interval(model_label(name), *interval(of), figure(metric, of["value"]), name == ours)
        for name, of in found.items()
    ]
    best = rows[0].label
    return Plot(
        "models",
        f"{metric_label(metric)} of every model, with its 95% interval",
        f"Dots on horizontal intervals, the best model at the top: {best}, {rows[0].text}.",
        intervals("models", rows),
        ("Model", metric_label(metric), "Low", "High"),
        tuple((row.label, row.text, figure(metric, row.low), figure(metric, row.high)) for row in rows),
    )


def nights(found: Sequence[Night], metric: str, model: str) -> Plot:
    """The metric of the published lists, night after night, tonight last."""
    found = [night for night in found if metric in night.figures]
    values = [interval(night.figures[metric]) for night in found]
    several = len({night.moment.date() for night in found}) < len(found)
    names = [f"{night.moment:%-d %b %H:%M}" if several else f"{night.moment:%-d %b}" for night in found]
    value, low, high = ([of[i] for of in values] for i in range(3))
    places = list(range(len(found)))
    line = Line(model_label(model), places, value, (low, high), [not night.published for night in found])
    return Plot(
        "nights",
        f"{metric_label(metric)} of {model_label(model)}, night after night",
        f"A line over {len(found)} nights with its 95% interval; tonight is the last: {value[-1]:.4f}.",
        lines(
            "nights",
            [line],
            "Night (UTC)",
            lambda y: f"{y:.3f}",
            x_text=lambda x: names[round(x)] if 0 <= round(x) < len(names) else "",
            ticks=places,
            half=False,
        ),
        ("Night (UTC)", metric_label(metric), "Low", "High", "Lists"),
        tuple(
            (
                f"{night.moment:%Y-%m-%d %H:%M}",
                *(figure(metric, number) for number in of),
                _fate(night, tonight=night is found[-1]),
            )
            for night, of in zip(found, values, strict=True)
        ),
    )


def training(deepfm: Run) -> list[Plot]:
    """The loss of a DeepFM's training, and its metric on the validation users, epoch by epoch."""
    with deepfm.filesystem.open_input_stream(f"{deepfm.path}/history.jsonl") as stream:
        history = [json.loads(line) for line in stream.read().decode().splitlines()]
    metric = history[0]["metric"]
    epochs = [line["epoch"] for line in history]
    best = max((line["epoch"] for line in history if line.get("best")), default=epochs[-1])
    found = []
    for name, key, title in (
        ("loss", "loss", "Training loss"),
        ("validation", metric, f"{metric_label(metric)} on the validation users"),
    ):
        values = [line[key] for line in history]
        found.append(
            Plot(
                name,
                title,
                f"A line over {len(history)} epochs, from {values[0]:.4f} to {values[-1]:.4f}. The best is "
                f"epoch {best}.",
                lines(
                    name,
                    [Line(title, epochs, values, hollow=[epoch != best for epoch in epochs])],
                    "Epoch",
                    lambda y: f"{y:.3g}",
                    ticks=epochs,
                ),
                ("Epoch", "Step", title),
                tuple((str(line["epoch"]), f"{line['step']:,}", f"{line[key]:.4f}") for line in history),
            )
        )
    return found


def time(run: OpenRun) -> Plot:
    """How long each stage took until this page was written."""
    rows = []
    for stage in STAGES:
        if stage in run.inputs:
            manifest = run.inputs[stage].manifest
            started, ended = (dt.datetime.fromisoformat(manifest[key]) for key in ("started", "ended"))
        elif stage == run.stage:
            started, ended = run.started, dt.datetime.now(dt.UTC)
        else:
            continue
        rows.append((STAGE_LABELS.get(stage, stage), started, (ended - started).total_seconds()))
    total = sum(seconds for *_, seconds in rows) or 1
    slowest = max(rows, key=lambda row: row[2])
    return Plot(
        "time",
        "Time that each stage took",
        f"Bars; the longest is {slowest[0]}, {slowest[2] / total:.0%} of the time.",
        bars(
            "time",
            [label for label, *_ in rows],
            [seconds for *_, seconds in rows],
            [_duration(seconds) for *_, seconds in rows],
        ),
        ("Stage", "Started (UTC)", "Seconds", "Share"),
        tuple(
            (
                label,
                f"{started.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S}",
                f"{seconds:,.1f}",
                f"{seconds / total:.0%}",
            )
            for label, started, seconds in rows
        ),
    )


def costs(metrics: dict[str, Any]) -> Plot | None:
    """How long each model of a comparison took to be fitted, and its memory; None where that is not known."""
    rows = [(model_label(name), of["seconds"], of["peak_gib"]) for name, of in metrics["costs"].items()]
    if not rows:
        return None
    slowest = max(rows, key=lambda row: row[1])
    return Plot(
        "time",
        "Time that each model took to be fitted",
        f"Bars; the longest is {slowest[0]}, {_duration(slowest[1])}.",
        bars(
            "time",
            [label for label, *_ in rows],
            [seconds for _, seconds, _ in rows],
            [_duration(seconds) for _, seconds, _ in rows],
        ),
        ("Model", "Seconds", "Most memory, GiB"),
        tuple((label, f"{seconds:,.0f}", f"{gib:.1f}") for label, seconds, gib in rows),
    )


def data(run: OpenRun, last: Night | None) -> dict[str, Any]:
    """What the features were made from, beside last night's where its run still is there.

    Returns:
        `rows`: of each table its name, rows read, rows set aside, and rows read last night or None;
        `reasons`: of each reason the table, the reason and the number; `plot`: of these, or None; `facts`:
        name and text of further figures.
    """
    figures = run.inputs["features"].manifest["figures"]
    before: dict[str, Any] = {}
    if last:
        evaluations = {other.run_id: other for other in run.workspace.runs("evaluation")}
        wanted = evaluations[last.run_id].inputs["features"]
        for other in run.workspace.runs("features"):
            if other.run_id == wanted:
                before = other.manifest["figures"].get("rows", {})
    aside = figures.get("quarantined", {})
    names = [name for name in TABLES if name in figures.get("rows", {})]
    rows = [
        (TABLES[name], figures["rows"][name], sum(aside.get(name, {}).values()), before.get(name))
        for name in names
    ]
    reasons = [(TABLES[name], reason, n) for name in names for reason, n in aside.get(name, {}).items()]
    reasons.sort(key=lambda row: -row[2])
    plot = None
    if reasons:
        labels = [f"{reason[:1].upper()}{reason[1:]}" for _, reason, _ in reasons]
        plot = Plot(
            "reasons",
            "Rows set aside, by reason",
            f"Bars; the most frequent reason is “{reasons[0][1]}”, {reasons[0][2]:,} rows.",
            bars("reasons", labels, [n for *_, n in reasons], [f"{n:,}" for *_, n in reasons]),
            ("Reason", "Table", "Rows"),
            tuple((label, table, f"{n:,}") for label, (table, _, n) in zip(labels, reasons, strict=True)),
        )
    return {"rows": rows, "reasons": reasons, "plot": plot, "facts": _facts(figures)}


def _facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Further figures of the features run, those that it has."""
    facts = []
    if "first_day" in figures and "last_day" in figures:
        facts.append(("Days of the log", f"{figures['first_day']} to {figures['last_day']}"))
    for name, label in (("users", "Users"), ("items", "Items")):
        if name in figures:
            facts.append((f"{label} known", f"{figures[name]:,}"))
    parts = (("train", "training"), ("valid", "validation"), ("test", "test"))
    for name, label in (("examples", "Events"), ("positives", "Liked")):
        if name in figures:
            found = [f"{figures[name][part]:,} {of}" for part, of in parts if part in figures[name]]
            facts.append((f"{label} by part", ", ".join(found)))
    if "cold_in_test" in figures:
        cold = figures["cold_in_test"]
        facts.append(
            ("New in the test part", f"{cold.get('users', 0):,} users, {cold.get('items', 0):,} items")
        )
    if figures.get("unreadable_numbers"):
        found = [f"{name}: {n:,}" for name, n in figures["unreadable_numbers"].items()]
        facts.append(("Numbers that could not be read", ", ".join(found)))
    news = [f"{name}: {', '.join(of)}" for name, of in figures.get("new_columns", {}).items() if of]
    if news:
        facts.append(("New columns, ignored", "; ".join(news)))
    return facts


def catalogue(
    items: Items, lists: pa.Table, metrics: dict[str, Any], config: Config, ours: str
) -> list[Plot]:
    """How much of the catalogue the lists show, and how much of it is popular."""
    k = max(config.evaluation.k)
    drawn = [name for name in dict.fromkeys([ours, *CURVES]) if name in metrics["models"]][:3]
    every = list(dict.fromkeys([*drawn, *metrics["models"]]))
    labels = tuple(model_label(name) for name in drawn)
    by_length = {name: coverage_by_length(of_model(lists, name, k), items.present, k) for name in every}
    covered = Plot(
        "coverage",
        "Coverage: the share of the catalogue in at least one list",
        f"Lines that rise with the lists' length; {labels[0]} comes to {by_length[ours][-1]:.1%} at {k}.",
        lines(
            "coverage",
            [Line(model_label(name), range(1, k + 1), 100 * by_length[name]) for name in drawn],
            "Length of the lists",
            lambda y: f"{y:.0f}%",
            bottom=0,
        ),
        ("Length", *map(model_label, every)),
        tuple((str(at + 1), *(f"{by_length[name][at]:.2%}" for name in every)) for at in range(k)),
        labels,
    )
    first, counts_I = config.evaluation.k[0], items.counts[items.present]
    shares = {}
    for name in every:
        listed = of_model(lists, name, first)["item"].to_numpy()
        listed_I = np.bincount(listed, minlength=len(items) + 1)[1:][items.present]
        shares[name] = share_of_popular(listed_I, counts_I)
    events = share_of_popular(counts_I, counts_I)
    n = len(counts_I)
    at = np.round(np.array(SHARES) * n).astype(np.int64)
    popular = Plot(
        "popularity",
        f"Popularity: the share of the places in lists of {first} that the most popular items take",
        f"Lines that rise with the share of the catalogue, the most popular items first. Of the places of "
        f"{labels[0]} the most popular tenth of the items has {shares[ours][round(0.1 * n)]:.1%}.",
        lines(
            "popularity",
            [
                *(Line(model_label(name), 100 * at / n, 100 * shares[name][at]) for name in drawn),
                Line("Training events", 100 * at / n, 100 * events[at]),
            ],
            "Share of the catalogue, the most popular first",
            lambda y: f"{y:.0f}%",
            x_text=lambda x: f"{x:.0f}%",
            bottom=0,
        ),
        ("Most popular", *map(model_label, every), "Training events"),
        tuple(
            (f"{share:.0%}", *(f"{of[place]:.2%}" for of in (*shares.values(), events)))
            for share, place in zip(SHARES, at, strict=True)
        ),
        (*labels, "Training events"),
    )
    return [covered, popular]


def sources(lists: pa.Table, users: pa.Table, truth: np.ndarray, model: str, k: int) -> Plot | None:
    """Which source the lists' items came from; None where the model has no sources."""
    rows = of_model(lists, model, k)
    relevant = users["user"].to_numpy()[truth[:, 0]].astype(np.int64) << 32 | truth[:, 1]
    listed = rows["user"].to_numpy().astype(np.int64) << 32 | rows["item"].to_numpy()
    shares = source_shares(rows, np.isin(listed, relevant))
    if not shares:
        return None
    labels = [model_label(share.name) for share in shares]
    return Plot(
        "sources",
        f"Share of the places of {model_label(model)}’s lists of {k} that each source proposed",
        f"Bars; {labels[0]} proposed {shares[0].places:.1%} of the recommendations.",
        bars("sources", labels, [of.places for of in shares], [f"{of.places:.1%}" for of in shares], 1),
        ("Source", "Proposed", "No other did", "Proposed and liked later"),
        tuple(
            (label, f"{of.places:.2%}", f"{of.alone:.2%}", f"{of.hits:.2%}")
            for label, of in zip(labels, shares, strict=True)
        ),
    )


def segments(metrics: dict[str, Any], metric: str, model: str, rival: str | None) -> list[Plot]:
    """The published model for kinds of users and of items, beside the one it must beat; those that
    have the metric.
    """
    titles = {"users": "By how many events users had before", "items": "By how popular the items are"}
    found = []
    for side, title in titles.items():
        rows, table = [], []
        for segment in metrics["segments"]:
            if segment["side"] != side:
                continue
            label = SEGMENT_LABELS[side, segment["segment"]]
            for name in dict.fromkeys([model, rival or model]):
                of = segment["models"][name].get(metric)
                if of:
                    numbers = interval(of)
                    texts = [figure(metric, number) for number in numbers]
                    row = label if name == model else model_label(name)
                    rows.append(Interval(row, *numbers, texts[0], name == model))
                    table.append((label, f"{segment['users']:,}", model_label(name), *texts))
        if rows:
            below = f", and {model_label(rival)} below it" if rival else ""
            found.append(
                Plot(
                    f"segments-{side}",
                    f"{title}: {metric_label(metric)}",
                    f"Dots on their 95% intervals, {model_label(model)} for each segment{below}.",
                    intervals(f"segments-{side}", rows),
                    ("Segment", "Users", "Model", metric_label(metric), "Low", "High"),
                    tuple(table),
                )
            )
    return found


def _fate(night: Night, *, tonight: bool) -> str:
    if night.published:
        return "published"
    return "not decided yet" if tonight else "not published"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
