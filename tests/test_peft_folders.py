"""PEFT's own folders, written by PEFT in this test: read, refused or written back, never cut."""

from __future__ import annotations

import json
import random
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from lora.disk import checkpoint, peft_config, peft_writing
from lora.disk.folder import from_tensors, open_folder, to_tensors
from tests.toys import MLP, randomize, snapshot

peft = pytest.importorskip("peft", reason="PEFT is the oracle here")
transformers = pytest.importorskip("transformers", reason="PEFT adapts its models")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about tied weights and embeddings

IDX = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))


def llama(tied: bool = False, kind: str = "LlamaForCausalLM") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_bias=True,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return getattr(transformers, kind)(config).eval()


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
    return theirs(IDX).logits


# The base's own weights beside an adapter


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "q_proj"]])
def test_adapted_embeddings_and_heads_load(tmp_path, tied, targets):
    want = write(tmp_path, llama(tied), target_modules=targets)
    keys = load_file(tmp_path / checkpoint.WEIGHTS).keys()
    assert any(key.endswith("base_layer.weight") for key in keys)
    model = llama(tied)
    lora.load(model, tmp_path, untie=tied)
    torch.testing.assert_close(model(IDX).logits, want, rtol=1e-4, atol=1e-5)


def test_whole_embeddings_load_where_they_are_the_bases(tmp_path):
    want = write(tmp_path, llama(), {"save_embedding_layers": True}, target_modules=["q_proj"])
    model = llama()
    lora.load(model, tmp_path)
    torch.testing.assert_close(model(IDX).logits, want, rtol=1e-4, atol=1e-5)
    half = llama().to(torch.bfloat16)
    lora.load(half, tmp_path)  # equal but for the rounding


@pytest.mark.parametrize(
    ("fields", "key", "words"),
    [
        ({"target_modules": ["lm_head"]}, "lm_head.base_layer.weight",
         r"lm_head\.weight differs from the base's in 1 of 248 values: it was made for another"),
        ({"target_modules": ["q_proj"]}, "lm_head.weight",
         r"lm_head\.weight: left over \(differs from the base's in 1 of 248 values\)"),
    ],
)  # fmt: skip
def test_other_weights_of_the_base_are_said(tmp_path, fields, key, words):
    write(tmp_path, llama(), {"save_embedding_layers": True}, **fields)
    tensors = load_file(tmp_path / checkpoint.WEIGHTS)
    tensors[f"base_model.model.{key}"][3, 2] += 1
    save_file(tensors, tmp_path / checkpoint.WEIGHTS)
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        lora.load(model, tmp_path)
    assert snapshot(model) == before
    if "base_layer" in key:
        lora.load(model, tmp_path, allow_base_mismatch=True)
    else:  # what was trained there would be lost
        with pytest.raises(ValueError, match="left over"):
            lora.load(model, tmp_path, allow_base_mismatch=True)


def test_a_resized_vocabulary_is_said(tmp_path):
    grown = llama()
    grown.resize_token_embeddings(33)
    write(tmp_path, grown, {"save_embedding_layers": True}, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"lm_head.*is \(33, 8\), the base's is \(31, 8\)"):
        lora.load(llama(), tmp_path, allow_base_mismatch=True)


# Modules trained as a whole, and biases


FOLDERS = {
    "head": {"kind": "LlamaForSequenceClassification", "task": "SEQ_CLS"},
    "norms": {"modules_to_save": ["norm", "lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "block": {"modules_to_save": ["mlp"], "bias": "all"},
    "own biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "embedding's": {"bias": "lora_only", "target_modules": ["embed_tokens", "q_proj"]},
    "biased copy": {"bias": "all", "modules_to_save": ["k_proj"]},
}


def folder_of(tmp_path, name: str):
    fields = {"target_modules": ["q_proj"]} | FOLDERS[name]
    model = llama(kind=fields.pop("kind", "LlamaForCausalLM"))
    return write(tmp_path / "theirs", model, **fields)


def test_the_parts_of_each_folder(tmp_path):
    h = "model.layers.{}.{}"
    norms = [h.format(i, f"{n}_layernorm") for i in (0, 1) for n in ("input", "post_attention")]
    copies = {
        "head": {"score": ["weight"]},
        "norms": {key: ["weight"] for key in [*norms, "model.norm", "lm_head"]},
        "embedding": {"model.embed_tokens": ["weight"]},
        "block": {
            h.format(i, "mlp"): ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
            for i in (0, 1)
        },
        "biased copy": {h.format(i, "self_attn.k_proj"): ["bias", "weight"] for i in (0, 1)},
    }
    own = [h.format(i, "self_attn.q_proj") for i in (0, 1)]
    every = [h.format(i, f"self_attn.{n}_proj") for i in (0, 1) for n in "kqvo"]
    biases = {
        "own biases": own,
        "all biases": every,
        "block": every,
        "embedding's": own,
        "biased copy": [path for path in every if "k_proj" not in path],
    }
    for name in FOLDERS:
        folder_of(tmp_path / name, name)
        saved = open_folder(tmp_path / name / "theirs")
        found = {path: sorted(module) for path, module in saved.copies.items()}
        assert found == copies.get(name, {}), name
        assert sorted(saved.biases) == sorted(biases.get(name, [])), name
        assert not saved.left_over, name


@pytest.mark.parametrize("name", FOLDERS)
def test_pefts_copies_and_biases_load_and_go_back(tmp_path, name):
    """PEFT's folder on our model, and what we save of it on PEFT's: the same logits."""
    want = folder_of(tmp_path, name)
    kind = FOLDERS[name].get("kind", "LlamaForCausalLM")
    model = llama(kind=kind)
    base = model(IDX).logits
    lora.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(IDX).logits, want, rtol=1e-4, atol=1e-5)
    with lora.disabled(model):
        assert torch.equal(model(IDX).logits, base)
    lora.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(kind=kind), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDX).logits, want, rtol=1e-4, atol=1e-5)
    again = llama(kind=kind)
    lora.load(again, tmp_path / "ours", trainable=False)
    assert torch.equal(again(IDX).logits, model(IDX).logits)
    assert not lora.trainable_parameters(again)
    lora.eject(model)
    assert torch.equal(model(IDX).logits, base)
    with pytest.raises(ValueError, match="holds more than factors: a copy or a bias of"):
        lora.algebra.read(tmp_path / "theirs")


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_written_is_what_peft_reads(tmp_path, name):
    """Parsed from PEFT's folder, written by us, read by PEFT: the same logits."""
    want = folder_of(tmp_path, name)
    saved = open_folder(tmp_path / "theirs")
    kind = FOLDERS[name].get("kind", "LlamaForCausalLM")
    factors = {path: (pair["A"], pair["B"]) for path, pair in saved.factors.items()}
    text = peft_writing.dumps(
        {path: saved.config.update_config(path) for path in factors},
        paths=[path for path, _ in llama(kind=kind).named_modules()],
        copies=saved.copies,
        biases=saved.biases,
    )
    tensors = to_tensors(factors, {"model.embed_tokens"}, saved.copies, saved.biases)
    again = from_tensors(tensors, peft_config.parse(text), {})
    assert (again.copies.keys(), again.biases.keys()) == (saved.copies.keys(), saved.biases.keys())
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / checkpoint.CONFIG).write_text(text)
    save_file(tensors, tmp_path / "ours" / checkpoint.WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of what it lacks or does not know
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing|.*tied|.*unregister")
        theirs = peft.PeftModel.from_pretrained(llama(kind=kind), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDX).logits, want, rtol=1e-5, atol=1e-6)


def test_a_copy_whose_name_ends_anothers_cannot_be_written():
    config = lora.UpdateConfig(r=1, alpha=1, dropout=0.0)
    with pytest.raises(ValueError, match="modules_to_save would also take my_score"):
        peft_writing.dumps({"a": config}, paths=["a", "score", "my_score"], copies=["score"])


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


def test_our_reading_of_a_config_is_pefts():
    from peft.tuners.tuners_utils import check_target_module_exists

    draw = random.Random(0)
    names = ["c_attn", "attn.c_attn", "q", "up", "proj", "c_proj", "h.0.proj", "dense", *PATHS[5:9]]
    regexes = [r".*\.(q|up)$", r"transformer\.h\.[01]\..*", "c_attn", r"(?!a).*\d", r"^h.*|score"]
    seen = 0
    for _ in range(600):
        fields: dict = {"r": 8, "target_modules": draw.sample(names, draw.randint(1, 4))}
        if draw.random() < 0.2:
            fields["target_modules"] = draw.choice(regexes)
        elif draw.random() < 0.6:
            fields["layers_to_transform"] = draw.choice([0, 1, [1, 2], [], [12], [0, 2]])
            if draw.random() < 0.5:
                fields["layers_pattern"] = draw.choice(["h", ["layers"], ["blocks", "layers"], []])
        if draw.random() < 0.3:
            fields["exclude_modules"] = draw.choice([["q", "h.0"], *regexes])
        if draw.random() < 0.3:
            fields["modules_to_save"] = draw.choice([["score"], ["attn"], ["h", "proj"]])
        if draw.random() < 0.3:
            fields["rank_pattern"] = {k: draw.randint(1, 9) for k in draw.sample(regexes, 2)}
        theirs = peft.LoraConfig(**fields)
        ours = peft_config.parse(json.dumps(fields | {"peft_type": "LORA"}))
        for path in PATHS:
            want = check_target_module_exists(theirs, path)
            excluded = type(want).__name__ == "_ExcludedModule"
            assert ours.matches(path) == (bool(want) and not excluded), (fields, path)
            key = peft.utils.other.get_pattern_key(theirs.rank_pattern, path)
            assert ours.update_config(path).r == theirs.rank_pattern.get(key, 8), (fields, path)
            seen += ours.matches(path)
    assert seen > 1000


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
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
    torch.testing.assert_close(model(IDX).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"lora_bias": True}, "lora_bias is True, which is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is .*, which is not supported"),
        ({"init_lora_weights": "mica"}, "init_lora_weights 'mica' changed"),
    ],
)
def test_variants_are_refused_by_name(tmp_path, fields, words):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **fields)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        lora.load(llama(), tmp_path)


def test_a_convolution_is_refused_by_name(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))

    config = peft.LoraConfig(r=2, target_modules=["0", "1"])
    peft.get_peft_model(build(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="0: it is no nn.Linear, Conv1D or nn.Embedding"):
        lora.load(build(), tmp_path)
