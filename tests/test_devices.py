"""What is asked of each kind of device, for devices that this machine has not got either."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from gpt2 import TrainConfig
from gpt2.fast import devices
from gpt2.training.step import AdamW, Stepper
from tests.runs import micro_batches, model_of, weights

KINDS = ("cpu", "cuda", "mps", "xpu")
CPU = torch.device("cpu")


def test_the_generators_of_an_apple_gpu_are_swapped_too(monkeypatch):
    other = torch.Generator().manual_seed(7)
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: other)
    kept = torch.get_rng_state(), other.get_state()
    drawn = []
    for _ in range(2):
        with devices.own_generators(torch.device("mps")) as seed:
            seed(5)
            drawn.append(torch.cat([torch.rand(2), torch.rand(2, generator=other)]))
        assert torch.equal(torch.get_rng_state(), kept[0])
        assert torch.equal(other.get_state(), kept[1])
    assert torch.equal(*drawn)


def test_a_device_without_known_generators_is_left_alone():
    with devices.own_generators(torch.device("xpu")) as seed:
        seed(1)


def test_where_the_flag_is_not_heeded_the_host_looks(monkeypatch):
    """As on an Apple GPU, where torch's fused AdamW steps whatever the flag says."""
    monkeypatch.setattr(devices, "skips_found_inf", lambda _: False)
    config = TrainConfig(lr=1e-2, steps=3)
    model, left = model_of().train(), model_of().train()
    steps = micro_batches(config)
    plain = Stepper(left, config)
    plain(steps[0], 1)
    stepper, real = Stepper(model, config), AdamW.step
    taken: list[int] = []
    monkeypatch.setattr(AdamW, "step", lambda self, *a: (taken.append(1), real(self, *a))[1])
    stepper(steps[0], 1)
    handle = model.transformer.h[1].register_forward_hook(lambda m, i, out: out * torch.nan)
    assert stepper(steps[1], 2).tolist()[2] == 2
    handle.remove()
    assert stepper(steps[2], 3).tolist()[2] == 2  # it stays failed
    assert len(taken) == 1
    assert weights(model) == weights(left)


def test_copies_are_of_pinned_memory_and_to_a_gpu_only(monkeypatch):
    asked: list[tuple] = []

    class Held:
        device = CPU

        def pin_memory(self):
            asked.append(("pinned",))
            return self

        def to(self, device, non_blocking=False):
            asked.append((device.type, non_blocking))

    for kind in KINDS:
        devices.copied(Held(), torch.device(kind))
    assert asked == [("cpu", False), ("pinned",), ("cuda", True), ("mps", False), ("xpu", False)]


def test_no_other_file_of_the_fast_wing_asks_for_the_kind_of_a_device():
    for file in Path(devices.__file__).parent.glob("*.py"):
        if file.name not in ("devices.py", "dropout.py"):
            assert not re.search(r"device\.type|is_cuda", file.read_text()), file
