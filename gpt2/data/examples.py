"""Examples as text, and the files that hold them: a prompt and a completion each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

SHOWN = 10  # faults that are listed one by one


@dataclass(frozen=True)
class Example:
    """A text in two parts, of which the prompt need not be learnt."""

    prompt: str
    completion: str


def from_texts(texts: Iterable[str]) -> Iterator[Example]:
    """Examples that are learnt as a whole."""
    return (Example("", text) for text in texts)


def read_jsonl(path: str | Path) -> list[Example]:
    """Read examples from a file with a JSON object a line.

    A line has `text`; or `question` and `answer`, which become "Q: …\\nA: …"; or `prompt` and
    `completion`, taken as they are. Blank lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: listing the faulty lines as `file:line`, or there is none at all.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing or no file.")
    examples: list[Example] = []
    faults: list[str] = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                examples.append(_parse(line))
            except ValueError as error:
                faults.append(f"{path}:{number}: {error}")
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError("; ".join(faults[:SHOWN]) + more + ".")
    if not examples:
        raise ValueError(f"{path} holds no examples.")
    return examples


def _parse(line: bytes) -> Example:
    try:
        fields: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deep)") from None
    forms = ({"text"}, {"question", "answer"}, {"prompt", "completion"})
    if not isinstance(fields, dict) or (keys := cast(dict[str, Any], fields).keys()) not in forms:
        found = sorted(cast(dict[str, Any], fields)) if isinstance(fields, dict) else fields
        raise ValueError(
            f"wants 'text', or 'question' and 'answer', or 'prompt' and 'completion', got {found!r}"
        )
    fields = cast(dict[str, Any], fields)
    if wrong := [key for key in keys if not isinstance(fields[key], str)]:
        raise ValueError(f"{wrong[0]!r} is {fields[wrong[0]]!r}, not a string")
    if empty := [key for key in keys if not fields[key].strip() and key != "prompt"]:
        raise ValueError(f"{empty[0]!r} is empty")
    for key in keys:
        fields[key].encode()  # refuses half a surrogate pair, which JSON can escape
    if "text" in fields:
        return Example("", fields["text"])
    if "question" in fields:
        return Example(f"Q: {fields['question']}\nA:", f" {fields['answer']}")
    return Example(fields["prompt"], fields["completion"])
