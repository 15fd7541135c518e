"""A run's examples, splits and prompts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

import gpt2
from gpt2.data.dataset import without_overlap
from gpt2.data.examples import ALL, Range

from ..cli.console import Plain
from . import processes

DATA = Path(__file__).resolve().parents[1] / "data"
ARTICLE, ARTICLE_PROMPTS = DATA / "article.jsonl", DATA / "article_prompts.jsonl"
TRIED = 6  # prompts without a file
FIRST = 20_000  # examples to compare with
SPLITS = ("validation", "test")
Sources = Mapping[str, list[gpt2.Example]]  # by data file


@dataclass(frozen=True)
class Prompt:
    """A prompt and its file's answers, perhaps none."""

    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Data to train, validate and test on: no prompt in two."""

    train: gpt2.Dataset
    validation: gpt2.Dataset | None
    test: gpt2.Dataset | None
    message: str

    @property
    def made_of(self) -> list[str]:
        """Fingerprints of the data."""
        return [data.fingerprint[:16] for data in (self.train, self.validation, self.test) if data]


class Reader:
    """A base on its device, and its tokenizer."""

    def __init__(self, options: Namespace, base: str, dropout: float | None = None) -> None:
        device = processes.pick_device(options.device)
        self.model = gpt2.GPT2.from_pretrained(base, device=device, dropout=dropout)
        self.options, self.tokenizer = options, gpt2.Tokenizer()
        self.console = Plain(quiet=processes.rank() > 0)

    def encode(self, file: str, side: Range = ALL) -> gpt2.Dataset:
        """The tokens of a side's examples."""
        names = ("eos", "answer_only", "separator", "cache", "fields")
        how: dict[str, Any] = {name: self.options[name] for name in names}
        length = min(int(self.options.max_token_length), self.model.config.block_size)
        return gpt2.open_data(
            file,
            self.tokenizer,
            side=side,
            max_length=length,
            tell=lambda line: self.console.print(line, soft_wrap=True),
            **how,
        )

    def split(self, file: str, config: gpt2.TrainConfig) -> Split:
        """A file's splits; prompts of the training data are left out of the others."""
        options, message, left_out = self.options, "", 0
        sets = {name: self.encode(file, side) for name, side in shares(options).items()}
        for name in SPLITS:
            if options[name] is None:
                continue
            by = ", by their prompts" if name in sets else ""
            if not by:
                whole = data = self.encode(options[name])
                for other in sets.values():
                    data = without_overlap(data, other, name)
                sets[name], left_out = data, left_out + len(whole) - len(data)
            message += f" {name.capitalize()}: {len(sets[name]):,} examples{by}."
        if left_out:
            message += f" {left_out:,} others share a prompt with the training data: left out."
        gpt2.total_steps(sets["train"], config)
        return Split(sets["train"], sets.get("validation"), sets.get("test"), message)

    def encode_prompts(self, prompts: list[Prompt], config: gpt2.GenerateConfig) -> list[list[int]]:
        """Token ids of the prompts, each with the separator."""
        new, end = config.max_new_tokens, self.options.separator
        context, last = self.model.config.block_size, [] if end is None else [end]
        ids = [self.tokenizer.encode(prompt.text) + last for prompt in prompts]
        for number, row in enumerate(ids, 1):
            if len(row) + new > context:
                raise ValueError(
                    f"Prompt {number}, of {len(row):,} tokens and {new:,} new ones, does not fit a "
                    f"context of {context}: shorten it, or lower max_new_tokens."
                )
        return ids


def shares(options: Namespace) -> dict[str, Range]:
    """Each split's range of the prompts' hashes."""
    ranges, taken = dict[str, Range](), 0.0
    for name in reversed(SPLITS):  # validation moves no test data
        try:
            share = float(options[name])
        except (TypeError, ValueError):  # null, or a file
            continue
        if not 0 < share < 1:
            raise ValueError(f"A share must be above 0 and below 1, got {share}.")
        ranges[name] = (taken, taken + share)
        taken += share
    if taken >= 1:
        raise ValueError(f"validation and test take {taken:g} of the data: lower them.")
    return {**ranges, "train": (taken, 1.0)}


def read(options: Namespace) -> Sources:
    """The first examples of the data files."""
    stream, fields = gpt2.stream_examples, options.fields
    return {f: [*islice(stream(f, fields), FIRST)] for f in options.tasks or [options.data]}


def prompts_of(sources: Sources, options: Namespace) -> list[Prompt]:
    """`--prompts`, the article's, or the first examples'."""
    if options.prompts is not None:
        return distinct(gpt2.read_examples(options.prompts, options.fields, prompts=True))
    files = [Path(file).resolve() for file in sources]
    if all(file == ARTICLE or file.parent == DATA / "tasks" for file in files):
        return distinct(gpt2.read_examples(ARTICLE_PROMPTS, prompts=True))
    texts = dict.fromkeys(e.prompt for many in sources.values() for e in many if e.prompt)
    return [Prompt(text, ()) for text in islice(texts, TRIED)]


def distinct(examples: Iterable[gpt2.Example]) -> list[Prompt]:
    """Each prompt once, with all its answers."""
    answers: dict[str, dict[str, None]] = {}
    for example in examples:
        known = answers.setdefault(example.prompt, {})
        if example.completion:
            known[example.completion] = None
    return [Prompt(text, tuple(known)) for text, known in answers.items()]
