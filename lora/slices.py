"""Updates of some slices of a fused projection: `"c_attn[q,v]"` leaves the keys alone.

Each slice of the output has an A and a B of its own. Together they are a plain update of rank
k·r whose B is block-structured, and everything but the training of B sees them as that.

Source: Hu et al. 2021, section 4.2, which adapts query and value only; loralib's `MergedLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import Slices, UpdateConfig
from lora.layer import LowRankUpdate
from lora.layout import out_in_view


class SlicedUpdate(LowRankUpdate):
    """k updates side by side: A is `(k·r, in)`; B holds their B's stacked, `(rows adapted, r)`.

    Args:
        in_features, out_features: of the base layer.
        config: of all k together; a slice's own rank is `config.r / k`.
        slices: `(start, stop)` of each adapted slice of the output, by name.
        dtype, device: of A and B.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: UpdateConfig,
        slices: Mapping[str, tuple[int, int]],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features, out_features, config, dtype=dtype, device=device)
        self.slices = dict(slices)
        self.out_features = out_features
        rows = torch.cat([torch.arange(*span, device=device) for span in slices.values()])
        self.rows: Tensor  # the adapted rows of the output
        self.register_buffer("rows", rows, persistent=False)
        self.B = nn.Parameter(self.B.new_zeros(len(rows), config.r // len(slices)))

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

    def _set(self, a: Tensor, b: Tensor) -> None:
        r = self.B.shape[1]
        spans = self.slices.values()
        blocks = [b[start:stop, i * r : (i + 1) * r] for i, (start, stop) in enumerate(spans)]
        if sum(int(block.count_nonzero()) for block in blocks) != int(b.count_nonzero()):
            raise ValueError(f"B has values outside the slices {', '.join(self.slices)}")
        self.A.copy_(a)
        self.B.copy_(torch.cat(blocks))


def split_target(target: str) -> tuple[str, tuple[str, ...]]:
    """`"c_attn[q,v]"` is `"c_attn"` and `("q", "v")`; without brackets, no slices.

    Raises:
        ValueError: unbalanced brackets, or a slice that is empty or named twice.
    """
    name, bracket, inside = target.partition("[")
    if not bracket and "]" not in target:
        return target, ()
    names = tuple(part.strip() for part in inside.removesuffix("]").split(","))
    if not inside.endswith("]") or not all(names) or len(set(names)) < len(names) or "]" in name:
        raise ValueError(f"Target {target!r} is not of the form 'c_attn[q,v]'.")
    return name, names


def spans_of(
    base: nn.Module, names: Sequence[str], given: Slices | None = None
) -> dict[str, tuple[int, int]]:
    """Where the named slices of a layer's output lie, by the given `slices` or the layer's own.

    Names alone are equal parts of the output; a mapping gives each part's size, in its order.

    Raises:
        ValueError: the layer has no named slices, they do not divide its output evenly, or a name
            is not among them.
    """
    if not names:
        return {}
    out_features = out_in_view(base, base.get_parameter("weight")).shape[0]
    known: Slices = given or getattr(base, "slices", ())
    if not known:
        raise ValueError("it names no slices; pass slices=('q', 'k', 'v') or such")
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"it has slices {', '.join(known)}, but no {', '.join(missing)}")
    if isinstance(known, Mapping):
        sizes = dict(known)
    else:
        sizes = dict.fromkeys(known, out_features // len(known))
    if sum(sizes.values()) != out_features:
        raise ValueError(f"its {out_features} outputs are not divided by slices {known}")
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    return {name: (ends[name] - sizes[name], ends[name]) for name in names}
