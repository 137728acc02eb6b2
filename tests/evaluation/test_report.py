"""The page in a real browser: what it says, how it looks, and that nothing in ids or titles runs."""

import datetime as dt
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from jinja2.utils import htmlsafe_json_dumps

from recsys_dist.config import REPOSITORY, load
from recsys_dist.evaluation import sections, shown
from recsys_dist.evaluation.evaluate import evaluate, held_out
from recsys_dist.evaluation.headline import best_of, headline
from recsys_dist.evaluation.nights import Night
from recsys_dist.scoring.models import load_models
from recsys_dist.workspace import Workspace
from tests.models import published_night, untrained_night
from tests.pages import TEXTS, chromium, opener, require_no_overlaps
from tests.synthetic import synthetic_config

EVIL = "<img src=x onerror=window.hacked=1></script><script>window.hacked=1</script>{{ 7*7 }} $x_1$ &amp;"
EVIL_USER = "<b onmouseover=window.hacked=1>u7</b>"
SECTIONS = [
    "models",
    "nights",
    "training",
    "time",
    "data",
    "catalogue",
    "sources",
    "segments",
    "users",
    "about",
]
WIDTHS = (390, 1400)
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => rgba(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const worst = {};
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    if (element.closest("script, style, noscript") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    const [a, b] = [light(svg ? style.fill : style.color), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const key = `${element.tagName}.${element.getAttribute("class") ?? ""}`;
    worst[key] = Math.min(worst[key] ?? 99, ratio);
  }
  return worst;
}"""


def number(text):
    return float(text.replace(",", "").replace("−", "-"))


def same(text, value):
    """Is this the value, rounded to the decimals that are printed?"""
    decimals = len(text.partition(".")[2])
    assert decimals >= 1, text
    assert number(text) == pytest.approx(value, abs=0.5000001 * 10**-decimals), (text, value)


def replace(run, table, column, old, new):
    """Change one value of a column in the files of a run's table."""
    for info in run.filesystem.get_file_info(pa.fs.FileSelector(f"{run.path}/{table}", recursive=True)):
        if info.is_file:
            rows = pq.read_table(info.path, partitioning=None)
            values = [new if value == old else value for value in rows[column].to_pylist()]
            place = rows.column_names.index(column)
            pq.write_table(rows.set_column(place, rows.field(column), pa.array(values)), info.path)


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Two nights, of which the first was published: the second evaluation's run, its config and its inputs.
    It has rows that were set aside, segments, and an item and a user whose names look like HTML.
    """
    config = synthetic_config(tmp_path_factory.mktemp("root"))
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"bootstrap": 100})})
    runs = untrained_night(config)
    workspace, features = Workspace(config), runs["features"]
    popular = features.table("items").sort_by([("count", "descending")]).to_pylist()[0]
    replace(features, "items", "title", popular["title"], EVIL)
    replace(features, "users/as_of=test", "user_id", "u7", EVIL_USER)
    features.manifest["figures"].update(
        {
            "rows": {"events": 2000, "items": 50},
            "quarantined": {"events": {"duplicate": 12, "missing <i>user</i>": 3}, "items": {}},
            "examples": {"train": 1400, "valid": 200, "test": 200},
            "first_day": "2024-01-01",
            "last_day": "2024-01-08",
        }
    )
    Path(features.path, "manifest.json").write_text(json.dumps(features.manifest))
    line = {"loss": 0.5, "metric": "ndcg@10", "ndcg@10": 0.1}
    history = [line | {"epoch": epoch, "step": 10 * epoch, "best": epoch < 9} for epoch in range(1, 13)]
    text = "".join(f"{json.dumps(line)}\n" for line in history)
    Path(runs["deepfm"].path, "history.jsonl").write_text(text)
    first = workspace.new("evaluation", {}, runs)
    first = first.commit(config, evaluate(config, first))
    published_night(config, first, dt.date(2024, 1, 8))

    run = workspace.new("evaluation", {}, runs)
    figures = evaluate(config, run)
    metrics = json.loads(Path(run.path, "metrics.json").read_text())
    users, truth = held_out(features, config.score.filter_seen)
    models = load_models(runs, config.score)
    done = run.commit(config, figures)
    return SimpleNamespace(
        config=config,
        run=done,
        first=first,
        runs=runs,
        metrics=metrics,
        users=users,
        truth=truth,
        models=models,
    )


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@pytest.fixture
def opened(browser, night):
    """Opens the page offline, and afterwards asserts that it said nothing and asked for nothing."""
    with opener(browser) as open_page:

        def open_report(width=1400, scheme="light", run=night.run, **context):
            return open_page(run, width, scheme, **context)

        yield open_report


def test_it_is_one_small_file_with_every_section(opened, night):
    assert Path(night.run.path, "report.html").stat().st_size < 5_000_000
    page = opened()
    assert page.locator("section").evaluate_all("all => all.map(one => one.id)") == SECTIONS
    links = page.locator("nav a").evaluate_all("all => all.map(one => one.getAttribute('href').slice(1))")
    assert links == SECTIONS


def test_the_numbers_are_those_of_metrics_json(opened, night):
    page = opened()
    for table, expected in (("#models .models table", 4), ("#all-metrics", 24)):
        cells = page.locator(f"{table} td[data-metric]").evaluate_all(
            "all => all.map(one => [one.dataset.model, one.dataset.metric, one.firstChild.data.trim(),"
            " one.querySelector('small')?.textContent])"
        )
        assert len(cells) == expected * len(night.metrics["models"])
        for model, metric, text, interval in cells:
            figure = night.metrics["models"][model][metric]
            same(text, figure["value"])
            assert (interval is None) == ("low" not in figure)
            for end, key in zip((interval or "").split(" to "), ("low", "high"), strict=False):
                if interval:
                    same(end, figure[key])
    compared = page.locator("td[data-compared]").evaluate_all(
        "all => all.map(one => [one.dataset.compared, one.firstChild.data.trim(),"
        " one.querySelector('small').textContent])"
    )
    assert {model for model, *_ in compared} == set(night.metrics["compared"]["models"])
    for model, text, significance in compared:
        against = night.metrics["compared"]["models"][model]
        same(text, against["value"])
        assert significance.endswith(", may be chance") == (against["p"] >= 0.05)
    numbers = page.locator(".numbers .number").all_inner_texts()
    ours, theirs = (night.metrics["models"][name] for name in ("two_stage", "popularity"))
    same(numbers[0], ours["ndcg@10"]["value"])
    assert numbers[1] == "0.0000"  # the same models on the same users as the night before
    same(numbers[2].removesuffix(" ×"), ours["ndcg@10"]["value"] / theirs["ndcg@10"]["value"])
    same(numbers[3].removesuffix("%"), 100 * ours["coverage@10"]["value"])
    assert "as good as last night" in page.locator("h1").inner_text()


def rows_of(page, plot):
    """The table beside a plot, as texts."""
    rows = page.locator(f"#plot-{plot} tbody tr")
    return rows.evaluate_all("all => all.map(row => [...row.cells].map(cell => cell.textContent))")


def test_the_plots_numbers_are_those_of_the_lists(opened, night):
    """Nights, coverage, popularity and sources, in plain Python from lists/ and items/."""
    page = opened()
    nights = rows_of(page, "nights")
    assert [row[4] for row in nights] == ["published", "not decided yet"]
    for row in nights:
        same(row[1], night.metrics["models"]["two_stage"]["ndcg@10"]["value"])
    lists = [
        row
        for row in night.run.table("lists").to_pylist()
        if row["model"] == "two_stage" and row["rank"] <= 10
    ]
    items = {row["item"]: row for row in night.runs["features"].table("items").to_pylist() if row["present"]}
    coverage = rows_of(page, "coverage")
    assert [row[0] for row in coverage] == [str(length) for length in range(1, 21)]
    # The lists' own model comes first.
    same(coverage[9][1].removesuffix("%"), 100 * len({row["item"] for row in lists}) / len(items))
    popular = sorted(items, key=lambda item: (-items[item]["count"], item))[: round(0.2 * len(items))]
    share = sum(row["item"] in popular for row in lists) / len(lists)
    curve = {row[0]: row[1:] for row in rows_of(page, "popularity")}
    same(curve["20%"][0].removesuffix("%"), 100 * share)
    assert [set(curve[end]) for end in ("0%", "100%")] == [{"0.00%"}, {"100.00%"}]
    sources = {row[0]: row[1:] for row in rows_of(page, "sources")}
    truth = {(night.users["user"][row].as_py(), item) for row, item in night.truth.tolist()}
    for label, name in {
        "ALS": "als",
        "Next items": "next_items",
        "FM": "fm",
        "Popularity": "popularity",
    }.items():
        found = [row for row in lists if name in row["sources"]]
        hits = [row for row in found if (row["user"], row["item"]) in truth]
        alone = [row for row in found if row["sources"] == [name]]
        for text, rows in zip(sources[label], (found, alone, hits), strict=True):
            same(text.removesuffix("%"), 100 * len(rows) / len(lists))


def test_what_was_set_aside_and_where_the_time_went(opened):
    page = opened()
    assert rows_of(page, "reasons") == [["Duplicate", "Events", "12"], ["Missing <i>user</i>", "Events", "3"]]
    assert page.locator("#data .plain tbody tr").first.inner_text().split() == [
        *("Events", "2,000", "15", "0.75%", "2,000")
    ]
    assert [row[0] for row in rows_of(page, "time")] == [
        *("Features", "ALS", "Recall", "DeepFM training", "Evaluation")
    ]


@pytest.mark.parametrize("width", [320, *WIDTHS, 700, 1000])
def test_no_text_overlaps_or_leaves_the_page(opened, width):
    require_no_overlaps(opened(width), width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(opened, scheme):
    page = opened(scheme=scheme)
    found = page.evaluate(CONTRASTS)
    assert {"text.", "SPAN.hit", "SMALL.", "H2."} <= set(found)
    assert {key: ratio for key, ratio in found.items() if ratio < 4.5} == {}
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("width", WIDTHS)
def test_search_by_keyboard(opened, night, width):
    page = opened(width)
    n = len(night.users)
    assert page.locator("#found").inner_text() == f"{n} users"
    assert page.locator("details.user").count() == 8
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(60):
        if page.evaluate("document.activeElement.id") == "search":
            break
        page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    user_id = next(name for name in night.users["user_id"].to_pylist() if re.fullmatch(r"u\d\d", name))
    page.keyboard.type(user_id.upper())
    assert page.locator("#found").inner_text() == f"1 of {n} users"
    assert page.locator(".who").all_inner_texts() == [f"User {user_id}"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("details.user").evaluate("one => one.open") is False
    page.locator("#search").fill("nobody has this")
    assert page.locator("#found").inner_text() == f"0 of {n} users"
    page.locator("#search").fill("")
    page.locator("#more").focus()
    page.keyboard.press("Enter")
    assert page.locator("details.user").count() == 16
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_a_users_list_is_that_of_the_run(opened, night):
    page = opened()
    user = next(row for row in night.users.to_pylist() if re.fullmatch(r"u\d\d", row["user_id"]))
    page.locator("#search").fill(user["user_id"])
    items = {row["item"]: row for row in night.runs["features"].table("items").to_pylist()}
    listed = night.run.table(
        "lists", filter=(pc.field("model") == "two_stage") & (pc.field("user") == user["user"])
    )
    listed = listed.sort_by("rank").to_pylist()[:10]
    titles = page.locator("ol.recommended .title").evaluate_all("all => all.map(one => one.firstChild.data)")
    assert titles == [items[row["item"]]["title"] or items[row["item"]]["item_id"] for row in listed]
    scores = page.locator("ol.recommended .score").evaluate_all("all => all.map(one => one.lastChild.data)")
    for text, row in zip(scores, listed, strict=True):
        same(text, row["score"])
    history = page.locator(".beside ul li").all_inner_texts()
    assert history == [
        items[item]["title"] or items[item]["item_id"] for item in reversed(user["recent"]) if item
    ]
    liked = {item for row, item in night.truth.tolist() if night.users["user"][row].as_py() == user["user"]}
    marked = page.locator("ol.recommended li").evaluate_all(
        "all => all.map(one => !!one.querySelector('.hit'))"
    )
    assert marked == [row["item"] in liked for row in listed]
    for why, row in zip(page.locator(".why").all_inner_texts(), listed, strict=True):
        assert re.match(r"Because of .+; found by |Popular; found by |New in the catalogue; found by ", why)
        assert ("popularity" in why.partition("found by ")[2]) == ("popularity" in row["sources"])


def test_titles_and_ids_that_look_like_html_are_texts(opened):
    page = opened()
    page.locator("#search").fill("onerror=window")
    assert page.locator("details.user").count() > 0
    assert EVIL in page.locator("#users-list").inner_text()
    page.locator("#search").fill("onmouseover")
    assert f"User {EVIL_USER}" in page.locator(".who").all_inner_texts()
    assert page.locator("img, b, i").count() == 0
    assert page.evaluate("window.hacked") is None


def test_what_a_screen_reader_finds(opened):
    page = opened()
    assert page.locator("html").get_attribute("lang") == "en"
    for role in ("main", "navigation", "search", "banner"):
        assert page.get_by_role(role).count() == 1, role
    headings = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(one => +one.tagName[1])")
    assert headings.count(1) == 1
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    names = page.locator("figure").evaluate_all("all => all.map(one => one.id)")
    assert len(names) == len(set(names)) == 11
    for figure in page.locator("figure").all():
        drawing = figure.get_by_role("img")
        assert drawing.count() == 1  # that of this width; the other is hidden from everybody
        assert len(drawing.get_attribute("aria-label")) > 20
        assert figure.locator("tbody tr").count() > 0
        assert figure.locator("caption").count() == 1
        assert figure.locator("thead th:not([scope]), tbody th:not([scope])").count() == 0
    assert page.get_by_label("Find a user id or a title").count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    wanted = page.evaluate(
        "[...document.querySelectorAll('use')].map(one => one.getAttribute('href').slice(1))"
    )
    assert set(wanted) <= set(ids)


def test_the_first_night_has_none_before_it(opened, night):
    page = opened(run=night.first)
    assert "no earlier night" in page.locator("h1").inner_text()
    assert page.locator(".numbers .number").nth(1).inner_text() == "–"
    assert len(rows_of(page, "nights")) == 1
    assert page.evaluate(TEXTS, "#nights")


@pytest.mark.parametrize(
    ("before", "passed", "sentence"),
    [
        (0.1, True, "Tonight’s lists may be published; they are better than last night’s."),
        (0.19, True, "Tonight’s lists may be published; they are as good as last night’s."),
        (0.3, False, "Tonight’s lists must not be published; they are worse than last night’s."),
    ],
)
def test_the_first_sentence(before, passed, sentence):
    config = load(None, ["evaluation.may_fall={ndcg@10: 0.01}"])

    def figures(value):
        return {
            "ndcg@10": {"value": value, "low": value - 0.02, "high": value + 0.02},
            "coverage@10": {"value": 0.5},
        }

    metrics = {"models": {"two_stage": figures(0.2), "popularity": figures(0.1)}}
    verdict = {"passed": passed, "model": "two_stage"}
    verdict["changes"] = {"ndcg@10": {"before": before, "now": 0.2, "chance": 0.0283}}
    last, tonight = (
        Night(name, figures(value), published=True) for name, value in (("a", before), ("b", 0.2))
    )
    found = headline(config, metrics, verdict, last, tonight)
    assert f"{found.may} {found.better}" == sentence
    assert [holds for holds, _ in found.checks] == [True, passed]
    assert [text for _, text, _ in found.numbers[2:]] == ["2.00 ×", "50.0%"]
    unknown = headline(
        config,
        metrics,
        {**verdict, "changes": {}, "not_compared": {"ndcg@10": "did not measure it"}},
        last,
        tonight,
    )
    assert [holds for holds, _ in unknown.checks] == [True, None]
    assert unknown.checks[1][1] == (
        "NDCG@10 is not held against the lists that were published last, whose evaluation did not measure it"
    )


@pytest.mark.parametrize(
    ("p", "may", "better"),
    [
        (0.001, "FM makes the best lists;", "Popularity is worse, beyond chance."),
        (0.4, "FM makes the best lists;", "that Popularity is worse may be chance."),
    ],
)
def test_the_first_sentence_of_a_comparison_is_of_the_best_two(p, may, better):
    """Whatever the model is that all are held against."""
    values = {"two_stage": 0.1, "popularity": 0.1999, "fm": 0.2}
    metrics = {
        "users": 5,
        "models": {
            name: {"ndcg@10": {"value": of, "low": of, "high": of}, "coverage@10": {"value": 0.5}}
            for name, of in values.items()
        },
        "compared": {"metric": "ndcg@10", "with": "two_stage", "models": {}},
        "ahead": {"model": "fm", "second": "popularity", "value": 0.0001, "low": 0, "high": 0.001, "p": p},
    }
    best, found = best_of(load(None), metrics)
    assert (best, found.may, found.better) == ("fm", may, better)
    assert found.passed == (p < 0.05)
    alone = metrics | {"models": {"fm": metrics["models"]["fm"]}, "ahead": None}
    assert best_of(load(None), alone)[1].better == "it is the only one."


def test_a_model_without_sources_has_no_section_of_them(night):
    lists = night.run.table("lists")
    assert sections.sources(lists, night.users, night.truth, "deepfm", 10) is None


def test_users_are_left_out_where_there_would_be_too_many(night, monkeypatch):
    lists = night.run.table("lists", filter=pc.field("model") == "two_stage")
    arguments = (night.config, night.models, night.users, night.truth, lists)
    every = shown.shown_users(*arguments)
    assert len(every["users"]) == every["of"] == len(night.users)
    monkeypatch.setattr(shown, "BYTES", len(htmlsafe_json_dumps(every)) // 3)
    some = shown.shown_users(*arguments)
    assert 0 < len(htmlsafe_json_dumps(some)) <= shown.BYTES
    assert 5 < len(some["users"]) < len(every["users"]) / 2


def printed(command, run):
    """The rows of the table that a command of the README prints for a run."""
    words = shlex.split(command)
    assert words[0].endswith("python")
    command = [sys.executable, *words[1:-1], run]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    header, *rows = [line.split() for line in text.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_readmes_commands_recompute_the_page(opened, night):
    """They read lists/ and the features run, and know nothing of this package."""
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    commands = [line.strip() for line in lines if "duckdb.sql" in line and "sys.argv" in line]
    first, second, sources, segments = [printed(command, night.run.path) for command in commands]
    models = [row | other for row, other in zip(first, second, strict=True)]
    assert {(row["model"], int(row["k"])) for row in models} == {
        (model, k) for model in night.metrics["models"] for k in (10, 20)
    }
    for row in models:
        wanted = night.metrics["models"][row["model"]]
        assert row.keys() - {"model", "k"} == {name.partition("@")[0] for name in wanted}
        for name in row.keys() - {"model", "k"}:
            same(row[name], wanted[f"{name}@{row['k']}"]["value"])
    names = {"ALS": "als", "Next items": "next_items", "FM": "fm", "Popularity": "popularity"}
    shares = {row["source"]: row["share"] for row in sources}
    page = {names[label]: share for label, share, *_ in rows_of(opened(), "sources")}
    assert set(shares) == set(page)
    for name, share in page.items():
        same(share.removesuffix("%"), 100 * float(shares[name]))
    found = {(row.pop("segment"), row.pop("model"), int(row.pop("k"))): row for row in segments}
    for part in night.metrics["segments"]:
        for model, wanted in part["models"].items():
            for k in (10, 20):
                row = found.pop((part["segment"], model, k))
                assert int(row.pop("users")) == part["users"]
                for name, value in row.items():
                    same(value, wanted[f"{name}@{k}"]["value"])
    assert not found
