"""loralib as the oracle: its sliced update, its embedding, and the checkpoints it publishes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpt2
import lora
from tests.test_loralib_files import PATHS, published
from tests.toys import TINY, tiny_gpt2

loralib = pytest.importorskip("loralib", reason="loralib is the oracle here")

IDX = torch.randint(0, TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))


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


def theirs_with(state: dict[str, torch.Tensor], r: int, alpha: float) -> gpt2.GPT2:
    """Our GPT-2 with loralib's own layers in the place of c_attn."""
    model = tiny_gpt2()
    for path in PATHS:
        old = model.get_submodule(path)
        new = loralib.MergedLinear(
            16, 48, r=r, lora_alpha=alpha, enable_lora=[True, False, True],
            fan_in_fan_out=True, merge_weights=False,
        )  # fmt: skip
        own = {"weight": old.weight, "bias": old.bias}
        own |= {f"lora_{f}": state[f"{path}.lora_{f}"] for f in "AB"}
        new.load_state_dict(own)
        model.get_submodule(path.rpartition(".")[0]).c_attn = new
    return model.eval()


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_published_checkpoints_load(tmp_path, r, prefix, nested, conv):
    state = published(r)
    want = theirs_with(state, r, 32)(IDX)
    saved = {
        prefix + k: v[..., None] if conv and k.endswith("B") else v for k, v in state.items()
    } | {f"{prefix}transformer.ln_f.weight": torch.ones(16)}  # the base's own may stand beside
    torch.save({"model_state_dict": saved} if nested else saved, tmp_path / "gpt2.pt")
    model = tiny_gpt2()
    assert lora.load_loralib(model, tmp_path / "gpt2.pt") == PATHS
    torch.testing.assert_close(model(IDX), want, rtol=1e-5, atol=1e-5)
    assert lora.count_parameters(model).trainable == sum(v.numel() for v in state.values())


def test_a_loaded_checkpoint_can_be_saved_as_ours(tmp_path):
    torch.save(published(), tmp_path / "gpt2.pt")
    model, again = tiny_gpt2(), tiny_gpt2()
    lora.load_loralib(model, tmp_path / "gpt2.pt", alpha=7, adapter="e2e")
    lora.save(model, tmp_path / "ours", adapter="e2e")
    lora.load(again, tmp_path / "ours")
    assert torch.equal(model(IDX), again(IDX))
    want = theirs_with(published(), 4, 7)(IDX)
    torch.testing.assert_close(model(IDX), want, rtol=1e-5, atol=1e-5)
