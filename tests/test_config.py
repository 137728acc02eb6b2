import pytest

from recsys_dist.config import REPOSITORY, absolute, load
from recsys_dist.errors import ConfigError


def test_conf_file_is_merged_over_the_defaults_and_overrides_win(tmp_path):
    conf = tmp_path / "mine.yaml"
    conf.write_text("deepfm: {epochs: 3}\nscore: {k: 5}\n")
    config = load(conf, ["score.k=7", "deepfm.hidden=[8]"])
    assert (config.deepfm.epochs, config.score.k, config.deepfm.hidden) == (3, 7, (8,))
    assert config.deepfm.batch_size == load().deepfm.batch_size


def test_relative_conf_is_found_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("conf/movielens_100k.yaml").data.events is not None


def test_every_error_is_named_at_once_with_the_nearest_key():
    overrides = ["deepfm.epoch=3", "deepfm.dropout=2", "dta.sample_users=1", "score.candidates={bm25: 3}"]
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    text = str(caught.value)
    assert caught.value.exit_code == 64
    assert "deepfm.epoch: unknown key; nearest valid key: epochs" in text
    assert "dta: unknown key; nearest valid key: data" in text
    assert "deepfm.dropout" in text
    assert "found 2" in text
    assert "score.candidates.bm25" in text
    assert text.startswith("4 wrong in ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["score.k"], "expected section.key=value"),
        (["score.k=ten"], "score.k"),
        (["score.k=[1"], "not YAML"),
        (["split.fractions=[0.5, 0.1, 0.1]"], "add up to 1"),
        (["fields=[{kind: time, name: user, part: hour}]"], "used twice or reserved: user"),
        (["fields=[{kind: history, name: a, lst: 3}]"], "nearest valid key: last"),
        (["deepfm.learning_rate=.inf"], "deepfm.learning_rate"),
        (["split.fractions=[.nan, 0.5, 0.5]"], "split.fractions"),
        (["score.candidates={}"], "score.candidates"),
        (["storage.pin.featurs=abc"], "storage.pin.featurs"),
        (["evaluation.k=[5]"], "allows ndcg@5"),
        (["data.events={path: a, columns: {user: u, itm: i}}"], "nearest valid key: item"),
        (["data.users={path: a, format: jsonl, decimal: ',', columns: {user: u}}"], "is for csv and tsv"),
    ],
)
def test_bad_values_are_refused(overrides, expected):
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        load(None, overrides)


@pytest.mark.parametrize("text", [b"- a list", b"a: [", b"deepfm: 3", b"storage: {root: caf\xe9}"])
def test_files_that_are_no_configuration_are_refused(tmp_path, text):
    conf = tmp_path / "bad.yaml"
    conf.write_bytes(text)
    with pytest.raises(ConfigError):
        load(conf)


def test_missing_conf_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load("conf/nowhere.yaml")


def test_paths_are_relative_to_the_repository():
    assert absolute("runs") == str(REPOSITORY / "runs")
    assert absolute("/a/b") == "/a/b"
    assert absolute("s3://bucket/x") == "s3://bucket/x"


def test_every_key_has_a_docstring():
    from pydantic import BaseModel

    from recsys_dist import config

    sections = [
        model for model in vars(config).values() if isinstance(model, type) and issubclass(model, BaseModel)
    ]
    undescribed = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and name not in ("kind", "name", "side") and section is not config.Config
    ]
    assert undescribed == []


def test_candidates_are_replaced_and_everything_else_is_merged():
    config = load(None, ["score.candidates={als: 7}", "score.k=3"])
    assert config.score.candidates == {"als": 7}


def test_a_lone_pipe_is_a_separator():
    events = "data.events={path: a, columns: {user: u, item: i, timestamp: t}}"
    config = load(None, [events, "data.events.delimiter=|"])
    assert config.data.events.delimiter == "|"
