"""Charts: series over two axes, as SVG paths and as a PNG."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKETS = 200
SIDE = 1000  # of a square drawing
COLORS = {"accent": "#1c6c86", "mid": "#74a9ba", "soft": "#a5a199", "2": "#c4602a", "4": "#8a5aa8"}
UNIT = "nats a token"
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A scale between two ends."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """From 0 to 1."""
        ends = (self.low, self.high, value)
        low, high, value = map(math.log10, ends) if self.log else ends
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        from matplotlib.ticker import LogLocator, MaxNLocator  # slow to import

        locator = MaxNLocator(5, steps=[1, 2, 5, 10])
        if self.log:
            decades = math.log10(self.high / self.low)
            subs = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 2.6 else (1,)
            locator = LogLocator(subs=subs, numticks=6)
        values = map(float, locator.tick_values(self.low, self.high))
        return [v for v in values if self.low <= v <= self.high] or [self.low, self.high]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points; a line has a gap where they are not finite."""

    name: str
    points: Points
    look: str = "line"  # or dots, both; and faint
    color: str = "accent"

    def paths(self, x: Axis, y: Axis) -> Iterator[tuple[str, str]]:
        """SVG paths, each with its class."""
        line, dots, pen = "", "", "M"
        for a, b in self.points:
            if math.isfinite(b):
                at = f"{round(SIDE * x.at(a))} {SIDE - round(SIDE * y.at(b))}"
                line, dots = f"{line}{pen}{at}", f"{dots}M{at}h0"
            pen = "L" if math.isfinite(b) else "M"
        if "dots" not in self.look:
            yield line, f"c-{self.color} {self.look} l"
        if "dots" in self.look or "both" in self.look:
            yield dots, f"c-{self.color} {self.look} d"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series over two axes."""

    title: str
    series: Sequence[Series]  # those behind first
    unit: str = ""
    x_label: str = "step"
    marks: Sequence[tuple[float, str]] = ()  # vertical lines
    log_x: bool = False
    log_y: bool = True  # where its range is wide
    x_ticks: Sequence[tuple[float, str]] | None = None

    def axes(self) -> tuple[Axis, Axis] | None:
        """Both, or None without points."""
        points = [point for series in self.series for point in finite(series.points)]
        if not points:
            return None
        xs, ys = map(list, zip(*points, strict=True))
        low, high = min(ys), max(ys)
        if log := self.log_y and low > 0 and high / low > 12:
            low, high = low / 1.15, high * 1.15
        else:
            room = 0.06 * (high - low) or abs(high) or 1.0
            low, high = (0.0 if 0 <= low < 0.35 * high else low - room), high + room
        xs += [at + side * 0.35 for at, _ in self.x_ticks or () for side in (-1, 1)]
        return Axis(min(xs), max(xs), self.log_x), Axis(low, high, log)


def png(charts: Sequence[Chart], file: Path) -> None:
    """Draw charts side by side."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7 * len(charts), 4.5), layout="constrained")
    plots = figure.subplots(1, len(charts), squeeze=False)[0]
    for plot, chart in zip(plots, charts, strict=True):
        for series in chart.series:
            look, xy = series.look, zip(*series.points or [(math.nan, math.nan)], strict=True)
            style = {"color": COLORS.get(series.color, "0.5"), "label": series.name or None}
            style |= {"alpha": 0.45 if "faint" in look else 1, "ls": "" if "dots" in look else "-"}
            plot.plot(*xy, **style, marker="." if "dots" in look or "both" in look else "")
        scales = ["log" if axis.log else "linear" for axis in chart.axes() or ()]
        plot.set(**dict(zip(("xscale", "yscale"), scales, strict=False)))
        plot.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.unit)
        if chart.x_ticks:
            plot.set_xticks(*zip(*chart.x_ticks, strict=True))
        plot.legend()
    figure.savefig(file, dpi=130, metadata={"Software": None})


def thinned(points: Points, buckets: int = BUCKETS) -> Points:
    """The lowest, the highest and a gap of each bucket of points."""
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
    """The means of `of` points each."""
    parts = [points[i : i + of] for i in range(0, len(points) - of + 1, of)]
    return [(sum(x for x, _ in p) / of, sum(y for _, y in p) / of) for p in parts]


def short(value: float) -> str:
    """A number in few letters."""
    if value == int(value) and 1 <= abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def number(value: float | None) -> str:
    """A loss."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def text(value: Any) -> str:
    """A hyper-parameter's value."""
    if isinstance(value, list):
        return " ".join(value)
    return short(value) if isinstance(value, int | float) else str(value)
