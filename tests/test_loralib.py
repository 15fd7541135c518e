"""loralib as the oracle: its sliced update, its embedding, and the checkpoints it publishes."""

from __future__ import annotations

import loralib
import pytest
import torch
from torch import nn

import gpt2
import lora
from tests.toys import TINY, snapshot, tiny_gpt2

IDX = torch.randint(0, TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
PATHS = [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]


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


def published(r: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path in PATHS:
        state[f"{path}.lora_A"] = torch.randn(2 * r, 16, generator=generator) * 0.1
        state[f"{path}.lora_B"] = torch.randn(32, r, generator=generator) * 0.1
    return state


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


def without(key: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in published().items() if not k.endswith(key)}


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds no tensors by name"),
        (torch.ones(3), "holds no tensors by name"),
        ({"model_state_dict": 5}, "holds no tensors by name"),
        ({}, "holds no c_attn.lora_A"),
        (without("h.1.attn.c_attn.lora_B"), "h.1.attn.c_attn: lora_B is missing"),
        ({k: v for k, v in published().items() if ".0." in k}, "h.1.attn.c_attn: no tensors"),
        (published() | {"transformer.h.7.attn.c_attn.lora_A": torch.ones(8, 16)},
         "h.7.attn.c_attn: no such layer here"),
        (published() | {"transformer.h.0.mlp.c_fc.lora_A": torch.ones(8, 16)}, "c_fc.lora_A: left"),
        (published() | {f"{PATHS[0]}.lora_A": 5.0}, "c_attn.lora_A: left over"),
        (published() | {f"{PATHS[0]}.lora_A": torch.tensor(1.0)}, "r must be"),
        (published() | {f"{PATHS[0]}.lora_B": torch.ones(32, 3)},
         r"A and B are \(\(8, 16\), \(32, 3\)\)"),
        (published() | {f"{PATHS[0]}.lora_B": torch.full((32, 4), torch.nan)}, "NaN"),
        ({"x": Evil()}, "no checkpoint of tensors"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content, words, capsys):
    torch.save(content, tmp_path / "gpt2.pt")
    model = tiny_gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        lora.load_loralib(model, tmp_path / "gpt2.pt")
    assert snapshot(model) == before
    assert "executed" not in capsys.readouterr().out


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        lora.load_loralib(tiny_gpt2(), tmp_path / "nowhere")
    (tmp_path / "x").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="no checkpoint of tensors"):
        lora.load_loralib(tiny_gpt2(), tmp_path / "x")
    torch.save(published(), tmp_path / "gpt2.pt")
    with pytest.raises(ValueError, match="alpha must be"):
        lora.load_loralib(tiny_gpt2(), tmp_path / "gpt2.pt", alpha=-1)
