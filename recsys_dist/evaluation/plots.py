"""Plots as inline SVG that takes its colours and its font from the page, each with its numbers as a table.

Drawn by Matplotlib in the sizes that the page shows, so that text has the page's own size on a phone too.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

WIDE, HALF, NARROW = 888, 385, 350
"""Widths in CSS pixels: the page's column, half of it, a phone's."""
COLOURS = {
    "--page": "#0b0b0b",
    "--ink": "#010101",
    "--soft": "#020202",
    "--line": "#030303",
    "--accent": "#040404",
    "--muted": "#050505",
    "--series-1": "#060606",
    "--series-2": "#070707",
    "--series-3": "#080808",
    "--series-4": "#090909",
}
"""CSS variable of the page to the colour that stands for it while Matplotlib draws."""
DASHES: tuple[Any, ...] = ("solid", (0, (6, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)))
"""Of the series, in their order: they differ without colours as well."""
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "recsys_dist",
    "text.parse_math": False,
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": COLOURS["--line"],
    "axes.labelcolor": COLOURS["--soft"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["--line"],
    "grid.linewidth": 1,
    "text.color": COLOURS["--ink"],
    "xtick.color": COLOURS["--line"],
    "ytick.color": COLOURS["--line"],
    "xtick.labelcolor": COLOURS["--soft"],
    "ytick.labelcolor": COLOURS["--soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
}
REFERENCE = re.compile(r"#([\w-]+)")
LETTER = 7.5
"""Width of a letter at most, in pixels, on average over a label."""
LONGEST = 24
"""Letters of a label at most."""


Numbers = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Plot:
    """What the page needs of a plot."""

    name: str
    """Unique on the page; of letters and hyphens."""
    title: str
    about: str
    """What can be seen in it, for those who do not see it too."""
    drawings: tuple[Markup, ...]
    """One for all widths of the page, or one for wide pages and one for phones."""
    columns: tuple[str, ...]
    """Of the table of its numbers."""
    rows: tuple[tuple[str, ...], ...]
    legend: tuple[str, ...] = ()
    """Names of the series, in their order; none where there is one."""


@dataclass(frozen=True)
class Interval:
    """A row of a plot of intervals."""

    label: str
    value: float
    low: float
    high: float
    text: str
    """The value as it is printed."""
    ours: bool = False
    """Is it what the page is about?"""


@dataclass(frozen=True)
class Line:
    """A series: x and y of its points and, where there is one, the interval of each."""

    label: str
    x: Numbers
    y: Numbers
    band: tuple[Numbers, Numbers] | None = None
    hollow: Sequence[bool] = field(default=())
    """Of each point: is its marker empty? No markers where this is empty."""


Draw = Callable[[Axes, int], None]


def intervals(name: str, rows: Sequence[Interval]) -> tuple[Markup, ...]:
    """A row each, the value as a dot on its interval, and as a number beside it."""
    left = _left([row.label for row in rows])

    def draw(axes: Axes, width: int) -> None:
        for place, row in enumerate(rows):
            colour = COLOURS["--accent" if row.ours else "--muted"]
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=3, solid_capstyle="round")
            axes.plot([row.value], [place], color=colour, marker="o", markersize=8 if row.ours else 6)
        _labels(axes, [row.label for row in rows], [row.text for row in rows])
        low, high = min(row.low for row in rows), max(row.high for row in rows)
        span = (high - low) or abs(high) or 1
        axes.set_xlim(max(0.0, low - 0.06 * span) if low >= 0 else low - 0.06 * span, high + 0.06 * span)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(3 if width < WIDE else 6))

    right = _right([row.text for row in rows])
    return _both(name, draw, 30 * len(rows) + 40, (left, right, 28, 8))


def bars(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    most: float | None = None,
) -> tuple[Markup, ...]:
    """Horizontal bars from 0 to `most`, or the greatest value, with the values as texts beside them."""

    def draw(axes: Axes, width: int) -> None:
        axes.barh(range(len(values)), values, height=0.5, color=COLOURS["--accent"])
        _labels(axes, labels, texts)
        axes.set_xlim(0, most or max([*values, 0]) or 1)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])

    return _both(name, draw, 32 * len(values) + 12, (_left(labels), _right(texts), 4, 8))


def lines(
    name: str,
    series: Sequence[Line],
    xlabel: str,
    y_text: Callable[[float], str],
    *,
    x_text: Callable[[float], str] = lambda x: f"{x:g}",
    ticks: Sequence[float] | None = None,
    bottom: float | None = None,
    half: bool = True,
) -> tuple[Markup, ...]:
    """Lines over x.

    Args:
        name: of the plot, which ids within the drawing begin with.
        series: at most four.
        xlabel: what x is.
        y_text: a label of the y axis.
        x_text: a label of the x axis.
        ticks: where x has labels, if there is room for so many; default: wherever it looks well.
        bottom: the least y that is shown; default: as the series have it.
        half: is the plot one of two beside each other?
    """

    def draw(axes: Axes, width: int) -> None:
        for place, line in enumerate(series):
            colour = COLOURS[f"--series-{place + 1}"]
            if line.band:
                axes.fill_between(line.x, *line.band, color=colour, alpha=0.18, linewidth=0)
                for end in line.band if len(line.x) == 1 else ():
                    axes.plot([line.x[0]] * 2, [line.y[0], end[0]], color=colour, linewidth=2, alpha=0.5)
            axes.plot(line.x, line.y, color=colour, linewidth=2, linestyle=DASHES[place])
            for x, y, hollow in zip(line.x, line.y, line.hollow, strict=False):
                face = COLOURS["--page"] if hollow else colour
                axes.plot([x], [y], marker="o", markersize=7, color=colour, markerfacecolor=face)
        axes.set_xlabel(xlabel, labelpad=8)
        axes.margins(x=0.06 if len(series[0].x) < 30 else 0.02, y=0.15)
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: y_text(y)))
        if ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        else:
            room = max(2, width // 100)
            step = -(-len(ticks) // room)
            axes.set_xticks(list(ticks)[::-1][::step][::-1])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: x_text(x)))

    margins = (46, 28, 54, 10)
    if half:
        return (_drawing(name, draw, HALF, 250, margins),)
    return _both(name, draw, 260, margins)


def _left(labels: Sequence[str]) -> int:
    return int(LETTER * max(min(len(label), LONGEST) for label in labels)) + 14


def _right(texts: Sequence[str]) -> int:
    return int(LETTER * max(len(text) for text in texts)) + 16


def _labels(axes: Axes, labels: Sequence[str], texts: Sequence[str]) -> None:
    """Rows from the top, each with its label before the axes and its text behind them."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    shown = [label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…" for label in labels]
    axes.set_yticks(range(len(labels)), shown)
    for label in axes.get_yticklabels():
        label.set(color=COLOURS["--ink"], horizontalalignment="left")
    axes.tick_params(axis="y", pad=_left(labels))
    for place, text in enumerate(texts):
        axes.annotate(
            text,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(_right(texts), 0),
            textcoords="offset points",
            ha="right",
            va="center_baseline",
        )


def _both(name: str, draw: Draw, height: int, margins: tuple[int, int, int, int]) -> tuple[Markup, ...]:
    return tuple(_drawing(name, draw, width, height, margins) for width in (WIDE, NARROW))


def _drawing(name: str, draw: Draw, width: int, height: int, margins: tuple[int, int, int, int]) -> Markup:
    """Draw in pixels, one of Matplotlib's points each.

    Args:
        name: of the plot.
        draw: puts everything into the axes of a drawing of this width.
        width: of the drawing.
        height: likewise.
        margins: around the axes: left, right, bottom, top.
    """
    left, right, bottom, top = margins
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72))
        figure.patch.set_alpha(0)
        place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        axes = figure.add_axes(place)
        axes.patch.set_alpha(0)
        draw(axes, width)
        written = io.BytesIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=empty)
    return _inline(ElementTree.fromstring(written.getvalue()), f"{name}-{width}")


def _inline(svg: ElementTree.Element, prefix: str) -> Markup:
    """The drawing as a part of an HTML page: with the page's colours in place of those that stand for them,
    and without ids but those that it refers to itself, which begin with `prefix`.
    """
    colours = {colour: f"var({name})" for name, colour in COLOURS.items()}
    for element in list(svg.iter()):
        element.tag = _local(element.tag)
        for name in list(element.attrib):
            element.set(_local(name), element.attrib.pop(name))
        for child in [child for child in element if _local(child.tag) in ("metadata", "style")]:
            element.remove(child)
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        if "style" in element.attrib:
            rules = dict(rule.split(": ", 1) for rule in element.attrib["style"].split("; "))
            rules.pop("font-family", None)
            element.set("style", "; ".join(f"{name}: {colours.get(of, of)}" for name, of in rules.items()))
    wanted = set()
    for element in svg.iter():
        for name in ("href", "clip-path"):
            if name in element.attrib:
                wanted |= set(REFERENCE.findall(element.attrib[name]))
                element.set(name, REFERENCE.sub(rf"#{prefix}-\1", element.attrib[name]))
    for element in svg.iter():
        own = element.attrib.pop("id", None)
        if own in wanted:
            element.set("id", f"{prefix}-{own}")
        element.text, element.tail = _inner(element.text), None
    for name in ("width", "height", "version"):
        svg.attrib.pop(name, None)
    svg.set("aria-hidden", "true")  # what is around it says what can be seen in it
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _local(name: str) -> str:
    """A name without its namespace, which HTML knows by itself."""
    return name.rpartition("}")[2]


def _inner(text: str | None) -> str | None:
    return text if text and text.strip() else None
