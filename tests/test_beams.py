"""Beam search: transformers' texts, and each prompt's own whatever lies beside it."""

from __future__ import annotations

import math
import shutil
from copy import deepcopy

import pytest
import torch
from toys import randomize, twin

import gpt2
import lora
from gpt2.beams import NOTHING, Beams, forbid_repeats

PROMPTS = [[7, 8, 9, 10, 11], [3], [50, 4, 50, 4, 50, 4, 2, 1], [12, 13]]


def tiny(n_layer: int = 2) -> gpt2.GPT2:
    torch.manual_seed(0)
    sizes = gpt2.GPT2Config(n_layer=n_layer, n_head=2, n_embd=32, block_size=48, vocab_size=60)
    model = gpt2.GPT2(sizes)
    for p in model.parameters():
        p.data.mul_(6)
    return model.eval()


def search(**options) -> gpt2.GenerateConfig:
    return gpt2.GenerateConfig(**{"max_new_tokens": 20, "num_beams": 4, "eos": None} | options)


def theirs(model: gpt2.GPT2, prompts: list[list[int]], config: gpt2.GenerateConfig):
    """What transformers' beam search makes of each prompt alone."""
    other = twin(model)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        [text] = other.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=config.max_new_tokens,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            no_repeat_ngram_size=config.no_repeat_ngram or 0,
            early_stopping=False,
            do_sample=False,
            eos_token_id=list(config.ends) or None,
            pad_token_id=0,
        )[:, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(text) if token in config.ends]
        yield text[: min(ends, default=len(text))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos": 17},
        {"eos": (17, 4, 31), "length_penalty": 0.8, "num_beams": 6},
        {"eos": (5, 40), "length_penalty": 3.0, "num_beams": 2},
        {"eos": (5, 40), "length_penalty": -1.0},
        {"eos": (5, 40), "length_penalty": 0.0, "no_repeat_ngram": 3, "no_repeat_prompt": True},
        {"no_repeat_ngram": 2, "no_repeat_prompt": True, "num_beams": 10},
        {"no_repeat_ngram": 4, "no_repeat_prompt": True, "num_beams": 10, "eos": 13},
        {"no_repeat_ngram": 1, "no_repeat_prompt": True},
        {"max_new_tokens": 1, "no_repeat_ngram": 2, "no_repeat_prompt": True},
    ],
)
def test_a_tiny_models_texts_are_transformers_own(options):
    model, config = tiny(), search(**options)
    expected = list(theirs(model, PROMPTS, config))
    assert gpt2.generate(model, PROMPTS, config) == expected
    assert gpt2.generate(model, PROMPTS[::-1], config) == expected[::-1]


def test_beams_under_an_adapter_are_those_of_the_merged_weights():
    model = tiny()
    lora.inject(model, r=2, targets=("c_attn", "mlp.c_proj"), seed=0)
    randomize(model, std=0.05)
    config = search(eos=(5, 40), num_beams=5)
    texts = gpt2.generate(model, PROMPTS, config)
    folded = deepcopy(model)
    lora.merge(folded)
    assert gpt2.generate(folded, PROMPTS, config) == texts
    with lora.disabled(model):
        assert gpt2.generate(model, PROMPTS, config) != texts


def score(model: gpt2.GPT2, prompt: list[int], text: list[int]) -> float:
    """The log-probability of a text, without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(text)), torch.tensor(text)].sum().item()


def test_a_search_that_follows_every_text_finds_the_likeliest():
    torch.manual_seed(1)
    model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=4))
    for p in model.parameters():
        p.data.mul_(20)
    model.eval()
    config = search(num_beams=64, max_new_tokens=4)
    [text] = gpt2.generate(model, [[1, 2]], config)
    every = torch.cartesian_prod(*[torch.arange(4)] * 4).tolist()
    assert text == max(every, key=lambda t: score(model, [1, 2], t))


def runs(text: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]


def test_runs_of_the_prompt_may_come_again_unless_it_counts():
    model = tiny()
    prompts = [p + t for p, t in zip(PROMPTS, gpt2.generate(model, PROMPTS, search()), strict=True)]
    said = [set(runs(prompt, 2)) for prompt in prompts]
    free = gpt2.generate(model, prompts, search(no_repeat_ngram=2))
    assert all(len(set(runs(text, 2))) == len(text) - 1 for text in free)
    assert any(old & set(runs(text, 2)) for old, text in zip(said, free, strict=True))
    config = search(no_repeat_ngram=2, no_repeat_prompt=True)
    counted = gpt2.generate(model, prompts, config)
    assert not any(old & set(runs(text, 2)) for old, text in zip(said, counted, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 9])
def test_what_is_forbidden_is_what_would_come_twice(size, length):
    generator = torch.Generator().manual_seed(size)
    places, new = max(size - 1, 2), 10
    history = torch.randint(0, 3, (50, places + new), generator=generator)
    history[:, :places] = NOTHING
    history[::2, places - 1] = 1  # a prompt of one token
    history[:, places + length :] = NOTHING
    log_probs = torch.zeros(50, 4)
    forbid_repeats(log_probs, history, torch.tensor([places + length]), size)
    for row, found in zip(history.tolist(), log_probs.tolist(), strict=True):
        text = [token for token in row if token != NOTHING]
        for token, value in enumerate(found):
            twice = len(text) >= size - 1 and (tuple([*text, token][-size:]) in runs(text, size))
            assert (value == -math.inf) == twice, (text, token)


@pytest.mark.parametrize("burst", [1, 3, 16])
def test_looking_seldom_changes_no_text(burst, monkeypatch):
    model, config = tiny(), search(eos=(5, 40, 17), length_penalty=0.8)
    expected = gpt2.generate(model, PROMPTS, config)
    monkeypatch.setattr("gpt2.fast.decoding.BURST", burst)
    monkeypatch.setattr("gpt2.fast.decoding.on_cuda", lambda device: True)  # as a GPU looks
    monkeypatch.setattr("gpt2.fast.decoding.GRAPHED", 10**9)
    assert gpt2.generate(model, PROMPTS, config) == expected


def test_the_search_is_over_when_no_text_can_be_better():
    model, calls = tiny(), []
    config = search(eos=tuple(range(0, 60, 2)), num_beams=3)  # every other token ends a text
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    texts = gpt2.generate(model, PROMPTS, config)
    assert len(calls) < 20
    assert all(len(text) < 20 for text in texts)
    assert not any(token % 2 == 0 for text in texts for token in text)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_the_search(value):
    model, calls = tiny(), []

    def spoil(module, args, logits):
        calls.append(1)
        if len(calls) == 4:
            logits[5, ..., 5] = value  # the second prompt's second beam
        return logits

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match="not finite: prompt 1 after its 1 tokens and 3 new"):
        gpt2.generate(model, PROMPTS, search())
    assert len(calls) < 20


def test_beams_give_no_stream_and_no_prompts_no_texts():
    with pytest.raises(ValueError, match="num_beams 4 gives no tokens one by one: use generate"):
        gpt2.stream(tiny(), PROMPTS, search())
    assert gpt2.generate(tiny(), [], search()) == []


@pytest.mark.parametrize("how", ["fixed", "compiled"])
def test_steps_of_one_shape_change_no_text(how, monkeypatch):
    model, config = tiny(n_layer=1), search(eos=(5, 40), no_repeat_ngram=3, num_beams=3)
    expected = gpt2.generate(model, PROMPTS, config)
    if how == "compiled" and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile needs a C++ compiler here")
    # Every step has the shapes of the first, as captured and compiled ones must.
    monkeypatch.setattr(Beams, "fixed", property(lambda _: True, lambda *_: None), raising=False)
    assert gpt2.generate(model, PROMPTS, config, compile=how == "compiled") == expected
    torch._dynamo.reset()


def test_a_step_writes_where_its_tensors_lie():
    """As a CUDA graph must."""
    beams = Beams(tiny(), PROMPTS, search(no_repeat_ngram=2))
    held = beams._changed()
    before = [tensor.clone() for tensor in held]
    beams.step()
    assert [id(tensor) for tensor in beams._changed()] == [id(tensor) for tensor in held]
    assert {id(kv) for kv in beams.cache.layers} < {id(tensor) for tensor in held}
    assert sum(not torch.equal(a, b) for a, b in zip(before, held, strict=True)) >= 6
