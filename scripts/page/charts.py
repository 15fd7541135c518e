"""Charts as SVG: axes, lines, dots. No spike is lost, and text keeps its size at any width.

The drawing is stretched over its frame, strokes and dots are not; the labels beside it are HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .markup import Markup, joined, tag

BUCKETS = 200  # each gives two points, its lowest and its highest
SIDE = 1000  # units of a drawing, across and down
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one name.

    Args:
        name: in the legend.
        points: x and y; those that are not finite are left out, and a line has a gap there.
        look: `line`, `dots` or `both`, and `faint` for what stands behind.
        color: its number, `accent` or `soft`.
        names: what the script says of each point.
    """

    name: str
    points: Points
    look: str = "line"
    color: str = "accent"
    names: Sequence[str] | None = None

    def numbers(self) -> dict[str, object]:
        """The points that are drawn, each coordinate in a row of its own."""
        kept = [i for i, (_, y) in enumerate(self.points) if math.isfinite(y)]
        found: dict[str, object] = {"name": self.name}
        if self.names:
            found["names"] = [self.names[i] for i in kept]
        found["x"], found["y"] = ([self.points[i][k] for i in kept] for k in (0, 1))
        return found


@dataclass(frozen=True)
class Axis:
    """Where values stand between two ends."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """From 0 to 1."""
        low, high, value = map(self._scaled, (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for kinds in ((1, 2, 5), (1, 3), (1,)):
                every = max(1, (last - first) // most) if kinds == (1,) else 1
                found = [k * 10.0**e for e in range(first, last + 1, every) for k in kinds]
                within = [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]
                if 2 <= len(within) <= most:
                    return within
            return within if len(within) > 1 else [self.low, self.high]
        rough = (self.high - self.low) / most
        if rough <= 0:
            return [self.low]
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(k * size for k in (1, 2, 5, 10) if k * size >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series over two axes.

    Args:
        name: by which the script finds its numbers.
        title, unit: what is drawn.
        series: those behind first.
        marks: x and what is said of it: lines from top to bottom.
        x_label: under the axis.
        log_x: whether x is in logarithms.
        log_y: whether y is where its values need that.
        x_ticks: values of x and their names, where numbers would not do.
        near: whether the script looks for the nearest point, and not for the nearest x.
    """

    name: str
    title: str
    series: Sequence[Series]
    unit: str = ""
    x_label: str = "step"
    marks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    log_x: bool = False
    log_y: bool = True
    x_ticks: Sequence[tuple[float, str]] | None = None
    near: bool = False

    def axes(self) -> tuple[Axis, Axis] | None:
        """Both, or None where there is nothing to draw."""
        points = [p for one in self.series for p in finite(one.points)]
        if not points:
            return None
        xs, ys = ([p[i] for p in points] for i in (0, 1))
        low, high = min(ys), max(ys)
        log = self.log_y and low > 0 and high / low > 12
        if not log:
            room = 0.06 * (high - low) or abs(high) or 1.0
            low, high = (low if 0 <= low < room * 3 else low - room), high + room
            low = 0.0 if 0 <= low < 0.35 * high else low
        else:
            low, high = low / 1.15, high * 1.15
        if self.x_ticks:
            xs += [at + side * 0.35 for at, _ in self.x_ticks for side in (-1, 1)]
        return Axis(min(xs), max(xs), self.log_x), Axis(low, high, log)

    def numbers(self) -> dict[str, object]:
        """The very numbers that are drawn, for the page's script and for whoever reads on."""
        if not (axes := self.axes()):
            return {}
        x, y = axes
        return {
            "x": [x.low, x.high, int(x.log)],
            "y": [y.low, y.high, int(y.log)],
            "near": int(self.near),
            "series": [one.numbers() for one in self.series if finite(one.points)],
        }

    def html(self) -> Markup:
        """The figure."""
        axes = self.axes()
        named = [one for one in self.series if one.name]
        keys = [tag("span", s.name, class_=f"key {s.look} c-{s.color}") for s in named]
        unit = ", ".join(u for u in (self.unit, "log" * bool(axes and axes[1].log)) if u)
        head = tag("figcaption", tag("b", self.title), tag("small", unit), *keys)
        if not axes:
            return tag("figure", head, tag("p", "There are no numbers."), class_="chart")
        drawn = tag("div", *self._plot(*axes), class_="plot")
        label = tag("div", self.x_label, class_="xl")
        return tag("figure", head, drawn, label, class_="chart", data_chart=self.name)

    def _plot(self, x: Axis, y: Axis) -> Iterable[Markup]:
        rows = [(SIDE - round(SIDE * y.at(v)), v) for v in y.ticks(5)]
        grid = [tag("path", d="".join(f"M0 {at}H{SIDE}" for at, _ in rows), class_="grid")]
        for at, _ in self.marks:
            grid.append(tag("path", d=f"M{round(SIDE * x.at(at))} 0V{SIDE}", class_="mark"))
        lines = [joined(*drawn(one, x, y)) for one in self.series]
        box = f"0 0 {SIDE} {SIDE}"
        svg = tag("svg", *grid, *lines, viewBox=box, preserveAspectRatio="none", role="img",
                  aria_label=self.title)  # fmt: skip
        ys = [tag("span", short(v), class_="yt", style=f"top:{at / 10:g}%") for at, v in rows]
        xs = [
            tag(
                "span",
                said,
                class_="xt" + " end" * (x.at(v) > 0.97),
                style=f"left:{100 * x.at(v):.4g}%",
            )
            for v, said in self.x_ticks or [(v, short(v)) for v in x.ticks(5)]
        ]
        said = [
            tag("span", what, class_="say" + " left" * (x.at(at) > 0.6),
                style=f"left:{100 * x.at(at):.4g}%")
            for at, what in self.marks
        ]  # fmt: skip
        return [svg, *ys, *xs, *said]


def drawn(series: Series, x: Axis, y: Axis) -> Iterable[Markup]:
    """A series as paths."""
    kind = f"c-{series.color} {series.look}"
    places: list[tuple[int, int] | None] = [
        (round(SIDE * x.at(a)), SIDE - round(SIDE * y.at(b))) if math.isfinite(b) else None
        for a, b in series.points
    ]
    if "dots" not in series.look:
        path, pen = "", "M"
        for place in places:
            path += f"{pen}{place[0]} {place[1]}" if place else ""
            pen = "L" if place else "M"
        yield tag("path", d=path, class_=f"{kind} l")
    if "dots" in series.look or "both" in series.look:  # a line of no length, with round ends
        yield tag("path", d="".join(f"M{p[0]} {p[1]}h0" for p in places if p), class_=f"{kind} d")


def thinned(points: Points, buckets: int = BUCKETS) -> Points:
    """Of many points the lowest and the highest of each bucket, so that no spike is lost.

    Points that are not finite stay: a line has a gap there. So do the first and the last.
    """
    if len(points) <= 2 * buckets:
        return points
    kept = {0, len(points) - 1}
    for n in range(buckets):
        within = range(n * len(points) // buckets, (n + 1) * len(points) // buckets)
        values = [i for i in within if math.isfinite(points[i][1])]
        if len(values) < len(within):
            kept.add(next(i for i in within if not math.isfinite(points[i][1])))
        if values:
            kept |= {
                min(values, key=lambda i: points[i][1]),
                max(values, key=lambda i: points[i][1]),
            }
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
    said = f"{value:.3g}"
    return said.replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
