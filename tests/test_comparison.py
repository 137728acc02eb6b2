"""All models under one protocol: what each is trained with, what is measured, and what was trained before."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_dist.comparison import MODELS, Cost, Trained, measured, table
from recsys_dist.config import load
from recsys_dist.errors import ConfigError
from recsys_dist.evaluation.labels import model_label
from recsys_dist.workspace import Workspace
from tests import generated
from tests.models import untrained_night
from tests.pages import chromium, opener, require_no_overlaps
from tests.processes import run_here
from tests.synthetic import synthetic_config


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """All models, of untrained runs: the figures, metrics.json, the comparison's run and the features run."""
    config = synthetic_config(tmp_path_factory.mktemp("root"))
    sections = {
        "recall": config.recall.model_copy(
            update={"measures": ("pearson", "cosine", "jaccard"), "linear": ("ease", "transitions")}
        ),
        "evaluation": config.evaluation.model_copy(update={"bootstrap": 100}),
        "score": config.score.model_copy(update={"filter_seen": "positives"}),
    }
    config = config.model_copy(update=sections)
    night = untrained_night(config)
    deepfm, als = night.pop("deepfm"), night["als"]
    runs = night | {"als_explicit": als} | dict.fromkeys(("mf", "fm", "dnn", "deepfm", "two_stage"), deepfm)
    unseen = config.model_copy(
        update={"score": config.score.model_copy(update={"filter_seen": "all"})},
    )
    trained = SimpleNamespace(
        runs=runs,
        config=config,
        cost=lambda name: Cost(12.6, 0.5) if name == "fm" else None,
        own=lambda name: unseen if name == "two_stage" else config,
    )
    run = Workspace(config).new("comparison", {}, runs)
    figures = measured(config, run, trained, list(MODELS))
    metrics = json.loads(Path(run.path, "metrics.json").read_text())
    return SimpleNamespace(figures=figures, metrics=metrics, run=run, features=night["features"])


def test_every_model_is_measured_and_held_against_the_two_stage_one(compared):
    figures = compared.figures
    assert list(figures["models"]) == list(MODELS)
    assert figures["compared"]["with"] == "two_stage"
    assert set(figures["compared"]["models"]) == set(MODELS) - {"two_stage"}
    metrics = compared.metrics
    assert metrics["protocol"]["fitted_on"] == dict.fromkeys(("als", "recall", "deepfm"), "train and valid")
    values = {name: of["ndcg@10"]["value"] for name, of in metrics["models"].items()}
    best, second = sorted(values, key=lambda name: -values[name])[:2]
    ahead = metrics["ahead"]
    assert (ahead["model"], ahead["second"]) == (best, second)
    assert ahead["value"] == pytest.approx(values[best] - values[second])
    assert ahead["low"] <= ahead["value"] <= ahead["high"]
    assert metrics["models"] == figures["models"]
    assert metrics["costs"] == {"fm": {"seconds": 12.6, "peak_gib": 0.5}}


def test_a_model_may_leave_out_more_than_is_asked_of_all(compared):
    users = compared.features.table("users/as_of=test").to_pylist()
    seen, liked = ({row["user"]: set(row[column]) for row in users} for column in ("seen", "liked"))
    listed = dict.fromkeys(MODELS, 0)
    for row in pq.read_table(f"{compared.run.path}/lists").to_pylist():
        assert row["item"] not in liked[row["user"]]
        listed[row["model"]] += row["item"] in seen[row["user"]]
    assert listed["two_stage"] == 0
    assert listed["popularity"] > 0
    protocol = compared.metrics["protocol"]
    assert "filter_seen: positives" in protocol["candidates"]
    assert protocol["own_filter"] == {"two_stage": "all"}
    page = Path(f"{compared.run.path}/report.html").read_text()
    assert "Two-stage lists nothing that the user had had before." in page
    # Relevant are the same items for all: with those seen but not liked.
    relevant = pq.read_table(f"{compared.run.path}/relevant").to_pylist()
    assert not any(row["item"] in liked[row["user"]] for row in relevant)


def test_popularity_counts_train_and_valid(compared):
    events = compared.features.table("examples").to_pandas()
    known = events[events.split.isin(["train", "valid"]) & (events.label > 0)]
    counts = np.bincount(known.item)
    lists = pq.read_table(f"{compared.run.path}/lists").to_pandas()
    lists = lists[(lists.model == "popularity") & (lists["rank"] == 1)]
    assert len(lists) == compared.figures["users"]
    assert (lists.score == counts[lists.item]).all()
    train = np.bincount(events[(events.split == "train") & (events.label > 0)].item, minlength=len(counts))
    assert (lists.score != train[lists.item]).any()


def test_the_table_tells_quality_difference_and_cost(compared):
    head, _, *rows = table(compared.figures)
    assert head.startswith(f"| {compared.figures['users']} test users | NDCG@10 |")
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [model_label(name) for name in MODELS]
    fm = rows[list(MODELS).index("fm")]
    assert fm.endswith("| 13 | 0.5 |")
    assert f"{compared.figures['models']['fm']['ndcg@10']['value']:.4f} (" in fm
    assert rows[-1].endswith("|  |  |  |")  # the two-stage one: no difference to itself, no cost known


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_says_which_model_is_best(compared, width):
    metrics = compared.metrics
    ranked = sorted(MODELS, key=lambda name: -metrics["models"][name]["ndcg@10"]["value"])
    with chromium() as browser, opener(browser) as open_page:
        page = open_page(compared.run, width)
        require_no_overlaps(page, width)
        assert page.locator("h1").inner_text().startswith(f"{model_label(ranked[0])} makes the best lists;")
        titles = page.locator("main h2").all_inner_texts()
        assert titles == [
            *("Models", "Training", "Where time went", "Data quality", "Coverage and popularity"),
            *("Where the recommendations came from", "Segments", "Users and their lists"),
            "How it is measured",
        ]
        for name in MODELS:
            cell = page.locator(f'.models td[data-model="{name}"][data-metric="ndcg@10"]').inner_text()
            assert cell.startswith(f"{metrics['models'][name]['ndcg@10']['value']:.4f}")
        page.locator("#search").fill("u5")
        assert page.locator("#users-list").inner_text().splitlines()[0] == "User u5"


def test_the_page_of_models_without_a_two_stage_one(compared, tmp_path):
    config = synthetic_config(tmp_path)
    runs = untrained_night(config)
    trained = SimpleNamespace(runs=runs, config=config, cost=lambda name: None, own=lambda name: config)
    run = Workspace(config).new("comparison", {}, runs)
    measured(config, run, trained, ["popularity", "next_items"])
    with chromium() as browser, opener(browser) as open_page:
        titles = open_page(run).locator("main h2").all_inner_texts()
    assert titles == ["Models", "Data quality", "Coverage and popularity", "Segments", "How it is measured"]


def test_what_each_model_is_trained_with(tmp_path):
    root = f"storage.root={tmp_path / 'runs'}"
    trained = Trained(None, [root, "compare.settings={mf: [deepfm.embedding_dim=12]}"])
    made = {name: load(None, trained.settings(name)) for name in MODELS}
    assert {config.storage.root for config in made.values()} == {f"{tmp_path / 'runs'}-comparison"}
    assert {config.deepfm.fit_on for config in made.values()} == {"train_valid"}
    assert {config.als.fit_on for config in made.values()} == {"train_valid"}
    assert {config.recall.fit_on for config in made.values()} == {"train_valid"}
    assert [made[name].als.implicit for name in ("als", "als_explicit")] == [True, False]
    assert len(made["als"].als.points()) == 6
    assert [made[name].deepfm.model for name in ("mf", "fm", "dnn", "deepfm", "two_stage")] == [
        "mf",
        "fm",
        "dnn",
        "deepfm",
        "deepfm",
    ]
    assert made["mf"].deepfm.embedding_dim == 12 != made["fm"].deepfm.embedding_dim
    assert made["two_stage"].deepfm.pair
    assert not made["deepfm"].deepfm.pair


def test_settings_that_are_none_are_told_before_anything_is_trained(tmp_path):
    settings = "compare.settings={als: [als.rnk=8], mf: [deepfm.embedding_dim=x], dnn: [deepfm.nonsense=1]}"
    asked = "compare.models=[popularity, als, mf]"
    with pytest.raises(ConfigError) as caught:
        Trained(None, [f"storage.root={tmp_path}", settings, asked])
    told = str(caught.value)
    assert re.search(r"compare.settings.als: .*als\.rnk", told)
    assert re.search(r"compare.settings.mf: .*deepfm\.embedding_dim", told)
    assert "nonsense" not in told  # of a model that is not asked for
    with pytest.raises(ConfigError, match=r"compare.settings.als: .*als\.rnk"):  # which two stages need
        Trained(None, [f"storage.root={tmp_path}", settings, "compare.models=[two_stage]"])
    pair = "compare.settings={two_stage: ['deepfm.pair=[{name: ease, measure: ease}]']}"
    Trained(None, [f"storage.root={tmp_path}", pair, "compare.models=[ease, two_stage]"])  # ease is fitted
    with pytest.raises(ConfigError, match=r"compare.settings.two_stage: .*recall.linear"):
        Trained(None, [f"storage.root={tmp_path}", pair, "compare.models=[two_stage]"])


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"compare.models.0: .*'popularity'"):
        Trained(None, [f"storage.root={tmp_path}", "compare.models=[svd]"])


@pytest.mark.long
def test_the_job_trains_what_is_missing_and_nothing_twice(tmp_path):
    lines = ["user,item,timestamp,value"]
    for user in range(30):
        lines += [f"u{user},i{(user + 7 * n) % 20},{1700000000 + 86400 * n + user},5" for n in range(12)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    columns = {"user": "user", "item": "item", "timestamp": "timestamp", "value": "value"}
    conf = {
        "storage": {"root": str(tmp_path / "runs")},
        "data": {"events": {"path": str(tmp_path / "log.csv"), "columns": columns}},
        "evaluation": {"bootstrap": 100},
        "compare": {"models": ["popularity", "transitions", "next_items"]},
    }
    (tmp_path / "conf.yaml").write_text(json.dumps(conf))
    words = ["compare.py", "--conf", str(tmp_path / "conf.yaml")]
    first = run_here(*words)
    assert "=== recall\n" in first
    again = run_here(*words)
    assert again.count("done before") == 2
    rows = [[line for line in of.splitlines() if line.startswith("|")] for of in (first, again)]
    assert rows[0] == rows[1]
    assert rows[0][-1].split("|")[-2].strip() != ""  # the memory that recall took
    assert not (tmp_path / "runs").exists()

    conf["recall"] = {"linear_items": 5}
    (tmp_path / "conf.yaml").write_text(json.dumps(conf))
    few = run_here(*words)
    assert "=== Transitions: left out, since there are 20 items, and recall.linear_items=5\n" in few
    assert "| Next items |" in few
    assert "| Transitions |" not in few


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "shape"), [("shop_events", generated.shop_events), ("music_plays", generated.music_plays)]
)
def test_the_log_of_a_shop_and_of_a_music_service_by_the_same_command(name, shape, tmp_path):
    log = shape(tmp_path, 20_000)
    models = ["popularity", "cosine", "next_items", "als", "two_stage"]
    overrides = [
        *log.overrides,
        f"storage.root={tmp_path / 'runs'}",
        "data.max_bad_rows=1",
        f"compare.models=[{', '.join(models)}]",
        "als={grid: {rank: [8], reg: [0.1, 0.4]}, iterations: 3}",
        "deepfm={epochs: 1, embedding_dim: 8, hidden: [8], num_workers: 1}",
        "evaluation.bootstrap=100",
    ]
    sets = [word for override in overrides for word in ("--set", override)]
    printed = run_here("compare.py", "--conf", f"conf/{name}.yaml", *sets)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [model_label(model) for model in models]

    workspace = Workspace(
        load(f"conf/{name}.yaml", [*overrides, f"storage.root={tmp_path / 'runs'}-comparison"])
    )
    compared, features = workspace.runs("comparison")[-1], workspace.runs("features")[-1]
    lists, relevant = (compared.table(table).to_pandas() for table in ("lists", "relevant"))
    relevant = set(zip(relevant.user, relevant.item, strict=True))
    events = features.table("examples").to_pandas()
    liked = events[(events.split == "test") & (events.label > 0)]
    assert relevant
    assert relevant <= set(zip(liked.user, liked.item, strict=True))
    ideal = np.cumsum(1 / np.log2(np.arange(2, 12)))
    users, counts = np.unique([user for user, _ in relevant], return_counts=True)
    for row, model in zip(rows, models, strict=True):
        first = lists[(lists.model == model) & (lists["rank"] <= 10)]
        hit = [pair in relevant for pair in zip(first.user, first.item, strict=True)]
        gained = (np.array(hit) / np.log2(1 + first["rank"])).groupby(first.user).sum()
        ndcg = gained.reindex(users, fill_value=0).to_numpy() / ideal[counts.clip(max=10) - 1]
        assert row[1].startswith(f"{ndcg.mean():.4f} (")
