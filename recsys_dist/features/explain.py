"""A features run as a table for people: a line a field, with what it was made from and how much it knows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.config import Categorical, Config, Numeric
from recsys_dist.features.ids import SOURCES
from recsys_dist.schema import FeatureSpec, FieldSpec
from recsys_dist.workspace import Run

WIDTH = 120
SAMPLES = 3
BATCH_ROWS = 1 << 16
HEADER = ("field", "kind", "source", "side", "cardinality", "coverage", "samples")
# field to coverage; the samples get the rest
GREATEST_WIDTHS = (20, 11, 31, 7, 11, 8)
FILLED = ("mean_value", "days_since")
"""Measures that are stored as 0, the mean, where there is no event."""
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def explain(config: Config, run: Run) -> str:
    """The fields of a features run: kind, source, side, cardinality, coverage and sample values.

    Coverage is the share of the train examples that have a known value; for fields of side item the share
    of the items, for daily ones as of their last day. `-` stands for a field that keeps no trace of what was
    missing. Samples are tokens, and numbers as they were before log and scaling. The run is read batch by
    batch, so that its size does not matter. Tokens are shortened to WIDTH.

    Args:
        config: what the run was made with.
        run: of the stage features.
    """
    spec = run.spec()
    columns = _columns(run, spec)
    lines = [HEADER[:-1]]
    for one in spec.fields:
        column = columns[one.name]
        coverage = f"{column.known / column.rows:.1%}" if column.known is not None and column.rows else "-"
        source = _source(config, one)
        lines.append((one.name, one.kind, source, one.side, f"{one.cardinality:,}", coverage))
    widths = [
        min(greatest, max(len(line[place]) for line in lines))
        for place, greatest in enumerate(GREATEST_WIDTHS)
    ]
    left = WIDTH - sum(widths) - 2 * len(widths)
    samples = [HEADER[-1]]
    for one in spec.fields:
        texts = _samples(run, columns[one.name])
        # Half a word can be guessed, half a number cannot: such a line is rather too long.
        samples.append(_fitting(texts, left) if one.vocab else ", ".join(texts))
    rows = [
        "  ".join([*_cells(line, widths), of_field]).rstrip()
        for line, of_field in zip(lines, samples, strict=True)
    ]
    return "\n".join([_title(run, spec), "", *rows])


def _title(run: Run, spec: FeatureSpec) -> str:
    figures = run.manifest["figures"]
    events, positives = sum(spec.rows.values()), sum(spec.positives.values())
    parts = ", ".join(f"{rows:,} {part}" for part, rows in spec.rows.items())
    return (
        f"{events:,} events, {positives:,} of them positive, from {figures['first_day']} to "
        f"{figures['last_day']}: {parts}; {spec.n_users:,} users, {spec.n_items:,} items"
    )


@dataclass
class _Column:
    """What was seen of a field's column so far."""

    spec: FieldSpec
    rows: int = 0
    known: int | None = 0
    """Rows with a known value; None: the column does not tell."""
    samples: dict[int | float, float] = field(default_factory=dict)
    """Distinct known values, as stored; for a vector the place in it (from 1) to the number there."""

    def add(self, column: pa.Array, missing: np.ndarray | None) -> np.ndarray:
        """Take in a batch of N rows.

        Args:
            column: [N] the field's values.
            missing: [N] bool, where the field has an indicator.

        Returns:
            [N] bool: which values are known.
        """
        known = np.zeros(len(column), bool)
        if self.spec.type in ("indices", "vector"):
            values = pc.list_flatten(column).to_numpy(zero_copy_only=False)
            filled = values != 0
            known[pc.list_parent_indices(column).to_numpy()[filled]] = True
            keys = (
                values if self.spec.type == "indices" else np.arange(len(values)) % self.spec.cardinality + 1
            )
        else:
            keys = values = column.fill_null(0).to_numpy(zero_copy_only=False)
            known = column.is_valid().to_numpy(zero_copy_only=False)
            if self.spec.type == "index":
                known = values != 0
            elif missing is not None:
                known = known & ~missing
            elif self.spec.of in FILLED:
                known = values != 0
            filled = known
        self.rows += len(column)
        if self.spec.fill is not None and missing is None:
            self.known = None
        elif self.known is not None:
            self.known += int(known.sum())
        if len(self.samples) < SAMPLES:
            keys, values = keys[filled], values[filled]
            for place in np.sort(np.unique(keys, return_index=True)[1]):
                if len(self.samples) < SAMPLES:
                    self.samples.setdefault(keys[place].item(), values[place].item())
        return known


def _columns(run: Run, spec: FeatureSpec) -> dict[str, _Column]:
    """Every field's column, by the field's name."""
    tables = {
        "examples/split=train": [f for f in spec.fields if f.kind == "id" or f.side != "item"],
        "items": [f for f in spec.side("item") if f.kind != "id" and not f.daily],
        "item_days": list(spec.daily),
    }
    found = {one.name: _Column(one) for one in spec.fields}
    present = np.zeros(spec.n_items + 1, bool)
    for table, fields in tables.items():
        if table == "item_days" and not fields:
            continue
        indicators = {one.indicator_of: one.name for one in fields if one.indicator_of}
        # Rows of item_days/ ascend by day: what the last one says of an item stays.
        latest = {one.name: np.zeros(spec.n_items + 1, bool) for one in fields if one.daily}
        # The defaults would read sixteen batches of four files ahead.
        for batch in run.dataset(table).to_batches(
            columns=list(dict.fromkeys(["item", *(one.name for one in fields)])),
            filter=pc.field("present") if table == "items" else None,
            batch_size=BATCH_ROWS,
            batch_readahead=2,
            fragment_readahead=1,
        ):
            items = batch["item"].to_numpy()
            if table == "items":
                present[items] = True
            for one in fields:
                indicator = indicators.get(one.name)
                missing = batch[indicator].to_numpy() == 1 if indicator else None
                known = found[one.name].add(batch[one.name], missing)
                if one.daily:
                    latest[one.name][items] = known
        for name, known in latest.items():
            found[name].rows, found[name].known = int(present.sum()), int((known & present).sum())
    for column in found.values():
        if column.spec.of in FILLED and not column.known:
            column.known = None  # all equal the mean
    return found


def _source(config: Config, spec: FieldSpec) -> str:
    """What a field is made from: `source.column`, or what of the events is summed up."""
    assert config.data.events is not None
    if spec.kind == "id":
        return f"events.{config.data.events.columns[spec.name]}"
    if spec.kind in ("categorical", "numeric"):
        name = spec.name.removesuffix("_missing") if spec.indicator_of else spec.name
        declared = next(one for one in config.fields if one.name == name)
        assert isinstance(declared, Categorical | Numeric)
        return f"{SOURCES[spec.side]}.{declared.column}{' missing' if spec.indicator_of else ''}"
    which = "" if spec.when in (None, "any") else f", {spec.when}"
    if spec.kind == "history":
        return f"last {spec.last} of {spec.of}{which}"
    if spec.kind == "time":
        part = f"{spec.wave} of {spec.part}" if spec.wave else spec.part
        return f"events.{config.data.events.columns['timestamp']}, {part}"
    if spec.of == "age":
        return "days since the first event"
    if spec.vocab:
        return f"{spec.of} of {spec.vocab}{which}"
    window = f", {spec.days} days" if spec.days else ""
    return f"{spec.of} of {spec.when if which else 'events'}{window}"


def _samples(run: Run, column: _Column) -> list[str]:
    """The stored values for people."""
    spec, tokens = column.spec, dict[int, str]()
    if spec.vocab is not None:
        rows = run.table(f"vocab/{spec.vocab}", filter=pc.field("index").isin(list(column.samples)))
        tokens = dict(zip(rows["index"].to_pylist(), rows["token"].to_pylist(), strict=True))
    texts = []
    for key, value in column.samples.items():
        if spec.vocab is not None:
            # What a log says must not steer the terminal.
            text = "".join(letter if letter.isprintable() else "?" for letter in tokens[int(key)])
            texts.append(f"{text} {value:.2g}" if spec.type == "vector" else text)
        elif spec.type == "value":
            number = _raw(spec, value)
            texts.append(f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}")
        else:
            texts.append(_meaning(spec, int(key)))
    return texts


def _raw(spec: FieldSpec, value: float) -> float:
    """The number before log and scaling; what float32 cannot tell from 0 is 0."""
    offset, scaled = spec.offset or 0.0, value * (spec.scale or 1.0)
    number = scaled + offset
    if abs(number) < 1e-6 * (1.0 if spec.wave else abs(offset) + abs(scaled)):
        return 0.0
    return math.copysign(math.expm1(abs(number)), number) if spec.log else number


def _meaning(spec: FieldSpec, index: int) -> str:
    """What an index without a vocabulary stands for."""
    if spec.edges is not None:
        low = f"{spec.edges[index - 2]:.4g}" if index > 1 else ""
        high = f"{spec.edges[index - 1]:.4g}" if index <= len(spec.edges) else ""
        return f"{low}..{high}"
    if spec.part == "weekday":
        return WEEKDAYS[index - 1]
    if spec.part == "hour":
        return f"{index - 1}:00"
    if spec.part == "recency" or spec.of == "age":
        return f"{2 ** (index - 1) - 1} {'h' if spec.part else 'd'}+"
    return f"#{index}"


def _cells(line: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    for name, text, width in zip(HEADER, line, widths, strict=False):
        fitting = _shortened(text, width)
        yield fitting.rjust(width) if name in ("cardinality", "coverage") else fitting.ljust(width)


def _fitting(texts: Sequence[str], width: int) -> str:
    """Texts in one line, the longest shortened until they fit."""
    lengths, free = [len(text) for text in texts], width - 2 * (len(texts) - 1)
    limit = next(limit for limit in range(free, 0, -1) if sum(min(n, limit) for n in lengths) <= free)
    return ", ".join(_shortened(text, limit) for text in texts)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
