"""The LoRA paper's task, E2E NLG: from a meaning representation to a sentence.

Base, ours, PEFT's with the same A, B, order and options, and full fine-tuning: held-out loss, BLEU
of 630 prompts with all their references, greedy and by beams, and the times.

    python -m benchmarks.e2e DATA                 # the recipe of scripts/configs/e2e.yaml
    python -m benchmarks.e2e DATA --choose        # a grid, judged by valid.jsonl alone
    python -m benchmarks.e2e DATA --quick         # a slice: does it all run?

DATA is a folder of train.jsonl (or train.jsonl.gz), valid.jsonl and test.jsonl, whose rows have
`prompt` and `completion`. What is chosen is chosen on valid; test is for the last word.
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

import torch
import yaml

import gpt2
import lora
from benchmarks import harness, models
from gpt2.data.batches import collate

RECIPE = Path(__file__).parents[1] / "scripts" / "configs" / "e2e.yaml"
CASES = ("base", "ours", "PEFT", "full")
GRID = {
    "r": (8, 16, 32),
    "lr": (1e-3, 2e-3, 4e-3),
    "epochs": (2, 3),
}
FULL_LR = 0.25  # of the adapter's learning rate, for all weights


@dataclasses.dataclass(frozen=True)
class Task:
    """The recipe, the data and where to run."""

    recipe: Mapping[str, Any]
    train: gpt2.Dataset
    valid: gpt2.Dataset
    judged: Mapping[str, Sequence[str]]  # the prompts to continue, with their references
    device: str
    compile: bool
    at_once: int  # rows to decode

    @property
    def training(self) -> gpt2.TrainConfig:
        """How to train, as the recipe says."""
        names = {f.name for f in dataclasses.fields(gpt2.TrainConfig)} & {*self.recipe}
        options = {name: self.recipe[name] for name in names}
        batch_size, compile = self.recipe["train_batch_size"], self.compile
        every = 1 if self.device == "cpu" else 100
        return gpt2.TrainConfig(**options, batch_size=batch_size, compile=compile, sync_every=every)

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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of train, valid and test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", help="file to append JSON lines to")
    parser.add_argument("--choose", action="store_true", help="a grid, judged on valid")
    parser.add_argument("--quick", action="store_true", help="a slice: does it all run?")
    a = parser.parse_args()
    bleu([" a b c d ."], [[" a b c d ."]])  # before the work, whether there is a sacrebleu
    task = prepare(a.data, a.device, quick=a.quick, judged="valid" if a.choose else "test")
    if a.choose:
        choose(task, a.out)
        return
    for case in a.cases:
        model, fields = train(case, task)
        report(case, model, task, a.out, **fields)
        del model
        harness.free()


def prepare(folder: Path, device: str, *, quick: bool, judged: str) -> Task:
    """The task on this data, or on a slice of it."""
    recipe = yaml.safe_load(RECIPE.read_text())
    limits = {"train": None, "valid": None, judged: None}
    if quick:
        limits = {"train": 64, "valid": 32, judged: 32}
        recipe["epochs"] = 1
        recipe["generate"] |= {"max_new_tokens": 12, "num_beams": 2}
    split = {name: read(folder, name, limit) for name, limit in limits.items()}
    options = {"max_length": recipe["max_token_length"], "eos": True, "answer_only": True}
    data = {n: gpt2.encode(split[n], gpt2.Tokenizer(), **options) for n in ("train", "valid")}
    references: dict[str, list[str]] = {}
    for example in split[judged]:
        references.setdefault(example.prompt, []).append(example.completion)
    on_gpu = device != "cpu"
    rows = 6400 if on_gpu else 160
    return Task(recipe, data["train"], data["valid"], references, device, on_gpu, rows)


def read(folder: Path, split: str, limit: int | None) -> list[gpt2.Example]:
    """A split's first examples."""
    file = folder / f"{split}.jsonl"
    packed = folder / f"{split}.jsonl.gz"
    with file.open() if file.is_file() else gzip.open(packed, "rt") as lines:
        return [gpt2.Example(**json.loads(line)) for line in islice(lines, limit)]


def choose(task: Task, out: str | None) -> None:
    """Train ours over the grid; held-out loss and BLEU on valid."""
    for values in product(*GRID.values()):
        chosen = dict(zip(GRID, values, strict=True))
        adapter = {**task.recipe["lora"], "r": chosen["r"], "alpha": 2 * chosen["r"]}
        recipe = {**task.recipe, "lr": chosen["lr"], "epochs": chosen["epochs"], "lora": adapter}
        trial = dataclasses.replace(task, recipe=recipe)
        model, fields = train("ours", trial)
        report("choose", model, trial, out, judged="valid", **chosen, **fields)
        del model
        harness.free()


def train(case: str, task: Task) -> tuple[gpt2.GPT2, dict[str, Any]]:
    """The trained model of a case, its steps and its seconds."""
    if case == "base":
        return task.base(), {"steps": 0, "training_seconds": 0.0}
    if case == "PEFT":
        return _train_peft(task)
    config = task.training
    if case == "full":
        model = task.base().requires_grad_(True)
        config = dataclasses.replace(config, lr=config.lr * FULL_LR)
    else:
        model = task.adapted()
    began, steps = time.perf_counter(), 0
    for record in gpt2.train(model, task.train, config):
        steps = record.step
    return model, {"steps": steps, "training_seconds": round(time.perf_counter() - began, 2)}


def _train_peft(task: Task) -> tuple[gpt2.GPT2, dict[str, Any]]:
    """PEFT's plain loop from our factors, over our batches; then its adapter under our base."""
    config, ours = task.training, task.adapted()
    wrapped: Any = models.theirs(ours, torch.float32).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    options = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(trained, lr=config.lr, **options)
    total, step, began = gpt2.total_steps(task.train, config), 0, time.perf_counter()
    for epoch in range(config.epochs or 1):
        for batch in gpt2.batches(task.train, config.batch_size, seed=config.seed, epoch=epoch):
            step += 1
            batch = batch.to(torch.device(task.device))
            for group in optimizer.param_groups:
                group["lr"] = gpt2.learning_rate(step, total, config)
            wrapped(input_ids=batch.idx, labels=batch.labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
    _finish(task.device)
    seconds = round(time.perf_counter() - began, 2)
    model = task.base()
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        lora.load(model, folder)
    return model, {"steps": step, "training_seconds": seconds}


def report(case: str, model: gpt2.GPT2, task: Task, out: str | None, **fields: Any) -> None:
    """One line: held-out loss, and BLEU and seconds of both ways to decode."""
    generate = task.recipe["generate"]
    beams = gpt2.GenerateConfig(**generate)
    ways = {"greedy": gpt2.GenerateConfig(max_new_tokens=beams.max_new_tokens), "beams": beams}
    found: dict[str, Any] = {"valid_loss": round(held_out_loss(model, task.valid), 4)}
    for way, config in ways.items():
        began = time.perf_counter()
        texts = predict(model, list(task.judged), config, task.at_once)
        found[f"{way}_seconds"] = round(time.perf_counter() - began, 2)
        found[f"{way}_bleu"] = round(bleu(texts, list(task.judged.values())), 2)
    counts = {"examples": len(task.train), "prompts": len(task.judged)}
    harness.emit("e2e", out, case=case, device=task.device, **counts, **fields, **found)


@torch.no_grad()
def held_out_loss(model: gpt2.GPT2, data: gpt2.Dataset, batch_size: int = 64) -> float:
    """Mean nats a supervised token."""
    device = model.lm_head.weight.device
    order = sorted(range(len(data)), key=data.lengths.__getitem__)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = collate([data[i] for i in order[start : start + batch_size]]).to(device)
        total += model(batch.idx, batch.labels).double().cpu()
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


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
