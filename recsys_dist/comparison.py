"""All models under one protocol, on one log: how well each ranks, in what time and in how much memory.

What is chosen (ALS' settings, the number of epochs) is chosen on valid; the figures are of test, by models
that are then fitted on train and valid. Every training is the job that a night runs, in a process of its own;
what was trained before is not trained again.
"""

import datetime as dt
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]

from recsys_dist import nightly
from recsys_dist.config import FIT_ON, LINEAR, Config, load
from recsys_dist.deepfm.items import Items
from recsys_dist.errors import ConfigError
from recsys_dist.evaluation.evaluate import hold_out, positives
from recsys_dist.evaluation.labels import model_label
from recsys_dist.evaluation.report import write_comparison
from recsys_dist.evaluation.significance import may_be_chance
from recsys_dist.recall.factors import FactorTables
from recsys_dist.scoring.models import Models, load_models, load_ranker
from recsys_dist.scoring.scorers import Exhaustive, Factors, Linear, NextItems, Popularity, Related, Scorer
from recsys_dist.workspace import OpenRun, Run, Workspace

BEFORE = ("features", "recall")
"""Stages that all models share the run of."""
COSTS = "costs.json"
PARTS = "train_valid"
"""What every model is fitted on in the end."""
FITTED = [f"{section}.fit_on={PARTS}" for section in ("recall", "als", "deepfm")]
MEASURES = ("cosine", "jaccard", "pearson")
GRID = "als.grid={rank: [64, 128], reg: [0.05, 0.15, 0.4]}"
PAIR = (
    "deepfm.pair=[{name: next, measure: next_items}, {name: next_one, measure: next_items, recency: 0.7}, "
    "{name: next_many, measure: next_items, recency: 12}, {name: near, measure: neighbors}, "
    "{name: near_many, measure: neighbors, recency: 20}, {name: since, measure: since}, "
    "{name: days, measure: days_since}]"
)
"""Of the two-stage model, where neither the conf file's section `deepfm` nor `compare.settings` has any."""
AT = (10, 20)
"""Lengths of the lists that the table tells of."""
EVERY = 0.5
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Model:
    """What is compared."""

    stage: str
    """Whose run it is read from."""
    overrides: tuple[str, ...] = ()
    """Beside those of the configuration."""


MODELS = {
    "popularity": Model("features"),
    **{measure: Model("recall") for measure in MEASURES},
    "next_items": Model("recall"),
    "ease": Model("recall"),
    "transitions": Model("recall"),
    "als_explicit": Model("als", ("als.implicit=false",)),
    "als": Model("als", ("als.implicit=true",)),
    "mf": Model("deepfm", ("deepfm.model=mf", "deepfm.pair=[]")),
    "fm": Model("deepfm", ("deepfm.model=fm", "deepfm.pair=[]")),
    # A DNN has no FM part, which a list of candidates may name.
    "dnn": Model("deepfm", ("deepfm.model=dnn", "deepfm.pair=[]", "score.candidates={popularity: 50}")),
    "deepfm": Model("deepfm", ("deepfm.model=deepfm", "deepfm.pair=[]")),
    "two_stage": Model("deepfm", ("deepfm.model=deepfm",)),
}


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    seconds: float
    peak_gib: float
    """The most memory that its processes held at once; what they share is counted once."""


class Trained:
    """The runs of the models, made where they are not there.

    Args:
        conf: as in `load`.
        overrides: likewise; they hold for all models.
    """

    def __init__(self, conf: str | None, overrides: Sequence[str]) -> None:
        self.conf = conf
        config = load(conf, overrides)
        root = config.compare.root or f"{config.storage.root.rstrip('/')}-comparison"
        # The first measure is the one that a night's lists go by.
        measures = dict.fromkeys((*config.recall.measures, *MEASURES))
        self.overrides = [*overrides, f"storage.root={root}", *FITTED]
        lengths = sorted({*AT, *config.evaluation.k})
        self.overrides += [f"recall.measures=[{', '.join(measures)}]", "recall.late=0.2"]
        self.overrides += [f"evaluation.k={lengths}", "evaluation.metric=ndcg@10"]
        self.config = load(conf, self.overrides)
        self._require_settings()
        self.workspace = Workspace(self.config)
        known = self.workspace.read_json(COSTS) or {}
        self.costs = {run_id: Cost(**cost) for run_id, cost in known.items()}
        self.runs: dict[str, Run] = {}
        """By stage, and by name of the models that have one of their own."""

    def make(self, names: Sequence[str]) -> list[str]:
        """Train these models, and what they need before; those that are there then: linear models of items
        are left out where there are too many items.
        """
        self.runs["features"] = self._run("features", "features", self.overrides)
        recall, n_items = self.config.recall, self.runs["features"].spec().n_items
        few = n_items <= recall.linear_items
        left_out = [name for name in names if name in LINEAR and not few]
        if left_out:
            print(
                f"=== {' and '.join(model_label(name) for name in left_out)}: left out, since there are "
                f"{n_items:,} items, and recall.linear_items={recall.linear_items}",
                flush=True,
            )
        names = [name for name in names if name not in left_out]
        if not names:
            raise ConfigError(
                "compare.models: nothing is left to compare. Name other models, or raise recall.linear_items."
            )
        self.overrides.append(self._linear(names))
        self.runs["recall"] = self._run("recall", "recall", self.overrides)
        for name in self._trained(names):
            model = MODELS[name]
            if model.stage not in BEFORE:
                self.runs[name] = self._run(model.stage, name, self.settings(name))
        return names

    def _require_settings(self) -> None:
        """Raise a ConfigError where a model that is asked for cannot have its own settings: before the first
        training, not after hours of the others'.
        """
        wrong, asked = [], self.config.compare.models
        for name in self._trained(asked):
            try:
                load(self.conf, [*self.settings(name), self._linear(asked)])
            except ConfigError as error:
                # Without the line that tells all the overrides, most of which are our own.
                _, *lines = str(error).splitlines()
                wrong += [f"compare.settings.{name}: {line.strip()}" for line in lines or [str(error)]]
        if wrong:
            raise ConfigError("\n".join(wrong))

    def _trained(self, names: Sequence[str]) -> list[str]:
        """The models that these need, in order: two stages have ALS among their sources, as a rule."""
        return list(dict.fromkeys((*(["als"] if "two_stage" in names else []), *names)))

    def _linear(self, names: Sequence[str]) -> str:
        """The override by which recall fits the linear models of items among these, beside its own."""
        fitted = dict.fromkeys((*self.config.recall.linear, *(name for name in LINEAR if name in names)))
        return f"recall.linear=[{', '.join(fitted)}]"

    def settings(self, name: str) -> list[str]:
        """The overrides that a model is trained with."""
        own = self.config.compare.settings.get(name, ())  # type: ignore[call-overload]
        more = []
        if MODELS[name].stage == "als" and not self.config.als.grid:
            more.append(GRID)
        if name == "two_stage" and not self.config.deepfm.pair:
            more.append(PAIR)
        return [*self.overrides, *more, *MODELS[name].overrides, *own]

    def own(self, name: str) -> Config:
        """The configuration with a model's settings."""
        return load(self.conf, self.settings(name))

    def cost(self, name: str) -> Cost | None:
        """Of the run that a model is read from; None where that is not known, or where nothing is fitted."""
        if MODELS[name].stage == "features":
            return None
        return self.costs.get(self.runs[name if name in self.runs else MODELS[name].stage].run_id)

    def _run(self, stage: str, name: str, overrides: list[str]) -> Run:
        # Pair fields may be of ALS, of which there can be two.
        read = {*BEFORE, *(["als"] if stage == "deepfm" else [])}
        pins = [f"storage.pin.{known}={run.run_id}" for known, run in self.runs.items() if known in read]
        config = load(self.conf, [*overrides, *pins])
        found = nightly.find(Workspace(config), stage, config)
        label = model_label(name) if name in MODELS else name
        if found:
            print(f"=== {label}: done before, {found.uri}", flush=True)
            return found
        print(f"=== {label}", flush=True)
        with _peak() as peak:
            nightly.run_stage(stage, config, self.conf, [*overrides, *pins])
        made = nightly.find(Workspace(config), stage, config)
        assert made, "it was just made"
        begin, end = (dt.datetime.fromisoformat(made.manifest[moment]) for moment in ("started", "ended"))
        self.costs[made.run_id] = Cost((end - begin).total_seconds(), peak() / 2**30)
        self.workspace.write_json(COSTS, {run_id: vars(cost) for run_id, cost in self.costs.items()})
        return made


def compare(conf: str | None, overrides: Sequence[str]) -> None:
    """Train the models of `compare.models`, measure them on test, print the table and write a comparison run.

    Args:
        conf: as in `load`.
        overrides: likewise.

    Raises:
        StageFailed: a training failed, with its exit code.
        DataError: no user has a positive event in the test part.
    """
    trained = Trained(conf, overrides)
    config = trained.config
    names = trained.make(config.compare.models)
    run = trained.workspace.new("comparison", {}, trained.runs)
    figures = measured(config, run, trained, names)
    committed = run.commit(config, figures)
    print("\n".join(["", *table(figures), "", f"Report: {committed.uri}/report.html"]))


def measured(config: Config, run: OpenRun, trained: Trained, names: Sequence[str]) -> dict[str, Any]:
    """Write lists/, relevant/, metrics.json and report.html of these models, and return what is told of
    them.
    """
    features = trained.runs["features"]
    items = Items(features, features.spec())
    filters = {name: trained.own(name).score.filter_seen for name in names}
    metrics, lists, users, truth = hold_out(
        config,
        run,
        items,
        names,
        lambda name: scorer(name, trained, items),
        "two_stage" if "two_stage" in names else names[-1],
        dict.fromkeys(("als", "recall", "deepfm"), PARTS),
        {name: own for name, own in filters.items() if own != config.score.filter_seen},
    )
    metrics["costs"] = {name: vars(cost) for name in names if (cost := trained.cost(name))}
    run.write_json("metrics.json", metrics)
    models = _two_stage(trained) if "two_stage" in names else None
    write_comparison(config, run, items, models, metrics, lists, users, truth)
    return {key: metrics[key] for key in ("users", "models", "compared", "ahead", "costs")}


def scorer(name: str, trained: Trained, items: Items) -> Scorer:
    """A model that ranks all items, as of the test part."""
    runs, config, spec = trained.runs, trained.config, items.spec
    recall = runs["recall"]
    made: dict[str, Callable[[], Scorer]] = {
        "popularity": lambda: Popularity(items, positives(runs["features"], items, FIT_ON[PARTS])),
        "next_items": lambda: NextItems(spec, recall),
        **dict.fromkeys(LINEAR, lambda: Linear(spec, recall, name)),
        "two_stage": lambda: _two_stage(trained).two_stage,
        **dict.fromkeys(("als", "als_explicit"), lambda: _factors(runs[name], items)),
    }
    if name in MEASURES:
        related = recall.table(f"neighbors/measure={name}")
        return Related(spec, related, config.recall.neighbors_recency)
    if name in made:
        return made[name]()
    return Exhaustive(load_ranker(_inputs(runs, name), items))


def _two_stage(trained: Trained) -> Models:
    return load_models(_inputs(trained.runs, "two_stage"), trained.own("two_stage").score)


def _inputs(runs: dict[str, Run], name: str) -> dict[str, Run]:
    """What a model of DeepFM's is loaded from; ALS is there where there are two stages."""
    return {stage: runs[stage] for stage in (*BEFORE, "als") if stage in runs} | {"deepfm": runs[name]}


def _factors(run: Run, items: Items) -> Scorer:
    return Factors(FactorTables.read(items.spec, run))


def table(figures: dict[str, Any]) -> list[str]:
    """The figures as a table in Markdown."""
    metrics = ("ndcg@10", "recall@10", "recall@20")
    apart = figures["compared"]["models"]
    reference = model_label(figures["compared"]["with"])
    head = [
        *("NDCG@10", "Recall@10", "Recall@20"),
        f"NDCG@10 less {reference}'s",
        "fitted in, s",
        "memory, GiB",
    ]
    lines = [f"| {figures['users']:,} test users | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, found in figures["models"].items():
        first, *others = (found[metric] for metric in metrics)
        cells = [f"{first['value']:.4f} ({first['low']:.4f}-{first['high']:.4f})"]
        cells += [f"{other['value']:.4f}" for other in others]
        cells.append(_difference(apart[name]) if name in apart else "")
        cost = figures["costs"].get(name)
        cells += [f"{cost['seconds']:.0f}", f"{cost['peak_gib']:.1f}"] if cost else ["", ""]
        lines.append(f"| {model_label(name)} | {' | '.join(cells)} |")
    return lines


def _difference(found: dict[str, float]) -> str:
    return (
        f"{found['value']:+.4f} ({'may be chance, ' if may_be_chance(found['p']) else ''}p {found['p']:.4f})"
    )


@contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """What the block's processes held at most, all together, in bytes; this process does not count."""
    most, ended = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not ended.wait(EVERY):
            held = 0
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    held += child.memory_full_info().pss
            most = max(most, held)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield lambda: most
    finally:
        ended.set()
        looking.join()
