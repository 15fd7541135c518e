"""Adapter folders spoiled at random: each loads or is refused, in few words, and nothing breaks."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

import lora
from lora.disk import checkpoint, fingerprint
from tests.folders import edit_config, rewrite
from tests.toys import MLP, adapted, snapshot

VALUES = [
    None, True, False, 0, 1, -1, 3, 2**31, 1.5, 1e30, "", "up", "(", ".*", [], [[]], [None], [1],
    ["up"], ["up", "down"], {}, {"up": 1}, {"up": None}, {"(": 2}, [0, "up"], "none", "all",
    "lora_only", ["down"], {"a": {"b": [1, 2]}}, "é", ["é", ""],
]  # fmt: skip
FIELDS = (
    "peft_type r lora_alpha lora_dropout use_rslora target_modules exclude_modules bias "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern modules_to_save use_dora "
    "init_lora_weights ensure_weight_tying fan_in_fan_out task_type new_field"
).split()
SEED, CASES = 0, 400
DTYPES = [torch.float64, torch.float16, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    lora.save(adapted(MLP(6, 4), targets=("up", "down")), folder)
    return folder


def spoil_config(folder, draw: random.Random) -> None:
    file = folder / checkpoint.CONFIG
    fields = json.loads(file.read_text())
    for _ in range(draw.randint(1, 3)):
        fields[draw.choice(FIELDS)] = draw.choice(VALUES)
    file.write_text(json.dumps(fields))


def spoil_bytes(folder, draw: random.Random) -> None:
    file = folder / draw.choice([checkpoint.CONFIG, checkpoint.WEIGHTS])
    data = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(data), 600))
        data[at] = draw.randrange(256)
    file.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data) + 1)])])


def spoil_tensors(folder, draw: random.Random) -> None:
    def spoil(tensors, metadata) -> None:
        key = draw.choice(sorted(tensors))
        match draw.randrange(7):
            case 0:
                tensors[key] = tensors[key].to(draw.choice(DTYPES))
            case 1:
                tensors[key] = torch.ones([draw.randint(0, 6) for _ in range(draw.randint(1, 4))])
            case 2:
                tensors[key + draw.choice(["", ".x", ".weight"])] = tensors.pop(key)
            case 3:
                tensors[key].flatten()[0] = draw.choice([torch.nan, torch.inf, 1e30])
            case 4:
                path = draw.choice(["up", "down", "", "no", "up.base_layer", "up.original_module"])
                name = f"base_model.model.{path}.{draw.choice(['weight', 'bias'])}"
                tensors[name] = torch.ones(4, 6)
            case 5:
                name = draw.choice([fingerprint.BASE, checkpoint.SLICES, checkpoint.DIGEST])
                metadata.pop(name, None)
            case 6:
                del tensors[key]

    rewrite(folder, spoil)


@pytest.mark.filterwarnings("ignore:.*was edited|.*Not loaded")
def test_a_spoiled_folder_loads_or_is_refused(whole, tmp_path):
    draw = random.Random(SEED)
    loaded, reasons = 0, set()
    torch.manual_seed(0)
    for case in range(CASES):
        folder = tmp_path / "spoiled"
        shutil.copytree(whole, folder)
        if case % 3:
            edit_config(folder)  # as if PEFT had written it like that
        draw.choice([spoil_config, spoil_config, spoil_bytes, spoil_tensors])(folder, draw)
        model = MLP(6, 4)
        before = snapshot(model)
        refusal = None
        try:
            lora.load(model, folder, allow_base_mismatch=True)
        except (ValueError, FileNotFoundError) as error:
            refusal = error
        if refusal is None:
            loaded += 1
            with torch.no_grad():
                assert model(torch.ones(1, 6)).isfinite().all()
        else:
            reasons.add(type(refusal))
            assert 15 <= len(str(refusal)) <= 2000
            assert snapshot(model) == before
        shutil.rmtree(folder)
    assert CASES // 25 < loaded < CASES // 2
    assert reasons == {ValueError}
