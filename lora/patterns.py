"""A placeholder until disk's lands."""

from __future__ import annotations

import re
from collections.abc import Callable


def compile_safely(text: str) -> Callable[[str], bool]:
    """A matcher of whole paths."""
    try:
        compiled = re.compile(text, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}.") from None
    return lambda path: compiled.fullmatch(path) is not None
