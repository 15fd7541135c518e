"""What accelerate, TRL, transformers and torch's wrappers do to an adapted model."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import lora
from tests import toys
from tests.toys import MLP, raw

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 2, 3, 4]])


def theirs(kind: str = "GPT2LMHeadModel", **sizes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **{"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 8} | sizes,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return getattr(transformers, kind)(config).eval()


def adapted(**settings) -> nn.Module:
    torch.manual_seed(0)
    return toys.adapted(MLP(), **{"targets": ("up", "down")} | settings)


# Hooks that move weights


def offload(model: nn.Module, how: str, folder) -> nn.Module:
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    return accelerate.dispatch_model(
        model, {"up": "cpu", "down": "disk"}, main_device="cpu", offload_dir=folder
    )


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_an_adapter_on_an_offloaded_model(how, tmp_path):
    want = adapted()(X)
    torch.manual_seed(0)
    model = offload(MLP(), how, tmp_path / "weights")
    assert model.down.weight.is_meta
    toys.adapted(model, targets=("up", "down"))
    assert {p.device.type for p in lora.trainable_parameters(model)} == {"cpu"}
    torch.testing.assert_close(model(X), want)
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in lora.trainable_parameters(model))
    with pytest.raises(ValueError, match="a hook moves its weight"):
        lora.merge(model)
    lora.save(model, tmp_path / "adapter")
    plain = MLP()
    plain.load_state_dict(lora.base_state_dict(adapted()))
    lora.load(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain(X), want)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_a_model_that_is_offloaded_with_its_adapter(how, tmp_path):
    model = adapted()
    want = model(X)
    offload(model, how, tmp_path / "weights")
    with torch.no_grad():
        torch.testing.assert_close(model(X), want)


# Quantised weights


def test_an_adapter_of_a_quantised_base_is_saved_and_not_merged(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    lora.inject(model, targets=("0", "2"), r=4)
    x = torch.randn(3, 64)
    optimizer = torch.optim.SGD(lora.trainable_parameters(model), 0.1)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    want = model(x)
    with pytest.raises(ValueError, match="0 cannot be merged: .* it is quantised"):
        lora.merge(model)
    lora.save(model, tmp_path)
    lora.eject(model)
    lora.load(model, tmp_path)
    assert torch.equal(model(x), want)


class Packed(nn.Linear):
    """As bitsandbytes' Linear4bit: a linear layer whose weight is a column of bytes."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        packed = torch.zeros(n_in * n_out // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_a_base_that_is_packed_is_named_and_no_other_layer_advised():
    model = nn.ModuleDict({"q_proj": Packed(4, 4), "lm_head": nn.Linear(4, 9)})
    words = r"matches q_proj, but its weight is no 2-D floating-point .*quantised\?\)\.$"
    with pytest.raises(ValueError, match=words):
        lora.inject(model, r=2, targets="q_proj")
    with (
        pytest.warns(UserWarning, match="leaves out q_proj: .*quantised"),
        pytest.raises(ValueError, match=r"^Nothing is left of the targets\.$"),
    ):
        lora.inject(model, r=2, targets="all-linear")


# Names and wrappers


def test_parameters_and_state_dict_have_the_same_names():
    model = adapted()
    names = {name for name, _ in model.named_parameters()}
    assert names == set(model.state_dict())
    assert {n for n in names if ".updates." not in n} == set(MLP().state_dict())
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    want = torch.func.functional_call(model, state, (X,))
    model.load_state_dict(state)
    assert torch.equal(model(X), want)


def test_distributed_state_dicts_go_round():
    from torch.distributed.checkpoint import state_dict as dcp

    model, twin = adapted(), adapted()
    options = dcp.StateDictOptions(ignore_frozen_params=True)
    state = dcp.get_model_state_dict(model, options=options)
    assert set(state) == {n for n, p in model.named_parameters() if p.requires_grad}
    full = {name: tensor * 2 for name, tensor in dcp.get_model_state_dict(model).items()}
    dcp.set_model_state_dict(twin, full)
    assert {n: raw(t) for n, t in twin.state_dict().items()} == {n: raw(t) for n, t in full.items()}


def test_the_sizes_of_an_adapted_layer_are_the_bases():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    lora.inject(model, targets=("0", "1"), r=2)
    assert (model[0].num_embeddings, model[0].embedding_dim) == (9, 6)
    assert (model[1].in_features, model[1].out_features) == (6, 4)


class LightningModule(nn.Module):
    """Called as Lightning's, which is told by this name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.metric = model, nn.Identity()

    def forward(self, x):
        return self.model(x)


WRAPPERS = {
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "Lightning": LightningModule,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_saved_as_the_one_inside(wrap, tmp_path):
    model = adapted()
    lora.save(model, tmp_path / "plain")
    lora.save(wrap(model), tmp_path / "wrapped")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "wrapped" / file.name).read_bytes() == file.read_bytes()


def test_ddp_takes_no_new_adapter_and_no_switch(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = adapted()
        lora.inject(model, targets="up", r=1, adapter="other")
        ddp = nn.parallel.DistributedDataParallel(model)
        for call in (
            lambda: lora.inject(ddp, targets="up", r=1, adapter="third"),
            lambda: lora.activate(ddp, "default"),
        ):
            with pytest.raises(RuntimeError, match="Inject and activate before you wrap"):
                call()
        lora.save(ddp, tmp_path / "adapter", adapter="other")
    finally:
        torch.distributed.destroy_process_group()


def test_quantize_dynamic_leaves_adapted_layers_and_their_outputs():
    model = adapted()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(quantised(X), model(X))


# Copies


def test_a_copy_of_one_layer_carries_no_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(1000, 1000))
    lora.inject(model, targets="0", r=2)
    assert len(pickle.dumps(model[0])) < 20_000
    twin = copy.deepcopy(model[0])
    x = torch.randn(2, 8)
    assert torch.equal(twin(x), model[0](x))
    assert twin.weight.data_ptr() != model[0].base.weight.data_ptr()


def test_a_second_adapter_does_not_freeze_what_was_thawed():
    model = toys.adapted()
    model.transformer.ln_f.requires_grad_(True)
    lora.inject(model, r=2, adapter="second")
    assert model.transformer.ln_f.weight.requires_grad
    lora.eject(model)
    assert all(p.requires_grad for p in model.parameters())


# transformers


def test_tie_weights_and_a_grown_vocabulary_leave_the_adapter_right():
    model = toys.adapted(theirs())
    want = model(IDS).logits
    model.tie_weights()
    assert torch.equal(model(IDS).logits, want)
    model.resize_token_embeddings(25, mean_resizing=False)
    torch.testing.assert_close(model(IDS).logits[..., :20], want)
    lora.eject(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_adapted_embedding_is_not_tied_in_silence():
    model = theirs()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    lora.inject(model, r=2, targets="wte")
    with pytest.raises(AttributeError, match=r"wte\.weight"):
        model.tie_weights()


@pytest.mark.parametrize("merged", [False, True])
def test_save_pretrained_writes_the_base_alone_and_says_so(merged, tmp_path):
    model = theirs()
    want, base = {key: raw(value) for key, value in model.state_dict().items()}, model(IDS).logits
    toys.adapted(model, targets=("c_attn", "mlp.c_fc"))
    if merged:
        lora.merge(model)
    with pytest.warns(UserWarning, match=r"writes the base.*lora\.save"):
        model.save_pretrained(tmp_path / "model")
    again = transformers.GPT2LMHeadModel
    again, info = again.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert {key: raw(value) for key, value in again.state_dict().items()} == want
    assert torch.equal(again.eval()(IDS).logits, base)
    lora.eject(model, merge=merged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "ejected")


def test_a_head_that_a_task_trains_is_named(tmp_path):
    classifier = {"kind": "GPT2ForSequenceClassification", "num_labels": 3}
    model = theirs(**classifier)
    with pytest.raises(TypeError, match=r"modules_to_save=\('score',\)"):
        lora.inject(model, r=2, task_type="SEQ_CLS")
    lora.inject(model, r=2)
    with pytest.warns(UserWarning, match=r"score.*random.*modules_to_save"):
        lora.save(model, tmp_path / "without")
    lora.eject(model)
    lora.inject(model, r=2, modules_to_save="score")
    lora.save(model, tmp_path / "with")
    other = theirs(**classifier)
    with torch.no_grad():
        other.score.weight.mul_(-1)
    lora.load(other, tmp_path / "with")
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_fused_experts_are_left_out_aloud():
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with pytest.warns(UserWarning, match=r"leaves out .*experts.* 3-D") as caught:
        lora.inject(model, r=2, targets="all-linear")
    assert caught[0].filename == __file__


# modules_to_save


def test_containers_tied_modules_and_targets_among_modules_to_save_are_said():
    more = nn.Linear(2, 2)
    for held in (nn.ModuleList([more]), nn.ModuleDict({"a": more}), nn.ParameterList([more.bias])):
        model = MLP()
        model.more = held
        with pytest.raises(ValueError, match="more in modules_to_save has no forward"):
            lora.inject(model, targets="up", r=2, modules_to_save="more")
    with pytest.raises(ValueError, match=r"up is a target and in modules_to_save.*exclude="):
        lora.inject(MLP(), targets="all-linear", r=2, modules_to_save="up")
    with pytest.warns(UserWarning, match="wte.weight and lm_head.weight are one tensor"):
        lora.inject(theirs(), r=2, modules_to_save="lm_head")


# TRL


def test_dpo_trainer_with_checkpointing_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words(), pad_token="p", eos_token="e", unk_token="u"
    )
    rows = [{"prompt": "a b", "chosen": "c d", "rejected": "d c"}] * 4
    model = theirs(n_positions=32)
    lora.inject(model, r=2, seed=0)
    before = [raw(p) for p in lora.trainable_parameters(model)]
    arguments = trl.DPOConfig(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=0.1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    assert arguments.gradient_checkpointing
    trainer = trl.DPOTrainer(
        model, ref_model=theirs(n_positions=32), args=arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    trainer.train()
    assert [raw(p) for p in lora.trainable_parameters(model)] != before


def words():
    import tokenizers

    model = tokenizers.models.WordLevel({w: i for i, w in enumerate("peuabcd")}, unk_token="u")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer
