"""What `lora.load` makes of strange files, strange models and strange numbers."""

from __future__ import annotations

import json
import math
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora
from lora.disk import checkpoint, probes
from tests.test_checkpoint import C_ATTN, IDX, edit, edit_config, refuses, saved
from tests.toys import MLP, TINY, randomize, raw, tiny_gpt2

__all__ = ["saved"]  # the fixture: an adapter's folder, and the logits it gives
A, B = f"{C_ATTN}.lora_A.weight", f"{C_ATTN}.lora_B.weight"
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
        (lambda t: t.double() * 1e300, r"lora_A has values that are infinite in float32"),
        (lambda t: t.fill_(torch.inf), r"lora_A has NaN or infinite"),
        (lambda t: t.to(torch.complex64), r"lora_A is complex64, and only floats"),
        (lambda t: t.to(torch.int32), r"lora_A is int32, and only floats"),
        (lambda t: t > 0, r"lora_A is bool, and only floats"),
        (lambda t: t.to(torch.float8_e4m3fn), r"lora_A is float8_e4m3fn, and only floats"),
    ],
)
def test_factors_that_are_no_finite_floats_here_are_refused(saved, change, words):
    folder, _ = saved
    edit(folder, lambda tensors: tensors.update({A: change(tensors[A])}))
    refuses(tiny_gpt2(), folder, f"{H}.0.attn.c_attn: {words}")


def test_finiteness_is_judged_in_the_dtype_that_is_loaded_to(saved):
    folder, _ = saved
    edit(folder, lambda tensors: tensors.update({A: tensors[A] + 1e5}))
    refuses(tiny_gpt2(), folder, "infinite in float16", dtype=torch.float16)
    edit(folder, lambda tensors: tensors.update({A: tensors[A].double()}), metadata=None)
    lora.load(tiny_gpt2(), folder, allow_base_mismatch=True, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.complex64, "A of transformer.h.0.attn.c_attn is complex64"),
        (torch.float8_e4m3fn, "A of transformer.h.0.attn.c_attn is float8_e4m3fn"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, dtype, words):
    model = adapted()
    update = model.transformer.h[0].attn.c_attn.updates["default"]
    update.A = nn.Parameter(update.A.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"Not saved: {words}"):
        lora.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_uniform_save_that_overflows_is_not_written(tmp_path):
    model = adapted(alpha=60_000, dtype=torch.float16)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.updates["default"].B.fill_(10)
    lora.save(model, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"Not saved once alpha / r is in B .*B of .*h.1.attn"):
        lora.save(model, tmp_path / "uniform", uniform=True)
    assert not (tmp_path / "uniform").exists()


def test_a_base_without_finite_values_is_saved_without_a_probe(tmp_path):
    model = adapted(targets=("c_attn", "c_fc"))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.base.weight[0, 0] = torch.nan
    model.transformer.h[1].mlp.c_fc.base.to("meta")
    lora.save(model, tmp_path)
    assert len(lora.load(tiny_gpt2(seed=0), tmp_path)) == 4
    with pytest.raises(ValueError, match=r"another base, .* in transformer\.h\.0\.mlp\.c_fc"):
        lora.load(tiny_gpt2(seed=5), tmp_path)


def test_an_adapter_without_values_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="A of .* is on the meta device, which holds no values"):
        lora.save(adapted().to("meta"), tmp_path)


# Sizes and lengths


@pytest.mark.parametrize("r", [10**5, 10**11, 2**62])
def test_a_rank_is_compared_with_the_file_before_anything_is_allocated(saved, r):
    folder, _ = saved
    edit_config(folder, r=r)
    tracemalloc.start()
    refuses(tiny_gpt2(), folder, rf"lora_A is \(4, 16\), this layer takes \({r}, 16\)")
    edit_config(folder, r=4, rank_pattern={"c_attn": r})
    refuses(tiny_gpt2(), folder, rf"lora_B is \(48, 4\), this layer takes \(48, {r}\)")
    tracemalloc.stop()


def test_errors_are_bounded_in_length(saved):
    folder, _ = saved
    edit(
        folder,
        lambda t: t.update({f"base_model.model.h.{i}.lora_A": t[A].clone() for i in range(3000)}),
    )
    edit(
        folder, lambda t: t.update({"x" * 100_000 + f"{i}.weight": t[A].clone() for i in range(3)})
    )
    with pytest.raises(
        ValueError, match=r"h\.\d+: no such layer here; .*and 2,?9\d\d more"
    ) as caught:
        lora.load(tiny_gpt2(), folder)
    assert len(str(caught.value)) <= 2000
    edit_config(folder, **{f"new_{i}": "x" * 10_000 for i in range(2000)})
    with pytest.raises(ValueError, match=r"new_0 is 'x+…x+', which is not supported") as caught:
        lora.load(tiny_gpt2(), folder)
    assert len(str(caught.value)) <= 2000


JSON = [
    ("[" * 100_000, "nested too deeply"),
    ('{"r": 4, "r": 8}', "the key 'r' stands twice"),
    ('{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
    ('{"lora_alpha": NaN}', "NaN is no number"),
    ('{"lora_alpha": -Infinity}', "-Infinity is no number"),
    ('{"lora_alpha": 1e999}', "1e999 is too large a number"),
    ('{"r": 1' + "0" * 5000 + "}", "is too large an integer"),
    ('{"r": 18446744073709551616}', "is too large an integer"),
    ('"' + "x" * 100_000, "is not JSON that can be read"),
    ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "is not JSON that can be read"),
]


@pytest.mark.parametrize(("text", "words"), JSON)
def test_a_config_that_means_no_one_thing_is_refused(saved, text, words):
    folder, _ = saved
    (folder / checkpoint.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        lora.load(tiny_gpt2(), folder)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", [probes.BASE, probes.UPDATES, checkpoint.SLICES])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "5", "[]", '{"a": 1, "a": 2}', "x"])
def test_metadata_that_means_no_one_thing_is_refused(saved, key, text):
    folder, _ = saved
    edit(folder, lambda tensors: None, metadata={key: text})
    with pytest.raises(ValueError, match="malformed") as caught:
        lora.load(tiny_gpt2(), folder)
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": r".*(a+)+$\1"}, r"target_modules: pattern .* could take very long"),
        ({"target_modules": [["c_attn"]]}, "target_modules is"),
        ({"exclude_modules": "(?i)x"}, "exclude_modules: .* is no regular expression"),
        ({"alpha_pattern": {"c_attn": "x"}}, "alpha must be"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"r": True}, "r must be"),
        ({"layers_to_transform": True}, "layers_to_transform is True, not integers"),
        ({"layers_to_transform": [1.5]}, "not integers"),
        ({"layers_pattern": "h"}, "layers_pattern takes layers_to_transform"),
        ({"layers_pattern": ["h.*"], "layers_to_transform": [0]}, "only plain names"),
        ({"target_modules": ".*c_attn", "layers_to_transform": 0}, "take a list of target_modules"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True, which is not supported"),
        ({"init_lora_weights": "mica"}, "init_lora_weights 'mica' changed"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changed"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', not a list"),
        ({"modules_to_save": ["("]}, r"modules_to_save: '\(' is no regular"),
        ({"modules_to_save": ["ln_f"]}, "ln_f: no tensors in the file, though modules_to_save"),
        ({"bias": "lora_only"}, r"bias is 'lora_only', and the file lacks the bias of .*c_attn"),
        ({"bias": "some"}, "bias is 'some', not 'none'"),
        ({"lora_bias": True}, "lora_bias is True, which is not supported"),
        ({"target_parameters": ["w"]}, "target_parameters is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
    ],
)
def test_more_configs_that_are_refused(saved, fields, words):
    folder, _ = saved
    edit_config(folder, **fields)
    refuses(tiny_gpt2(), folder, words)


@pytest.mark.parametrize("text", ["(a+)+$", "(.*.*.*)*x", "(c_attn|c_attn|c_)*$", "(?=(.+)+y)*.*"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_no_pattern_of_a_file_hangs_a_load(saved, text, field):
    folder, _ = saved
    edit_config(folder, **{field: {text: 4} if field == "rank_pattern" else text})
    began = time.perf_counter()
    try:
        lora.load(tiny_gpt2(), folder)
    except ValueError as error:
        length = len(str(error))
    else:
        length = 0
    assert length <= 2000
    assert time.perf_counter() - began < 5


def test_a_convolution_and_what_cannot_be_adapted_are_named(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora.inject(model, r=2, targets=("0", "1"))
    lora.save(model, tmp_path)
    other = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    refuses(other, tmp_path, "1: it is no nn.Linear, Conv1D or nn.Embedding")


def test_a_pickled_adapter_is_named_in_its_refusal(saved):
    folder, _ = saved
    (folder / checkpoint.WEIGHTS).rename(folder / "adapter_model.bin")
    words = "adapter_model.safetensors is missing; there is adapter_model.bin, a pickle.*PEFT"
    refuses(tiny_gpt2(), folder, words, FileNotFoundError)


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


@pytest.mark.parametrize(
    "name", ["a\nb", "module", "_orig_mod_", "a b", "é", "base_layer", "lora_A"]
)
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


def test_a_layer_that_stands_twice_in_the_file_is_refused(saved):
    folder, _ = saved

    def twice(tensors):
        for key in (A, B):
            tensors[key.replace("h.0.attn", "h.0._orig_mod.attn")] = tensors[key].clone()

    edit(folder, twice)
    refuses(tiny_gpt2(), folder, r"left over \(the file has this layer as transformer\.h\.0\.")


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
        r"Not saved: transformer\.h\.0\.ln_1\.weight, transformer\.h\.0\.ln_1\.bias, "
        r"transformer\.h\.1\.ln_1\.weight and 3 more require grad, .*modules_to_save"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        lora.save(model, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    assert (tmp_path / checkpoint.WEIGHTS).is_file()


def test_a_card_on_request(tmp_path):
    model = adapted(rank_pattern={"h.1.attn.c_attn": 3})
    lora.save(model, tmp_path)
    assert not (tmp_path / "README.md").exists()
    model.name_or_path = "openai-community/gpt2"
    lora.save(model, tmp_path, card=True)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: openai-community/gpt2\nlibrary_name: peft\n")
    for words in ("Layers: 2, at `transformer.h.*.attn.c_attn`", "Rank: 2, 3", "Parameters: 320"):
        assert words in text
    lora.save(model, tmp_path, card=True)  # ours is written anew
    assert (tmp_path / "README.md").read_text() == text
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"README\.md is not one that lora\.save wrote"):
        lora.save(model, tmp_path, card=True)
    assert (tmp_path / "README.md").read_text() == "mine"


class Elsewhere(torch.Tensor):
    """A tensor on a device that has no float64 and mixes with no other, as Apple's GPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device="mps", strides=inner.stride()
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert all(type(a) is cls for a in args if isinstance(a, torch.Tensor)), "mixed devices"
        plain = [a.inner if isinstance(a, cls) else a for a in args]
        to = kwargs.pop("device", None)
        out = func(*plain, **kwargs)
        if to is not None and torch.device(to).type == "cpu":
            return out
        assert out.dtype != torch.float64, "no float64 on this device"
        return cls(out)


def test_probes_compute_on_the_cpu():
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    metadata = probes.describe({"x": base}, {"x": (a, b)})
    there = nn.Linear(6, 4)
    there._parameters["weight"] = Elsewhere(base.weight.detach())
    there.get_parameter = lambda name: there._parameters[name]
    factors = {"x": (Elsewhere(a), Elsewhere(b))}
    assert probes.describe({"x": there}, factors) == metadata
    assert probes.faults(metadata, {"x": there}, factors, False) == []
    with pytest.raises(AssertionError, match="no float64"):
        Elsewhere(a).double()


def test_a_card_and_a_config_are_the_same_bytes_again(tmp_path):
    for name in ("a", "b"):
        lora.save(adapted(alpha=math.pi, targets=("c_attn", "c_fc")), tmp_path / name, card=True)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab"]
    assert files[0] == files[1]
    assert len(files[0]) == 3
    json.loads(files[0][checkpoint.CONFIG])


def test_an_empty_file_holds_no_adapter(saved):
    folder, _ = saved
    save_file({}, folder / checkpoint.WEIGHTS)
    refuses(tiny_gpt2(), folder, "no tensors in the file")
