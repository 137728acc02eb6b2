"""features.json: the description of every field, made from the configuration and what was fitted."""

from collections.abc import Iterator, Mapping
from typing import Any

from recsys_dist.config import Aggregate, Categorical, Config, History, Numeric, Time
from recsys_dist.errors import DataError
from recsys_dist.features.item_days import MOST_AGE
from recsys_dist.features.numeric import Fitted
from recsys_dist.features.state import MOST_RECENCY
from recsys_dist.schema import FieldSpec, VocabularySpec

CARDINALITY = {"hour": 25, "weekday": 8, "recency": MOST_RECENCY + 1}


def field_specs(
    config: Config, vocabularies: Mapping[str, VocabularySpec], fitted: Mapping[str, Fitted]
) -> tuple[FieldSpec, ...]:
    """Every field in order: user, item, then as declared."""
    sizes = {name: found.size for name, found in vocabularies.items()}
    fields = [
        FieldSpec(name=name, kind="id", side=name, type="index", cardinality=sizes[name] + 1, vocab=name)
        for name in ("user", "item")
    ]
    for field in config.fields:
        if isinstance(field, Categorical):
            fields.append(_categorical(field, sizes))
        elif isinstance(field, Numeric):
            fields.extend(_numeric(field, fitted[field.name]))
        elif isinstance(field, Time):
            fields.extend(_time(field))
        elif isinstance(field, History):
            own = [f for f in config.fields if isinstance(f, Categorical) and f.name == field.of]
            of = _categorical(own[0], sizes) if own else fields[1]
            fields.append(
                FieldSpec(
                    name=field.name, kind="history", side="user", type="indices", cardinality=of.cardinality,
                    vocab=of.vocab, hashed=of.hashed, pooling=field.pooling, last=field.last, when=field.when,
                    of=field.of,
                )
            )  # fmt: skip
        else:
            fields.append(_aggregate(field, sizes, fitted))
    return tuple(fields)


def _categorical(field: Categorical, sizes: Mapping[str, int]) -> FieldSpec:
    return FieldSpec(
        name=field.name,
        kind="categorical",
        side=field.side,
        type="indices" if field.several else "index",
        cardinality=(field.hash_buckets or sizes[field.name]) + 1,
        vocab=None if field.hash_buckets else field.name,
        hashed=field.hash_buckets is not None,
        pooling=field.pooling if field.several else None,
    )


def _numeric(field: Numeric, found: Fitted) -> Iterator[FieldSpec]:
    if found.edges is not None:
        yield FieldSpec(
            name=field.name, kind="numeric", side=field.side, type="index",
            cardinality=len(found.edges) + 2, edges=found.edges,
        )  # fmt: skip
        return
    yield FieldSpec(
        name=field.name, kind="numeric", side=field.side, type="value", cardinality=1,
        log=found.log, fill=found.fill, offset=found.offset, scale=found.scale,
    )  # fmt: skip
    if field.indicator:
        yield FieldSpec(
            name=f"{field.name}_missing", kind="numeric", side=field.side, type="value", cardinality=1,
            indicator_of=field.name,
        )  # fmt: skip


def _time(field: Time) -> Iterator[FieldSpec]:
    if field.encoding == "cyclic":
        for wave in ("sin", "cos"):
            yield FieldSpec(
                name=f"{field.name}_{wave}", kind="time", side="context", type="value", cardinality=1,
                part=field.part, wave=wave,
            )  # fmt: skip
        return
    yield FieldSpec(
        name=field.name,
        kind="time",
        side="user" if field.part == "recency" else "context",
        type="index",
        cardinality=CARDINALITY[field.part],
        part=field.part,
    )


def share_width(field: Aggregate, sizes: Mapping[str, int]) -> int:
    """Number of values that a share field tells the shares of."""
    assert field.attribute
    width = min(field.top, sizes[field.attribute])
    if not width:
        raise DataError(
            f"fields {field.name}: {field.attribute} has no value in the log, or none that min_count lets "
            f"through, so there are no shares of them. Lower min_count, or leave the field out."
        )
    return width


def _aggregate(field: Aggregate, sizes: Mapping[str, int], fitted: Mapping[str, Fitted]) -> FieldSpec:
    about: dict[str, Any] = {
        "name": field.name,
        "kind": "aggregate",
        "side": field.side,
        "daily": field.side == "item",
        "of": field.measure,
    }
    if field.measure == "share":
        width = share_width(field, sizes)
        return FieldSpec(**about, when=field.when, type="vector", cardinality=width, vocab=field.attribute)
    if field.measure == "age":
        return FieldSpec(**about, type="index", cardinality=MOST_AGE + 1)
    found = fitted[field.name]
    return FieldSpec(
        **about, when=field.when, type="value", cardinality=1, days=field.days,
        log=found.log, offset=found.offset, scale=found.scale,
    )  # fmt: skip
