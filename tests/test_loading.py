"""What `lora.load` makes of its own folders, strange files, strange models and strange numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import gpt2
import lora
from lora.disk import checkpoint
from tests.folders import C_ATTN, drop_metadata, edit, edit_config, refuses
from tests.toys import IDX, MLP, TINY, adapted, raw, tiny_gpt2

A = f"{C_ATTN}.lora_A.weight"
H = "transformer.h"
OLD = Path(__file__).parent / "data" / "adapter_of_0_1"


def factors(model: nn.Module) -> list[bytes]:
    return [raw(p) for p in lora.trainable_parameters(model)]


# Round trips


@pytest.mark.parametrize("training", [True, False])
def test_loading_gives_back_what_was_saved_and_keeps_the_mode(saved, training):
    folder, want = saved
    model = tiny_gpt2().train(training)
    paths = lora.load(model, folder)
    assert sorted(paths) == sorted(
        f"{H}.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "mlp.c_fc")
    )
    updates = [model.get_submodule(path).updates["default"] for path in paths]
    assert {update.training for update in updates} == {training}
    assert {update.config for update in updates} == {lora.UpdateConfig(r=4, alpha=6, dropout=0.25)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{p}.updates.default.{f}" for p in paths for f in "AB"
    }
    assert torch.equal(model(IDX), want) is not training


def test_loading_for_inference(saved):
    folder, want = saved
    model = tiny_gpt2()
    lora.load(model, folder, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(IDX), want)
    lora.eject(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_folder_of_an_earlier_version_loads():
    """It has slices, patterns, a module trained whole, and probes of base and factors."""
    model, plain = tiny_gpt2(), tiny_gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = lora.load(model, OLD)
    assert paths == [
        *(f"{H}.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")),
        "transformer.ln_f",
    ]
    tensors = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in safetensors.torch.load_file(OLD / checkpoint.WEIGHTS).items()
    }
    scalings = {"h.0.attn.c_attn": 3, "h.0.mlp.c_fc": 2.5, "h.1.attn.c_attn": 3, "h.1.mlp.c_fc": 2}
    with torch.no_grad():
        for end, scaling in scalings.items():
            path = f"transformer.{end}"
            a, b = (tensors[f"{path}.lora_{f}.weight"].double() for f in "AB")
            plain.get_submodule(path).weight += (scaling * b @ a).t()
        for name, p in plain.transformer.ln_f.named_parameters():
            p.copy_(tensors[f"transformer.ln_f.{name}"])
    torch.testing.assert_close(model(IDX), plain(IDX), rtol=1e-4, atol=1e-5)
    c_attn = model.transformer.h[0].attn.c_attn.updates["default"]
    assert c_attn.slices == {"q": [0, 16], "v": [32, 48]}
    assert c_attn.config == lora.UpdateConfig(r=4, alpha=12, dropout=0.25)


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
    model = adapted(at_save(tiny_gpt2()), targets=targets)
    lora.save(model, tmp_path)
    again = at_load(tiny_gpt2())
    assert len(lora.load(again, tmp_path)) == TINY.n_layer
    assert factors(again) == factors(model)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_keys_saved_through_a_wrapper_are_unwrapped(saved, wrapper):
    folder, want = saved
    prefix = "base_model.model."

    def wrap(tensors):
        for key in list(tensors):
            tensors[key.replace(prefix, f"{prefix}{wrapper}")] = tensors.pop(key)

    edit(folder, wrap)
    model = tiny_gpt2()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The layers are called module")
        lora.load(model, folder)
    assert torch.equal(model(IDX), want)


@pytest.mark.parametrize("name", ["module", "_orig_mod_", "a b", "é", "base_layer", "lora_A"])
def test_odd_names_of_modules_load(tmp_path, name):
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        for child in (name, "other"):
            model.add_module(child, MLP())
        return model

    model = adapted(build(), targets=(f"{name}.up", "down"), rank_pattern={f"{name}.up": 3})
    lora.save(model, tmp_path)
    again = build()
    lora.load(again, tmp_path)
    assert lora.adapters(again) == lora.adapters(model)
    assert factors(again) == factors(model)


# Another base


def test_an_adapter_for_another_depth_width_or_base_is_refused(saved):
    folder, want = saved

    def build(**sizes):
        torch.manual_seed(0)
        settings = {k: getattr(TINY, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
        return gpt2.GPT2(gpt2.GPT2Config(**settings | sizes)).eval()

    refuses(build(n_layer=1), folder, "h.1.attn.c_attn: no such layer here")
    refuses(build(n_layer=3), folder, "made for another base")
    refuses(build(n_embd=32), folder, r"lora_A is \(4, 16\), this layer takes \(4, 32\)")
    refuses(tiny_gpt2(seed=5), folder, "made for another base.*h.0.attn.c_attn")
    model = tiny_gpt2()
    with torch.no_grad():  # tuned a little
        model.transformer.h[1].attn.c_attn.weight.mul_(
            1 + 0.01 * torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
        )
    refuses(model, folder, r"another base, whose weights differ in transformer.h.1.attn.c_attn ")
    model = tiny_gpt2(seed=5)
    lora.load(model, folder, allow_base_mismatch=True)
    assert not torch.equal(model(IDX), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_accepted(saved, dtype):
    folder, want = saved
    model = tiny_gpt2(dtype=dtype)
    lora.load(model, folder)
    assert (model(IDX).float() - want).norm() < 0.1 * want.norm()


def test_files_without_our_metadata_load(saved):
    folder, want = saved
    drop_metadata(folder)
    model = tiny_gpt2()
    lora.load(model, folder)
    assert torch.equal(model(IDX), want)
    lora.load(tiny_gpt2(seed=5), folder)  # nothing to tell another base by


def test_a_base_without_finite_values_is_saved_without_its_fingerprint(tmp_path):
    model = adapted(targets=("c_attn", "c_fc"))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.base.weight.fill_(torch.nan)
    model.transformer.h[1].mlp.c_fc.base.to("meta")
    lora.save(model, tmp_path)
    assert len(lora.load(tiny_gpt2(seed=0), tmp_path)) == 4
    with pytest.raises(ValueError, match=r"another base, .* in transformer\.h\.0\.mlp\.c_fc"):
        lora.load(tiny_gpt2(seed=5), tmp_path)


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
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
        model[0].weight = nn.Parameter(Packed(model[0].weight.detach()), requires_grad=False)
        return model

    model, again = adapted(build(), targets="0"), build()
    lora.save(model, tmp_path)
    lora.load(again, tmp_path)
    assert factors(again) == factors(model)


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


@pytest.fixture
def old_style(tmp_path) -> Tensor:
    """As transformers called the layers of vision models before 4.52; what they compute."""
    model = adapted(
        tower("language_model.model"), targets=("up", "down"), alpha_pattern={"1.up": 3}
    )
    lora.save(model, tmp_path)
    return model.language_model.model.layers(torch.ones(1, 6))


@pytest.mark.parametrize("other", ["model.visual", "model.vision_tower.encoder"])
def test_layers_under_another_prefix_load_and_it_is_said(old_style, tmp_path, other):
    model = tower("model.language_model")
    model.model.add_module(other.split(".")[1], nn.Linear(6, 6))
    words = r"called language_model\.model\.… in the file and model\.language_model\.… here"
    with pytest.warns(UserWarning, match=words) as caught:
        lora.load(model, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    assert torch.equal(model.model.language_model.layers(torch.ones(1, 6)), old_style)


def test_another_prefix_hides_neither_a_second_place_nor_another_base(old_style, tmp_path):
    words = r"language_model\.model\.layers\.0\.up: no such layer here"
    refuses(tower("model.language_model", "model.visual"), tmp_path, words)
    model = tower("model.language_model")
    with torch.no_grad():
        model.model.language_model.layers[1].up.weight += 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = r"another base, whose weights differ in language_model\.model\.layers\.1\.up "
        refuses(model, tmp_path, words)


def test_a_block_is_never_taken_for_another(tmp_path):
    lora.save(adapted(tower("model.language_model"), targets="up", layers=1), tmp_path)
    drop_metadata(tmp_path)  # no base to tell it by
    small = tower("model.language_model")
    del small.model.language_model.layers[1]
    refuses(small, tmp_path, r"model\.language_model\.layers\.1\.up: no such layer here")
    with pytest.warns(UserWarning, match="layers are called"):
        assert lora.load(tower("language_model"), tmp_path) == ["language_model.layers.1.up"]


# Tensors


def test_all_faults_are_listed_at_once(saved):
    folder, _ = saved

    def spoil(tensors):
        del tensors[f"{C_ATTN}.lora_B.weight"]
        tensors["base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"] = torch.ones(3, 16)
        tensors["base_model.model.transformer.h.7.attn.c_attn.lora_A.weight"] = torch.ones(4, 16)
        tensors["base_model.model.lm_head.weight"] = torch.ones(2)
        tensors["base_model.model.lm_head.lora_magnitude_vector"] = torch.ones(2)
        tensors["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"][0, 0] = torch.nan

    edit(folder, spoil)
    refuses(
        tiny_gpt2(),
        folder,
        r"(?s)(?=.*h.0.attn.c_attn: lora_B is missing)"
        r"(?=.*h.1.mlp.c_fc: lora_B is \(64, 4\), this layer takes \(64, 3\))"
        r"(?=.*h.7.attn.c_attn: no such layer here)"
        r"(?=.*lm_head.weight is \(2,\), this model's is \(61, 16\))"
        r"(?=.*lm_head.lora_magnitude_vector: left over)"
        r"(?=.*h.1.attn.c_attn: lora_A has NaN)",
    )
    edit(
        folder,
        lambda t: t.update({f"base_model.model.h.{i}.lora_A": t[A].clone() for i in range(3000)}),
    )
    with pytest.raises(ValueError, match=r"h\.\d+: no such .*and 2,?9\d\d more") as caught:
        lora.load(tiny_gpt2(), folder)
    assert len(str(caught.value)) <= 2000
    safetensors.torch.save_file({}, folder / checkpoint.WEIGHTS)
    refuses(tiny_gpt2(), folder, "no LoRA tensors in adapter_model.safetensors")


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
    words = "lora_A has NaN or infinite values in torch.float16"
    refuses(tiny_gpt2(), folder, words, dtype=torch.float16)
    edit(folder, lambda tensors: tensors.update({A: tensors[A].double()}))
    lora.load(tiny_gpt2(), folder, allow_base_mismatch=True, dtype=torch.bfloat16)


# Files and configs


def test_broken_files(saved, tmp_path):
    folder, _ = saved
    words = "has no adapter_config.json and no adapter_model"
    refuses(tiny_gpt2(), tmp_path / "nowhere", words, FileNotFoundError)
    config = (folder / checkpoint.CONFIG).read_bytes()
    for content in (b"\xff{", b"[]", b"", b"{"):
        (folder / checkpoint.CONFIG).write_bytes(content)
        refuses(tiny_gpt2(), folder, "adapter_config.json: it is not a JSON object")
    (folder / checkpoint.CONFIG).write_bytes(config)
    file = folder / checkpoint.WEIGHTS
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"not a safetensors file" * 9):
        file.write_bytes(content)
        refuses(tiny_gpt2(), folder, "is not an intact safetensors file")
    file.unlink()
    refuses(tiny_gpt2(), folder, f"has no {checkpoint.WEIGHTS}", FileNotFoundError)


def test_a_file_of_another_format_is_named(saved):
    folder, _ = saved
    weights = (folder / checkpoint.WEIGHTS).rename(folder / "weights")
    for name, format in {
        "adapter_model.bin": "a pickle: load it with PEFT",
        "adapters.safetensors": "mlx-lm's format",
        "pytorch_lora_weights.safetensors": "diffusers' format",
    }.items():
        weights = weights.rename(folder / name)
        words = rf"has no .*safetensors\. {name} is not read: it is {format}"
        refuses(tiny_gpt2(), folder, words, FileNotFoundError)
    (folder / checkpoint.CONFIG).unlink()
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


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "olora", "use_dora": True}, r"changed the base.*use_dora"),
        ({"some_future_field": 3}, "some_future_field is 3, which is not supported"),
        ({"lora_alpha": -1}, "alpha must be"),
        ({"lora_alpha": "x"}, "alpha cannot be 'x'"),
        ({"alpha_pattern": {"c_attn": "x"}}, "alpha cannot be 'x'"),
        ({"alpha_pattern": {"(": 1}}, "adapter_config.json: missing \\)"),
        ({"lora_dropout": 1}, r"dropout must be in \[0, 1\)"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changed"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True, which is not supported"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save names ln_f, of which the file has no"),
        ({"modules_to_save": "ln_f"}, "modules_to_save names ln_f, of which the file has no"),
        ({"target_parameters": ["w"]}, r"target_parameters is \['w'\], which is not supported"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens is \[3\]"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication is \[\[0, 1\]\]"),
    ],
)
def test_configs_that_are_refused(saved, fields, words):
    folder, _ = saved
    edit_config(folder, **fields)
    refuses(tiny_gpt2(), folder, words)


def test_the_tensors_tell_the_layers_and_the_ranks(saved):
    folder, want = saved
    edit_config(folder, target_modules=["c_proj"], rank_pattern={"c_attn": 64}, r=1)
    model = tiny_gpt2()
    assert len(lora.load(model, folder)) == 4
    assert torch.equal(model(IDX), want)
