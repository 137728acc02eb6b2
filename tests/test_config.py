import pytest

from recsys_dist.config import REPOSITORY, Proposals, absolute, load
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


def test_every_error_is_named_at_once_also_what_does_not_go_together(tmp_path):
    """And nothing that may be wrong only because of another error."""
    conf = tmp_path / "mine.yaml"
    conf.write_text("""
        data: {events: {path: a, formt: csv, columns: {user: u, item: i, timestamp: t}}}
        label: {kind: colum}
        split: {kind: column, fractions: [0.5, 0.1, 0.1], lst: 1}
        score: {k: 5, kk: 7, rules: {explore: 9}}
        fields:
          - {name: genres, kind: categoricl, side: item, column: genres}
          - {name: tags, kind: categorical, side: item, column: tags, hash_bukets: 9}
          - {name: taste, kind: aggregate, measure: share, attribute: genres}
          - {name: tag_taste, kind: aggregate, measure: share, attribute: tgs}
          - {name: bought, kind: history, when: purchase}
          - {name: hour, part: hour}
          - {name: user, kind: time, part: hour}
          - {name: price, kind: numeric, side: item, column: price, buckets: 1}
          - {name: pause, kind: time, part: recency, side: context, history: 1, time: 2}
    """)
    with pytest.raises(ConfigError) as caught:
        load(conf)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{len(lines)} wrong in {conf}")
    kinds = "expected categorical, numeric, time, history, aggregate"
    assert sorted(line.strip() for line in lines) == sorted(
        [
            "data.events.formt: unknown key; nearest valid key: format",
            "label.kind: Input should be 'implicit', 'rating' or 'column', found 'colum'",
            "split.lst: unknown key; nearest valid key: last",
            "split: fractions must be positive and add up to 1, found [0.5, 0.1, 0.1]",
            "score.kk: unknown key; nearest valid key: k",
            "score: rules.explore=9 is more than the k=5 places of a list",
            f"fields.0 (genres): kind 'categoricl' is none, {kinds}",
            "fields.1.categorical.hash_bukets: unknown key; nearest valid key: hash_buckets",
            "fields tag_taste: 'tgs' is no categorical field of side item; nearest valid key: tags",
            "fields bought: when 'purchase' needs data.events.columns.event",
            f"fields.5 (hour): no kind, {kinds}",
            "fields: names used twice or reserved: user",
            "fields.7.numeric.buckets: Input should be greater than or equal to 2, found 1",
            "fields.8.time.history: unknown key; valid keys: encoding, kind, name, part, side",
            "fields.8.time.time: unknown key; nearest valid key: side",
            "fields.8.time: time field pause: recency has side user, found context",
        ]
    )


def test_all_that_is_wrong_with_a_source_is_named_at_once():
    source = "{path: a, timezone: Mars, encoding: utf-9, value_range: [2, 1], columns: {user: u}}"
    with pytest.raises(ConfigError) as caught:
        load(None, [f"data.users={source}", "data.events={path: a, columns: {usr: u}}"])
    assert str(caught.value).startswith("3 wrong in ")
    with pytest.raises(ConfigError) as caught:
        load(None, ["data.events={path: a, columns: {usr: u}}"])
    assert str(caught.value).startswith("4 wrong in ")
    assert "data: events.columns has no 'item'\n" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["score.k"], "expected section.key=value"),
        (["score.k=ten"], "score.k"),
        (["score.k=[1"], "not YAML"),
        (["score.date=2024-02-30"], "score.date=2024-02-30: the value is not YAML: day is out of range"),
        (["split.fractions=[0.5, 0.1, 0.1]"], "add up to 1"),
        (["fields=[{kind: time, name: user, part: hour}]"], "used twice or reserved: user"),
        (["fields=[{kind: history, name: a, lst: 3}]"], "nearest valid key: last"),
        (["deepfm.learning_rate=.inf"], "deepfm.learning_rate"),
        (["split.fractions=[.nan, 0.5, 0.5]"], "split.fractions"),
        (["score.candidates={}"], "score.candidates"),
        (
            ["score.mode=exhaustive", "deepfm.pair=[{name: next, measure: next_items}]"],
            "leave deepfm.pair out",
        ),
        (
            ["score.candidates={als: {qota: 5}}"],
            "score.candidates.als.qota: unknown key; nearest valid key: quota",
        ),
        (["score.candidates={als: 0}"], "score.candidates.als.quota: .* found 0"),
        (["score.candidates={als: many}"], "score.candidates.als: .* found 'many'"),
        (["score.candidates={als: {quota: 5, weight: 0}}"], "score.candidates.als.weight"),
        (["storage.pin.featurs=abc"], "storage.pin.featurs"),
        (["evaluation.k=[5]"], "allows ndcg@5"),
        (["evaluation.k=[10, 1001]"], "less than or equal to 1000"),
        (["data.events={path: a, columns: {user: u, itm: i}}"], "nearest valid key: item"),
        (["data.users={path: a, format: jsonl, decimal: ',', columns: {user: u}}"], "is for csv and tsv"),
    ],
)
def test_bad_values_are_refused(overrides, expected):
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        load(None, overrides)


@pytest.mark.parametrize(
    "text", [b"- a list", b"a: [", b"deepfm: 3", b"1: {2: 3}", b"storage: {root: caf\xe9}"]
)
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
    assert config.score.candidates == {"als": Proposals(quota=7, weight=1)}
    weighted = load(None, ["score.candidates={als: 7, fm: {quota: 5, weight: 2}}"])
    assert weighted.score.candidates == {"als": Proposals(quota=7), "fm": Proposals(quota=5, weight=2)}


def test_a_lone_pipe_is_a_separator():
    events = "data.events={path: a, columns: {user: u, item: i, timestamp: t}}"
    config = load(None, [events, "data.events.delimiter=|"])
    assert config.data.events.delimiter == "|"
