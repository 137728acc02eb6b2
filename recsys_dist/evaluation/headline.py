"""What a page says first: may the lists be published, and are they better than last night's? Of a comparison:
which model makes the best lists, and may that be chance?
"""

from dataclasses import dataclass
from typing import Any

from recsys_dist.config import Config
from recsys_dist.evaluation.labels import LABELS, figure, metric_label, model_label, ranked
from recsys_dist.evaluation.nights import Night, change, interval
from recsys_dist.evaluation.significance import may_be_chance


@dataclass(frozen=True)
class Headline:
    """One sentence, in two halves, four numbers, and what was checked."""

    passed: bool
    """Is the first half good news?"""
    may: str
    """May the lists be published? Which model is the best?"""
    better: str
    """Are they better than last night's? May that be chance?"""
    numbers: tuple[tuple[str, str, str], ...]
    """Four: what it is, the number, and how to take it."""
    checks: tuple[tuple[bool | None, str], ...] = ()
    """What must be so before the lists may be published: is it? None: that could not be found out."""


def headline(
    config: Config, metrics: dict[str, Any], verdict: dict[str, Any], last: Night | None, tonight: Night
) -> Headline:
    """Put it together.

    Args:
        config: the settings.
        metrics: as in metrics.json.
        verdict: as in the run's figures.
        last: the night to compare with, if any.
        tonight: the published model's figures.
    """
    metric, k = config.evaluation.metric, config.evaluation.k[0]
    value, low, high = interval(tonight.figures[metric])
    better, since = _since(last, tonight, metric)
    beside = config.evaluation.must_beat or "popularity"
    theirs = metrics["models"][beside][metric]["value"]
    numbers = (
        (
            f"{metric_label(metric)} tonight",
            figure(metric, value),
            f"95% interval {figure(metric, low)} to {figure(metric, high)}",
        ),
        since,
        _against(LABELS[beside], metric, value, theirs),
        (
            "Catalogue in the lists",
            f"{tonight.figures[f'coverage@{k}']['value']:.1%}",
            f"of all items are in a list of {k}",
        ),
    )
    may = "may" if verdict["passed"] else "must not"
    return Headline(
        verdict["passed"],
        f"Tonight’s lists {may} be published;",
        better,
        numbers,
        tuple(_checks(config, metrics, verdict)),
    )


def best_of(config: Config, metrics: dict[str, Any]) -> tuple[str, Headline]:
    """Put a comparison's together, and name the best model.

    Args:
        config: the settings.
        metrics: as in metrics.json.
    """
    metric, k = metrics["compared"]["metric"], config.evaluation.k[0]
    ahead = metrics["ahead"]
    best = ahead["model"] if ahead else ranked(metrics["models"], metric)[0]
    value, low, high = interval(metrics["models"][best][metric])
    beyond, better = False, "it is the only one."
    beside = ("Against others", "–", "there is none")
    if ahead:
        second = ahead["second"]
        beyond = not may_be_chance(ahead["p"])
        worse = f"{model_label(second)} is worse"
        better = f"{worse}, beyond chance." if beyond else f"that {worse} may be chance."
        beside = _against(model_label(second), metric, value, metrics["models"][second][metric]["value"])
    numbers = (
        (
            f"{metric_label(metric)} of {model_label(best)}",
            figure(metric, value),
            f"95% interval {figure(metric, low)} to {figure(metric, high)}",
        ),
        beside,
        ("Users", f"{metrics['users']:,}", "who liked something in the test part"),
        (
            "Catalogue in the lists",
            f"{metrics['models'][best][f'coverage@{k}']['value']:.1%}",
            f"of all items are in a list of {k}",
        ),
    )
    return best, Headline(beyond, f"{model_label(best)} makes the best lists;", better, numbers)


def signed(difference: float) -> str:
    """A difference with its sign; without one where it is 0 as printed."""
    text = f"{difference:+.4f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _against(other: str, metric: str, value: float, theirs: float) -> tuple[str, str, str]:
    """How many times another model's figure it is."""
    times = f"{value / theirs:.2f} ×" if theirs > 0 else "–"
    return f"Against {other}", times, f"the {metric_label(metric)} there is {figure(metric, theirs)}"


def _since(last: Night | None, tonight: Night, metric: str) -> tuple[str, tuple[str, str, str]]:
    """The half sentence on last night, and the number."""
    found = change(last, tonight, metric) if last else None
    if found is None:
        return (
            "there is no earlier night to compare them with.",
            ("Since last night", "–", "the first night that is measured like this"),
        )
    way = "as good as"
    if found.beyond_chance:
        way = "better than" if found.difference > 0 else "worse than"
    note = f"from {figure(metric, found.before)}; up to {figure(metric, found.chance)} may be chance"
    return f"they are {way} last night’s.", ("Since last night", signed(found.difference), note)


def _checks(
    config: Config, metrics: dict[str, Any], verdict: dict[str, Any]
) -> list[tuple[bool | None, str]]:
    """Each condition of publishing that the evaluation knows of, and whether it holds."""
    metric, rival, model = config.evaluation.metric, config.evaluation.must_beat, verdict["model"]
    found: list[tuple[bool | None, str]] = []
    if rival:
        ours, theirs = (metrics["models"][name][metric]["value"] for name in (model, rival))
        above = "above" if ours > theirs else "not above"
        text = f"{model_label(model)}: {metric_label(metric)} {figure(metric, ours)} is {above} that of "
        found.append((ours > theirs, f"{text}{LABELS[rival]}, {figure(metric, theirs)}"))
    for name, of in verdict.get("changes", {}).items():
        before, now, chance = of["before"], of["now"], of["chance"]
        most = config.evaluation.may_fall[name]
        text = (
            f"{metric_label(name)} {'fell' if now < before else 'rose'} from {figure(name, before)} to "
            f"{figure(name, now)}; {figure(name, chance)} may be chance, and a fall of {most:g} beyond it is "
            f"allowed"
        )
        found.append((before - now - chance <= most, text))
    for name, why in verdict.get("not_compared", {}).items():
        text = f"is not held against the lists that were published last, whose evaluation {why}"
        found.append((None, f"{metric_label(name)} {text}"))
    return found
