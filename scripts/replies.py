"""Answers in a report: what base and tuned model say, with what differs marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from markup import Markup, joined, tag


def cards(answers: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """A card a prompt; of `--tasks` with a row an adapter."""
    return [_card(answer) for answer in answers]


def _card(answer: Mapping[str, Any]) -> Markup:
    known = [*answer.get("trained", ()), *answer.get("references", ())]
    wanted = _nearest(str(answer.get("tuned", "")), known)
    said = {"base": Markup(tag("span", answer["base"].strip()))}
    columns = [k for k in answer if k not in NOT_ANSWERS]
    for name in columns:
        said[name] = marked(answer[name].strip(), (wanted or answer["base"]).strip())
    if wanted is not None:
        said["reference"] = marked(wanted.strip(), answer.get("tuned", "").strip())
    rows = [
        tag("div", tag("dt", name), tag("dd", text), class_=KINDS.get(name))
        for name, text in said.items()
    ]
    verdict = answer.get("verdict")
    told = (
        [tag("span", verdict, class_="verdict" + " ok" * verdict.startswith("exact"))]
        if verdict
        else []
    )
    return tag(
        "article", tag("h3", answer["prompt"].strip(), *told), tag("dl", *rows), class_="reply"
    )


KINDS = {"base": "base", "reference": "base"}
NOT_ANSWERS = ("prompt", "base", "stopped", "trained", "references", "searched", "verdict")


def marked(said: str, other: str) -> Markup:
    """A text, with those words marked that the other does not have there."""
    one, two = _words(said), _words(other)
    parts: list[str] = []
    for kind, a, b, *_ in SequenceMatcher(None, one, two, autojunk=False).get_opcodes():
        piece = "".join(one[a:b])
        parts.append(piece if kind == "equal" or not piece.strip() else tag("mark", piece))
    return joined(*parts)


def _words(said: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", said)


def _nearest(said: str, known: Sequence[str]) -> str | None:
    """Of several right answers the one that is most like what was said."""
    return max(known, key=lambda k: SequenceMatcher(None, said, k).ratio(), default=None)
