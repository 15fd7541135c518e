"""How fast a training step could be at most, by its device's arithmetic and its memory.

A step reads each weight twice, forward and backward, and takes 4 operations a weight and token: 2
forward, and 2 backward for the gradient of the activations; the base's own is not computed. What
attention, adapter, head and optimiser take is left out, so that no step reaches the limit.

Source: NVIDIA's data sheets, dense products; the name is that of `torch.cuda.get_device_name`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .markup import Markup, joined, tag
from .record import Record

# Operations a second in bfloat16 and in float32, and bytes a second.
DEVICES = {
    "NVIDIA H200": (989e12, 67e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 67e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12, 2.04e12),
}


@dataclass(frozen=True)
class Limit:
    """Tokens a second that a device allows, and what bounds them: `memory` or `arithmetic`."""

    tokens: float
    by: str


def of(record: Record) -> Limit | None:
    """The limit of a run; None where its device, or its speed, is not known."""
    machine, counts = record.run.get("machine", {}), record.run.get("parameters", {})
    device = DEVICES.get(machine.get("gpu", ""))
    if device is None or "base" not in counts or not record.steps:
        return None
    sixteen = record.asked.get("autocast") or machine["weights"] in ("bfloat16", "float16")
    size = 2 if machine["weights"] in ("bfloat16", "float16") else 4
    weights = counts["base"]["total"]
    tokens = sum(step["tokens"] for step in record.steps) / len(record.steps)
    seconds = {
        "memory": 2 * weights * size / device[2],
        "arithmetic": 4 * weights * tokens / device[0 if sixteen else 1],
    }
    by = max(seconds, key=seconds.__getitem__)
    return Limit(tokens / seconds[by], by)


def bar(record: Record) -> Markup | None:
    """How near the run came to it."""
    found, reached = of(record), record.tokens_a_second
    if found is None or reached is None:
        return None
    share = reached / found.tokens
    said = (
        f"{reached:,.0f} tokens a second, {share:.1%} of the {found.tokens:,.0f} that the "
        f"{record.run['machine']['gpu']} allows at this batch, bounded by its {found.by}."
    )
    inside = tag("i", style=f"width:{100 * min(share, 1):.2f}%")
    return joined(tag("div", inside, class_="bar"), tag("p", said, class_="note"))
