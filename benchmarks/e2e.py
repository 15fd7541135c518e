"""The LoRA paper's task, E2E NLG: from a meaning representation to a sentence.

Base, ours, PEFT's with the same A, B, order and options, and full fine-tuning: held-out loss, BLEU
of 630 prompts with all their references, greedy and by beams, and the times. On a GPU all of them
take their steps as CUDA graphs, PEFT's modules too; "PEFT, plain loop" times some of the steps that
its users take.

    python -m benchmarks.e2e DATA                 # the recipe of scripts/configs/e2e.yaml
    python -m benchmarks.e2e DATA --choose r=8,16 lr=0.001,0.002 targets='[[c_attn],[c_attn,c_fc]]'

DATA is a folder of train.jsonl (or train.jsonl.gz), valid.jsonl and test.jsonl, whose rows have
`prompt` and `completion`. `--choose` trains ours with each combination of options and judges by
valid alone; `--quick` takes a slice: does it all run?
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import islice, product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml

import gpt2
import lora
from benchmarks import harness, models
from gpt2.data.batches import collate

RECIPE = Path(__file__).parents[1] / "scripts" / "configs" / "e2e.yaml"
PLAIN = "PEFT, plain loop"
CASES = ("base", "ours", PLAIN, "PEFT", "full")
PLAIN_STEPS, UNTIMED = 500, 20  # how many it takes, and of these how many before the clock starts
GRID = ("r=8,16", "lr=0.001,0.002")
ADAPTER = {field.name for field in dataclasses.fields(lora.LoRAConfig)}
FULL_LR = 5e-4  # for all weights


@dataclasses.dataclass(frozen=True)
class Task:
    """The recipe, the data and where to run."""

    recipe: Mapping[str, Any]
    train: gpt2.Dataset
    valid: gpt2.Dataset
    judged: Mapping[str, Sequence[str]]  # the prompts to continue, with their references
    device: str
    at_once: int  # rows to decode

    @property
    def training(self) -> gpt2.TrainConfig:
        """How to train, as the recipe says; batches so small are replayed as CUDA graphs."""
        names = {f.name for f in dataclasses.fields(gpt2.TrainConfig)} & {*self.recipe}
        options = {name: self.recipe[name] for name in names}
        return gpt2.TrainConfig(**options, batch_size=self.recipe["train_batch_size"])

    def base(self) -> gpt2.GPT2:
        """The base that the recipe names."""
        name, dropout = self.recipe["model_name"], self.recipe["base_dropout"]
        return gpt2.GPT2.from_pretrained(name, device=self.device, dropout=dropout)

    def adapted(self) -> gpt2.GPT2:
        """The base with a new adapter."""
        model = self.base()
        lora.inject(model, seed=self.recipe["seed"], **self.recipe["lora"])
        return model


def main() -> None:
    parser = argparse.ArgumentParser(description="E2E NLG, ours and others.")
    parser.add_argument("data", type=Path, help="folder of train, valid and test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", help="file to append JSON lines to")
    parser.add_argument("--choose", nargs="*", metavar="OPTION=A,B", help="judged on valid")
    parser.add_argument("--beside", action="store_true", help="other work runs: say so in each row")
    parser.add_argument("--quick", action="store_true", help="a slice: does it all run?")
    a = parser.parse_args()
    bleu([" a b c d ."], [[" a b c d ."]])  # before the work, whether there is a sacrebleu
    task = prepare(a.data, a.device, quick=a.quick, judged="test" if a.choose is None else "valid")
    if a.choose is not None:
        choose(task, a.choose or GRID, a.out)
        return
    timed = "beside other work" if a.beside else "alone"
    for case in a.cases:
        harness.emit("e2e", a.out, case=case, timed=timed, **measured(case, task))
        harness.free()


def prepare(folder: Path, device: str, *, quick: bool, judged: str) -> Task:
    """The task on this data, or on a slice of it."""
    recipe = yaml.safe_load(RECIPE.read_text())
    limits = {"train": None, "valid": None, judged: None}
    if quick:
        limits = {"train": 64, "valid": 32, judged: 32}
        recipe["epochs"] = 1
        recipe["generate"] |= {"max_new_tokens": 8, "num_beams": 2}
    split = {name: read(folder, name, limit) for name, limit in limits.items()}
    options = {"max_length": recipe["max_token_length"], "eos": True, "answer_only": True}
    data = {n: gpt2.encode(split[n], gpt2.Tokenizer(), **options) for n in ("train", "valid")}
    references: dict[str, list[str]] = {}
    for example in split[judged]:
        references.setdefault(example.prompt, []).append(example.completion)
    rows = 160 if device == "cpu" else 6400
    return Task(recipe, data["train"], data["valid"], references, device, rows)


def read(folder: Path, split: str, limit: int | None) -> list[gpt2.Example]:
    """A split's first examples."""
    file = folder / f"{split}.jsonl"
    packed = folder / f"{split}.jsonl.gz"
    with file.open() if file.is_file() else gzip.open(packed, "rt") as lines:
        return [gpt2.Example(**json.loads(line)) for line in islice(lines, limit)]


def choose(task: Task, grid: Sequence[str], out: str | None) -> None:
    """Train ours with each combination of `option=value,value`; alpha is 2 r unless it is given."""
    pairs = [option.partition("=") for option in grid]
    values = [yaml.safe_load(v if v.startswith("[") else f"[{v}]") for _, _, v in pairs]
    for combination in product(*values):
        chosen = dict(zip((name for name, _, _ in pairs), combination, strict=True))
        adapter = {**task.recipe["lora"], **{k: v for k, v in chosen.items() if k in ADAPTER}}
        if "r" in chosen and "alpha" not in chosen:
            adapter["alpha"] = 2 * chosen["r"]
        rest = {k: v for k, v in chosen.items() if k not in ADAPTER}
        if unknown := sorted({*rest} - {*task.recipe}):
            raise SystemExit(
                f"The recipe has no {', '.join(unknown)}, only {', '.join(task.recipe)}."
            )
        trial = dataclasses.replace(task, recipe={**task.recipe, **rest, "lora": adapter})
        harness.emit("e2e_choose", out, case=str(chosen), **measured("ours", trial))
        harness.free()


def measured(case: str, task: Task) -> dict[str, Any]:
    """Train a case: what it took, held-out loss, and BLEU and seconds of both ways to decode."""
    model, steps, seconds, trainable = train(case, task)
    found: dict[str, Any] = {"device": task.device, "examples": len(task.train)}
    found |= {"prompts": len(task.judged), "trainable": trainable, "steps": steps}
    found |= {"training_seconds": round(seconds, 2), "steps_per_s": round(steps / seconds, 1)}
    if case == PLAIN:  # a part of a run is not judged
        return found
    found["valid_loss"] = round(held_out_loss(model, task.valid), 4)
    beams = gpt2.GenerateConfig(**task.recipe["generate"])
    greedy = gpt2.GenerateConfig(max_new_tokens=beams.max_new_tokens)
    for way, config in {"greedy": greedy, "beams": beams}.items():
        began = time.perf_counter()
        texts = predict(model, list(task.judged), config, task.at_once)
        found[f"{way}_seconds"] = round(time.perf_counter() - began, 2)
        found[f"{way}_bleu"] = round(bleu(texts, list(task.judged.values())), 2)
    return found


def train(case: str, task: Task) -> tuple[gpt2.GPT2, int, float, int]:
    """The trained model of a case, its steps, its seconds, and how many weights were trained."""
    config = task.training
    model = task.base() if case in ("base", "full") else task.adapted()
    trainable = 0 if case == "base" else lora.count_parameters(model).trainable
    if case in ("PEFT", PLAIN):
        wrapped: Any = models.theirs(model, torch.float32)
        if case == PLAIN:
            return model, *_plain_steps(wrapped, task), trainable
        config = dataclasses.replace(config, cuda_graph=task.device != "cpu")
        steps, seconds = _steps(wrapped, task, config)
        with tempfile.TemporaryDirectory() as folder:  # its adapter under our base
            wrapped.save_pretrained(folder)
            model = task.base()
            lora.load(model, folder)
        return model, steps, seconds, trainable
    if case == "full":
        config = dataclasses.replace(config, lr=FULL_LR)
    steps, seconds = (0, 1.0) if case == "base" else _steps(model, task, config)
    return model, steps, seconds, trainable


def _steps(model: torch.nn.Module, task: Task, config: gpt2.TrainConfig) -> tuple[int, float]:
    """Train by our loop; steps and seconds."""
    began = time.perf_counter()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    of_b = {name for name, _ in named if name.endswith(".B") or ".lora_B." in name}  # ours, PEFT's
    fast, rest = ([p for name, p in named if (name in of_b) is is_b] for is_b in (True, False))
    groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
    groups += [{"params": fast, "lr": config.lr * task.recipe["b_ratio"]}] if fast else []
    steps = sum(1 for _ in gpt2.train(model, task.train, config, groups=groups))
    return steps, time.perf_counter() - began


def _plain_steps(wrapped: Any, task: Task) -> tuple[int, float]:
    """The first steps of PEFT's plain loop over our batches: how many were timed, and seconds."""
    config, device = task.training, torch.device(task.device)
    trained = [p for p in wrapped.train().parameters() if p.requires_grad]
    options = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(trained, lr=config.lr, **options)
    total, began = gpt2.total_steps(task.train, config), 0.0
    taken = min(PLAIN_STEPS, -(-len(task.train) // config.batch_size))
    untimed = min(UNTIMED, taken // 2)
    rows = gpt2.batches(task.train, config.batch_size, seed=config.seed, epoch=0)
    for step, batch in enumerate(islice(rows, taken), 1):
        batch = batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = gpt2.learning_rate(step, total, config)
        wrapped(input_ids=batch.idx, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if step in (untimed, taken):
            if task.device != "cpu":
                torch.cuda.synchronize()
            began = began or time.perf_counter()
    return taken - untimed, time.perf_counter() - began


@torch.no_grad()
def held_out_loss(model: gpt2.GPT2, data: gpt2.Dataset, batch_size: int = 64) -> float:
    """Mean nats a supervised token."""
    device = model.lm_head.weight.device
    order = sorted(range(len(data)), key=data.lengths.__getitem__)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = collate(data, np.array(order[start : start + batch_size])).to(device)
        total += model(batch.idx, batch.labels).cpu()
        tokens += batch.n_tokens
    return total.item() / tokens


def predict(
    model: gpt2.GPT2, prompts: Sequence[str], config: gpt2.GenerateConfig, at_once: int
) -> list[str]:
    """What the model says to each prompt."""
    tokenizer = gpt2.Tokenizer()
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    said: dict[int, str] = {}
    size = max(1, at_once // config.num_beams)
    for start in range(0, len(order), size):
        some = order[start : start + size]
        rows = gpt2.generate(model, [ids[i] for i in some], config)
        said |= {i: tokenizer.decode(row) for i, row in zip(some, rows, strict=True)}
    return [said[i].strip() for i in range(len(ids))]


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, lower-cased, tokenised as mteval-v13a, each text against all its references."""
    corpus_bleu: Callable[..., Any] = cast(Any, import_module("sacrebleu")).corpus_bleu
    most = max(map(len, references))
    columns = [
        [found[i].strip() if i < len(found) else None for found in references] for i in range(most)
    ]
    return corpus_bleu(list(texts), columns, lowercase=True, tokenize="13a").score


if __name__ == "__main__":
    main()
