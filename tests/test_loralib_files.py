"""Files that are no checkpoint of loralib's, or fit no layer: refused, and nothing is changed."""

from __future__ import annotations

import pytest
import torch

import lora
from tests.toys import snapshot, tiny_gpt2

PATHS = [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]


def published(r: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path in PATHS:
        state[f"{path}.lora_A"] = torch.randn(2 * r, 16, generator=generator) * 0.1
        state[f"{path}.lora_B"] = torch.randn(32, r, generator=generator) * 0.1
    return state


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
        (published() | {5: torch.ones(1)}, "the key 5 is no name"),
        (published() | {None: 1, ("a",): 2}, r"the key None is no name; the key \('a',\)"),
        (published() | {f"module.{PATHS[0]}.lora_A": torch.ones(8, 16)}, "stands twice"),
        (published() | {f"{PATHS[0]}.lora_A": torch.ones(8, 16, device="meta")},
         "lora_A is on the meta device"),
        (published() | {f"{PATHS[0]}.lora_A": torch.ones(8, 16).to_sparse()}, "lora_A is sparse"),
        (published() | {f"{PATHS[0]}.lora_A": torch.ones(8, 16, dtype=torch.complex64)},
         "lora_A is complex64"),
        (published() | {f"{PATHS[0]}.lora_B": torch.ones(32, 4, dtype=torch.int64)},
         "lora_B is int64"),
        (published() | {f"{PATHS[0]}.lora_B": torch.ones(32, 4).to(torch.float8_e5m2)},
         "lora_B is float8_e5m2"),
        (published() | {f"{PATHS[0]}.lora_A": torch.full((8, 16), 1e300, dtype=torch.float64)},
         "lora_A has values that are infinite in float32"),
        (published() | {f"{PATHS[0]}.lora_A": torch.ones(8, 16, 1, 1)}, "A and B are"),
        (published() | {f"{PATHS[0]}.lora_A": torch.ones(0, 16)}, "r must be"),
        (published() | {f"x{i}.c_attn.lora_A": torch.ones(1) for i in range(3000)}, "29.. more"),
        (published() | {"lora_" + "x" * 100_000: torch.ones(1)}, "lora_xx.*…x+: left over"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content, words, capsys):
    torch.save(content, tmp_path / "gpt2.pt")
    model = tiny_gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words) as caught:
        lora.load_loralib(model, tmp_path / "gpt2.pt")
    assert len(str(caught.value)) <= 2000
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
