"""Training through wrappers: the model that was given is the one that is called."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import gpt2
import lora
from gpt2 import IGNORE, StepRecord, TrainConfig, summed_loss, train
from gpt2.training.wrapped import inner
from tests.test_train import DATA, STILL, Letters, model_of, weights


@pytest.fixture
def _one_process():
    """A group of one process, without a socket."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class Counting(nn.Module):
    """A wrapper of the usual kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.calls = 0

    def forward(self, *inputs: object, **options: object) -> object:
        self.calls += 1
        return self.module(*inputs, **options)


class Logits(nn.Module):
    """A model that holds a GPT-2 and takes ids only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.module(idx)


class Output(Logits):
    """As transformers' models: the logits are a field of what is given."""

    def forward(self, idx: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.module(idx))


def run(model: nn.Module, **options) -> list[StepRecord]:
    return list(train(model, DATA, TrainConfig(**{"lr": 1e-2, "steps": 3} | options)))


def losses(records: list[StepRecord]) -> list[float]:
    return [record.loss for record in records]


# The model's own loss


def test_the_models_loss_is_the_summed_cross_entropy():
    model = model_of()
    idx, labels = torch.randint(60, (3, 9)), torch.randint(60, (3, 9))
    labels[1, 4:] = IGNORE
    want = nn.functional.cross_entropy(
        model(idx)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(model(idx, labels), want)
    torch.testing.assert_close(summed_loss(model, idx, labels), want)
    parts = [model(idx[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(sum(parts), want)


def test_labels_that_lie_not_beside_the_ids_are_refused():
    idx = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels \(2, 4\) and token ids \(2, 5\) differ"):
        model_of()(idx, idx[:, :4])


def test_the_head_computes_what_a_linear_layer_does():
    head, x = model_of().lm_head, torch.randn(2, 3, 16)
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(head(x), nn.functional.linear(x, head.weight))


# Wrappers


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
@pytest.mark.parametrize("wrap", [Counting, Logits, Output])
def test_a_step_calls_what_it_was_given(wrap, adapter):
    plain, wrapped = model_of(adapter=adapter), wrap(model_of(adapter=adapter))
    calls: list[int] = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    assert losses(run(wrapped, accumulate=2)) == pytest.approx(losses(run(plain, accumulate=2)))
    assert len(calls) == 6
    if wrap is Counting:
        assert weights(inner(wrapped)) == weights(plain)


@pytest.mark.usefixtures("_one_process")
def test_ddp_reduces_the_gradients_of_a_step():
    plain, wrapped = model_of(adapter=True), model_of(adapter=True)
    ddp, reduced = DistributedDataParallel(wrapped), []

    def hook(_, bucket):
        reduced.append(bucket.buffer())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, hook)
    assert losses(run(ddp)) == pytest.approx(losses(run(plain)))
    assert len(reduced) >= 3
    assert weights(wrapped) == weights(plain)


def sharded(model: nn.Module, how: str) -> nn.Module:
    """A model whose parameters are shared out among processes."""
    if how == "fully_shard":
        return fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return fsdp.FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=how == "FSDP, parameters kept"
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("how", ["FSDP", "FSDP, parameters kept", "fully_shard"])
def test_a_sharded_model_trains_as_a_whole_one(how):
    plain, wrapped = model_of(), sharded(model_of(), how)
    assert isinstance(inner(wrapped), gpt2.GPT2)
    options = {"accumulate": 2, "checkpointing": True}
    want, got = run(plain, **options), run(wrapped, **options)
    assert losses(got) == pytest.approx(losses(want), rel=1e-5)
    assert [r.grad_norm for r in got] == pytest.approx([r.grad_norm for r in want], rel=1e-4)


def test_training_a_compiled_model_runs_what_was_compiled():
    graphs: list[int] = []

    def backend(graph, _):
        graphs.append(1)
        return graph.forward

    plain, model = model_of(adapter=True), model_of(adapter=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    got = losses(run(compiled))
    assert graphs
    assert got == pytest.approx(losses(run(plain)), rel=1e-5)
    graphs.clear()
    run(compiled, compile=True)  # it is: nothing within is compiled twice
    torch._dynamo.reset()


def test_flags_reach_the_gpt2_within_a_wrapper():
    model = model_of(adapter=True)
    seen: list[bool] = []
    model.transformer.register_forward_hook(lambda m, *_: seen.append("forward" in vars(m.h[0])))
    run(Counting(Counting(model)), checkpointing=True)
    assert seen == [True] * 3
    assert "forward" not in vars(model.transformer.h[0])


def test_compiling_a_wrapped_model_compiles_its_blocks():
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile needs a C++ compiler here")
    model = gpt2.GPT2(replace(STILL, n_layer=1))
    lora.inject(model, r=2, seed=0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = gpt2.encode(["compile"], Letters())
    list(train(Counting(model), data, TrainConfig(steps=2, compile=True)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("wrap", [Logits, lambda _: nn.Embedding(64, 64)], ids=["ids", "table"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compile": True}, r"compile=True needs a GPT2; give torch.compile\(model\) instead"),
        ({"checkpointing": True}, "checkpointing=True needs a GPT2"),
    ],
    ids=str,
)
def test_flags_that_reach_nothing_are_refused(options, said, wrap):
    with pytest.raises(ValueError, match=said):
        train(wrap(model_of()), DATA, TrainConfig(steps=1, **options))


def test_a_cuda_graph_of_a_step_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA device"):
        train(model_of(), DATA, TrainConfig(steps=1, cuda_graph=True))


def test_the_context_is_that_of_the_gpt2_within():
    data = gpt2.encode(["a" * 32], Letters())
    with pytest.raises(ValueError, match="33 tokens"):
        train(Counting(model_of()), data, TrainConfig(steps=1))


# Other models


def test_a_transformers_model_trains():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    ours, theirs = model_of(), transformers.GPT2LMHeadModel(config)
    theirs.load_state_dict(ours.state_dict())
    assert losses(run(theirs)) == pytest.approx(losses(run(ours)), rel=1e-4)


def test_a_model_without_logits_is_refused():
    class Nothing(nn.Embedding):
        def forward(self, idx):
            return (super().forward(idx),)

    with pytest.raises(ValueError, match=r"Nothing gives tuple: .* as \.logits"):
        run(Nothing(64, 64))
