"""Devices that are not here: what runs on a pretended Apple GPU, with the CPU's results."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import gpt2
import lora
from benchmarks import device_check
from tests.devices import pretended_device
from tests.toys import randomize, tiny_gpt2

SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
IDX = torch.arange(24).view(2, 12)


@pytest.fixture
def device():
    with pretended_device() as found:
        yield found


def on(device: torch.device, model: nn.Module) -> nn.Module:
    """A copy of the model on the device."""
    return deepcopy(model).to(device)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().cpu(), b.detach().cpu())


def near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: on a CPU some products and the attention have forms of their own."""
    return torch.allclose(a.detach().cpu(), b.detach().cpu(), rtol=1e-5, atol=1e-5)


def test_the_model(device):
    model = tiny_gpt2()
    twin = on(device, model)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert near(twin(IDX.to(device)), model(IDX))


def test_loading_and_saving(device, tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "cpu")
    twin = gpt2.GPT2.from_pretrained(tmp_path / "cpu", device=device)
    assert {p.device.type for p in twin.parameters()} == {"mps"}
    twin.save_pretrained(tmp_path / "there")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "cpu" / file).read_bytes()


BEAMS = {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram": 2, "no_repeat_prompt": True}


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.5}, {"temperature": 1.0}, SAMPLED, BEAMS]
)
def test_generate(device, options):
    model = tiny_gpt2()
    config = gpt2.GenerateConfig(max_new_tokens=12, eos=None, **options)
    expected = gpt2.generate(model, PROMPTS, config)
    assert gpt2.generate(on(device, model), PROMPTS, config) == expected
    if config.num_beams > 1:
        return
    texts = zip(*gpt2.stream(on(device, model), PROMPTS, config), strict=True)
    assert [list(text) for text in texts] == expected


def letters(*texts: str) -> gpt2.Dataset:
    """Texts as the numbers of their letters."""
    tokenizer = SimpleNamespace(encode=lambda text: [ord(letter) % 32 for letter in text], eos=60)
    return gpt2.encode(texts, tokenizer)


@pytest.mark.parametrize("full", [True, False])
def test_training(device, full, tmp_path):
    data = letters("one two three", "four")
    figures, tuned = [], []
    for where in ("cpu", device):
        tiny_gpt2().save_pretrained(tmp_path)
        model = gpt2.GPT2.from_pretrained(tmp_path, dropout=0.0, device=where)
        if not full:
            lora.inject(model, r=2, targets=("c_attn", "mlp.c_proj"), seed=0)
        records = list(gpt2.train(model, data, gpt2.TrainConfig(steps=4, lr=1e-3, batch_size=2)))
        figures.append([number for r in records for number in (r.loss, r.grad_norm)])
        tuned.append(model)
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    assert figures[1][0] > figures[1][-2]
    assert near(tuned[1](IDX.to(device)), tuned[0](IDX))


def test_training_with_dropout(device):
    model = tiny_gpt2().to(device)
    lora.inject(model, r=2, dropout=0.5, seed=0)
    config = gpt2.TrainConfig(steps=3, lr=1e-3, batch_size=2, checkpointing=True)
    records = list(gpt2.train(model, letters("one two three", "four"), config))
    assert len({record.loss for record in records}) == 3


def adapted(where: torch.device | str = "cpu") -> gpt2.GPT2:
    model = tiny_gpt2().to(where)
    lora.inject(model, r=2, targets=("c_attn", "mlp.c_proj"), seed=0)
    return model


def test_merge_and_unmerge(device):
    model = adapted()
    randomize(model)
    twin = on(device, model)
    before = twin(IDX.to(device))
    lora.merge(model)
    lora.merge(twin)
    for mine, merged in zip(twin.parameters(), model.parameters(), strict=True):
        assert same(mine, merged)
    assert near(twin(IDX.to(device)), model(IDX))
    lora.unmerge(twin)
    assert same(twin(IDX.to(device)), before)
    lora.eject(twin, merge=True)
    assert near(twin(IDX.to(device)), model(IDX))


def test_save(device, tmp_path):
    model = adapted()
    randomize(model)
    lora.save(on(device, model), tmp_path / "there")
    lora.save(model, tmp_path / "cpu")
    for file in (tmp_path / "cpu").iterdir():
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes()


def test_switching_disabling_and_removing(device):
    model = adapted()
    randomize(model)
    lora.inject(model, r=3, targets=("c_attn",), adapter="other", seed=1)
    randomize(model, "other", seed=2)
    twin = on(device, model)
    for each in (model, twin):
        lora.activate(each, {"default": 0.5, "other": 2.0})
    assert near(twin(IDX.to(device)), model(IDX))
    with lora.disabled(twin):
        assert near(twin(IDX.to(device)), tiny_gpt2()(IDX))
    for each in (model, twin):
        lora.remove(each, "default")
        lora.activate(each, "other")
    assert near(twin(IDX.to(device)), model(IDX))


def test_adapters_as_values(device):
    model = adapted()
    randomize(model)
    twin = on(device, model)
    mine, others = (lora.algebra.factors(each) for each in (model, twin))
    for path, pair in mine.items():
        assert same(others[path].A, pair.A)
        assert same(others[path].B, pair.B)
    lora.algebra.implant(twin, lora.algebra.scale(mine, 2.0), "twice")
    assert near(lora.algebra.factors(twin, "twice")[path].B @ pair.A, 2 * pair.B @ pair.A)


def test_low_rank_of_a_dense_change(device):
    change = {"x": torch.randn(6, 5)}
    found = lora.algebra.approximate({"x": change["x"].to(device)}, 5)
    assert near(found.adapter["x"].delta().float(), change["x"])


@pytest.fixture
def checked_base(small_base, monkeypatch):
    def base(device, dtype=None):
        return gpt2.GPT2.from_pretrained(small_base, device=device, dtype=dtype, dropout=0.0)

    monkeypatch.setattr(device_check, "base", base)


def test_device_check_says_what_works_differs_and_fails(checked_base, device, capsys):
    def fail(where):
        raise NotImplementedError("no such operation\nand much more")

    def differ(where):
        return torch.ones(3) + (where.type == "mps") * 0.5

    checks = {
        "logits": device_check.CHECKS["logits"],
        "sampled text": device_check.CHECKS["sampled text"],
    }
    assert device_check.main("mps", checks) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "device mps" in head
    assert [line.split("  ")[0] for line in lines] == list(checks)
    assert all(" works" in line for line in lines)
    spoiled = {"a": lambda where: fail(where) if where.type == "mps" else torch.ones(1)}
    spoiled |= {"b": differ, "c": lambda where: differ(where).bool().long() + (where.type == "mps")}
    assert device_check.main("mps", spoiled) == 1
    _, a, b, c = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert a == ["a", "fails with NotImplementedError: no such operation"]
    assert b == ["b", "differs by 5.0e-01 of the largest number"]
    assert c == ["c", "differs in 3 of 3 tokens"]
