"""A README.md beside a saved adapter, in plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lora.config import UpdateConfig

CARD = "README.md"
_MARK = "<!-- Written by lora.save, which writes it anew. -->"


def write(base_name: str | None, updates: Mapping[str, UpdateConfig], parameters: int) -> str:
    """The card's text; the same adapter gives the same text.

    Args:
        base_name: of the base model, a folder's or one on the Hub.
        updates: what each update is made of, by the path of its layer.
        parameters: how many numbers A and B hold, all together.
    """
    base = f"`{base_name}`" if base_name else "a base model whose name is not known"
    on_hub = base_name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base_name)
    head = ["library_name: peft", "tags:", "- lora"]
    if on_hub:
        head.insert(0, f"base_model: {base_name}")
    ranks = sorted({u.r for u in updates.values()})
    scalings = sorted({u.scaling for u in updates.values()})
    kinds = sorted({re.sub(r"\b\d+\b", "*", path) for path in updates})
    lines = [
        "---",
        *head,
        "---",
        _MARK,
        "# A LoRA adapter",
        "",
        f"This folder holds small matrices that change what {base} computes. "
        "It does not hold the base itself.",
        "",
        f"- Layers: {len(updates)}, at {', '.join(f'`{kind}`' for kind in kinds)}",
        f"- Rank: {', '.join(map(str, ranks))}",
        f"- Scaling of the update: {', '.join(f'{s:g}' for s in scalings)}",
        f"- Parameters: {parameters:,}",
        "",
        "What it was trained on and what it is good for: not stated.",
        "",
        "## Use",
        "```python",
        "import lora",
        "",
        'lora.load(model, "path/of/this/folder")  # model: the base',
        "```",
        "PEFT reads it too: `peft.PeftModel.from_pretrained(model, folder)`.",
    ]
    return "\n".join(lines) + "\n"


def require_free(folder: Path) -> None:
    """Raise where someone else's card would be overwritten.

    Raises:
        ValueError: the folder has a README.md that `lora.save` did not write.
    """
    file = folder / CARD
    if file.is_file() and _MARK not in file.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"{file} is not one that lora.save wrote. Move it away, or save with card=False."
        )
