import pyarrow as pa
import pytest
import torch

from recsys_dist.deepfm.batches import side_batch
from recsys_dist.errors import DataError
from recsys_dist.schema import FieldSpec

FIELDS = (
    FieldSpec(name="user", kind="id", side="user", type="index", cardinality=10),
    FieldSpec(
        name="recent", kind="history", side="user", type="indices", cardinality=10, pooling="mean", last=3
    ),
    FieldSpec(name="tastes", kind="aggregate", side="user", type="vector", cardinality=2),
    FieldSpec(name="activity", kind="aggregate", side="user", type="value", cardinality=1),
)
ROWS = [
    {"user": 3, "recent": [1, 2], "activity": 0.5, "tastes": [0.25, 0.75]},
    {"user": None, "recent": [], "activity": None, "tastes": None},
    {"user": 9, "recent": None, "activity": -1.0, "tastes": [0.0, 1.0]},
    {"user": 1, "recent": [4, None, 5], "activity": 2.0, "tastes": [None, 0.5]},
]
SCHEMA = pa.schema([(field.name, field.arrow_type) for field in FIELDS])
EXPECTED = {"user": [[3], [0], [9], [1]], "recent": [[1, 2], [], [], [4, 0, 5]]}
VALUES = [[0.25, 0.75, 0.5], [0.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, 0.5, 2.0]]


def bags(batch):
    return {
        name: [bag.tolist() for bag in torch.split(jagged.values(), jagged.lengths().tolist())]
        for name, jagged in batch.indices.to_dict().items()
    }


@pytest.fixture
def table():
    return pa.Table.from_pylist(ROWS, schema=SCHEMA)


def test_missing_values_are_unknown_and_missing_lists_empty(table):
    batch = side_batch(table, FIELDS)
    assert bags(batch) == EXPECTED
    assert batch.values.tolist() == VALUES
    assert batch.indices.keys() == ["user", "recent"]
    assert batch.values.dtype == torch.float32


def test_a_history_that_goes_on_brings_only_what_is_new():
    """Of an encoder. Others of the same user have all of theirs, and so has who begins anew."""
    kinds = {"kind": "history", "side": "user", "type": "indices", "cardinality": 10}
    fields = (
        FieldSpec(name="read", pooling="encoder", last=3, **kinds),
        FieldSpec(name="seen", pooling="recency", last=4, decay=2.0, **kinds),
    )
    histories = [[], [1], [1], [1, 2, 3], [3, 4, 5], [4, 6], [4, 5, 6], [], None, [1, 2], [2, 1], [7]]
    #            all new: those that are no window over the row's before and something after it
    new = [[], [1], [], [2, 3], [4, 5], [4, 6], [4, 5, 6], [], [], [1, 2], [2, 1], [7]]
    starts = [True, False, False, False, False, True, True, True, False, False, True, True]
    columns = {"read": pa.array(histories, pa.list_(pa.int32()))}
    columns["seen"] = columns["read"]
    batch = side_batch(columns, fields, joined=True)
    assert {name: of.tolist() for name, of in batch.starts.items()} == {"read": starts}
    found = {name: of.to_dense() for name, of in batch.sequences.to_dict().items()}
    for name, rows in (("read", new), ("seen", histories)):
        for row, expected in enumerate(rows):
            own = [bag.tolist() for bag in found[name][row * 4 : row * 4 + 4]]
            assert own == [*([item] for item in expected or []), *[[]] * (4 - len(expected or []))], (
                name,
                row,
            )
    assert not side_batch(columns, fields).starts


@pytest.mark.parametrize(("start", "length"), [(0, 2), (1, 2), (2, 2), (3, 1)])
def test_a_slice_holds_only_its_rows(table, start, length):
    part = table.slice(start, length)
    for columns in (part, {name: part[name].combine_chunks() for name in part.column_names}):
        batch = side_batch(columns, FIELDS)
        assert bags(batch) == {name: rows[start : start + length] for name, rows in EXPECTED.items()}
        assert batch.values.tolist() == VALUES[start : start + length]


def test_sliced_arrays_under_a_null_list():
    lists = pa.array([[7, 8], None, [9]], SCHEMA.field("recent").type)
    vectors = pa.array([[7.0, 8.0], None, [1.0, 2.0]], SCHEMA.field("tastes").type)
    columns = {"user": pa.array([1, 2], pa.int32()), "recent": lists[1:], "activity": pa.array([0.0, 1.0])}
    batch = side_batch(columns | {"tastes": vectors[1:]}, FIELDS)
    assert bags(batch)["recent"] == [[], [9]]
    assert batch.values.tolist() == [[0.0, 0.0, 0.0], [1.0, 2.0, 1.0]]


def test_a_side_of_numbers_only_or_of_indices_only(table):
    numbers = side_batch(table, FIELDS[2:])
    assert numbers.indices.keys() == []
    assert numbers.take(torch.tensor([3, 0])).values.tolist() == [VALUES[3], VALUES[0]]
    indices = side_batch(table, FIELDS[:2])
    assert indices.values.shape == (len(table), 0)
    assert bags(indices.take(torch.tensor([2]))) == {"user": [[9]], "recent": [[]]}


@pytest.mark.parametrize("vector", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_vector_of_another_length_is_refused(table, vector):
    columns = {name: table[name] for name in table.column_names}
    columns["tastes"] = pa.array([[0.0, 0.0], vector, None, [0.0, 0.0]], SCHEMA.field("tastes").type)
    with pytest.raises(DataError, match=f"tastes has a vector of {len(vector)} numbers, .* expects 2"):
        side_batch(columns, FIELDS)


def test_several_chunks(table):
    batch = side_batch(pa.concat_tables([table.slice(2), table.slice(0, 2)]), FIELDS)
    assert bags(batch)["recent"] == EXPECTED["recent"][2:] + EXPECTED["recent"][:2]


def test_take_repeats_and_reorders(table):
    rows = [3, 0, 3, 1]
    taken = side_batch(table, FIELDS).take(torch.tensor(rows))
    assert bags(taken) == {name: [bag[row] for row in rows] for name, bag in EXPECTED.items()}
    assert taken.values.tolist() == [VALUES[row] for row in rows]


def test_a_missing_column_is_named(table):
    with pytest.raises(DataError, match="recent are not among the columns user, tastes, activity"):
        side_batch(table.drop(["recent"]), FIELDS)


@pytest.mark.parametrize("index", [10, -1])
def test_an_index_outside_the_table_is_refused(table, index):
    columns = {name: table[name] for name in table.column_names} | {
        "recent": pa.array([[index]] * 4, pa.list_(pa.int32()))
    }
    with pytest.raises(DataError, match=f"recent has indices from {index} to {index}, and its table has 10"):
        side_batch(columns, FIELDS)
