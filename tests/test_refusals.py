"""What `lora.inject` refuses: an error of one line says what to do, and nothing has changed."""

from __future__ import annotations

import pytest
from torch import nn

import lora
from tests.toys import MLP, adapted, snapshot, tiny_gpt2

NAN, INF = float("nan"), float("inf")
PATH = r"transformer\.h\.0\.attn\.c_attn"

# Arguments for a small GPT-2, and what the error says.
VALUES = [
    ({"r": 0}, "r must be at least 1, got 0"),
    ({"r": 1.5}, "r cannot be 1.5: .* integer"),
    ({"r": 17}, rf"{PATH}: r 17 is above 16, its smaller side; leave it out \(exclude=\)"),
    ({"alpha": 0}, "alpha must be finite and above 0, got 0"),
    ({"alpha": "x"}, "alpha cannot be 'x'"),
    ({"dropout": -0.5}, r"dropout must be in \[0, 1\), got -0.5"),
    ({"dropout": "x"}, "dropout cannot be 'x'"),
    ({"r": 0, "alpha": -1, "dropout": 1}, "r must be.*alpha must be.*dropout must be"),
    ({"seed": "x"}, "seed cannot be 'x': .* integer"),
    ({"targets": ()}, "targets must name at least one layer"),
    ({"targets": 3}, "targets cannot be 3"),
    ({"targets": ["c_attn", None]}, "targets cannot be"),
    ({"targets": ("c_attn", "c_atn")}, "No module matches target 'c_atn'"),
    *(({"targets": part}, "No module matches target")  # parts of a segment, of a path
      for part in ("fc", "ttn.c_attn", r"h\.\d\.attn\.c_attn")),
    ({"targets": ("x", "y")}, r"No module matches target 'x', 'y'\."),
    ({"targets": "q_proj"}, "No module matches target 'q_proj'. Linear modules here end in: "
                            "attn.c_attn, attn.c_proj, lm_head, mlp.c_fc, mlp.c_proj"),
    ({"targets": ("c_attn", "ln_1")}, r"matches transformer.h.0.ln_1, but it is no nn.Linear"),
    ({"targets": "attn"}, "but it is no nn.Linear, Conv1D or"),
    ({"targets": "c_attn[q,v]", "slices": ("a", "b")}, "it has slices a, b, no q, v"),
    ({"slices": ("q", "k", "v")}, "slices are given, but no target names any"),
    ({"targets": ("c_attn[q]", "c_attn[v]")}, "of which other slices are named"),
    ({"targets": "lm_head"}, r"transformer.wte.weight and lm_head.weight are one tensor.*exclude="
                             r".*layer.weight = torch\.nn\.Parameter\(layer\.weight\.detach\(\)"),
    ({"targets": "wte"}, r"transformer.wte.weight and lm_head.weight are one tensor"),
    ({"exclude": "c_fc"}, "exclude='c_fc' matches no target"),
    ({"layers": [0.5]}, "layers cannot be"),
    ({"layers": 2}, r"layers=\[2\] match no target; there are \[0, 1\]"),
    ({"rank_pattern": {"c_attn": 1.5}}, "rank_pattern cannot be"),
    ({"alpha_pattern": {"c_attn": "x"}}, "alpha_pattern cannot be"),
    ({"modules_to_save": 3}, "modules_to_save cannot be 3"),
    ({"modules_to_save": "nothing"}, "No module matches modules_to_save 'nothing'"),
    ({"modules_to_save": "c_attn"}, f"{PATH} is a target and in modules_to_save"),
    ({"modules_to_save": "attn"}, f"{PATH} is a target and in"),
    *(({"adapter": name}, "cannot name an adapter") for name in ("", "a.b", "train", "keys")),
]  # fmt: skip

KEYWORDS = [
    ({"lora_alpha": 16}, r"no argument 'lora_alpha'; did you mean alpha\?$"),
    ({"target_modules": ["c_attn"]}, "'target_modules'; did you mean targets"),
    ({"task_type": "CAUSAL_LM"}, "'task_type' is not needed: the model is called as it is"),
    ({"use_dora": True}, "'use_dora' is not supported: there is no DoRA"),
    ({"init_lora_weights": "pissa"}, "not supported: an adapter is drawn as PEFT does"),
    ({"trainable_token_indices": [1]}, "not supported: target the embedding"),
    ({"bias": "all"}, "not supported: name the modules whose biases train in modules_to_save"),
    ({"fan_in_fan_out": True}, "no argument 'fan_in_fan_out'; there are r, alpha"),
    ({"alhpa": 3}, r"no argument 'alhpa'; did you mean alpha\?$"),
    ({"tragets": "up"}, r"did you mean targets\?$"),
    ({"config": lora.LoRAConfig(), "r": 4}, "Give a config or r, not both"),
    ({"config": {"r": 4}}, "config must be a lora.LoRAConfig"),
]

NOTHING = "There are no linear modules below it."
MODELS = [
    (nn.Sequential(nn.Linear(4, 4)), {}, "Linear modules here end in: 0. Pass targets="),
    (MLP(), {"targets": "q_proj"}, "Linear modules here end in: down, up"),
    (nn.Sequential(MLP(), nn.Linear(6, 2)), {"targets": "all-linear", "r": 4}, "1: r 4 is above 2"),
    # nn.MultiheadAttention reads out_proj.weight itself: an update there would do nothing.
    (nn.TransformerEncoderLayer(8, 2), {"targets": "out_proj"}, "without calling it"),
    *((model, {"targets": targets}, f"{NOTHING}|but it is no nn.L")
      for model in (nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(1, 1, 1)))
      for targets in ("0", "all-linear")),
    ("x", {}, "must be a torch.nn.Module, got str"),
    (None, {}, "must be a torch.nn.Module, got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "settings", "error", "words"),
    [
        *((tiny_gpt2, settings, ValueError, words) for settings, words in VALUES),
        *((tiny_gpt2, settings, TypeError, words) for settings, words in KEYWORDS),
        *((model, {"r": 1} | settings, ValueError, words) for model, settings, words in MODELS),
    ],
)
def test_inject_refuses_in_one_line_and_changes_nothing(model, settings, error, words):
    model = model() if model is tiny_gpt2 else model
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=words) as refusal:
        lora.inject(model, **settings)
    assert len(str(refusal.value)) < 500
    assert "\n" not in str(refusal.value)
    assert before is None or snapshot(model) == before


# Values that no argument takes, whatever the others are.
NUMBERS = [0, -1, NAN, INF, None, [1]]
ODD = {
    "r": [*NUMBERS, 2.0, 17, 10**9],
    "alpha": NUMBERS,
    "dropout": [*NUMBERS[1:], 1.0, 1, 1.5],
    "targets": [
        "", (), ("",), "c_atn", "attn", "ln_1", 5, (5,), ".c_attn", "c_attn.", "*", "lm_head",
        "c_attn[", "c_attn]", "c_attn[]", "c_attn[q,q]", "c_attn[x]", "c_fc[q]", "attn[q]",
        ("c_attn", "c_attn[q]"), ("c_attn[q]", "all-linear"), ("all-linear", "c_attn[q]"),
        "all-linear[q]",
    ],
    "exclude": ["nothing", 5, ("c_attn", "x"), "", [3]],
    "layers": [[2], [-1], 7, "0", ["0"], [None], [0, "x", None], [], [0.0], "01", [0.5]],
    "rank_pattern": [*({"c_attn": n} for n in (0, "x", None, 17, 2.0)), {"x": 2}, ["c_attn"], 5],
    "alpha_pattern": [
        *({"c_attn": n} for n in (0, "x", None, NAN)), {"x": 2}, [("c_attn", 2)], "c_attn", 5,
    ],
    "slices": [("q", "k", "v"), "qkv", 5, (1, 2)],
    "adapter": ["", "a.b", "train", "items"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ODD.items() for v in values])
def test_an_odd_value_is_refused_in_one_line_and_changes_nothing(name, value):
    model = tiny_gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        lora.inject(model, **{"targets": "c_attn", "seed": 0, name: value})
    assert snapshot(model) == before
    if name in ("r", "alpha", "dropout") and value not in (17, 10**9):
        with pytest.raises(ValueError, match="must be|cannot be"):
            lora.UpdateConfig(**{"r": 8, "alpha": 16, "dropout": 0.0, name: value})


@pytest.mark.parametrize(
    ("lr", "ratio"),
    [(0, 16), (-1, 16), (NAN, 16), (1e-3, 0), (1e-3, INF)],
)
def test_rates_that_are_refused(lr, ratio):
    with pytest.raises(ValueError, match="lr and b_ratio must be"):
        lora.parameter_groups(adapted(), lr, b_ratio=ratio)
