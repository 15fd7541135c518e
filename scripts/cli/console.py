"""What a script shows: text as it is, tables, a progress bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Advance = Callable[..., None]  # of how much more is done; perhaps another text, another total


class Plain(Console):
    """Shows text as it is: no path and no answer is markup."""

    def __init__(self, *, quiet: bool = False) -> None:
        terminal = False if quiet else None  # and so no progress bar
        super().__init__(
            markup=False, emoji=False, highlight=False, quiet=quiet, force_terminal=terminal
        )

    def on_broken_pipe(self) -> None:
        """Leave the error to `guarded`; rich would end the process, and training with it."""
        raise BrokenPipeError("Nobody reads the output any more.")


@contextmanager
def bar(
    console: Console, text: str, total: float | None = None, completed: int = 0
) -> Iterator[Advance]:
    """A progress bar with a text, where the console is a terminal; gives what advances it."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(text, total=total, completed=completed)

        def advance(more: int, text: str | None = None, total: float | None = None) -> None:
            progress.update(task, advance=more, description=text, total=total)

        yield advance


def table(
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    ratios: Sequence[int] | None = None,
) -> Table:
    """A table: of words first and numbers after, or of texts in columns of these widths."""
    made = Table(title=title, show_lines=ratios is not None)
    for i, head in enumerate(heads):
        if ratios:
            made.add_column(Text(head), ratio=ratios[i], overflow="fold")
        else:
            numeric = i > 0 and head != "what it is"
            made.add_column(Text(head), justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:  # as Text: nothing in it is markup
        made.add_row(*(Text(cell, style="green" * cell.startswith("exact")) for cell in row))
    return made
