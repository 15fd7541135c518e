"""Answers in a report: what base and tuned model say, with what differs marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from .markup import Markup, joined, tag, text


def cards(answers: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """A card a prompt; of `--tasks` with a row an adapter."""
    return [_card(answer) for answer in answers]


def _card(answer: Mapping[str, Any]) -> Markup:
    known = [text.strip() for kind in KNOWN for text in answer.get(kind, ())]
    given = {name: answer[name].strip() for name in answer if name not in (*KNOWN, *ABOUT)}
    (_, base), *others = given.items()
    said: dict[str, str] = {"base": base}
    for name, own in others:
        wanted = max(known, key=lambda k, own=own: likeness(own, k), default=base)
        said[name] = marked(own, wanted)
    if known:
        said["reference"] = max(known, key=lambda k: likeness(others[0][1], k))
    rows = [
        tag("div", tag("dt", name), tag("dd", own), class_=SOFT.get(name))
        for name, own in said.items()
    ]
    verdict = answer.get("verdict", "")
    told = tag("span", verdict, class_="verdict" + " ok" * verdict.startswith("exact"))
    head = tag("h3", answer["prompt"].strip(), told)
    return tag("article", head, tag("dl", *rows), class_="reply")


KNOWN = ("trained", "references")
ABOUT = ("prompt", "stopped", "searched", "verdict")
SOFT = {"base": "base", "reference": "base"}


def marked(said: str, other: str) -> Markup:
    """A text, with those words marked that the other does not have there; none if few agree."""
    one, two = _words(said), _words(other)
    matcher = SequenceMatcher(None, one, two, autojunk=False)
    if matcher.ratio() < 0.5:
        return text(said)
    parts: list[str] = []
    for kind, a, b, *_ in matcher.get_opcodes():
        piece = "".join(one[a:b])
        parts.append(piece if kind == "equal" or not piece.strip() else tag("mark", piece))
    return joined(*parts)


def likeness(one: str, other: str) -> float:
    """Of two texts, from 0 to 1."""
    return SequenceMatcher(None, _words(one), _words(other), autojunk=False).ratio()


def _words(said: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", said)
