"""Line charts and scatters in SVG, drawn by hand; of many points the lowest and the highest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import cast

Point = tuple[float, float]
LEFT, RIGHT, TOP, BASE = 46.0, 12.0, 10.0, 24.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series and how it is drawn: a class of the style sheet."""

    name: str
    points: Sequence[Point]
    style: str = "c0"


def thinned(points: Sequence[Point], columns: int) -> list[Point]:
    """The first, lowest, highest and last point of each of so many columns: no spike is lost.

    What is not finite stays out of the drawing, and the line has a gap there.
    """
    if len(points) <= 2 * columns:
        return list(points)
    low, high = points[0][0], points[-1][0]
    held: dict[int, list[Point]] = {}
    for point in points:
        held.setdefault(int((point[0] - low) / (high - low or 1) * (columns - 1)), []).append(point)
    kept: list[Point] = [points[0]]
    for column in held.values():
        finite = [p for p in column if math.isfinite(p[1])]
        pair = {min(finite, key=_height), max(finite, key=_height)} if finite else {column[0]}
        if len(finite) < len(column) and finite:  # a gap is seen
            pair.add(next(p for p in column if not math.isfinite(p[1])))
        kept += sorted(pair - {kept[-1]}, key=lambda p: p[0])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _height(point: Point) -> float:
    return point[1]


@dataclass(frozen=True)
class Axis:
    """From values to places on the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands."""
        v = math.log10(max(value, 1e-300)) if self.log else value
        return self.start + (v - self.low) / ((self.high - self.low) or 1) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values and what is written at them."""
        if self.log:
            whole = range(math.floor(self.low), math.ceil(self.high) + 1)
            close = (1, 2, 5) if self.high - self.low < 2 else (1,)
            found = [m * 10.0**e for e in whole for m in close]
            inside = [v for v in found if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
            return [(v, short(v)) for v in inside]
        gap = (self.high - self.low) / 4 or 1
        unit = 10.0 ** math.floor(math.log10(gap))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= gap - 1e-12)
        first = math.ceil(self.low / step - 1e-9)
        count = int((self.high + 1e-9 * step) / step) - first + 1
        return [(v, short(v)) for v in ((first + i) * step for i in range(count))]


def short(value: float) -> str:
    """A number in few letters."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def scale(values: Sequence[float], start: float, end: float, *, log: bool, zero: bool) -> Axis:
    """The axis on which all finite values have room."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0, 2.0]
    if log:
        low, high = math.log10(min(finite)), math.log10(max(finite))
        pad = (high - low) * 0.05 or 0.1
        return Axis(low - pad, high + pad, start, end, log=True)
    low, high = min(finite), max(finite)
    low = min(0.0, low) if zero else low
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(low if zero else low - pad, high + pad, start, end)


def frame(
    x: Axis,
    y: Axis,
    size: tuple[float, float],
    x_name: str,
    named: Sequence[str] = (),
) -> str:
    """Grid lines and what is written at them; below, names for the places 0, 1, … if there are."""
    (width, height), parts = size, list[str]()
    for value, said in y.ticks():
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{width - RIGHT:g}"/>')
        parts.append(f'<text x="{LEFT - 7:g}" y="{at + 4:.1f}" text-anchor="end">{said}</text>')
    for value, said in enumerate(map(escape, named)) if named else x.ticks():
        at = x.at(value)
        parts.append(f'<text x="{at:.1f}" y="{height - 7:g}" text-anchor="middle">{said}</text>')
    name = f'<text x="{width - RIGHT:g}" y="{height - BASE - 5:g}" text-anchor="end">'
    return "".join(parts) + f"{name}{escape(x_name)}</text>"


def path(points: Sequence[Point], x: Axis, y: Axis, style: str) -> str:
    """A line in whole units, each point told from the one before, in as few letters as can be."""
    said, last = list[str](), cast(tuple[int, int] | None, None)
    for px, py in points:
        if not math.isfinite(py) or (y.log and py <= 0):
            last = None
            continue
        now = (round(x.at(px)), round(y.at(py)))
        if last is None:
            said.append(f"M{now[0]} {now[1]}")
        elif now != last:
            said.append(f"l{now[0] - last[0]} {now[1] - last[1]}")
        last = now
    d = "".join(said).replace(" -", "-")
    return f'<path class="l {style}" d="{d}"/>' if d else ""


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    size: tuple[float, float] = (1000, 320),
    log: bool = False,
    zero: bool = True,
    mark: Point | None = None,
) -> str:
    """A chart of lines over steps; `mark` is the best one."""
    width, height = size
    xs = [p[0] for line in lines for p in line.points] or [0, 1]
    x = Axis(min(xs), max(xs), LEFT, width - RIGHT)
    ys = [p[1] for line in lines for p in line.points]
    y = scale(ys, height - BASE, TOP, log=log, zero=zero and not log)
    drawn = "".join(path(line.points, x, y, line.style) for line in lines)
    if mark:
        mx, my = x.at(mark[0]), y.at(mark[1])
        drawn += f'<path class="best" d="M{mx:.1f} {TOP}V{height - BASE:g}"/>'
        drawn += f'<circle class="d1" cx="{mx:.1f}" cy="{my:.1f}" r="4.5"/>'
    at = f'data-x="{x.low:g} {x.high:g} {x.start:g} {x.end:g}"'
    at += f' data-y="{y.low!r} {y.high!r} {y.end:g} {y.start:g}" data-log="{int(log)}"'
    told = escape(", ".join(line.name for line in lines if line.style != "pale"))
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{told}" '
        f'data-chart="{escape(name)}" {at}>{frame(x, y, size, "step")}{drawn}</svg>'
    )


def scatter(
    points: Sequence[tuple[float, float, str, str]],
    *,
    x_name: str,
    x_log: bool,
    whiskers: Sequence[tuple[float, float, float]] = (),
    names: Sequence[str] = (),
    size: tuple[float, float] = (470, 250),
) -> str:
    """Points (x, y, style, what is said of it), y in logarithms; whiskers are (x, low, high)."""
    width, height = size
    heights = [p[1] for p in points] + [v for w in whiskers for v in w[1:]]
    x = scale([p[0] for p in points], LEFT, width - RIGHT, log=x_log, zero=False)
    y = scale(heights, height - BASE, TOP, log=min(heights, default=1) > 0, zero=False)
    dots = "".join(
        f'<circle class="{style}" cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3.4">'
        f"<title>{escape(said)}</title></circle>"
        for px, py, style, said in points
    )
    spread = "".join(
        f'<path class="whisk" d="M{x.at(at):.1f} {y.at(low):.1f}V{y.at(high):.1f}"/>'
        for at, low, high in whiskers
    )
    label = escape(f"loss over {x_name}")
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">'
        f"{frame(x, y, size, '', names)}{spread}{dots}</svg>"
    )
