"""Charts: series over two axes, as SVG for the page and as a PNG beside it. No spike is lost.

The SVG is stretched over its frame, strokes and dots are not; the labels beside it are HTML, so
that text keeps its size at any width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKETS = 200  # each gives two points, its lowest and its highest
SIDE = 1000  # units of a drawing, across and down
COLORS = {"accent": "#1c6c86", "mid": "#74a9ba", "soft": "#a5a199", "2": "#c4602a", "4": "#8a5aa8"}
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one name; those that are not finite are left out, and a line has a gap there.

    Its look is `line`, `dots` or `both`, and `faint` for what stands behind; its color a number,
    `accent`, `mid` or `soft`. The page's script shows the name of each point.
    """

    name: str
    points: Points
    look: str = "line"
    color: str = "accent"
    names: Sequence[str] | None = None

    def numbers(self) -> dict[str, object]:
        """The points that are drawn, each coordinate in a row of its own."""
        kept = [i for i, (_, y) in enumerate(self.points) if math.isfinite(y)]
        names = {"names": [self.names[i] for i in kept]} if self.names else {}
        xs, ys = ([self.points[i][k] for i in kept] for k in (0, 1))
        return {"name": self.name, **names, "x": xs, "y": ys}


@dataclass(frozen=True)
class Axis:
    """Where values stand between two ends."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """From 0 to 1."""
        ends = (self.low, self.high, value)
        low, high, value = map(math.log10, ends) if self.log else ends
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self, most: int = 5) -> list[float]:
        """Round values between the ends."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for digits in ((1, 2, 5), (1, 3), (1,)):
                every = max(1, (last - first) // most) if digits == (1,) else 1
                values = [k * 10.0**e for e in range(first, last + 1, every) for k in digits]
                within = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
                if 2 <= len(within) <= most:
                    return within
            return [self.low, self.high]
        rough = (self.high - self.low) / most
        if rough <= 0:
            return [self.low]
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(k * size for k in (1, 2, 5, 10) if k * size >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series over two axes."""

    name: str  # by which the page's script finds its numbers
    title: str
    series: Sequence[Series]  # those behind first
    unit: str = ""
    x_label: str = "step"
    marks: Sequence[tuple[float, str]] = ()  # x and a label: lines from top to bottom
    log_x: bool = False
    log_y: bool = True  # where its values need that
    x_ticks: Sequence[tuple[float, str]] | None = None  # where numbers would not do
    near: bool = False  # whether the script looks for the nearest point, and not for the nearest x

    def axes(self) -> tuple[Axis, Axis] | None:
        """Both, or None where there is nothing to draw."""
        points = [point for one in self.series for point in finite(one.points)]
        if not points:
            return None
        xs, ys = map(list, zip(*points, strict=True))
        low, high = min(ys), max(ys)
        if log := self.log_y and low > 0 and high / low > 12:
            low, high = low / 1.15, high * 1.15
        else:
            room = 0.06 * (high - low) or abs(high) or 1.0
            low, high = (low if 0 <= low < room * 3 else low - room), high + room
            low = 0.0 if 0 <= low < 0.35 * high else low
        xs += [at + side * 0.35 for at, _ in self.x_ticks or () for side in (-1, 1)]
        return Axis(min(xs), max(xs), self.log_x), Axis(low, high, log)

    def numbers(self) -> dict[str, object]:
        """The very numbers that are drawn, for the page's script and for whoever reads on."""
        ends = zip("xy", self.axes() or (), strict=False)
        drawn = [one.numbers() for one in self.series if finite(one.points)]
        axes = {name: [axis.low, axis.high, int(axis.log)] for name, axis in ends}
        return {**axes, "near": int(self.near), "series": drawn}

    def drawing(self) -> dict[str, Any] | None:
        """Paths, ticks and marks for the page's template; places are per cent of the frame."""
        if not (axes := self.axes()):
            return None
        x, y = axes
        rows = [(SIDE - round(SIDE * y.at(v)), v) for v in y.ticks()]
        ticks = self.x_ticks or [(v, short(v)) for v in x.ticks()]
        return {
            "unit": ", ".join(u for u in (self.unit, "log" * y.log) if u),
            "grid": "".join(f"M0 {at}H{SIDE}" for at, _ in rows),
            "marks": [(round(100 * x.at(v), 2), text) for v, text in self.marks],
            "lines": [path for one in self.series for path in _paths(one, x, y)],
            "ys": [(at / 10, short(v)) for at, v in rows],
            "xs": [(round(100 * x.at(v), 2), text) for v, text in ticks],
        }


def _paths(series: Series, x: Axis, y: Axis) -> Iterable[tuple[str, str]]:
    """A series as paths, each with its class."""
    look, path, dots, pen = f"c-{series.color} {series.look}", "", "", "M"
    for a, b in series.points:
        if math.isfinite(b):
            place = f"{round(SIDE * x.at(a))} {SIDE - round(SIDE * y.at(b))}"
            path, dots = f"{path}{pen}{place}", f"{dots}M{place}h0"
        pen = "L" if math.isfinite(b) else "M"
    if "dots" not in series.look:
        yield path, f"{look} l"
    if "dots" in series.look or "both" in series.look:  # lines of no length, with round ends
        yield dots, f"{look} d"


def png(charts: Sequence[Chart], file: Path) -> None:
    """Draw charts side by side."""
    from matplotlib.figure import Figure  # slow to import; drawn this way it needs no display

    figure = Figure(figsize=(7 * len(charts), 4.5), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        for one in chart.series:
            points = zip(*one.points or [(math.nan, math.nan)], strict=True)
            style = {"color": COLORS.get(one.color, "0.5"), "label": one.name or None}
            style["alpha"] = 0.45 if "faint" in one.look else 1
            style["linestyle"] = "" if "dots" in one.look else "-"
            style["marker"] = "." if "dots" in one.look or "both" in one.look else ""
            axes.plot(*points, **style)
        scales = ["log" if axis.log else "linear" for axis in chart.axes() or ()]
        axes.set(**dict(zip(("xscale", "yscale"), scales, strict=False)))
        axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.unit)
        if chart.x_ticks:
            axes.set_xticks(*zip(*chart.x_ticks, strict=True))
        axes.legend()
    figure.savefig(file, dpi=130, metadata={"Software": None})


def thinned(points: Points, buckets: int = BUCKETS) -> Points:
    """Of many points the lowest and the highest of each bucket, so that no spike is lost.

    Points that are not finite stay: a line has a gap there. So do the first and the last.
    """
    if len(points) <= 2 * buckets:
        return points
    kept = {0, len(points) - 1}
    for n in range(buckets):
        bucket = range(n * len(points) // buckets, (n + 1) * len(points) // buckets)
        values = [i for i in bucket if math.isfinite(points[i][1])]
        kept |= {*[i for i in bucket if not math.isfinite(points[i][1])][:1]}
        if values:
            kept |= {f(values, key=lambda i: points[i][1]) for f in (min, max)}
    return [points[i] for i in sorted(kept)]


def finite(points: Points) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(y)]


def means(points: Points, of: int) -> Points:
    """The mean of each `of` points, in their middle."""
    parts = [points[i : i + of] for i in range(0, len(points) - of + 1, of)]
    return [(sum(x for x, _ in p) / of, sum(y for _, y in p) / of) for p in parts]


def short(value: float) -> str:
    """A number in few letters."""
    if value == int(value) and abs(value) < 1e7 and abs(value) >= 1:
        return f"{int(value):,}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
