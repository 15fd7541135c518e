"""Error messages of a bounded length, however much is wrong."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 200  # characters of one fault; what a file holds may be megabytes long
TOTAL = 1600  # characters of all of them: the message around them has room for 400


def listed(faults: Sequence[str]) -> str:
    """The faults in one line, "; " between them: as many as fit, then how many more there are."""
    shown: list[str] = []
    room = TOTAL
    for fault in faults:
        text = fault if len(fault) <= LONGEST else f"{fault[: LONGEST - 51]}…{fault[-50:]}"
        room -= len(text) + 2
        if room < 0:
            break
        shown.append(text)
    more = len(faults) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
