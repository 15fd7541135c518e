"""What an adapter changed, drawn: the tokens of a passage, and the weights of each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .markup import Markup, joined, tag

MOST = 4.0  # nats: a token that gained or lost so much has the full colour
STRONGEST = 0.45  # opacity of the full colour, on which text still reads
Row = Mapping[str, Any]


def passage(found: Row) -> tuple[Markup, str]:
    """The tokens, coloured by what the adapter did to each one's log-probability; and a note."""
    first, *others = found["tokens"]
    both = list(zip(found["base"], found["adapter"], strict=True))
    spans = [
        tag("span", piece, title=_told(piece, before, after), style=_colour(after - before))
        for piece, (before, after) in zip(others, both, strict=True)
        if piece
    ]
    known = [after - before for before, after in both if math.isfinite(after - before)]
    total = sum(known) / len(known) if known else math.nan
    kind = "held-out" if found["held_out"] else "learnt"
    note = (
        f"A {kind} passage: blue where the adapter makes the token likelier than the base does, "
        f"orange where less likely; full colour at {MOST:g} nats. {total:+.3f} nats a token."
    )
    steps = {"−4": -4, "−2": -2, "0": 0, "+2": 2, "+4": 4}
    scale = [tag("span", said, style=_colour(step)) for said, step in steps.items()]
    shown = tag("div", tag("span", first, class_="first"), joined(*spans), class_="passage")
    return joined(shown, tag("p", "nats ", *scale, class_="scale")), note.replace("-0", "−0")


def _told(piece: str, before: float, after: float) -> str:
    signs = f"base {before:.2f}, adapter {after:.2f}: {after - before:+.2f} nats"
    return f"{piece.strip() or 'space'} · {signs}".replace("-", "−")


def _colour(change: float) -> str:
    name = "lose" if change < 0 else "gain"
    share = min(1.0, abs(change) / MOST) * STRONGEST if math.isfinite(change) else 0
    return f"background:rgb(var(--{name}) / {share:.2f})"


def heat(updates: Sequence[Row]) -> Markup:
    """The size of each update as a share of its weight's, a row a layer and a column a target."""
    shares: dict[str, dict[str, float]] = {}
    for row in updates:
        where, target = _split(row["layer"])
        shares.setdefault(where, {})[target] = row["update"] / (row["weight"] or math.nan)
    targets = list(dict.fromkeys(target for own in shares.values() for target in own))
    finite = [v for own in shares.values() for v in own.values() if math.isfinite(v)]
    most = max(finite, default=1.0) or 1.0
    by_place = {_split(row["layer"]): row for row in updates}
    head = tag("tr", tag("th", "layer"), *(tag("th", t, class_="n") for t in targets))
    rows: list[Markup] = []
    for where, own in shares.items():
        cells = [_cell(own.get(t), most, by_place.get((where, t))) for t in targets]
        rows.append(tag("tr", tag("td", where), *cells))
    made = tag("table", tag("thead", head), tag("tbody", *rows), class_="heat")
    return tag("div", made, class_="wide")


def _cell(share: float | None, most: float, row: Row | None) -> Markup:
    if share is None or row is None:
        return tag("td", "")
    said = f"{100 * share:.3g} %" if math.isfinite(share) else "not finite"
    strong = STRONGEST * share / most if math.isfinite(share) else 0
    title = f"‖s·BA‖ {row['update']:g}, ‖W‖ {row['weight']:g}"
    style = f"background:rgb(var(--gain) / {strong:.2f})"
    return tag("td", said, class_="n", title=title, style=style)


def _split(path: str) -> tuple[str, str]:
    """A layer's number, and what of it; a path without a number is a row of its own."""
    found = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", path)
    return (found[1], found[2]) if found else (path, "update")
