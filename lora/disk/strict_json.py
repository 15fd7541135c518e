"""JSON that means one thing: no key twice, no NaN, no number that a float cannot hold."""

from __future__ import annotations

import json
import math
from typing import Any, cast

from lora.messages import brief, cut


def parse(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, nested too deeply, has a key twice in one object, or a number
            that is not finite or has more than 64 bits.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_number,
            parse_float=_float,
            parse_int=_int,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # not UTF-8 either
        raise ValueError(cut(error)) from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
        ValueError: it holds none, or as `parse`.
    """
    found = parse(text)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return cast(dict[str, Any], found)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {brief(twice)} stands twice in one object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{cut(text, 40)} is too large a number")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) >= 2**63:
        raise ValueError(f"{cut(text, 40)} is too large an integer")
    return value
