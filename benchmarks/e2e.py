"""The LoRA paper's task, E2E NLG: from a meaning representation to a sentence.

Base, ours, PEFT's with the same A, B, order and options, and full fine-tuning: held-out loss, BLEU
of 630 prompts with all their references, greedy and by beams, and the times. On a GPU all of them
take their steps as CUDA graphs, PEFT's modules too.

    python -m benchmarks.e2e DATA            # the recipe of scripts/configs/e2e.yaml
    python -m benchmarks.e2e DATA --seeds 8 --cases ours PEFT  # mean and spread; ours together

DATA is a folder of train.jsonl (or train.jsonl.gz), valid.jsonl and test.jsonl, whose rows have
`prompt` and `completion`. Seeds are trained with label smoothing, 0.1 as in the paper.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import yaml

import gpt2
import lora
from benchmarks import harness, models
from gpt2.population.training import PopulationTraining
from scripts.runs import scores

RECIPE = harness.ROOT / "scripts" / "configs" / "e2e.yaml"
CASES = ("base", "ours", "PEFT", "full")
FULL_LR = 5e-4  # for all weights
TICKS = 64  # micro-batches of a population between two looks at the device


@dataclasses.dataclass(frozen=True)
class Task:
    """The recipe, the data and where to run."""

    recipe: Mapping[str, Any]
    train: gpt2.Dataset
    valid: gpt2.Dataset
    references: Mapping[str, Sequence[str]]  # by the prompt of the test data
    held_out: Mapping[str, Sequence[str]]  # by that of the validation data
    device: str

    @property
    def training(self) -> gpt2.TrainConfig:
        """How to train, as the recipe says."""
        names = {f.name for f in dataclasses.fields(gpt2.TrainConfig)} & {*self.recipe}
        options = {name: self.recipe[name] for name in names}
        return gpt2.TrainConfig(**options, batch_size=self.recipe["train_batch_size"])

    @property
    def adapter(self) -> lora.LoRAConfig:
        """The adapter, as the recipe says."""
        return lora.LoRAConfig(seed=self.recipe["seed"], **self.recipe["lora"])

    def base(self) -> gpt2.GPT2:
        """The base that the recipe names."""
        name, dropout = self.recipe["model_name"], self.recipe["base_dropout"]
        return gpt2.GPT2.from_pretrained(name, device=self.device, dropout=dropout)


def main() -> None:
    parser = argparse.ArgumentParser(description="E2E NLG, ours and others.")
    parser.add_argument("data", type=Path, help="folder of train, valid and test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--seeds", type=int, default=0, help="of each case: mean and spread")
    parser.add_argument("--label_smoothing", type=float, default=0.1, help="with --seeds")
    parser.add_argument("--out", help="file to append JSON lines to")
    a = parser.parse_args()
    bleu([" a b c d ."], [[" a b c d ."]])  # before the work, whether there is a sacrebleu
    task = prepare(a.data, a.device)
    if a.seeds:
        smoothing = {"label_smoothing": a.label_smoothing}
        task = dataclasses.replace(task, recipe={**task.recipe, **smoothing})
        for case in a.cases:
            facts = under_seeds(case, task, a.seeds)
            harness.emit("e2e", a.out, case=f"{case}, {a.seeds} seeds", **smoothing, **facts)
            harness.free()
        return
    for case in a.cases:
        harness.emit("e2e", a.out, case=case, **measured(case, task))
        harness.free()


def prepare(folder: Path, device: str) -> Task:
    """The task on this data."""
    recipe = yaml.safe_load(RECIPE.read_text())
    options = {"max_length": recipe["max_token_length"], "eos": True, "answer_only": True}
    train, valid = (
        gpt2.encode(read(folder, split), gpt2.Tokenizer(), **options)
        for split in ("train", "valid")
    )
    by_prompt: dict[str, dict[str, list[str]]] = {"test": {}, "valid": {}}
    for split, references in by_prompt.items():
        for example in read(folder, split):
            references.setdefault(example.prompt, []).append(example.completion)
    return Task(recipe, train, valid, by_prompt["test"], by_prompt["valid"], device)


def read(folder: Path, split: str) -> list[gpt2.Example]:
    """A split's examples."""
    file = folder / f"{split}.jsonl"
    with file.open() if file.is_file() else gzip.open(f"{file}.gz", "rt") as lines:
        return [gpt2.Example(**json.loads(line)) for line in lines]


def measured(case: str, task: Task) -> harness.Facts:
    """Train a case: what it took, and how good it is."""
    began = time.perf_counter()
    model, steps, trainable = train(case, task)
    seconds = time.perf_counter() - began
    facts = {"trainable": trainable, "steps": steps, "training_seconds": round(seconds, 2)}
    return facts | {"steps_per_s": round(steps / seconds, 1)} | judged(model, task)[0]


def train(case: str, task: Task) -> tuple[gpt2.GPT2, int, int]:
    """The trained model of a case, its steps, and how many weights were trained."""
    model, config = task.base(), task.training
    if case == "base":
        return model, 0, 0
    if case == "full":
        config = dataclasses.replace(config, lr=FULL_LR)
    else:
        lora.inject(model, task.adapter)
    trainable = lora.count_parameters(model).trainable
    if case != "PEFT":
        return model, take_steps(model, task, config), trainable
    wrapped = models.theirs(model, torch.float32)
    config = dataclasses.replace(config, cuda_graph=task.device != "cpu")
    steps = take_steps(wrapped, task, config)
    with tempfile.TemporaryDirectory() as folder:  # its adapter under our base
        wrapped.save_pretrained(folder)
        model = task.base()
        lora.load(model, folder)
    return model, steps, trainable


def take_steps(model: torch.nn.Module, task: Task, config: gpt2.TrainConfig) -> int:
    """Train by our loop, B at its own rate; how many steps that took."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    of_b = {name for name, _ in named if name.endswith(".B") or ".lora_B." in name}  # ours, PEFT's
    fast, rest = ([p for name, p in named if (name in of_b) is is_b] for is_b in (True, False))
    groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
    groups += [{"params": fast, "lr": config.lr * task.recipe["b_ratio"]}] if fast else []
    return sum(1 for _ in gpt2.train(model, task.train, config, groups=groups))


def under_seeds(case: str, task: Task, n: int) -> harness.Facts:
    """A case under n seeds: the mean of each figure and its spread, and how good agreement is."""
    began = time.perf_counter()
    every: list[harness.Facts] = []
    texts: list[list[str]] = []
    seconds = 0.0
    for model in population(task, n) if case == "ours" else one_by_one(case, task, n):
        seconds += time.perf_counter() - began
        figures, of_beams = judged(model, task)
        every.append(figures)
        texts.append(of_beams)
        began = time.perf_counter()
    facts: harness.Facts = {"training_seconds": round(seconds, 2)}
    for name in ("valid_loss", "valid_bleu", "greedy_bleu", "beams_bleu"):
        values = [figures[name] for figures in every]
        mean, sd = statistics.mean(values), statistics.stdev(values)
        facts[name] = {"mean": round(mean, 4), "sd": round(sd, 4)}
        facts[f"{name}_of_each"] = values
        print(f"{name}: {mean:.4g} ± {sd:.2g} over {n} seeds")
    best = max(every, key=lambda figures: figures["valid_bleu"])
    facts["beams_bleu_of_best_valid_bleu"] = best["beams_bleu"]
    alike = scores.named("bleu")
    agreed = [of[scores.agreed(of, alike)] for of in zip(*texts, strict=True)]
    facts["agreement_bleu"] = round(bleu(agreed, list(task.references.values())), 2)
    return facts


def seeded(task: Task, seed: int) -> Task:
    """The task with the recipe's seed moved on."""
    recipe = {**task.recipe, "seed": task.recipe["seed"] + seed}
    return dataclasses.replace(task, recipe=recipe)


def one_by_one(case: str, task: Task, n: int) -> Iterator[gpt2.GPT2]:
    """The models of a case under n seeds, trained alone."""
    for seed in range(n):
        yield train(case, seeded(task, seed))[0]
        harness.free()


def population(task: Task, n: int) -> Iterator[gpt2.GPT2]:
    """Ours under n seeds, trained in one population."""
    model = task.base()
    slots = lora.Population(model, n, task.adapter)
    training = PopulationTraining(model, slots, task.train, task.training)
    for slot in range(n):
        of = seeded(task, slot)
        slots.draw(slot, of.adapter)
        training.start(slot, of.training, ratios={"B": task.recipe["b_ratio"]})
    while training.advance(TICKS):
        pass
    for slot in range(n):
        with slots.adapter(slot) as tuned:
            yield cast(gpt2.GPT2, tuned)


def judged(model: gpt2.GPT2, task: Task) -> tuple[harness.Facts, list[str]]:
    """Held-out loss, BLEU and seconds of both ways to decode; and the texts by beams."""
    facts: harness.Facts = {
        "valid_loss": round(gpt2.evaluate(model, task.valid, batch_size=64).loss, 4)
    }
    beams = gpt2.GenerateConfig(**task.recipe["generate"])
    greedy = gpt2.GenerateConfig(max_new_tokens=beams.max_new_tokens)
    texts: list[str] = []
    for way, config in {"greedy": greedy, "beams": beams}.items():
        began = time.perf_counter()
        texts = predict(model, list(task.references), config, task.device)
        facts[f"{way}_seconds"] = round(time.perf_counter() - began, 2)
        facts[f"{way}_bleu"] = round(bleu(texts, list(task.references.values())), 2)
    valid = predict(model, list(task.held_out), beams, task.device)
    facts["valid_bleu"] = round(bleu(valid, list(task.held_out.values())), 2)
    return facts, texts


def predict(
    model: gpt2.GPT2, prompts: Sequence[str], config: gpt2.GenerateConfig, device: str
) -> list[str]:
    """The model's text for each prompt."""
    tokenizer = gpt2.Tokenizer()
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    size, texts = (160 if device == "cpu" else 6400) // config.num_beams, list[str]()
    for start in range(0, len(ids), size):
        rows = gpt2.generate(model, ids[start : start + size], config)
        texts += [tokenizer.decode(row).strip() for row in rows]
    return texts


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, lower-cased, tokenised as mteval-v13a, each text against all its references."""
    corpus_bleu: Callable[..., Any] = cast(Any, import_module("sacrebleu")).corpus_bleu
    most = max(map(len, references))
    columns = [
        [every[i].strip() if i < len(every) else None for every in references] for i in range(most)
    ]
    return corpus_bleu(list(texts), columns, lowercase=True, tokenize="13a").score


if __name__ == "__main__":
    main()
