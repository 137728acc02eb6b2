import itertools
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from recsys_dist.deepfm import ingest
from recsys_dist.deepfm.ingest import Order, RowGroups, Shuffled
from recsys_dist.errors import DataError

ROWS = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files, row groups of 70 rows, of which every fifth row is not wanted."""
    folder = tmp_path_factory.mktemp("data")
    ids = np.arange(ROWS)
    for name, rows in (("b", ids[:210]), ("a", ids[210:700]), ("c", ids[700:])):
        table = pa.table({"id": rows, "bag": [[i] * (i % 3) for i in rows], "wanted": rows % 5 != 0})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=70)
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(ingest, "CHUNK", 100)


def row_groups(folder, cache=1 << 20):
    return RowGroups(pa.dataset.dataset(folder), ["id", "bag"], pc.field("wanted"), cache)


def shuffled(folder, batch_size=64, streams=5, cache=1 << 20, together=1):
    groups = row_groups(folder, cache)
    return Shuffled(groups, Order(groups.each(len, ["id"]), streams, batch_size, 7, together))


def epoch(rows, epoch, streams=None, steps=None):
    """The ids of an epoch's steps, a list a stream."""
    streams = range(rows.order.streams) if streams is None else streams
    steps = range(rows.order.steps) if steps is None else steps
    return [[rows.take(epoch, step, stream)["id"].to_pylist() for stream in streams] for step in steps]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("batch_size", "streams", "together"),
    [(64, 5, 1), (64, 1, 1), (7, 12, 1), (5000, 3, 1), (3, 12, 1), (64, 5, 9), (7, 12, 9), (64, 5, 5000)],
)
def test_every_row_comes_once_an_epoch(folder, batch_size, streams, together):
    rows = shuffled(folder, batch_size, streams, together=together)
    wanted = [i for i in range(ROWS) if i % 5]
    orders = []
    for number in (0, 1):
        steps = epoch(rows, number)
        flat = [list(itertools.chain(*step)) for step in steps]
        assert [len(step) for step in flat] == [rows.order.size(step) for step in range(len(steps))]
        assert max(len(step) for step in flat) <= batch_size
        assert max(len(part) for step in steps for part in step) == rows.order.most
        orders.append(list(itertools.chain(*flat)))
        assert sorted(orders[-1]) == wanted
    assert orders[0] != orders[1]
    assert epoch(shuffled(folder, batch_size, streams, together=together), 1) == epoch(rows, 1)


@pytest.mark.usefixtures("small_chunks")
def test_a_worker_that_begins_in_the_middle_goes_on_with_the_same_rows(folder):
    whole = epoch(shuffled(folder), 3)
    late = epoch(shuffled(folder, cache=0), 3, streams=[2, 4], steps=range(6, 13))
    assert late == [[step[2], step[4]] for step in whole[6:13]]


@pytest.mark.usefixtures("small_chunks")
def test_rows_stay_together(folder):
    """So many of a chunk, which is of 100 rows, or what its end or a step's leaves of them."""
    steps = epoch(shuffled(folder, together=8), 0)
    wanted = [i for i in range(ROWS) if i % 5]
    following = dict(itertools.pairwise(wanted))
    pairs = [pair for step in steps for part in step for pair in itertools.pairwise(part)]
    assert 0.7 < np.mean([following.get(a) == b for a, b in pairs]) < 0.9
    alone = [
        pair for step in epoch(shuffled(folder), 0) for part in step for pair in itertools.pairwise(part)
    ]
    assert np.mean([following.get(a) == b for a, b in alone]) < 0.1


@pytest.mark.usefixtures("small_chunks")
def test_rows_are_mixed(folder):
    """A step's rows come from all over the files, and within a chunk in another order."""
    rows = shuffled(folder)
    first = epoch(rows, 0, steps=[0])[0]
    assert len({i // 70 for part in first for i in part}) >= 4
    assert all(part != sorted(part) for part in first)
    assert max(len(rows.order.chunks(0)[stream]) for stream in range(5)) > 1


@pytest.mark.usefixtures("small_chunks")
def test_a_stream_reads_its_own_row_groups_once_each(folder, monkeypatch):
    rows = shuffled(folder, cache=0)
    read, plain = [], RowGroups.read
    monkeypatch.setattr(RowGroups, "read", lambda self, n: read.append(n) or plain(self, n))
    epoch(rows, 0, streams=[1])
    own = {group for chunk in rows.order.chunks(0)[1] for group, *_ in chunk.pieces}
    assert set(read) == own
    assert len(read) == len(own) < len(rows.groups) / 2


def test_row_groups_are_kept_up_to_so_many_bytes(folder):
    size = row_groups(folder).read(0).nbytes
    groups = row_groups(folder, cache=int(2.5 * size))
    kept = [groups.read(n) for n in (0, 1)]
    assert groups.read(0) is kept[0]
    groups.read(2)  # now 1 has been longest without use
    assert groups.read(0) is kept[0]
    assert groups.read(1) is not kept[1]
    nothing = row_groups(folder, cache=0)
    assert nothing.read(0) is not nothing.read(0)
    assert nothing.read(0).equals(kept[0])


def test_padding_is_made_of_any_row(folder):
    rows = shuffled(folder)
    parts = [rows.take(0, 0, 0), rows.groups.empty]
    padded = rows.padded(parts, len(parts[0]) + 2)["id"].to_pylist()
    assert padded == parts[0]["id"].to_pylist() + parts[0]["id"].to_pylist()[:1] * 2
    assert len(rows.padded([rows.groups.empty], 3)) == 3


@pytest.mark.parametrize("how", ["truncated", "overwritten", "missing"])
def test_a_file_that_cannot_be_read_is_named(folder, tmp_path, how):
    """Whether that shows in its footer, in its pages, or when it is opened."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "a.parquet"
    content = file.read_bytes()
    dataset = pa.dataset.dataset(copy)
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    with pytest.raises(DataError, match=rf"{file} cannot be read: .*jobs/featurize\.py --force"):
        RowGroups(dataset, ["id", "bag"], pc.field("wanted"), 1 << 20).each(len, ["id", "bag"])
