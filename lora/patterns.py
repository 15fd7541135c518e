"""Regular expressions over module paths, of which none can run for long.

Python's matcher tries, where a pattern fits in many ways, one after the other. So a pattern is
taken only if the ways are few: what is repeated neither repeats nor chooses, and all repetitions,
options and choices together leave at most 2²⁴ ways on a path of 64 characters. What people write
stays far below: `.*\\.(q_proj|v_proj)` has 2⁷.

Source of what patterns and lists mean: PEFT, `tuners_utils.check_target_module_exists`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

_LONGEST = 100_000  # characters of a pattern: a list of a large model's paths fits
_WAYS = 24  # log2 of how many ways there may be
_REPEAT = 6  # log2 of the lengths that a repetition can have on a path
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:=!]|[()|]|(?:[*+?]|\{\d*,?\d*\})[?+]?|.", re.S
)
_AMOUNT = re.compile(r"[*+?]|\{\d+,?\d*\}|\{,\d+\}")


def compile_safely(text: str) -> Callable[[str], bool]:
    """A test whether a regular expression fits the whole of a path.

    Raises:
        ValueError: it is malformed, too long, or could take very long.
    """
    pattern = _compiled(text)
    return lambda path: pattern.fullmatch(path) is not None


def chooser(entries: str | Sequence[str]) -> Callable[[str], bool]:
    """PEFT's rule for targets: a string is a regular expression, a list holds suffixes.

    Raises:
        ValueError: as `compile_safely`.
    """
    if isinstance(entries, str):
        return compile_safely(entries)
    ends = tuple(f".{entry}" for entry in entries)
    return lambda path: f".{path}".endswith(ends)


def suffix_pattern(text: str) -> Callable[[str], bool]:
    """PEFT's rule for the keys of `rank_pattern`: a regular expression for a path or its end.

    Raises:
        ValueError: as `compile_safely`.
    """
    pattern = _compiled(text)

    def fits(path: str) -> bool:
        starts = [0, *(i + 1 for i, character in enumerate(path) if character == ".")]
        return any(pattern.fullmatch(path, start) for start in starts)

    return fits


def _compiled(text: str) -> re.Pattern[str]:
    shown = repr(text if len(text) <= 120 else f"{text[:120]}…")
    if len(text) > _LONGEST:
        raise ValueError(f"pattern {shown} has more than {_LONGEST:,} characters")
    try:
        pattern = re.compile(f"(?:{text})")
        re.compile(text)  # the whole may hide a parenthesis too many
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{shown} is no regular expression: {error}") from None
    if reason := _why_slow(text):
        raise ValueError(f"pattern {shown} could take very long: {reason}. List the names instead")
    return pattern


def _why_slow(text: str) -> str | None:
    """The reason, or None where there are few ways to fit.

    Each open group holds log2 of the ways of its alternatives, the last one not yet complete.
    """
    groups: list[list[float]] = [[0.0]]
    repeated = 0.0  # the ways of what a quantifier that comes now would repeat
    for token in _TOKEN.findall(text):
        if token.startswith("("):
            groups.append([0.0])
        elif token == "|":
            groups[-1].append(0.0)
        elif token == ")":
            repeated = math.log2(sum(2.0**ways for ways in groups.pop()))
            groups[-1][-1] += repeated
        elif _AMOUNT.match(token):
            if repeated and not token.startswith("?"):
                return "it repeats what itself repeats or chooses"
            numbers = [int(number) for number in re.findall(r"\d+", token)]
            if max(numbers, default=0) > 1000:
                return f"it repeats {max(numbers):,} times"
            fixed = len(numbers) == 1 and "," not in token
            groups[-1][-1] += 0 if fixed else 1 if token.startswith("?") else _REPEAT
            repeated = 0.0
        else:
            repeated = 0.0
        if max(groups[-1]) > _WAYS:
            return "it repeats and chooses too often"
    return None if math.log2(sum(2.0**w for w in groups[0])) <= _WAYS else "it chooses too often"
