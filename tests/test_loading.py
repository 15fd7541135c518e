"""What `lora.load` makes of strange files, strange models and strange numbers."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from lora.disk import checkpoint
from tests.folders import C_ATTN, edit, refuses
from tests.toys import IDX, MLP, TINY, randomize, raw, tiny_gpt2

A = f"{C_ATTN}.lora_A.weight"
H = "transformer.h"


def adapted(**arguments) -> nn.Module:
    model = tiny_gpt2()
    lora.inject(model, **{"r": 2, "seed": 0} | arguments)
    randomize(model)
    return model


# Numbers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.double() * 1e300, r"lora_A has NaN or infinite values in torch.float32"),
        (lambda t: t.fill_(torch.inf), r"lora_A has NaN or infinite"),
        (lambda t: t.to(torch.complex64), r"lora_A is torch.complex64, which is no float"),
        (lambda t: t.to(torch.int32), r"lora_A is torch.int32, which is no float"),
        (lambda t: t > 0, r"lora_A is torch.bool, which is no float"),
        (lambda t: t.to(torch.float8_e4m3fn), r"lora_A is torch.float8_e4m3fn, which is no float"),
    ],
)
def test_factors_that_are_no_finite_floats_here_are_refused(saved, change, words):
    folder, _ = saved
    edit(folder, lambda tensors: tensors.update({A: change(tensors[A])}))
    refuses(tiny_gpt2(), folder, f"{H}.0.attn.c_attn: {words}")


def test_finiteness_is_judged_in_the_dtype_that_is_loaded_to(saved):
    folder, _ = saved
    edit(folder, lambda tensors: tensors.update({A: tensors[A] + 1e5}))
    refuses(
        tiny_gpt2(),
        folder,
        "lora_A has NaN or infinite values in torch.float16",
        dtype=torch.float16,
    )
    edit(folder, lambda tensors: tensors.update({A: tensors[A].double()}), metadata=None)
    lora.load(tiny_gpt2(), folder, allow_base_mismatch=True, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.complex64, "A of transformer.h.0.attn.c_attn is torch.complex64"),
        (torch.float8_e4m3fn, "A of transformer.h.0.attn.c_attn is torch.float8_e4m3fn"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, dtype, words):
    model = adapted()
    update = model.transformer.h[0].attn.c_attn.updates["default"]
    update.A = nn.Parameter(update.A.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"Not saved: {words}"):
        lora.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_base_without_finite_values_is_saved_without_its_fingerprint(tmp_path):
    model = adapted(targets=("c_attn", "c_fc"))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.base.weight.fill_(torch.nan)
    model.transformer.h[1].mlp.c_fc.base.to("meta")
    lora.save(model, tmp_path)
    assert len(lora.load(tiny_gpt2(seed=0), tmp_path)) == 4
    with pytest.raises(ValueError, match=r"another base, .* in transformer\.h\.0\.mlp\.c_fc"):
        lora.load(tiny_gpt2(seed=5), tmp_path)


def test_an_adapter_without_values_is_not_saved(tmp_path):
    with pytest.raises(NotImplementedError, match="meta tensor; no data"):
        lora.save(adapted().to("meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_error_lists_some_of_many_faults(saved):
    folder, _ = saved
    edit(
        folder,
        lambda t: t.update({f"base_model.model.h.{i}.lora_A": t[A].clone() for i in range(3000)}),
    )
    with pytest.raises(
        ValueError, match=r"h\.\d+: no such layer here; .*and 2,?9\d\d more"
    ) as caught:
        lora.load(tiny_gpt2(), folder)
    assert len(str(caught.value)) <= 2000


# What a save and a load cost


class Counting(TorchDispatchMode):
    """Counts the elements that operations read or make, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
            made = func is torch.ops.aten.index.Tensor  # reads no more than it makes
            self.elements += sum(t.numel() for t in (tensors[-1:] if made else tensors))
        return out


def test_a_save_and_a_load_read_some_entries_of_the_base(tmp_path):
    model = nn.Sequential(nn.Linear(400, 500, bias=False), nn.Embedding(500, 400))
    lora.inject(model, r=1, targets=("0", "1"))
    with Counting() as saving:
        lora.save(model, tmp_path)
    lora.eject(model)
    with Counting() as loading:
        lora.load(model, tmp_path)
    factors = 2 * (400 + 500)
    assert factors < saving.elements < 20 * factors < 400 * 500
    assert factors < loading.elements < 20 * factors


class Packed(Tensor):
    """A weight as a quantiser packs it: it can be handed on, and no entry of it can be read."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0])
        raise NotImplementedError(f"{func} of a packed weight")


def test_an_adapter_of_a_packed_base_is_saved_and_loads(tmp_path):
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
        model[0].weight = nn.Parameter(Packed(model[0].weight.detach()), requires_grad=False)
        return model

    torch.manual_seed(0)
    model = build()
    lora.inject(model, r=2, targets="0")
    randomize(model)
    lora.save(model, tmp_path)
    torch.manual_seed(0)
    again = build()
    lora.load(again, tmp_path)
    want = [raw(p) for p in lora.trainable_parameters(model)]
    assert [raw(p) for p in lora.trainable_parameters(again)] == want


def test_a_convolution_and_what_cannot_be_adapted_are_named(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora.inject(model, r=2, targets=("0", "1"))
    lora.save(model, tmp_path)
    other = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    refuses(other, tmp_path, "1: it is no nn.Linear, Conv1D or nn.Embedding")


@pytest.mark.parametrize("config", [True, False])
def test_a_pickle_is_named(saved, config):
    folder, _ = saved
    (folder / checkpoint.WEIGHTS).rename(folder / "adapter_model.bin")
    if not config:
        (folder / checkpoint.CONFIG).unlink()
    words = r"has no .*safetensors\. adapter_model\.bin is not read: load it with PEFT"
    refuses(tiny_gpt2(), folder, words, FileNotFoundError)


def test_the_folders_of_named_adapters_are_named(saved):
    """PEFT saves an adapter that is not called default in a folder of its name."""
    folder, want = saved
    (folder / "legal").mkdir()
    for name in (checkpoint.CONFIG, checkpoint.WEIGHTS):
        (folder / name).rename(folder / "legal" / name)
    words = rf"has no .*\. Name one of {folder / 'legal'}\."
    refuses(tiny_gpt2(), folder, words, FileNotFoundError)
    model = tiny_gpt2()
    lora.load(model, folder / "legal")
    assert torch.equal(model(IDX), want)


# The same layers under other paths


def tower(*paths: str) -> nn.Module:
    """Two MLPs, numbered, at each of these paths."""
    torch.manual_seed(0)
    model = nn.Module()
    for path in paths:
        holder = model
        for name in path.split("."):
            if not hasattr(holder, name):
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        holder.layers = nn.Sequential(MLP(), MLP())
    return model.eval()


def old_style(tmp_path) -> Tensor:
    """As transformers called the layers of vision models before 4.52; what they compute."""
    model = tower("language_model.model")
    lora.inject(model, r=2, targets=("up", "down"), alpha_pattern={"1.up": 3})
    randomize(model)
    lora.save(model, tmp_path)
    return model.language_model.model.layers(torch.ones(1, 6))


@pytest.mark.parametrize("other", ["model.visual", "model.vision_tower.encoder"])
def test_layers_under_another_prefix_load_and_it_is_said(tmp_path, other):
    want = old_style(tmp_path)
    model = tower("model.language_model")
    model.model.add_module(other.split(".")[1], nn.Linear(6, 6))
    words = r"called language_model\.model\.… in the file and model\.language_model\.… here"
    with pytest.warns(UserWarning, match=words) as caught:
        lora.load(model, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    assert torch.equal(model.model.language_model.layers(torch.ones(1, 6)), want)


def test_layers_that_fit_at_two_places_are_refused(tmp_path):
    old_style(tmp_path)
    words = r"language_model\.model\.layers\.0\.up: no such layer here"
    refuses(tower("model.language_model", "model.visual"), tmp_path, words)


def test_a_block_is_never_taken_for_another(tmp_path):
    model = tower("model.language_model")
    lora.inject(model, r=2, targets="up", layers=1)
    lora.save(model, tmp_path)
    edit(tmp_path, lambda tensors: None, metadata={"format": "pt"})  # no base to tell it by
    small = tower("model.language_model")
    del small.model.language_model.layers[1]
    refuses(small, tmp_path, r"model\.language_model\.layers\.1\.up: no such layer here")
    with pytest.warns(UserWarning, match="layers are called"):
        assert lora.load(tower("language_model"), tmp_path) == ["language_model.layers.1.up"]


def test_another_prefix_does_not_hide_another_base(tmp_path):
    old_style(tmp_path)
    model = tower("model.language_model")
    with torch.no_grad():
        model.model.language_model.layers[1].up.weight += 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = r"another base, whose weights differ in language_model\.model\.layers\.1\.up "
        refuses(model, tmp_path, words)


# Wrappers and odd names


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


def compiled_by_block(model: nn.Module) -> nn.Module:
    blocks = model.transformer.h
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    return model


def plain(model: nn.Module) -> nn.Module:
    return model


SHAPES = [plain, averaged, compiled_by_block]


@pytest.mark.parametrize("at_load", SHAPES)
@pytest.mark.parametrize("at_save", SHAPES)
@pytest.mark.parametrize("targets", ["c_attn", "attn.c_proj"])
def test_what_was_saved_loads_through_wrappers(tmp_path, at_save, at_load, targets):
    model = at_save(tiny_gpt2())
    lora.inject(model, r=2, targets=targets)
    randomize(model)
    lora.save(model, tmp_path)
    again = at_load(tiny_gpt2())
    assert len(lora.load(again, tmp_path)) == TINY.n_layer
    want = [raw(p) for p in lora.trainable_parameters(model)]
    assert [raw(p) for p in lora.trainable_parameters(again)] == want


@pytest.mark.parametrize("name", ["module", "_orig_mod_", "a b", "é", "base_layer", "lora_A"])
def test_odd_names_of_modules_load(tmp_path, name):
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        for child in (name, "other"):
            model.add_module(child, MLP())
        return model

    model = build()
    lora.inject(model, r=2, targets=(f"{name}.up", "down"), rank_pattern={f"{name}.up": 3})
    randomize(model)
    lora.save(model, tmp_path)
    again = build()
    lora.load(again, tmp_path)
    assert lora.adapters(again) == lora.adapters(model)
    want = [raw(p) for p in lora.trainable_parameters(model)]
    assert [raw(p) for p in lora.trainable_parameters(again)] == want


# States


def test_loading_for_inference(saved):
    folder, want = saved
    model = tiny_gpt2()
    lora.load(model, folder, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(IDX), want)
    lora.eject(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_loading_keeps_the_mode_and_the_saved_dropout(saved, training):
    folder, want = saved
    model = tiny_gpt2().train(training)
    paths = lora.load(model, folder)
    updates = [model.get_submodule(path).updates["default"] for path in paths]
    assert {update.training for update in updates} == {training}
    assert {update.config.dropout for update in updates} == {0.25}
    assert all(p.requires_grad for update in updates for p in update.parameters())
    assert len(lora.trainable_parameters(model)) == 2 * len(paths)  # the base is frozen
    assert torch.equal(model(IDX), want) is not training


def test_trained_parts_outside_the_adapter_are_said(tmp_path):
    model = adapted()
    for i in range(2):
        model.transformer.h[i].ln_1.requires_grad_(True)
    model.transformer.ln_f.requires_grad_(True)
    words = (
        r"Not saved: transformer\.h\.0\.ln_1\.weight; transformer\.h\.0\.ln_1\.bias; "
        r"transformer\.h\.1\.ln_1\.weight; .*ln_f\.bias\. Train it by modules_to_save"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        lora.save(model, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    assert (tmp_path / checkpoint.WEIGHTS).is_file()


# The card


def test_a_card_holds_base_targets_rank_and_notes(tmp_path):
    model = adapted(rank_pattern={"h.1.attn.c_attn": 3})
    lora.save(model, tmp_path)
    assert not (tmp_path / "README.md").exists()
    model.name_or_path = "openai-community/gpt2"
    lora.save(model, tmp_path, notes={"data": "legal.jsonl", "loss": 2.31})
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: openai-community/gpt2\nlibrary_name: peft\n")
    rows = ("base | openai-community/gpt2", "targets | c_attn", "r | 2, 3")
    for row in (*rows, "data | legal.jsonl", "loss | 2.31"):
        assert f"\n| {row} |\n" in text
    lora.save(model, tmp_path, notes={"data": "new.jsonl"})  # ours is written anew
    assert "| data | new.jsonl |" in (tmp_path / "README.md").read_text()


def test_ones_own_readme_is_never_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match=r"README\.md was not written by lora\.save, and is kept"):
        lora.save(adapted(), tmp_path, notes={"data": "legal.jsonl"})
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / checkpoint.WEIGHTS).is_file()


def test_a_card_and_a_config_are_the_same_bytes_again(tmp_path):
    for name in ("a", "b"):
        model = adapted(alpha=math.pi, targets=("c_attn", "c_fc"))
        lora.save(model, tmp_path / name, notes={"loss": 0.5})
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab"]
    assert files[0] == files[1]
    assert len(files[0]) == 3
    json.loads(files[0][checkpoint.CONFIG])


def test_an_empty_file_holds_no_adapter(saved):
    folder, _ = saved
    save_file({}, folder / checkpoint.WEIGHTS)
    refuses(tiny_gpt2(), folder, "no LoRA tensors in adapter_model.safetensors")
