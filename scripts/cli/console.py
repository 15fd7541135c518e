"""What a script shows: plain text, tables, a progress bar."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Advance = Callable[..., None]  # a count, a text


class Plain(Console):
    """Shows text as it is, never as markup."""

    def __init__(self, *, quiet: bool = False) -> None:
        terminal = False if quiet else None  # no progress bar
        plain = dict.fromkeys(("markup", "emoji", "highlight"), False)
        super().__init__(quiet=quiet, force_terminal=terminal, **plain)

    def on_broken_pipe(self) -> None:
        """Rich would end the process."""
        raise BrokenPipeError("Nobody reads the output any more.")


@contextmanager
def bar(
    console: Console, text: str = "", total: float | None = None, completed: int = 0
) -> Iterator[Advance]:
    """A progress bar on a terminal; yields its `advance`."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    how = {"console": console, "disable": not console.is_terminal, "transient": True}
    with Progress(*columns, TimeRemainingColumn(), **how) as progress:
        task = progress.add_task(text, total=total, completed=completed, visible=False)

        def advance(more: int, text: str | None = None) -> None:
            progress.update(task, advance=more, description=text, visible=True)

        yield advance


def table(title: str, heads: list[str], rows: Iterable[list[str]], ratios: list[int]) -> Table:
    """A table; `ratios` are widths."""
    made = Table(title=title, show_lines=True)
    for head, ratio in zip(heads, ratios, strict=True):
        made.add_column(Text(head), ratio=ratio, overflow="fold")
    for row in rows:  # Text is no markup
        made.add_row(*(Text(cell, style="green" * cell.startswith("exact")) for cell in row))
    return made
