"""What the driver prints of a training: of files that its workers write."""

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.deepfm.examples import Examples
from recsys_dist.deepfm.items import Items
from recsys_dist.deepfm.reports import best, lines, write_json
from recsys_dist.deepfm.train import _evaluation_text, _Fitted, _now_text, _print_progress, _publish
from recsys_dist.deepfm.validation import validation
from recsys_dist.errors import DataError
from recsys_dist.workspace import Workspace
from tests.synthetic import synthetic_config, synthetic_features

LINE = {"loss": 0.5, "best": True, "examples_per_s": 1000, "pairs_per_s": 5000, "seconds_left": 3}
NDCG = {"metric": "ndcg@10", "ndcg@10": 0.25}


def lines_of(*steps):
    """A history, an evaluation each step."""
    lines = [LINE | NDCG | {"epoch": epoch, "step": step} for epoch, step in enumerate(steps, 1)]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


class Workers:
    """Write their files while the driver waits for the last time."""

    def __init__(self, folder, history, **files):
        self.folder, self.history, self.files = folder, history, files

    def wait(self, seconds):
        (self.folder / "history.jsonl").write_text(self.history)
        for name, value in self.files.items():
            write_json(self.folder / f"{name}.json", value)
        return True


class Told(list):
    """In the place of MLflow."""

    def epoch(self, line):
        self.append(line["step"])


@pytest.fixture
def printed(tmp_path, capsys):
    """Of what workers write: the printed lines, and the steps that MLflow is told."""

    def printed(history, **files):
        told = Told()
        _print_progress(tmp_path, Workers(tmp_path, history, **files), told)
        return capsys.readouterr().out.splitlines(), told

    return printed


def resumed(attempt, step, *remarks):
    return {"attempt": attempt, "step": step, "workers": 2, "remarks": list(remarks)}


def test_a_training_opens_with_its_data_and_its_plan(printed):
    row = {"table": "table_item", "rows": 51, "dim": 20, "sharding": "row_wise", "ranks": [0, 1]}
    found, told = printed(lines_of(30), data={"told": ["train: 9", "valid: 3"]}, plan=[row])
    assert found[:2] == ["  train: 9", "  valid: 3"]
    assert found[3].split() == ["table_item", "51", "20", "row_wise", "0,1"]
    rates = "  1,000 examples/s      5,000 pairs/s"
    (evaluation,) = found[4:]
    assert evaluation == (
        f"  epoch   1  step      30  loss 0.5000  {rates}  valid NDCG@10 0.2500 *  left 3 s"
    )
    assert told == [30]


def test_a_driver_that_goes_on_does_not_print_what_was_printed(tmp_path, printed):
    (tmp_path / "history.jsonl").write_text(lines_of(30, 60))
    write_json(tmp_path / "now.json", LINE | {"epoch": 3, "step": 75})
    write_json(tmp_path / "resumed.json", resumed(0, 0))
    # It goes on from before the second evaluation, which comes again.
    found, told = printed(lines_of(30, 60), resumed=resumed(1, 40, "checkpoint step_60-0 is refused"))
    assert found[:2] == ["  checkpoint step_60-0 is refused", "  goes on from step 40 on 2 workers"]
    assert [line.split()[:4] for line in found[2:3]] == [["epoch", "2", "step", "60"]]
    assert told == [60]


def test_nothing_is_said_of_a_beginning_and_one_without_a_checkpoint_is_named(printed):
    assert printed("", resumed=resumed(0, 0))[0] == []
    assert printed("", resumed=resumed(1, 0))[0] == ["  begins again on 2 workers"]


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        (NDCG, "5,000 pairs/s  valid NDCG@10 0.2500 *  left"),
        (
            {"metric": "auc", "auc": 0.75, "gauc": 0.625, "logloss": 0.5, "calibration": 1.1}
            | {"pairs_per_s": 1000},
            "1,000 examples/s  valid AUC 0.7500 *  GAUC 0.6250  log loss 0.5000  calibration 1.1000  left",
        ),
        (
            {"metric": "rmse", "rmse": 0.5, "mse": 0.25, "best": False, "pairs_per_s": 1000},
            "1,000 examples/s  valid RMSE 0.5000  MSE 0.2500  left",
        ),
        ({}, "5,000 pairs/s  left"),
    ],
)
def test_a_line_has_the_figures_of_its_kind(figures, text):
    assert f" {text} 3 s" in _evaluation_text(LINE | {"epoch": 1, "step": 30} | figures)


def test_what_is_learned_from_and_measured_with_is_counted(tmp_path):
    config = synthetic_config(tmp_path)
    features = synthetic_features(config)
    spec, items = features.spec(), Items(features, features.spec())

    def told(parts=("train",), **deepfm):
        changed = config.model_copy(update={"deepfm": config.deepfm.model_copy(update=deepfm)})
        examples = Examples(features, items, changed, parts)
        return examples, examples.told(), validation(features, items, changed).told

    rows = [row for row in features.table("examples").to_pylist() if row["split"] == "valid"]
    liked = {row["user"] for row in rows if row["label"]}
    examples, train, valid = told()
    assert train == f"train: {spec.positives['train']:,} positive examples, {examples.steps} steps an epoch"
    assert valid == f"valid: {len(liked)} users"
    _, both, valid = told(("train", "valid"), valid_users=7)
    assert both.startswith(f"train and valid: {spec.positives['train'] + spec.positives['valid']:,} positive")
    assert valid == f"valid: 7 users, drawn from {len(liked)}"
    _, train, valid = told(negatives=0)
    assert train.startswith(f"train: {spec.rows['train']:,} examples, ")
    assert valid == f"valid: {len(rows)} examples of {len({row['user'] for row in rows})} users"


def test_users_who_had_all_their_positives_before_are_counted(tmp_path):
    config = synthetic_config(tmp_path)
    features = synthetic_features(config)
    copy = dataclasses.replace(features, path=str(shutil.copytree(features.path, tmp_path / "copy")))
    (file,) = Path(copy.path).glob("users/as_of=valid/*.parquet")
    table = pq.read_table(file, partitioning=None)
    one = next(
        row["user"]
        for row in features.table("examples").to_pylist()
        if row["split"] == "valid" and row["label"]
    )
    everything = list(range(1, features.spec().n_items + 1))
    seen = [everything if row["user"] == one else row["seen"] for row in table.to_pylist()]
    column = table.column_names.index("seen")
    pq.write_table(table.set_column(column, "seen", pa.array(seen, table["seen"].type)), file)
    items = Items(copy, copy.spec())
    users = len(validation(features, items, config))
    expected = f"valid: {users - 1} users; 1 left out: all their positives were seen (filter_seen=all)"
    assert validation(copy, items, config).told == expected


def test_a_damaged_line_is_passed_over(tmp_path):
    file = tmp_path / "history.jsonl"
    history = lines_of(30, 60, 90).encode().splitlines()
    assert lines(file) == []
    file.write_bytes(b"\n".join([history[0], b'"best": \xff true}', b"12", b"", history[2], history[1][:-9]]))
    assert [line["step"] for line in lines(file)] == [30, 90]
    assert best(lines(file))["step"] == 90
    with pytest.raises(DataError, match=r"Of the 0 whole lines of history\.jsonl none is marked as the best"):
        best([])


def test_a_best_epoch_without_a_checkpoint_is_named(tmp_path):
    config = synthetic_config(tmp_path)
    run = Workspace(config).new("deepfm", {}, {"features": synthetic_features(config)})
    run.training.mkdir()
    (run.training / "history.jsonl").write_text(lines_of(30))
    with pytest.raises(DataError, match=r"no checkpoint of step 30, the best one by history\.jsonl"):
        _publish(config, run, _Fitted(lines(run.training / "history.jsonl"), run.training))


def test_a_line_between_two_epochs_has_all_that_is_known():
    now = LINE | {"epoch": 2, "step": 45}
    rates = "step      45  loss 0.5000    1,000 examples/s"
    assert _now_text(now, []) == f"     in   2  {rates}  left 3 s"
    history = [LINE | NDCG | {"epoch": 1, "step": 30}]
    assert _now_text(now, history) == f"     in   2  {rates}  (NDCG@10 0.2500 before)  left 3 s"
