"""loralib as the oracle: its sliced update and its embedding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpt2
import lora

loralib = pytest.importorskip("loralib", reason="loralib is the oracle here")


def take(update: lora.LowRankUpdate, theirs: nn.Module) -> None:
    with torch.no_grad():
        update.A.copy_(theirs.lora_A)
        update.B.copy_(theirs.lora_B)


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_our_slices_are_their_merged_linear(r, fan_in_fan_out):
    """A fused projection of which query and value are adapted."""
    torch.manual_seed(0)
    sliced = {"enable_lora": [True, False, True], "fan_in_fan_out": fan_in_fan_out}
    theirs = loralib.MergedLinear(6, 12, r=r, lora_alpha=5, merge_weights=False, **sliced)
    nn.init.normal_(theirs.lora_B)
    base = gpt2.Conv1D(6, 12) if fan_in_fan_out else nn.Linear(6, 12)
    base.load_state_dict({"weight": theirs.weight, "bias": theirs.bias})
    ours = nn.Sequential(base)
    lora.inject(ours, r=r, alpha=5, targets="0[q,v]", slices=("q", "k", "v"))
    update = ours[0].updates["default"]
    take(update, theirs)
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    probe = torch.randn(3, 5, 12)
    (ours(x) * probe).sum().backward()
    (theirs(x) * probe).sum().backward()
    torch.testing.assert_close(update.A.grad, theirs.lora_A.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(update.B.grad, theirs.lora_B.grad, rtol=1e-4, atol=1e-5)


def test_our_embedding_is_theirs():
    torch.manual_seed(0)
    theirs = loralib.Embedding(11, 6, r=3, lora_alpha=5, merge_weights=False)
    nn.init.normal_(theirs.lora_A)
    ours = nn.Sequential(nn.Embedding(11, 6))
    ours[0].load_state_dict({"weight": theirs.weight})
    lora.inject(ours, r=3, alpha=5, targets="0")
    take(ours[0].updates["default"], theirs)
    idx = torch.randint(0, 11, (4, 5))
    torch.testing.assert_close(ours(idx), theirs(idx), rtol=1e-5, atol=1e-6)
