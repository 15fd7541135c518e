"""Training what was compiled, sharded or is no GPT-2: the model that was given is called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from gpt2 import StepRecord, TrainConfig, train
from tests.runs import DATA, Logits, model_of


@pytest.fixture
def _one_process():
    """A group of one process, without a socket."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class Output(Logits):
    """As transformers' models: the logits are a field of what is given."""

    def forward(self, idx: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.module(idx))


def run(model: nn.Module, **options) -> list[StepRecord]:
    return list(train(model, DATA, TrainConfig(**{"lr": 1e-2, "steps": 3} | options)))


def losses(records: list[StepRecord]) -> list[float]:
    return [record.loss for record in records]


# The model's own loss


def test_labels_that_lie_not_beside_the_ids_are_refused():
    idx = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels \(2, 4\) and token ids \(2, 5\) differ"):
        model_of()(idx, idx[:, :4])


# Wrappers


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
@pytest.mark.parametrize("wrap", [Logits, Output])
def test_a_step_calls_what_it_was_given(wrap, adapter):
    plain, wrapped = model_of(adapter=adapter), wrap(model_of(adapter=adapter))
    calls: list[int] = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    assert losses(run(wrapped, accumulate=2)) == pytest.approx(losses(run(plain, accumulate=2)))
    assert len(calls) == 6


@pytest.mark.usefixtures("_one_process")
def test_a_sharded_model_trains_as_a_whole_one():
    plain, sharded = model_of(), fsdp.fully_shard(model_of(), mesh=init_device_mesh("cpu", (1,)))
    options = {"accumulate": 2, "checkpointing": True}
    want, got = run(plain, **options), run(sharded, **options)
    assert losses(got) == pytest.approx(losses(want), rel=1e-5)
    assert [r.grad_norm for r in got] == pytest.approx([r.grad_norm for r in want], rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        lambda model: fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    ],
    ids=["DataParallel", "DDP", "FSDP1"],
)
def test_wrappers_of_several_devices_are_refused_with_what_takes_their_place(wrap):
    with pytest.raises(ValueError, match="Parallel is not trained: give the model in it; torchrun"):
        train(wrap(model_of()), DATA, TrainConfig(steps=1))


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

    with pytest.raises(ValueError, match=r"Nothing gives tuple: .* an object with \.logits"):
        run(Nothing(64, 64))
