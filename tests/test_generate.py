import importlib
import math
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from toys import randomize, twin

import lora
from gpt2.config import GPT2Config
from gpt2.generation import generate, stream
from gpt2.model import GPT2
from gpt2.sampling import (
    GenerateConfig,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    greedy,
    sample,
)

SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}


def tiny(**changes) -> GPT2:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 60}
    model = GPT2(GPT2Config(**(sizes | changes)))
    for p in model.parameters():  # far from uniform, so that the next token is never a tie
        p.data.mul_(6)
    return model.eval()


PROMPTS = [[7, 8, 9, 10, 11], [3], [50, 4, 50, 4, 50, 4, 2, 1], [12, 13]]


@pytest.fixture
def theirs():
    pytest.importorskip("transformers", reason="compares with transformers (extra: peers)")
    return importlib.import_module("transformers.generation.logits_process")


def logits_with_ties() -> torch.Tensor:
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) * 3
    logits[1] = logits[1].round()
    logits[2] = 0.0
    logits[3, :20] = logits[3].max()
    return logits


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.5])
def test_temperature_is_transformers_own(theirs, temperature):
    logits = logits_with_ties()
    warped = theirs.TemperatureLogitsWarper(temperature)(None, logits)
    uniform = torch.rand(5, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ours = sample(logits, GenerateConfig(temperature=temperature), uniform)
    assert torch.equal(ours, sample(warped, GenerateConfig(temperature=1.0), uniform))


@pytest.mark.parametrize("k", [1, 7, 20, 200, 1000])
def test_top_k_is_transformers_own(theirs, k):
    logits = logits_with_ties()
    assert torch.equal(apply_top_k(logits, k), theirs.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_is_transformers_own(theirs, p):
    logits = logits_with_ties()
    if p < 1:
        assert torch.equal(apply_top_p(logits, p), theirs.TopPLogitsWarper(p)(None, logits))
    assert apply_top_p(logits, p).isfinite().any(-1).all()


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty_is_transformers_own(theirs, penalty):
    logits = logits_with_ties()
    ids = torch.randint(200, (5, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 6:] = ids[:, :6]  # a token that comes twice counts once
    seen = torch.zeros(5, 200, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(
        apply_repetition_penalty(logits, seen, penalty),
        theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()),
    )


def test_sample_follows_the_filtered_distribution():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2)) * 2
    config = GenerateConfig(temperature=0.8, top_k=6, top_p=0.9)
    expected = apply_top_p(apply_top_k(logits / 0.8, 6), 0.9).softmax(-1)[0]
    n = 500
    even = (torch.arange(n, dtype=torch.double) + 0.5) / n  # evenly spaced: no chance involved
    uniform = torch.cartesian_prod(even, even)
    drawn = sample(logits.expand(n**2, -1), config, uniform).bincount(minlength=12) / n**2
    torch.testing.assert_close(drawn, expected.to(drawn.dtype), rtol=0, atol=1.5 / n)
    assert (drawn[expected == 0] == 0).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_are_allowed(u):
    logits = torch.full((1, 50), -math.inf)
    logits[0, 20:30] = torch.linspace(-1, 1, 10)
    uniform = torch.full((1, 2), u, dtype=torch.double)
    token = sample(logits, GenerateConfig(temperature=1.0), uniform)
    assert token.item() == (20 if u == 0 else 29)


def test_rounding_seldom_changes_what_is_drawn():
    """Two batches round a row's logits differently; of the whole vocabulary's bounds 1 in 200
    draws would cross one."""
    generator, config = torch.Generator().manual_seed(0), GenerateConfig(temperature=1.0)
    changed = 0
    for _ in range(20):
        logits = torch.randn(100, 50257, generator=generator) * 2.5 - 60
        uniform = torch.rand(100, 2, dtype=torch.double, generator=generator)
        off = torch.randn(logits.shape, generator=generator) * 2**-18  # a bit of such logits
        drawn = [sample(some, config, uniform) for some in (logits, logits + off)]
        changed += int((drawn[0] != drawn[1]).sum())
    assert changed <= 2


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_transformers_own(demo, penalty):
    prompt = torch.tensor([[464, 3139, 286, 4881, 318]])
    expected = twin(demo).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=penalty,
    )[0, 5:]
    config = GenerateConfig(max_new_tokens=30, repetition_penalty=penalty)
    assert generate(demo, prompt.tolist(), config) == [expected.tolist()]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, SAMPLED])
def test_each_prompt_of_a_batch_gives_what_it_gives_alone(options):
    model, options = tiny(), {"max_new_tokens": 20, "eos": None, **options}
    together = generate(model, PROMPTS, GenerateConfig(seed=5, **options))
    assert len({tuple(text) for text in together}) == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], GenerateConfig(seed=5 + row, **options)) == [together[row]]


def test_a_seed_gives_the_same_text_and_leaves_the_global_generator_alone():
    model, before = tiny(), torch.get_rng_state()
    configs = [GenerateConfig(temperature=1.5, seed=s, max_new_tokens=25) for s in (3, 3, 4)]
    texts = [generate(model, [[1, 2]] * 2, config) for config in configs]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]  # the same prompt twice draws differently
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_stop_at_their_own_end():
    model = tiny()
    free = generate(model, PROMPTS, GenerateConfig(max_new_tokens=20, eos=None))
    eos = next(t for t in free[0] if any(t in text for text in free[1:]))
    for ends in (eos, (eos, free[2][5])):
        config = GenerateConfig(max_new_tokens=20, eos=ends)
        cut = [[i for i, token in enumerate(text) if token in config.ends] for text in free]
        expected = [text[: min(at, default=20)] for text, at in zip(free, cut, strict=True)]
        assert generate(model, PROMPTS, config) == expected
    steps = list(stream(model, PROMPTS, config))
    assert len(steps) == max(map(len, expected))  # over as soon as all rows are
    for row, text in enumerate(expected):
        column = [step[row] for step in steps]
        assert column == text + [None] * (len(steps) - len(text))


def test_tokens_come_one_at_a_time():
    model, calls = tiny(), []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    tokens = stream(model, [[1, 2, 3]], GenerateConfig(max_new_tokens=5, eos=None))
    assert not calls
    next(tokens)
    assert len(calls) == 1
    assert len(list(tokens)) == 4
    assert len(calls) == 5  # the last token is not read back


def test_the_prompt_costs_one_row_of_logits():
    model = tiny()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    generate(model, PROMPTS, GenerateConfig(max_new_tokens=1))
    assert shapes == [(4, 60)]


def test_the_context_may_be_filled_but_not_passed():
    model = tiny()
    prompt = list(range(28))
    [text] = generate(model, [prompt], GenerateConfig(max_new_tokens=4, eos=None))
    for n, token in enumerate(text):  # the last positions are right, without a cache
        assert model(torch.tensor([prompt + text[:n]]))[0, -1].argmax() == token
    with pytest.raises(ValueError, match="prompt 1 has 28 tokens, and with 5 .* context of 32"):
        generate(model, [[1], prompt], GenerateConfig(max_new_tokens=5))


def test_all_bad_prompts_are_named_before_any_work():
    model = tiny()
    model.transformer.register_forward_hook(lambda *_: pytest.fail("worked"))
    with pytest.raises(ValueError, match="Nothing was generated") as caught:
        stream(model, [[1], [], [60], [-1], [2] * 40])  # already here, not at the first token
    for fault in ("prompt 1 is empty", "prompt 2 holds ids outside 0..59", "prompt 3", "prompt 4"):
        assert fault in str(caught.value)
    with pytest.raises(ValueError, match=r"prompt 0 .*; and \d+ more") as caught:
        generate(model, [[]] * 5_000)
    assert len(str(caught.value)) <= 2_000
    assert generate(model, []) == list(stream(model, [])) == []
    with pytest.raises(TypeError):
        generate(model, ["hello"])


@pytest.mark.parametrize(
    "prompts",
    [
        torch.tensor([[7, 8, 9], [3, 4, 5]], dtype=torch.int32),
        [torch.tensor([7, 8, 9]), torch.tensor([3, 4, 5])],
        np.array([[7, 8, 9], [3, 4, 5]]),
        [[np.int64(7), np.int32(8), torch.tensor(9)], range(3, 6)],
    ],
    ids=["tensor", "tensors", "array", "scalars"],
)
def test_prompts_in_every_form_of_integers(prompts):
    model, config = tiny(), GenerateConfig(max_new_tokens=6, eos=None)
    expected = generate(model, [[7, 8, 9], [3, 4, 5]], config)
    assert generate(model, prompts, config) == expected
    assert [list(row) for row in zip(*stream(model, prompts, config), strict=True)] == expected


def spoiled(value: float, tokens: int, row: int = 1) -> GPT2:
    """A model whose logits hold `value` in one row, once that row has read so many tokens."""
    model, calls = tiny(), []

    def spoil(module, args, logits):
        calls.append(1)
        if len(calls) == tokens:
            logits[row, ..., 5] = value
        return logits

    model.lm_head.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, SAMPLED, {"temperature": 1.0}])
@pytest.mark.parametrize("burst", [1, 16])
def test_logits_that_are_not_finite_stop_the_text(value, options, burst, monkeypatch):
    monkeypatch.setattr("gpt2.fast.decoding.BURST", burst)
    monkeypatch.setattr("gpt2.fast.decoding.on_cuda", lambda device: True)  # as a GPU looks
    monkeypatch.setattr("gpt2.fast.decoding.GRAPHED", 10**9)
    config = GenerateConfig(max_new_tokens=12, eos=None, **options)
    with pytest.raises(RuntimeError, match="not finite: prompt 1 after its 1 tokens and 3 new"):
        generate(spoiled(value, 4), PROMPTS, config)
    tokens = stream(spoiled(value, 4), PROMPTS, config)
    assert [next(tokens) for _ in range(3)]
    with pytest.raises(RuntimeError, match="prompt 1 after its 1 tokens and 3 new"):
        next(tokens)


def test_logits_of_a_row_that_has_ended_do_not_matter():
    free = generate(tiny(), PROMPTS, GenerateConfig(max_new_tokens=12, eos=None))
    eos = free[1][2]
    assert eos not in free[1][:2]
    config = GenerateConfig(max_new_tokens=12, eos=eos)
    assert generate(spoiled(math.nan, 6), PROMPTS, config) == generate(tiny(), PROMPTS, config)


def test_forbidden_tokens_may_be_minus_infinity():
    model = tiny()
    ban = torch.zeros(60).index_fill(0, torch.arange(30), -math.inf)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + ban)
    for options in ({}, {"temperature": 2.0}):
        [text] = generate(model, [[1]], GenerateConfig(max_new_tokens=12, eos=None, **options))
        assert min(text) >= 30


@pytest.mark.parametrize("temperature", [1e-20, 1e-6])
def test_the_lowest_temperatures_are_greedy(temperature):
    config = GenerateConfig(max_new_tokens=12, eos=None, temperature=temperature)
    greedy = GenerateConfig(max_new_tokens=12, eos=None)
    assert generate(tiny(), PROMPTS, config) == generate(tiny(), PROMPTS, greedy)


def test_no_token_is_drawn_from_logits_that_are_not_finite():
    logits = torch.zeros(4, 9)
    logits[1, 3], logits[2, 0], logits[3] = math.nan, math.inf, -math.inf
    uniform = torch.full((4, 2), 0.5, dtype=torch.double)
    drawn = [sample(logits, GenerateConfig(**o), uniform) for o in ({"temperature": 1.0}, SAMPLED)]
    for token, *others in (tokens.tolist() for tokens in (greedy(logits), *drawn)):
        assert 0 <= token < 9
        assert others == [-1, -1, -1]


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_a_default_dtype_or_device_changes_no_token(options):
    model, config = tiny(), GenerateConfig(max_new_tokens=8, eos=None, **options)
    expected = generate(model, PROMPTS, config)
    with torch.device("meta"):
        assert generate(model, PROMPTS, config) == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert generate(model, PROMPTS, config) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_sixteen_bits_keep_the_promise_that_is_made():
    """The same call gives the same, and each text is one that rounding alone can explain."""
    model = tiny().to(torch.bfloat16)
    prompts = [[i % 60, (7 * i) % 60] for i in range(16)]
    config = GenerateConfig(max_new_tokens=20, eos=None)
    together = generate(model, prompts, config)
    assert generate(model, prompts, config) == together
    for prompt, text in zip(prompts, together, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1].float()
        chosen = logits[torch.arange(20), torch.tensor(text)]
        assert (chosen >= logits.amax(-1) - 0.05 * logits.abs().amax(-1)).all()


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_eval_inside_and_the_own_mode_of_every_module_outside():
    model = tiny(embd_pdrop=0.9, attn_pdrop=0.9, resid_pdrop=0.9)
    config = GenerateConfig(max_new_tokens=6, eos=None)
    expected = generate(model, PROMPTS, config)
    model.train()
    model.transformer.h[1].eval()
    before = modes(model)
    assert generate(model, PROMPTS, config) == expected
    assert modes(model) == before
    tokens = stream(model, PROMPTS, config)
    next(tokens)
    assert modes(model) == before  # between tokens
    assert torch.is_grad_enabled()
    del tokens  # abandoned
    assert modes(model) == before


def test_the_mode_survives_an_error():
    model = tiny().train()
    model.transformer.h[1].mlp.c_fc.weight = None
    with pytest.raises((AttributeError, TypeError)):
        generate(model, [[1]], GenerateConfig(max_new_tokens=4))
    assert all(modes(model))


def test_no_gradients_and_no_traces():
    model = tiny()
    before = deepcopy(model.state_dict())
    logits = []
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    generate(model, PROMPTS, GenerateConfig(max_new_tokens=3, eos=None))
    assert not any(each.requires_grad for each in logits)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [SAMPLED, {"num_beams": 4}, {}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "autocast"])
def test_other_dtypes(dtype, options):
    config = GenerateConfig(max_new_tokens=8, eos=None, **options)
    model = tiny() if dtype == "autocast" else tiny().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        assert [len(text) for text in generate(model, PROMPTS, config)] == [8] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "temperature does not go with num_beams 2"),
        ({"no_repeat_ngram": 4}, "no_repeat_ngram does not go with num_beams 1"),
        ({"num_beams": 2, "no_repeat_prompt": True}, "no_repeat_prompt takes a no_repeat_ngram"),
        ({"num_beams": 2, "length_penalty": math.nan}, r"length_penalty must be in \(-inf, inf\)"),
        ({"eos": (1, -2)}, r"eos must be .* got \(1, -2\)"),
        ({"max_new_tokens": 0, "top_k": 0}, "max_new_tokens .* 1, got 0; top_k .* 1, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer"),
        ({"temperature": "0.5", "top_p": True}, "temperature must .* got '0.5'; top_p .* got True"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": None}, r"repetition_penalty must be in \(0, inf\), got None"),
        ({"seed": None}, "seed"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**options)


@pytest.mark.parametrize("config", [{}, {"temperature": 0.8, "repetition_penalty": 1.3}])
def test_compiling_changes_no_token(config):
    """With an adapter beside the base too; and lengths that are near share their graphs."""
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile needs a C++ compiler here")
    model = tiny()
    lora.inject(model, r=2, targets=("c_attn", "mlp.c_proj"), seed=0)
    randomize(model)
    prompts = [[5, 6, 7], [8]]
    options = GenerateConfig(max_new_tokens=12, eos=None, **config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    want = generate(model, prompts, options)
    assert generate(model, prompts, options, compile=True) == want
    assert generate(model, [[9] * 9, [1]], options, compile=True) != want
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    torch._dynamo.reset()
