import json
import math

import numpy as np
import pyarrow as pa
import pytest

from recsys_dist.errors import ConfigError
from recsys_dist.schema import FeatureSpec, FieldSpec, VocabularySpec, padded

CONTEXT = (
    FieldSpec(name="weekday", kind="time", side="context", type="index", cardinality=8, part="weekday"),
    FieldSpec(name="hour", kind="time", side="context", type="index", cardinality=25, part="hour"),
    *(
        FieldSpec(
            name=f"{part}_{wave}",
            kind="time",
            side="context",
            type="value",
            cardinality=1,
            part=part,
            wave=wave,
        )
        for part in ("weekday", "hour")
        for wave in ("sin", "cos")
    ),
    FieldSpec(name="device", kind="categorical", side="context", type="index", cardinality=4),
    FieldSpec(name="tags", kind="categorical", side="context", type="indices", cardinality=4, pooling="mean"),
    FieldSpec(
        name="price",
        kind="numeric",
        side="context",
        type="value",
        cardinality=1,
        log=True,
        fill=math.e - 1,
        offset=0.5,
        scale=0.25,
    ),
    FieldSpec(
        name="price_missing",
        kind="numeric",
        side="context",
        type="value",
        cardinality=1,
        indicator_of="price",
    ),
    FieldSpec(
        name="bucket",
        kind="numeric",
        side="context",
        type="index",
        cardinality=4,
        edges=(1.0, 2.0),
    ),
)


def spec(*fields, **vocabularies):
    return FeatureSpec(
        fields=fields,
        vocabularies=vocabularies,
        n_users=1,
        n_items=1,
        rows={},
        positives={},
        date="2024-01-01",
        hour=6,
    )


def test_context_of_a_list_made_ahead_of_time():
    """The weekday and the hour are known, other context is unknown or what a missing value becomes."""
    columns = spec(*CONTEXT).context(np.array([0, 3, 6]))
    assert list(columns) == [field.name for field in CONTEXT]
    for field in CONTEXT:
        assert columns[field.name].type == field.arrow_type
    found = pa.table(columns).to_pydict()
    assert found["weekday"] == [1, 4, 7]
    assert found["hour"] == [7, 7, 7]
    assert found["weekday_sin"] == pytest.approx([math.sin(2 * math.pi * day / 7) for day in (0, 3, 6)])
    assert found["weekday_cos"] == pytest.approx([math.cos(2 * math.pi * day / 7) for day in (0, 3, 6)])
    assert found["hour_sin"] == pytest.approx([1.0] * 3)
    assert found["hour_cos"] == pytest.approx([0.0] * 3, abs=1e-6)
    assert found["device"] == found["bucket"] == [0, 0, 0]
    assert found["tags"] == [[], [], []]
    assert found["price"] == pytest.approx([(1 - 0.5) / 0.25] * 3)
    assert found["price_missing"] == [1.0] * 3


def test_context_of_nobody_has_its_columns():
    columns = spec(*CONTEXT).context(np.empty(0, np.int32))
    assert {name: column.type for name, column in columns.items()} == {f.name: f.arrow_type for f in CONTEXT}


@pytest.mark.parametrize(
    ("settings", "x", "expected"),
    [
        ({}, 3.0, 3.0),
        ({"offset": 1.0, "scale": 4.0}, 3.0, 0.5),
        ({"offset": 1.0}, 3.0, 2.0),
        ({"scale": 2.0}, 3.0, 1.5),
        ({"log": True}, math.e - 1, 1.0),
        ({"log": True}, 1 - math.e, -1.0),
        ({"log": True}, 0.0, 0.0),
        ({"log": True, "offset": 2.0, "scale": 0.5}, math.e**3 - 1, 2.0),
    ],
)
def test_transformed(settings, x, expected):
    field = FieldSpec(name="x", kind="numeric", side="item", type="value", cardinality=1, **settings)
    assert field.transformed(x) == pytest.approx(expected)


MONDAY = VocabularySpec(size=3, fingerprint="a")
TUESDAY = VocabularySpec(size=5, fingerprint="b", ancestors=((3, "a"),))
WEDNESDAY = VocabularySpec(size=6, fingerprint="c", ancestors=((3, "a"), (5, "b")), gone=1)
REBUILT = VocabularySpec(size=3, fingerprint="d")


def test_a_vocabulary_continues_itself_and_its_ancestors():
    nights = (MONDAY, TUESDAY, WEDNESDAY)
    for later, night in enumerate(nights):
        for earlier, other in enumerate(nights):
            assert night.continues(other) == (earlier <= later)
        assert not night.continues(REBUILT)
        assert not REBUILT.continues(night)
    # The same size or the same fingerprint alone is not enough.
    assert not WEDNESDAY.continues(VocabularySpec(size=5, fingerprint="a"))


def test_vocabularies_of_other_lineages_are_refused_by_name():
    ours = spec(item=TUESDAY, genres=REBUILT)
    ours.require_continues(spec(item=MONDAY), "this run", "that model")
    ours.require_continues(spec(brand=MONDAY), "this run", "that model")  # nothing here points into it
    for theirs in (spec(item=WEDNESDAY), spec(item=MONDAY, genres=MONDAY)):
        name = "item" if "genres" not in theirs.vocabularies else "genres"
        with pytest.raises(ConfigError, match=f"vocabulary {name} of this run .* that of that model"):
            ours.require_continues(theirs, "this run", "that model")


def test_a_spec_survives_json():
    whole = spec(*CONTEXT, item=WEDNESDAY)
    assert FeatureSpec.model_validate_json(json.dumps(whole.model_dump(mode="json"))) == whole


def test_the_shown_history_is_the_longest_of_liked_items():
    def history(name, last, when="positive", of="item"):
        return FieldSpec(
            name=name,
            kind="history",
            side="user",
            type="indices",
            cardinality=9,
            last=last,
            when=when,
            of=of,
        )

    assert spec(*CONTEXT).shown_history == "liked"
    others = (history("viewed", 50, when="view"), history("brands", 40, of="brand"))
    assert spec(*others).shown_history == "liked"
    assert spec(history("last", 1), *others, history("recent", 20)).shown_history == "recent"


def test_lists_of_a_column_are_padded():
    column = pa.chunked_array([[[1, 2], []], [[3]]], pa.list_(pa.int32()))
    assert padded(column, 3).tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
