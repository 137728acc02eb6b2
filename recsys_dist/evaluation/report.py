"""report.html: one page that says whether tonight's lists are better and may be published, and shows them. A
comparison's says which model makes the best lists.

Everything that it needs is inside of it: it is read offline, and runs no script but its own.
"""

import base64
import datetime as dt
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup

from recsys_dist.config import Config
from recsys_dist.deepfm.items import Items
from recsys_dist.evaluation import sections
from recsys_dist.evaluation.curves import of_model
from recsys_dist.evaluation.headline import best_of, headline, signed
from recsys_dist.evaluation.labels import (
    METRIC_LABELS,
    figure,
    metric_label,
    model_label,
    ranked,
    summary_columns,
)
from recsys_dist.evaluation.nights import Night, earlier_nights, moment_of
from recsys_dist.evaluation.shown import shown_users
from recsys_dist.evaluation.significance import may_be_chance
from recsys_dist.scoring.models import Models
from recsys_dist.workspace import OpenRun

HERE = Path(__file__).parent


def write_report(
    config: Config,
    run: OpenRun,
    models: Models,
    metrics: dict[str, Any],
    verdict: dict[str, Any],
    lists: pa.Table,
    users: pa.Table,
    truth: np.ndarray,
) -> None:
    """Write report.html into the evaluation's run.

    Args:
        config: the settings.
        run: the evaluation; the runs that it reads are described too.
        models: that the lists were made with.
        metrics: as in metrics.json.
        verdict: as in the run's figures.
        lists: of all models, schema LISTS.
        users: of `held_out`.
        truth: likewise.
    """
    model, metric = verdict["model"], config.evaluation.metric
    earlier, other = earlier_nights(run, metrics, model)
    tonight = Night(run.run_id, metrics["models"][model], published=False)
    last = next((night for night in earlier if night.run_id == verdict.get("last")), None)
    last = last or (earlier[-1] if earlier else None)
    when = moment_of(run.run_id)
    _write(
        run,
        config,
        metrics,
        title=f"Recommendations, {when:%-d %B %Y}",
        kicker=f"Recommendations, evaluation of {when:%-d %B %Y, %H:%M} UTC",
        is_night=True,
        metric=metric,
        model=model,
        rival=config.evaluation.must_beat,
        headline=headline(config, metrics, verdict, last, tonight),
        nights_plot=sections.nights([*earlier, tonight], metric, model),
        other_nights=other,
        training_plots=sections.training(run.inputs["deepfm"]),
        refit=config.deepfm.fit_on != "train" or bool(config.deepfm.pair),
        time_plot=sections.time(run),
        data=sections.data(run, last),
        catalogue_plots=sections.catalogue(models.items, lists, metrics, config, model),
        sources_plot=sections.sources(lists, users, truth, model, config.evaluation.k[0]),
        segment_plots=sections.segments(metrics, metric, model, config.evaluation.must_beat),
        shown=shown_users(config, models, users, truth, of_model(lists, model, max(config.evaluation.k))),
    )


def write_comparison(
    config: Config,
    run: OpenRun,
    items: Items,
    models: Models | None,
    metrics: dict[str, Any],
    lists: pa.Table,
    users: pa.Table,
    truth: np.ndarray,
) -> None:
    """Write report.html into a comparison's run.

    Args:
        config: the settings.
        run: the comparison; the runs that it reads are described too.
        items: of the features run.
        models: of the two-stage model, whose lists are shown with their reasons; None: it is not compared.
        metrics: as in metrics.json, with `costs`.
        lists: as in `write_report`.
        users: likewise.
        truth: likewise.
    """
    when, metric = moment_of(run.run_id), metrics["compared"]["metric"]
    best, found = best_of(config, metrics)
    shown = None
    if models:
        own = of_model(lists, "two_stage", max(config.evaluation.k))
        shown = shown_users(config, models, users, truth, own)
    others = ranked(metrics["models"], metric)[1:]
    rival = "popularity" if "popularity" in others else others[0] if others else None
    _write(
        run,
        config,
        metrics,
        title=f"Models compared, {when:%-d %B %Y}",
        kicker=f"Models compared, {when:%-d %B %Y, %H:%M} UTC",
        is_night=False,
        metric=metric,
        model=best,
        rival=rival,
        headline=found,
        nights_plot=None,
        other_nights=0,
        training_plots=sections.training(run.inputs["two_stage"]) if models else None,
        refit=True,
        time_plot=sections.costs(metrics),
        data=sections.data(run, None),
        catalogue_plots=sections.catalogue(items, lists, metrics, config, best),
        sources_plot=sections.sources(lists, users, truth, "two_stage", config.evaluation.k[0])
        if models
        else None,
        segment_plots=sections.segments(metrics, metric, best, rival),
        shown=shown,
    )


def _write(run: OpenRun, config: Config, metrics: dict[str, Any], **told: Any) -> None:
    """Fill the template with what both kinds of page have, and what is told of one."""
    script = (HERE / "report.js").read_text()
    predicted = metrics.get("predictions")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric": metric_label, "model": model_label}
    environment.globals |= {"figure": figure, "signed": signed, "may_be_chance": may_be_chance}
    page = environment.get_template("report.html.j2").render(
        run_id=run.run_id,
        stage=run.stage,
        written=dt.datetime.now(dt.UTC),
        metrics=metrics,
        columns=list(summary_columns(config.evaluation.k)),
        glossary={
            label: text
            for name, (label, text) in METRIC_LABELS.items()
            if any(
                of.partition("@")[0] == name
                for of in (*metrics["models"][told["model"]], *(predicted or {"figures": ()})["figures"])
            )
        },
        ranked=ranked(metrics["models"], told["metric"]),
        models_plot=sections.models(metrics, told["metric"], told["model"]),
        filter_seen=config.score.filter_seen,
        resamplings=config.evaluation.bootstrap,
        runs={name: other.run_id for name, other in run.inputs.items()},
        style=Markup((HERE / "report.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **told,
    )
    run.write_text("report.html", page)
