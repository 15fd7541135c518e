"""PEFT as the oracle: adapters go back and forth between it and us with equal logits."""

from __future__ import annotations

import json
import random
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from lora.disk import checkpoint
from lora.disk import peft as lora_peft
from tests.folders import UNSLOTH, llama, peft_model, refuses
from tests.toys import IDX, MLP, TINY, adapted, randomize, tiny_gpt2, twin

peft = pytest.importorskip("peft", reason="PEFT is the oracle here")
transformers = pytest.importorskip("transformers", reason="PEFT adapts its models")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about tied weights and embeddings

IDS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))


def write(folder, model: nn.Module, saving=None, task="CAUSAL_LM", **fields):
    """A folder that PEFT has written, every trained part of it random; and the logits it gives."""
    config = peft.LoraConfig(r=2, task_type=task, init_lora_weights=False, **fields)
    theirs = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    theirs.save_pretrained(folder, **(saving or {}))
    return theirs(IDS).logits


# Our GPT-2 and transformers', there and back

ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("targets", [["c_attn"], ALL, ["attn.c_proj"]])
def test_ours_to_peft(tmp_path, targets):
    model = adapted(r=4, alpha=6, targets=targets)
    want = model(IDX)
    lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin(tiny_gpt2()), tmp_path)
    torch.testing.assert_close(theirs(IDX).logits, want, rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(IDX).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ALL, "lora_dropout": 0.1},
        {"use_rslora": True},
        {"target_modules": r".*\.h\.1\.attn\.c_(attn|proj)"},
        {"target_modules": ALL, "exclude_modules": ["mlp.c_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": ALL, "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"h.0.mlp.c_fc": 3}},
    ],
)
def test_peft_to_ours_and_back(tmp_path, fields):
    theirs = peft_model(tiny_gpt2(), **fields).eval()
    want = theirs(IDX).logits
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_gpt2()
    lora.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(IDX), want, rtol=1e-5, atol=1e-5)
    lora.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(twin(tiny_gpt2()), tmp_path / "ours")
    torch.testing.assert_close(again(IDX).logits, want, rtol=1e-5, atol=1e-5)


def test_peft_reads_our_config_without_a_warning(tmp_path, recwarn):
    lora.save(adapted(), tmp_path)
    recwarn.clear()
    peft.PeftModel.from_pretrained(twin(tiny_gpt2()), tmp_path)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    known = set(peft.LoraConfig.__dataclass_fields__)
    assert set(fields) <= known


def test_our_loader_works_on_transformers_model(tmp_path):
    theirs = peft_model(tiny_gpt2()).eval()
    want = theirs(IDX).logits
    theirs.save_pretrained(tmp_path)
    plain = twin(tiny_gpt2())
    lora.load(plain, tmp_path)
    torch.testing.assert_close(plain(IDX).logits, want, rtol=1e-5, atol=1e-5)


def test_the_update_has_pefts_gradients():
    ours = tiny_gpt2()
    theirs = peft_model(ours).eval()
    factors = {}
    for path in lora.inject(ours, r=4, alpha=6):
        update, layer = ours.get_submodule(path), theirs.base_model.model.get_submodule(path)
        for name, factor in update.updates["default"].named_parameters():
            factors[factor] = getattr(layer, f"lora_{name}")["default"].weight
    with torch.no_grad():
        for mine, other in factors.items():
            mine.copy_(other)
    labels = torch.nn.functional.pad(IDX[:, 1:], (0, 1), value=-100)
    theirs(IDX, labels=IDX).loss.backward()
    torch.nn.functional.cross_entropy(ours(IDX).flatten(0, 1), labels.flatten()).backward()
    assert len(factors) == 2 * TINY.n_layer
    for mine, other in factors.items():
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


# The base's own weights beside an adapter


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "q_proj"]])
def test_adapted_embeddings_and_heads_load(tmp_path, tied, targets):
    want = write(tmp_path, llama(tied), target_modules=targets)
    keys = load_file(tmp_path / checkpoint.WEIGHTS).keys()
    assert any(key.endswith("base_layer.weight") for key in keys)
    model = llama(tied)
    if tied:
        words = r"lm_head\.weight are one tensor.* torch\.nn\.Parameter\(layer\.weight\.detach"
        refuses(model, tmp_path, words)
        for layer in (model.model.embed_tokens, model.lm_head):
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the base's weights beside the adapter are the model's
        lora.load(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_whole_embeddings_load_where_they_are_the_bases(tmp_path):
    want = write(tmp_path, llama(), {"save_embedding_layers": True}, target_modules=["q_proj"])
    model = llama()
    lora.load(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    half = llama().to(torch.bfloat16)
    lora.load(half, tmp_path)  # equal but for the rounding


@pytest.mark.parametrize(
    ("targets", "key"),
    [(["lm_head"], "lm_head.base_layer.weight"), (["q_proj"], "lm_head.weight")],
)
def test_other_weights_of_the_base_are_said(tmp_path, targets, key):
    write(tmp_path, llama(), {"save_embedding_layers": True}, target_modules=targets)
    tensors = load_file(tmp_path / checkpoint.WEIGHTS)
    tensors[f"base_model.model.{key}"][3, 2] += 1
    save_file(tensors, tmp_path / checkpoint.WEIGHTS)
    words = r"Not loaded: lm_head\.weight, which differ\."
    with pytest.warns(UserWarning, match=words) as caught:
        lora.load(llama(), tmp_path)
    assert [w.filename for w in caught] == [__file__]


def test_a_grown_vocabulary_loads_once_the_model_has_grown_too(tmp_path):
    grown = llama()
    grown.resize_token_embeddings(33)
    want = write(tmp_path, grown, {"save_embedding_layers": True}, target_modules=["q_proj"])
    model = llama()
    words = r"lm_head\.weight is \(33, 8\), this model's is \(31, 8\): call resize_token_embeddings"
    refuses(model, tmp_path, words)
    torch.manual_seed(5)
    model.resize_token_embeddings(33)
    with pytest.warns(UserWarning, match=r"Not loaded: .*embed_tokens.* copy them into the model"):
        lora.load(model, tmp_path)
    lora.eject(model)
    tensors = load_file(tmp_path / checkpoint.WEIGHTS)
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            model.get_parameter(name).copy_(tensors[f"base_model.model.{name}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.load(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)


# Modules trained as a whole


FOLDERS = {
    "head": {"kind": "LlamaForSequenceClassification", "task": "SEQ_CLS"},
    "norms": {"modules_to_save": ["norm", "lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding twice": {
        "modules_to_save": ["embed_tokens"],
        "saving": {"save_embedding_layers": True},
    },
    "block": {"modules_to_save": ["mlp"]},
    "biased copy": {"modules_to_save": ["k_proj"]},
}


def folder_of(tmp_path, name: str):
    fields = {"target_modules": ["q_proj"]} | FOLDERS[name]
    model = llama(kind=fields.pop("kind", "LlamaForCausalLM"))
    return write(tmp_path / "theirs", model, **fields)


@pytest.mark.parametrize("name", FOLDERS)
def test_pefts_copies_load_and_go_back(tmp_path, name):
    """PEFT's folder on our model, and what we save of it on PEFT's: the same logits."""
    want = folder_of(tmp_path, name)
    kind = FOLDERS[name].get("kind", "LlamaForCausalLM")
    model = llama(kind=kind)
    base = model(IDS).logits
    lora.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    with lora.disabled(model):
        assert torch.equal(model(IDS).logits, base)
    lora.save(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of what it lacks or does not know
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing|.*tied|.*unregister")
        theirs = peft.PeftModel.from_pretrained(llama(kind=kind), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDS).logits, want, rtol=1e-4, atol=1e-5)
    again = llama(kind=kind)
    lora.load(again, tmp_path / "ours", trainable=False)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not lora.trainable_parameters(again)
    lora.eject(model)
    assert torch.equal(model(IDS).logits, base)
    with pytest.raises(ValueError, match="holds more than factors: "):
        lora.algebra.read(tmp_path / "theirs")


def test_a_copy_whose_name_ends_anothers_cannot_be_written(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("a", "score", "my_score")})
    lora.inject(model, r=1, targets="a", modules_to_save="score")
    with pytest.raises(ValueError, match="PEFT takes my_score for "):
        lora.save(model, tmp_path)


# Which layers a config names


class Strange(nn.Module):
    """Modules of all kinds, of which some are called as a layer that is adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = MLP(), MLP(), nn.Module(), nn.Module()
        self.a.proj, self.b.proj, self.proj = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.c.down, self.c.up = nn.Conv2d(1, 1, 1), nn.Dropout()
        self.d.a = nn.Module()
        self.d.a.up = nn.RMSNorm(6)
        self.d.a.proj = nn.Embedding(5, 6, max_norm=1.0)

    def forward(self, x):
        return self.proj(self.b.proj(self.b(self.a.proj(self.a(x)))))


@pytest.mark.parametrize(
    "chosen",
    [
        ["a.proj"],
        ["proj"],
        ["a.up", "b.up"],
        ["a.up", "b.up", "a.down", "b.down"],
        ["a.down", "a.proj", "proj"],
        ["b.up", "proj"],
    ],
)
def test_a_saved_config_fits_exactly_the_adapted_layers_among_all_modules(tmp_path, chosen):
    from peft.tuners.tuners_utils import check_target_module_exists

    model = Strange()
    for path in chosen:  # each alone, however other modules are called
        holder = nn.ModuleDict({"layer": model.get_submodule(path)})
        lora.inject(holder, r=2, targets="layer", seed=0)
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).register_module(name, holder["layer"])
    randomize(model)
    lora.save(model, tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    matched = [p for p, _ in Strange().named_modules() if check_target_module_exists(config, p)]
    assert sorted(matched) == sorted(chosen)
    theirs = peft.PeftModel.from_pretrained(Strange(), tmp_path)
    adapted = [
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    ]
    assert sorted(adapted) == sorted(chosen)
    x = torch.randn(3, 6)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)


PATHS = [
    "", "proj", "h", "h.0", "h.0.proj",
    "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj",
    "model.layers.1.experts.0.up", "model.layers.0.experts.1.up", "enc.layers.2.attn.q",
    "dec.blocks.2.layers.1.attn.q", "a.b.1", "a.1.b.2.c", "score", "my.score", "score.dense",
    "transformer.h.12.attn.c_attn", "h.1.attn.q",
]  # fmt: skip


def test_our_reading_of_alpha_patterns_is_pefts():
    draw = random.Random(0)
    names = ["c_attn", "attn.c_attn", "q", "up", "proj", "c_proj", "h.0.proj", "dense", *PATHS[5:9]]
    regexes = [r".*\.(q|up)$", r"transformer\.h\.[01]\..*", "c_attn", r"(?!a).*\d", r"^h.*|score"]
    seen = 0
    for _ in range(600):
        keys = draw.sample([*names, *regexes], draw.randint(0, 3))
        pattern = {key: draw.randint(1, 7) for key in keys}
        ours = lora_peft.parse(json.dumps({"peft_type": "LORA", "alpha_pattern": pattern}))
        for path in PATHS[1:]:
            key = peft.utils.other.get_pattern_key(pattern, path)
            assert ours.update_config(path, 1).alpha == pattern.get(key, 8), (pattern, path)
            seen += key in pattern
    assert seen > 1000


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_pattern": ""},
        {"target_modules": UNSLOTH},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.0.mlp.up_proj": 5}},
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear"},
        {"target_modules": r"^(?!.*layers\.1).*(?:q|v)_proj"},
    ],
)
def test_layers_chosen_by_number_or_pattern_load(tmp_path, fields):
    want = write(tmp_path, llama(), **fields)
    model = llama()
    lora.load(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "all"}, "bias is 'all': trained biases are not supported"),
        ({"bias": "lora_only"}, "bias is 'lora_only': trained biases are not supported"),
        ({"init_lora_weights": "pissa_niter_2"}, "changed the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changed the base weights"),
        ({"lora_bias": True}, "lora_bias is True, which is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is .*, which is not supported"),
        ({"init_lora_weights": "mica"}, "init_lora_weights 'mica' changed"),
    ],
)
def test_variants_are_refused_by_name(tmp_path, fields, words):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **fields)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    refuses(llama(), tmp_path, words)


def test_a_convolution_is_refused_by_name(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))

    config = peft.LoraConfig(r=2, target_modules=["0", "1"])
    peft.get_peft_model(build(), config).save_pretrained(tmp_path)
    refuses(build(), tmp_path, "0: it is no nn.Linear, Conv1D or nn.Embedding")


def deepseek() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=31, hidden_size=16, intermediate_size=24, moe_intermediate_size=12,
        num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).eval()


ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def test_an_adapter_of_attention_beside_fused_experts_goes_both_ways(tmp_path):
    want = write(tmp_path / "theirs", deepseek(), target_modules=ATTENTION)
    model = deepseek()
    lora.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(deepseek(), tmp_path / "ours")
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_what_peft_takes_for_parts_of_fused_experts_is_said(tmp_path):
    """PEFT reads `gate_proj` of a layer without experts, or of shared ones, as the experts'."""
    write(tmp_path / "theirs", deepseek(), target_modules=["gate_proj", "up_proj", "down_proj"])
    words = r"target_parameters is \[.*'gate_up_proj'.*\], which is not supported"
    refuses(deepseek(), tmp_path / "theirs", words)
    model = deepseek()
    lora.inject(model, r=2, targets="all-linear")
    randomize(model)
    want = model(IDS).logits
    words = r"PEFT takes .*layers\.0\.mlp\.gate_proj.*shared_experts\.up_proj.* for experts"
    with pytest.warns(UserWarning, match=words) as caught:
        lora.save(model, tmp_path / "ours")
    assert [w.filename for w in caught] == [__file__]
    again = deepseek()
    lora.load(again, tmp_path / "ours")
    assert torch.equal(again(IDS).logits, want)
