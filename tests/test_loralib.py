"""loralib as the oracle: its sliced update, its embedding, its GPT-2."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpt2
import lora
from tests.toys import IDX, tiny_gpt2

loralib = pytest.importorskip("loralib", reason="loralib is the oracle here")


def merged_linear(r: int = 2, **more) -> loralib.MergedLinear:
    """Their fused projection with query and value adapted, B not zero."""
    torch.manual_seed(0)
    theirs = loralib.MergedLinear(
        6, 12, r=r, lora_alpha=5, enable_lora=[True, False, True], merge_weights=False, **more
    )
    nn.init.normal_(theirs.lora_B)
    return theirs


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_our_slices_are_their_merged_linear(r, fan_in_fan_out):
    theirs = merged_linear(r, fan_in_fan_out=fan_in_fan_out)
    base = gpt2.Conv1D(6, 12) if fan_in_fan_out else nn.Linear(6, 12)
    base.load_state_dict({"weight": theirs.weight, "bias": theirs.bias})
    ours = nn.Sequential(base)
    lora.inject(ours, r=r, alpha=5, targets="0[q,v]", slices=("q", "k", "v"))
    update = ours[0].updates["default"]
    with torch.no_grad():
        update.A.copy_(theirs.lora_A)
        update.B.copy_(theirs.lora_B)
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
    update = ours[0].updates["default"]
    with torch.no_grad():
        update.A.copy_(theirs.lora_A)
        update.B.copy_(theirs.lora_B)
    idx = torch.randint(0, 11, (4, 5))
    torch.testing.assert_close(ours(idx), theirs(idx), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("r", [1, 4])
def test_a_published_checkpoint_computes_here_what_it_computes_there(r):
    """loralib's weights of q and v in every c_attn, put by hand into a GPT-2 of ours and theirs."""
    ours, theirs = tiny_gpt2(), tiny_gpt2()
    paths = lora.inject(ours, r=r, alpha=32, targets="c_attn[q,v]")
    generator = torch.Generator().manual_seed(0)
    for path in paths:
        a = torch.randn(2 * r, 16, generator=generator) * 0.1
        b = torch.randn(32, r, generator=generator) * 0.1
        old = theirs.get_submodule(path)
        new = loralib.MergedLinear(
            16, 48, r=r, lora_alpha=32, enable_lora=[True, False, True],
            fan_in_fan_out=True, merge_weights=False,
        )  # fmt: skip
        new.load_state_dict({"weight": old.weight, "bias": old.bias, "lora_A": a, "lora_B": b})
        theirs.get_submodule(path.rpartition(".")[0]).c_attn = new
        update = ours.get_submodule(path).updates["default"]
        with torch.no_grad():
            update.A.copy_(a)
            update.B.copy_(b)
    torch.testing.assert_close(ours(IDX), theirs.eval()(IDX), rtol=1e-5, atol=1e-5)
