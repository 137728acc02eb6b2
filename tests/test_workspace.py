import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from recsys_dist import workspace as workspace_module
from recsys_dist.config import load
from recsys_dist.errors import ConfigError, DataError, RetryableError
from recsys_dist.workspace import Workspace, raw_files


@pytest.fixture
def config(tmp_path):
    return load(None, [f"storage.root={tmp_path}/root"])


@pytest.fixture
def workspace(config):
    return Workspace(config)


def commit(workspace, config, stage, inputs=None, key=None):
    run = workspace.new(stage, key or {}, inputs or {})
    run.write_table("table", pa.table({"a": [1, 2, 3]}))
    return run.commit(config, {"n": 3})


def test_a_run_is_seen_only_after_its_manifest(workspace, config):
    run = workspace.new("features", {}, {})
    run.write_table("table", pa.table({"a": [1]}))
    assert workspace.runs("features") == []
    committed = run.commit(config, {"figure": 1})
    assert [found.run_id for found in workspace.runs("features")] == [committed.run_id]


def test_manifest_names_files_rows_schema_and_hashes(workspace, config):
    run = workspace.new("deepfm", {}, {})
    run.write_table("table", pa.table({"a": [1, 2, 3]}))
    run.filesystem.create_dir(f"{run.path}/model")
    run.write_json("model/model.json", {})
    manifest = run.commit(config, {"n": 3}).manifest
    files = {file["path"]: file for file in manifest["files"]}
    assert files["table/part-00000.parquet"]["rows"] == 3
    assert len(files["model/model.json"]["sha256"]) == 64
    assert manifest["schema"] == {"table": {"a": "int64"}}
    assert manifest["figures"] == {"n": 3}
    assert manifest["config"]["score"]["k"] == 10
    assert manifest["started"] < manifest["ended"]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "it is missing"),
        ("{", "it has 1 bytes, expected 3"),
        ("[]\n", "its sha256 is not that of its manifest"),
    ],
)
def test_a_model_that_is_not_what_was_committed_is_refused_by_name(workspace, config, content, wrong):
    run = workspace.new("deepfm", {}, {})
    run.filesystem.create_dir(f"{run.path}/model")
    run.write_json("model/model.json", {})
    committed = run.commit(config, {})
    committed.require_intact("model", "checkpoint")
    file = Path(run.path, "model/model.json")
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(DataError, match=f"{run.run_id}/model/model.json is not what was committed: {wrong}"):
        committed.require_intact("model")
    committed.require_intact("checkpoint")


def test_inputs_follow_the_manifest_upstream(workspace, config):
    first = commit(workspace, config, "features")
    als = commit(workspace, config, "als", {"features": first})
    recall = commit(workspace, config, "recall", {"features": first})
    deepfm = commit(workspace, config, "deepfm", {"features": first})
    commit(workspace, config, "features")  # newer features: the models were not trained on them
    inputs = workspace.inputs("evaluation")
    assert {name: run.run_id for name, run in inputs.items()} == {
        "features": first.run_id,
        "als": als.run_id,
        "recall": recall.run_id,
        "deepfm": deepfm.run_id,
    }


def test_models_of_different_features_are_not_mixed(workspace, config):
    first, second = commit(workspace, config, "features"), commit(workspace, config, "features")
    commit(workspace, config, "als", {"features": first})
    commit(workspace, config, "recall", {"features": second})
    commit(workspace, config, "deepfm", {"features": second})
    with pytest.raises(DataError, match=r"Run jobs/train_als\.py first"):
        workspace.inputs("evaluation")


def test_missing_input_names_the_job_to_run_first(workspace):
    with pytest.raises(DataError, match=r"Run jobs/featurize\.py first") as caught:
        workspace.inputs("als")
    assert caught.value.exit_code == 65


def test_a_pinned_run_is_used(workspace, config, tmp_path):
    first = commit(workspace, config, "features")
    commit(workspace, config, "features")
    pinned = Workspace(load(None, [f"storage.root={tmp_path}/root", f"storage.pin.features={first.run_id}"]))
    assert pinned.inputs("als")["features"].run_id == first.run_id


def test_a_pin_goes_before_what_the_latest_model_was_trained_on(workspace, config, tmp_path):
    first, second = commit(workspace, config, "features"), commit(workspace, config, "features")
    for features in (first, second):
        for stage in ("als", "recall", "deepfm"):
            commit(workspace, config, stage, {"features": features})
    pinned = Workspace(load(None, [f"storage.root={tmp_path}/root", f"storage.pin.features={first.run_id}"]))
    inputs = pinned.inputs("evaluation")
    assert {run.inputs.get("features", run.run_id) for run in inputs.values()} == {first.run_id}
    wrong = Workspace(load(None, [f"storage.root={tmp_path}/root", "storage.pin.als=20240101"]))
    latest = workspace.runs("als")[-1].run_id
    with pytest.raises(
        DataError, match=rf"storage\.pin\.als=20240101 names no .*/als: the latest is {latest}\."
    ):
        wrong.inputs("evaluation")


def test_what_an_input_must_be_made_from_is_told_in_words(workspace, config, tmp_path):
    first, second = commit(workspace, config, "features"), commit(workspace, config, "features")
    commit(workspace, config, "als", {"features": first})
    commit(workspace, config, "recall", {"features": second})
    commit(workspace, config, "deepfm", {"features": second})
    with pytest.raises(
        DataError, match=rf"evaluation needs .* als run made from features {second.run_id} under"
    ):
        workspace.inputs("evaluation")


def test_root_as_a_uri_with_escapes_is_one_place_for_all_readers(tmp_path):
    workspace = Workspace(load(None, [f"storage.root=file://{tmp_path}/my%20runs/"]))
    assert workspace.uri == workspace.path == f"{tmp_path}/my runs"


def test_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        Workspace(load(None, [f"storage.root={tmp_path}/file"]))


def test_an_equal_run_is_found_and_a_changed_one_is_not(workspace, config, tmp_path):
    features = commit(workspace, config, "features")
    key = workspace.key("als", config, {"features": features})
    run = commit(workspace, config, "als", {"features": features}, key)
    assert workspace.find("als", key).run_id == run.run_id
    other = load(None, [f"storage.root={tmp_path}/root", "als.rank=3"])
    assert workspace.find("als", workspace.key("als", other, {"features": features})) is None
    unrelated = load(None, [f"storage.root={tmp_path}/root", "deepfm.epochs=3"])
    assert workspace.find("als", workspace.key("als", unrelated, {"features": features})) is not None


def test_changed_raw_files_and_changed_code_make_new_keys(workspace, tmp_path, monkeypatch):
    log = tmp_path / "log.csv"
    log.write_text("u,i,t\n")
    events = f"data.events={{path: {log}, columns: {{user: u, item: i, timestamp: t}}}}"
    config = load(None, [f"storage.root={tmp_path}/root", events])
    before = workspace.key("features", config, {})
    assert workspace.key("features", config, {}) == before
    monkeypatch.setattr(workspace_module, "code_version", lambda: "other")
    assert workspace.key("features", config, {}) != before
    monkeypatch.undo()
    log.write_text("u,i,t\n1,2,3\n")
    assert workspace.key("features", config, {}) != before
    forget = tmp_path / "forget.txt"
    forget.write_text("u1\n")
    config = load(None, [f"storage.root={tmp_path}/root", events, f"data.forget={forget}"])
    before = workspace.key("features", config, {})
    forget.write_text("u1\nu2\n")
    assert workspace.key("features", config, {}) != before


def test_raw_files_of_file_folder_and_glob(tmp_path):
    for name in ("day=1/a.csv", "day=2/b.csv", "day=2/_SUCCESS", "day=2/.hidden", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(path):
        return [os.path.relpath(info.path, tmp_path) for info in raw_files(f"{tmp_path}/{path}")]

    assert names("c.txt") == ["c.txt"]
    assert names("") == ["c.txt", "day=1/a.csv", "day=2/b.csv"]
    assert names("day=*/*.csv") == ["day=1/a.csv", "day=2/b.csv"]
    assert names("nowhere") == []


def test_root_that_cannot_be_written_is_retryable(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    workspace = Workspace(load(None, [f"storage.root={tmp_path}/file/root"]))
    with pytest.raises(RetryableError, match="cannot be written") as caught:
        workspace.new("features", {}, {})
    assert caught.value.exit_code == 75


def test_relative_root_in_a_folder_that_ray_uploaded_is_refused(tmp_path, monkeypatch):
    uploaded = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "recsys_dist"
    monkeypatch.setattr(workspace_module, "PACKAGE", uploaded)
    with pytest.raises(ConfigError, match=r"storage\.root"):
        Workspace(load())
    Workspace(load(None, [f"storage.root={tmp_path}"]))


def test_manifest_is_json_that_reads_back(workspace, config):
    run = commit(workspace, config, "features")
    with open(f"{run.path}/manifest.json") as file:  # noqa: PTH123
        assert json.load(file) == run.manifest
