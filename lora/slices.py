"""Updates of some slices of a fused projection: `"c_attn[q,v]"` leaves the keys alone."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import Slices
from lora.layer import LowRankUpdate
from lora.layout import out_in_view


class SlicedUpdate(LowRankUpdate):
    """k updates side by side: A is `(k·r, in)`; B holds their B's stacked, `(rows adapted, r)`.

    `slices` is the `(start, stop)` of each adapted slice of the output, by name.

    Source: loralib's `MergedLinear`.
    """

    def __init__(self, *sizes: Any, slices: Mapping[str, tuple[int, int]], **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.slices, self.out_features = dict(slices), len(self.B)
        rows = [torch.arange(*span, device=self.B.device) for span in slices.values()]
        self.rows: Tensor  # the adapted rows of the output
        self.register_buffer("rows", torch.cat(rows), persistent=False)
        self.B = nn.Parameter(self.B.new_zeros(len(self.rows), self.config.r // len(slices)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `(k·r, in)`, and the block-structured B `(out, k·r)`."""
        r, columns, first = self.B.shape[1], self.config.r, 0
        blocks: list[Tensor] = []
        for i, (start, stop) in enumerate(self.slices.values()):
            part = self.B[first : first + stop - start]
            blocks.append(F.pad(part, (i * r, columns - (i + 1) * r)))
            first += stop - start
        b = self.B.new_zeros(self.out_features, columns)
        return self.A, b.index_copy(0, self.rows, torch.cat(blocks))

    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Copy values; those of B outside the blocks are a ValueError."""
        r = self.B.shape[1]
        spans = self.slices.values()
        blocks = [b[start:stop, i * r : (i + 1) * r] for i, (start, stop) in enumerate(spans)]
        if sum(int(block.count_nonzero()) for block in blocks) != int(b.count_nonzero()):
            raise ValueError(f"B has values outside the slices {', '.join(self.slices)}")
        super().set_factors(a, torch.cat(blocks))


def split_target(target: str) -> tuple[str, tuple[str, ...]]:
    """`"c_attn[q,v]"` is `"c_attn"` and `("q", "v")`; without brackets, no slices."""
    name, bracket, inside = target.partition("[")
    if not bracket and "]" not in target:
        return target, ()
    names = tuple(part.strip() for part in inside.removesuffix("]").split(","))
    distinct = all(names) and len(set(names)) == len(names)
    if not inside.endswith("]") or "]" in name or not distinct:
        raise ValueError(f"Target {target!r} is not of the form 'c_attn[q,v]'.")
    return name, names


def spans_of(
    base: nn.Module, names: Sequence[str], given: Slices | None = None
) -> dict[str, tuple[int, int]]:
    """Where the named slices of a layer's output lie, by `given` or the layer's `slices`."""
    if not names:
        return {}
    out_features = out_in_view(base, base.get_parameter("weight")).shape[0]
    known: Slices = given or getattr(base, "slices", ())
    if not known:
        raise ValueError("it names no slices; pass slices=('q', 'k', 'v')")
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"it has slices {', '.join(known)}, no {', '.join(missing)}")
    if isinstance(known, Mapping):
        sizes = dict(known)
    else:
        sizes = dict.fromkeys(known, out_features // len(known))
    if sum(sizes.values()) != out_features:
        raise ValueError(f"its {out_features} outputs are not those of slices {known}")
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    return {name: (ends[name] - sizes[name], ends[name]) for name in names}
