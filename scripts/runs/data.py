"""What a run reads: examples, the splits that they are trained and judged on, prompts to try."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

import gpt2
from gpt2.data.held_out import ALL, Range, is_within, sides, without_overlap

from ..cli.console import Advance, bar

DATA = Path(__file__).resolve().parents[1] / "data"
ARTICLE, ARTICLE_PROMPTS = DATA / "article.jsonl", DATA / "article_prompts.jsonl"
TRIED = 6  # prompts that are taken from the examples where no file of prompts is given
FIRST = 20_000  # examples of a file that are looked at, beside its tokens
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and all the answers that a file gives for it; there may be none."""

    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A data file, and its first examples: the whole of it, if there are no more."""

    file: str
    examples: list[gpt2.Example]
    whole: bool


@dataclass(frozen=True)
class Split:
    """Data to train on, to validate and to test, no prompt in two; and what to print of them."""

    train: gpt2.Dataset
    validation: gpt2.Dataset | None
    test: gpt2.Dataset | None
    message: str

    @property
    def made_of(self) -> list[str]:
        """Fingerprints of what an adapter is trained on and judged by."""
        return [data.fingerprint[:16] for data in (self.train, self.validation, self.test) if data]


@dataclass(frozen=True)
class Reader:
    """How files become tokens: as the options say, none longer than the context."""

    tokenizer: gpt2.Tokenizer
    model: gpt2.GPT2
    options: Namespace
    console: Console

    def encode(self, file: str, side: Range = ALL) -> gpt2.Dataset:
        """The tokens of a side's examples, in memory or in a store that is made if need be."""
        names = ("eos", "answer_only", "separator", "cache", "fields")
        how: dict[str, Any] = {name: self.options[name] for name in names}
        how["side"], how["max_length"] = (
            side,
            min(self.options.max_token_length, self.model.config.block_size),
        )
        with ExitStack() as shown:
            advances, done = list[Advance](), [0]

            def tell(line: str) -> None:
                self.console.print(line, soft_wrap=True)
                advances.append(shown.enter_context(bar(self.console, "examples")))

            def progress(more: int, share: float | None) -> None:
                done[0] += more
                advances[0](more, total=round(done[0] / share) if share else None)

            return gpt2.open_data(file, self.tokenizer, **how, tell=tell, progress=progress)

    def split(self, source: Source, config: gpt2.TrainConfig) -> Split:
        """A source's data to train on, and what it is validated and tested on."""
        options, ranges = self.options, shares(self.options)
        sets = {name: self.encode(source.file, side) for name, side in ranges.items()}
        n, repeated = sum(map(len, sets.values())), sum(data.repeated for data in sets.values())
        message, left_out = "", 0
        for name in SPLITS:
            if options[name] is None:
                continue
            if name not in sets:
                whole = data = self.encode(options[name])
                for other in sets.values():
                    data = without_overlap(data, other, name)
                sets[name], left_out = data, left_out + len(whole) - len(data)
            by = ", by their prompts" if name in ranges else ""
            message += f" {name.capitalize()}: {len(sets[name]):,} examples{by}."
        if message and repeated:
            message += f" {repeated:,} of the data's {n:,} stand there more than once."
        if left_out:
            message += f" {left_out:,} others have a prompt that is learnt too, and are left out."
        gpt2.total_steps(sets["train"], config)  # raises what is wrong with the two
        return Split(sets["train"], sets.get("validation"), sets.get("test"), message)


def shares(options: Namespace) -> dict[str, Range]:
    """The ranges of a prompt's hash that each split of the data is of, `train` among them."""
    ranges, taken = dict[str, Range](), 0.0
    for name in reversed(SPLITS):  # the same test data, whatever is validated on
        try:
            share = float(options[name])
        except (TypeError, ValueError):  # null, or a file
            continue
        sides(share)  # raises where it is out of range
        ranges[name] = (taken, taken + share)
        taken += share
    if taken >= 1:
        raise ValueError(f"validation and test take {taken:g} of the data and leave none to learn.")
    return {**ranges, "train": (taken, 1.0)}


def read(file: str, options: Namespace) -> Source:
    """A data file, and as many of its examples as are looked at."""
    examples = list(islice(gpt2.stream_examples(file, options.fields), FIRST))
    return Source(file, examples, whole=len(examples) < FIRST)


def trained(sources: Sequence[Source], options: Namespace) -> list[gpt2.Example]:
    """The examples that are trained on, as far as they are read."""
    side = shares(options)["train"]
    return [e for source in sources for e in source.examples if is_within(e, side)]


def prompts_of(sources: Sequence[Source], options: Namespace) -> list[Prompt]:
    """What is tried: the file that `--prompts` names, the article's for its data and tasks, or else
    the first prompts of the examples."""
    if options.prompts is not None:
        return distinct(gpt2.read_prompts(options.prompts, options.fields))
    files = [Path(source.file).resolve() for source in sources]
    if all(file == ARTICLE or file.parent == DATA / "tasks" for file in files):
        return distinct(gpt2.read_prompts(ARTICLE_PROMPTS))
    texts = dict.fromkeys(e.prompt for s in sources for e in s.examples if e.prompt)
    return [Prompt(text, ()) for text in islice(texts, TRIED)]


def distinct(examples: Iterable[gpt2.Example]) -> list[Prompt]:
    """Each prompt once, in the order of its first row, with the answers of all its rows."""
    answers: dict[str, dict[str, None]] = {}
    for example in examples:
        known = answers.setdefault(example.prompt, {})
        if example.completion:
            known[example.completion] = None
    return [Prompt(text, tuple(known)) for text, known in answers.items()]


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: gpt2.Tokenizer,
    model: gpt2.GPT2,
    config: gpt2.GenerateConfig,
    separator: int | None = None,
) -> list[list[int]]:
    """Token ids of the prompts, the separator's last if there is one."""
    new = config.max_new_tokens
    limit = model.config.block_size - new
    if limit < 1:
        raise ValueError(f"max_new_tokens {new} does not fit a context of {limit + new} tokens.")
    last = [] if separator is None else [separator]
    ids = [tokenizer.encode(prompt.text) + last for prompt in prompts]
    if long := [str(number) for number, row in enumerate(ids, 1) if len(row) > limit]:
        raise ValueError(
            f"{len(long)} prompts have more than {limit} tokens, which leaves no room for {new} "
            f"new ones: {', '.join(long[:10])}{'…' * (len(long) > 10)}. Shorten them."
        )
    return ids
