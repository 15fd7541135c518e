"""Regular expressions over module paths, in bounded time: no pattern in a file can hang a load.

Understood: characters, `.`, `[…]`, `\\d \\w \\s` and their opposites, `\\b ^ $`, `|`, groups,
lookaheads, `* + ? {m,n}` and their lazy forms. Anything else (back references, looking behind,
flags, possessive forms) is refused. `lora.disk.matching` says how it is done.

Source of what patterns and lists mean: PEFT, `tuners_utils.check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lora.disk.matching import (
    Places,
    Step,
    ahead,
    chain,
    edge,
    either,
    first,
    last,
    one,
    repeat,
    word,
)
from lora.disk.messages import brief

_LONGEST = 100_000  # characters of a pattern: a list of a large model's paths fits
_DEEPEST = 50  # groups in groups
_COUNTS = re.compile(r"[*+?]|\{(?=\d|,)(?P<low>\d{0,9})(?P<comma>,?)(?P<high>\d{0,9})\}")
_KINDS: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}


def compile_safely(text: str) -> Callable[[str], bool]:
    """A test whether a regular expression fits the whole of a text, as `re.fullmatch` says.

    Raises:
        ValueError: it is malformed, too long, or has a form that is not understood. The test
            itself raises one where a comparison would take too long.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"pattern {brief(text)} has more than {_LONGEST:,} characters")
    parser = _Parser(text)
    step = parser.alternatives(0)
    if parser.here:
        raise parser.error("there is a ')' too many")

    def fits(path: str) -> bool:
        places = Places(path)
        try:
            return bool(step(places, 1) & places.end)
        except OverflowError:
            raise ValueError(
                f"pattern {brief(text)} takes too long on {brief(path)}: simplify it"
            ) from None

    return fits


def chooser(entries: str | Sequence[str]) -> Callable[[str], bool]:
    """PEFT's rule for names of modules: a string is a regular expression, a list has suffixes.

    Raises:
        ValueError: as `compile_safely`.
    """
    if isinstance(entries, str):
        return compile_safely(entries)
    exact = frozenset(entries)

    def fits(path: str) -> bool:
        while path not in exact:  # the path, then each of its ends on whole segments
            _, dot, path = path.partition(".")
            if not dot:
                return False
        return True

    return fits


def suffix_pattern(text: str) -> Callable[[str], bool]:
    """PEFT's rule for keys of `rank_pattern`: the expression fits the path, or its end at a dot.

    Raises:
        ValueError: as `compile_safely`.
    """
    bare = text.removeprefix("^")
    plain = re.sub(r"\\(\W)", r"\1", bare)
    if re.escape(plain) == bare:  # a large model's file may have one for each layer
        return plain.__eq__ if bare != text else lambda path: f".{path}".endswith(f".{plain}")
    compile_safely(text)  # alone, so that no bracket in it can close ours
    return compile_safely(rf"(.*\.)?({text})")


class _Parser:
    """Reads a pattern from left to right; `here` is the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    @property
    def here(self) -> str:
        return self.text[self.at : self.at + 1]

    def error(self, reason: str) -> ValueError:
        return ValueError(f"pattern {brief(self.text)}: at character {self.at}, {reason}")

    def take(self, token: str) -> bool:
        """Go on behind the token if it stands here."""
        found = self.text.startswith(token, self.at)
        self.at += len(token) if found else 0
        return found

    def alternatives(self, depth: int) -> Step:
        if depth > _DEEPEST:
            raise self.error("groups are nested too deeply")
        options = [self.sequence(depth)]
        while self.take("|"):
            options.append(self.sequence(depth))
        return options[0] if len(options) == 1 else either(options)

    def sequence(self, depth: int) -> Step:
        steps: list[Step] = []
        letters = ""  # characters that stand for themselves are compared at once
        while self.here not in ("", "|", ")"):
            item = self.item(depth)
            counts = self.counts()
            if isinstance(item, str) and counts is None:
                letters += item
                continue
            if letters:
                steps.append(word(letters))
                letters = ""
            step = word(item) if isinstance(item, str) else item
            steps.append(repeat(step, *counts) if counts else step)
        if letters:
            steps.append(word(letters))
        return steps[0] if len(steps) == 1 else chain(steps)

    def item(self, depth: int) -> Step | str:
        """A character, or what fits one, or a place, or a group."""
        letter = self.here
        self.at += 1
        match letter:
            case "(":
                return self.group(depth)
            case "[":
                return one(self.character_class())
            case "\\":
                return self.escape()
            case ".":
                return one(_not_newline)
            case "^":
                return first
            case "$":
                return last
            case "*" | "+" | "?":
                raise self.error("there is nothing to repeat")
            case _:
                return letter

    def group(self, depth: int) -> Step:
        wanted = True if self.take("?=") else False if self.take("?!") else None
        if wanted is None and not self.take("?:") and self.here == "?":
            raise self.error(f"'({self.text[self.at : self.at + 2]}' is not supported")
        inner = self.alternatives(depth + 1)
        if not self.take(")"):
            raise self.error("a ')' is missing")
        return inner if wanted is None else ahead(inner, wanted)

    def escape(self) -> Step | str:
        letter = self.here
        if self.take("b"):
            return edge(_KINDS["w"])
        if letter in _KINDS:
            self.at += 1
            return one(_KINDS[letter])
        return self.literal()

    def literal(self) -> str:
        """What the escaped character here stands for."""
        letter = self.here
        if not letter or (letter.isascii() and letter.isalnum() and letter not in _ESCAPED):
            raise self.error(f"'\\{letter}' is not supported")
        self.at += 1
        return _ESCAPED.get(letter, letter)

    def counts(self) -> tuple[int, int | None] | None:
        """How often the item before may stand, from and to; None for once."""
        if not (found := _COUNTS.match(self.text, self.at)):
            return None
        self.at = found.end()
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        low = int(found["low"] or 0)
        high = int(found["high"]) if found["high"] else None if found["comma"] else low
        if high is not None and high < low:
            raise self.error("the smaller number must come first")
        self.take("?")  # lazy or not, the same texts fit
        if _COUNTS.match(self.text, self.at):
            raise self.error(f"'{self.here}' after a repetition is not supported")
        return simple.get(found[0], (low, high))

    def character_class(self) -> Callable[[str], bool]:
        negated = self.take("^")
        members: list[Callable[[str], bool]] = []
        singles: set[str] = set()
        while not (self.here == "]" and (members or singles)):  # a first ']' is a member
            low = self.member(members)
            if low is None:
                continue
            if self.here != "-" or self.text[self.at + 1 : self.at + 2] in ("", "]"):
                singles.add(low)
                continue
            self.at += 1
            high = self.member([])
            if high is None or high < low:
                raise self.error("this range of characters is malformed")
            members.append(_between(low, high))
        self.at += 1
        return lambda c: (c in singles or any(fits(c) for fits in members)) is not negated

    def member(self, members: list[Callable[[str], bool]]) -> str | None:
        """One character of a class; a kind such as `\\d` goes to the members."""
        if not self.here:
            raise self.error("a ']' is missing")
        if not self.take("\\"):
            self.at += 1
            return self.text[self.at - 1]
        if self.here in _KINDS:
            members.append(_KINDS[self.here])
            self.at += 1
            return None
        return self.literal()


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda c: low <= c <= high


def _not_newline(c: str) -> bool:
    return c != "\n"
