"""Runs docs/tour.ipynb and keeps what its cells show: `python tests/tour.py` writes it anew.

A cell is run as IPython runs it: its last expression is shown by `_repr_mimebundle_`, `_repr_html_`
or `repr`, and what it prints is a stream. That is all the tour needs, so it takes no kernel.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
Cell = dict[str, Any]


def code_cells(notebook: Cell) -> list[Cell]:
    """The cells that run, in their order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(value: Any) -> Cell:
    """What a notebook keeps of a value, by kind."""
    if hasattr(value, "_repr_mimebundle_"):
        return dict(value._repr_mimebundle_((), ()))
    html = getattr(value, "_repr_html_", lambda: None)()
    return {"text/plain": repr(value)} | ({} if html is None else {"text/html": html})


def execute(source: str, names: dict[str, Any], number: int) -> list[Cell]:
    """Run a cell in the namespace; what it printed and showed, as a notebook keeps it."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, bundle = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
            bundle = None if value is None else shown(value)
    text, outputs = printed.getvalue(), []
    if text:
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines(text)})
    if bundle is not None:
        data = {kind: lines(content) for kind, content in bundle.items()}
        about = {"execution_count": number, "metadata": {}, "output_type": "execute_result"}
        outputs.append(about | {"data": data})
    return outputs


def lines(text: str) -> list[str]:
    """A text as a notebook's list of lines."""
    return text.splitlines(keepends=True)


def run(notebook: Cell) -> tuple[list[list[Cell]], dict[str, Any]]:
    """Every code cell from top to bottom in one namespace: their outputs, and the names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = enumerate(code_cells(notebook), 1)
    return [execute("".join(cell["source"]), names, number) for number, cell in cells], names


def main() -> None:
    """Run the tour and write its outputs into the file."""
    notebook = json.loads(NOTEBOOK.read_text())
    for number, (cell, outputs) in enumerate(
        zip(code_cells(notebook), run(notebook)[0], strict=True), 1
    ):
        cell |= {"execution_count": number, "outputs": outputs}
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    NOTEBOOK.write_text(text + "\n")


if __name__ == "__main__":
    main()
