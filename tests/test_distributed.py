"""Several processes train what one trains."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2
import lora
from gpt2.training import distributed, fitting
from gpt2.training.distributed import shard, whole
from tests.processes import end, together
from tests.runs import DATA, digest, encoded, model_of

HELD_OUT = encoded("abd hallo lowtank as x")
MANY = encoded(
    "a bc def ghij klmno pqrstu vw xyz abab cd efgh ijk lmnopq r stu vwxyz ace bdfh ik jl"
)
PLANS: dict[str, dict[str, Any]] = {
    "rows": {"batch_size": 1},
    "buckets": {"tokens_per_batch": 24},
    "packed": {"tokens_per_batch": 16, "packing": True},
}


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    end()


def fitted(adapter: bool, options: dict[str, Any], nan_on: int | None = None) -> dict[str, Any]:
    """All that a run comes to: losses, norms, what was found, the bytes of weights and moments."""
    model = model_of(dropout=True, adapter=adapter)
    config = gpt2.TrainConfig(**{"lr": 3e-2, "steps": 7, "weight_decay": 0.1} | options)
    if nan_on is not None and torch.distributed.get_rank() == nan_on:
        first = next(p for p in model.parameters() if p.requires_grad)
        first.register_hook(lambda grad: grad * torch.nan)
    run = gpt2.RunConfig(eval_every=3)
    fit = fitting.fit(model, MANY, config, validation=HELD_OUT, run=run)
    told: list[Any] = []
    error = ""
    try:
        told += [r.metrics() | {"seconds": 0} for r in fit]
    except RuntimeError as failed:
        error = str(failed)
    with fit.last_weights():
        state = fit.state()
        return {
            "told": told,
            "error": error,
            "evaluated": fit.evaluated,
            "parameters": digest(state.parameters),
            "moments": digest(state.moments),
        }


@pytest.mark.parametrize("plan", PLANS)
def test_any_number_of_processes_gives_the_same_bits(plan):
    """With dropout, uneven token counts, and an epoch's end at which some have nothing to do."""
    options = {"accumulate": 8} | PLANS[plan]
    (alone,) = together(1, fitted, True, options)
    assert len(alone["told"]) == 7
    for count in (2, 4, 8):
        for got in together(count, fitted, True, options):
            assert got == alone


def sharded_run(accumulate: int, adapter: bool, world: int) -> Any:
    model = model_of(adapter=adapter)
    if world > 1:
        model = shard(model)
    # An eps above rounding: attention does not depend on the bias of the keys, whose gradient is 0.
    config = gpt2.TrainConfig(lr=1e-2, steps=7, accumulate=accumulate, eps=1e-3)
    told = [(r.loss, r.grad_norm) for r in gpt2.train(model, DATA, config)]
    weights = {n: whole(p.detach()).numpy().copy() for n, p in model.named_parameters()}
    return told, gpt2.evaluate(model, HELD_OUT, batch_size=2).loss, weights


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter"])
def test_a_sharded_model_trains_as_a_whole_one_to_rounding(adapter):
    (want,) = together(1, sharded_run, 6, adapter, 1)
    for got in together(2, sharded_run, 6, adapter, 2):
        assert [*map(list, got[0])] == [pytest.approx(row, rel=1e-4) for row in want[0]]
        assert got[1] == pytest.approx(want[1], rel=1e-5)
        assert got[2].keys() == want[2].keys()
        for name, values in want[2].items():
            assert got[2][name] == pytest.approx(values, rel=1e-3, abs=1e-4)


def rounded_run(dtype: torch.dtype | None, world: int, autocast: bool) -> Any:
    """The losses of a run, its weights' dtypes, and which of them are numbers of bfloat16."""
    model = model_of()
    if world > 1:
        model = shard(model, dtype=dtype)
    config = gpt2.TrainConfig(lr=1e-2, steps=7, accumulate=6, eps=1e-3, autocast=autocast)
    told = [r.loss for r in gpt2.train(model, DATA, config)]
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    narrow = [name for name, p in weights.items() if torch.equal(p.bfloat16().float(), p)]
    return told, {str(p.dtype) for p in model.parameters()}, narrow


def test_a_model_sharded_in_bfloat16_keeps_float32_and_trains_as_autocast_does():
    """Both round weights and activations to 8 bits, at other places, and so err alike.

    So their losses differ by no more than twice what rounding does to autocast's, which is itself
    below bfloat16's unit.
    """
    exact, _, _ = together(1, rounded_run, None, 1, False)[0]
    want, _, _ = together(1, rounded_run, None, 1, True)[0]
    rounding = max(abs(a - b) for a, b in zip(exact, want, strict=True))
    assert 0 < rounding < 2**-8 * max(exact)
    one, other = together(2, rounded_run, torch.bfloat16, 2, False)
    assert one == other
    assert one[0] != exact  # it was rounded
    assert one[0] == pytest.approx(want, abs=2 * rounding)
    assert one[1:] == ({"torch.float32"}, [])


def test_a_gradient_that_is_not_finite_in_one_process_stops_all_at_the_same_step():
    options = {"accumulate": 2, "batch_size": 1}
    one, other = together(2, fitted, True, options, 1)
    assert one == other
    assert one["told"] == []
    assert "Step 1: the loss or" in one["error"]
    assert "The step was not applied" in one["error"]


def started(accumulate: int, seed: int | None) -> Any:
    model = model_of(adapter=True, seed=torch.distributed.get_rank() if seed is None else seed)
    return len(list(gpt2.train(model, DATA, gpt2.TrainConfig(steps=2, accumulate=accumulate))))


def test_processes_that_cannot_share_a_step_are_refused_with_the_sizes_that_can():
    for said in together(2, started, 3, 0):
        assert "2 processes cannot share the 3 micro-batches" in said
        assert "let 2 divide accumulate" in said


def test_processes_that_begin_with_other_weights_are_refused():
    for said in together(2, started, 2, None):
        assert "Process 1 begins with other weights" in said


def reduced(*arguments: Any) -> Any:
    distributed.GATHERED_BYTES = 0
    return fitted(*arguments)


def test_all_reduce_gives_the_same_to_rounding():
    options = {"accumulate": 4, "eps": 1e-3}
    (alone,) = together(1, fitted, False, options)
    assert len(alone["told"]) == 7
    one, other = together(2, reduced, False, options)
    assert one == other
    for got, want in zip(one["told"], alone["told"], strict=True):
        assert (got["loss"], got["grad_norm"]) == pytest.approx(
            (want["loss"], want["grad_norm"]), rel=1e-5
        )


def sharded_fit(world: int, folder: str, stop: int | None, resume: bool) -> Any:
    """A run of a whole or a sharded model, cut short or resumed, and its snapshots.

    The last step that it tells of is told again by a run that goes on, since nobody came back.
    """
    model = model_of()
    if world > 1:
        model = shard(model)
    config = gpt2.TrainConfig(lr=1e-2, steps=8, accumulate=2, eps=1e-3)
    run = gpt2.RunConfig(eval_every=2, save_every=2, folder=folder)
    fit = gpt2.fit(model, DATA, config, validation=HELD_OUT, run=run, resume=resume)
    told = [r.loss for r in itertools.islice(fit, stop)]
    fit.save()
    fit.close()
    model.save_pretrained(Path(folder, f"of {world}"))
    return told, fit.evaluated, fit.best_step


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory) -> tuple[Any, Path]:
    """What a run of a whole model comes to, and where it is saved."""
    folder = tmp_path_factory.mktemp("unsharded")
    return together(1, sharded_fit, 1, str(folder), None, False)[0], folder / "of 1"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_a_snapshot_of_a_sharded_run_opens_on_any_number_of_processes(
    before, after, unsharded, tmp_path
):
    whole_run, whole_model = unsharded
    first = together(before, sharded_fit, before, str(tmp_path), 5, False)
    second = together(after, sharded_fit, after, str(tmp_path), None, True)
    for one in first:
        for two in second:
            assert one[0][:4] + two[0] == pytest.approx(whole_run[0], rel=1e-4)
            assert two[1] == pytest.approx(whole_run[1], rel=1e-4)
            assert two[2] == whole_run[2]
    want = gpt2.GPT2.from_pretrained(str(whole_model)).state_dict()
    got = gpt2.GPT2.from_pretrained(str(tmp_path / f"of {after}")).state_dict()
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, rtol=1e-3, atol=1e-4)


def saved_where_it_cannot_be(folder: str) -> list[str]:
    """What a save says whose folder is a file, and one after it."""
    model, said = model_of(), list[str]()
    shard(model)
    for name in ("file", "folder"):
        try:
            said.append(str(model.save_pretrained(Path(folder, name))))
        except OSError as error:
            said.append(type(error).__name__)
    return said


def test_nobody_waits_for_the_first_process_if_its_save_fails(tmp_path):
    (tmp_path / "file").touch()
    said = together(2, saved_where_it_cannot_be, str(tmp_path))
    assert said == [["FileExistsError", "None"], ["None", "None"]]
    got = gpt2.GPT2.from_pretrained(tmp_path / "folder").state_dict()
    assert all(torch.equal(got[name], t) for name, t in model_of().state_dict().items())


def adapter_of_a_sharded_model(folder: str) -> list[str]:
    """Save the adapter; what merging, loading, injecting and ejecting say."""
    model = model_of(adapter=True)
    twin = copy.deepcopy(model)
    shard(model)
    own = Path(folder, str(torch.distributed.get_rank()))  # only the first's is to be there
    lora.save(model, own)
    idx = torch.tensor([[1, 2, 3]])
    said = [str(torch.equal(model(idx), twin(idx)))]
    for verb in (
        lambda: lora.merge(model),
        lambda: lora.eject(model),
        lambda: lora.eject(model, merge=True),
        lambda: lora.load(model, Path(folder, "0"), adapter="other"),
        lambda: lora.inject(model, adapter="third"),
    ):
        torch.distributed.barrier()
        with pytest.raises(RuntimeError) as caught:
            verb()
        said.append(str(caught.value))
    return said


def test_an_adapter_of_a_sharded_model_is_saved_as_of_a_whole_one_and_the_rest_refused(tmp_path):
    for same, *said in together(2, adapter_of_a_sharded_model, str(tmp_path)):
        assert same == "True"
        assert len(said) == 5
        assert {line.split(",")[0] for line in said} == {"The model is sharded"}
    lora.save(model_of(adapter=True), tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "whole"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
