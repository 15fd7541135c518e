"""What a run reads: the examples of each file, and the prompts that show what was learnt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

import gpt2
from gpt2.data import store
from gpt2.data.held_out import ALL, Range, within

from ..cli import bars

DATA = Path(__file__).resolve().parents[1] / "data"
ARTICLE, PROMPTS = DATA / "article.jsonl", DATA / "article_prompts.jsonl"
FORMATS = ".jsonl, .json, .csv, .tsv, .parquet or .txt file to train on"
TRIED = 6  # prompts that are taken from the examples where no file of prompts is given
FIRST = 1000  # examples of a large file that are looked at


@dataclass(frozen=True)
class Asked:
    """A prompt, and all the answers that a file gives for it; there may be none."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A data file, and its examples; of a large one the first, its tokens being kept on disk."""

    file: str
    examples: list[gpt2.Example]
    whole: bool


@dataclass(frozen=True)
class Reader:
    """How a run's files become tokens: as its options say, none longer than the context."""

    tokenizer: gpt2.Tokenizer
    model: gpt2.GPT2
    options: Namespace
    console: Console

    def encode(self, source: Source, side: Range = ALL) -> gpt2.Dataset:
        """The tokens of a side's examples, in memory or in a store that is made if need be."""
        options, console = self.options, self.console
        how = {name: options[name] for name in ("eos", "answer_only", "separator")}
        how["max_length"] = min(options.max_token_length, self.model.config.block_size)
        if source.whole and options.cache is None:
            return gpt2.encode(within(source.examples, side), self.tokenizer, **how)
        with ExitStack() as shown:
            advances = list[bars.Advance]()

            def tell(line: str) -> None:
                console.print(line, soft_wrap=True)
                advances.append(shown.enter_context(bars.bar(console, "examples")))

            def progress(more: int, share: float | None) -> None:
                advances[0](more, share)

            given = {"cache": options.cache, "fields": options.fields, "side": side}
            return gpt2.open_data(
                source.file, self.tokenizer, **given, **how, tell=tell, progress=progress
            )


def read(files: Sequence[str], options: Namespace) -> tuple[list[Source], list[Asked]]:
    """The files, and the prompts, whose completions are references.

    Prompts come from the file that `--prompts` names, for the article's data from the article's,
    and else from the examples themselves.
    """
    sources = [source(file, options) for file in files]
    if options.prompts is not None:
        return sources, asked(gpt2.read_prompts(options.prompts, options.fields))
    if all(DATA in Path(file).resolve().parents for file in files):
        return sources, asked(gpt2.read_prompts(PROMPTS))
    distinct = dict.fromkeys(e.prompt for s in sources for e in s.examples if e.prompt)
    return sources, [Asked(prompt, ()) for prompt in list(distinct)[:TRIED]]


def asked(examples: Iterable[gpt2.Example]) -> list[Asked]:
    """Each prompt once, in the order of its first row, with the answers of all its rows."""
    answers: dict[str, list[str]] = {}
    for example in examples:
        answers.setdefault(example.prompt, []).extend(
            [example.completion] * bool(example.completion)
        )
    return [Asked(prompt, tuple(dict.fromkeys(found))) for prompt, found in answers.items()]


def source(file: str, options: Namespace) -> Source:
    """A data file, read whole unless it is large."""
    if Path(file).is_file() and Path(file).stat().st_size >= store.SMALL:
        first = islice(gpt2.stream_examples(file, options.fields), FIRST)
        return Source(file, list(first), whole=False)
    return Source(file, gpt2.read_examples(file, options.fields), whole=True)


def base(options: Namespace, device: str) -> gpt2.GPT2:
    """The base that `--model_name` names, with the dropouts of `--base_dropout` if it is given."""
    name, dropout = options.model_name, options.base_dropout
    return gpt2.GPT2.from_pretrained(name, device=device, dropout=dropout)


def encode_prompts(
    prompts: Sequence[Asked],
    tokenizer: gpt2.Tokenizer,
    model: gpt2.GPT2,
    config: gpt2.GenerateConfig,
    separator: int | None = None,
) -> list[list[int]]:
    """Token ids of the prompts, the separator's last if there is one.

    Raises:
        ValueError: listing the prompts that leave no room for so many new tokens.
    """
    new = config.max_new_tokens
    limit = model.config.block_size - new
    if limit < 1:
        raise ValueError(f"max_new_tokens {new} does not fit a context of {limit + new} tokens.")
    last = [] if separator is None else [separator]
    ids = [tokenizer.encode(asked.prompt) + last for asked in prompts]
    long = [str(number) for number, row in enumerate(ids, 1) if len(row) > limit]
    if long:
        raise ValueError(
            f"{len(long)} prompts have more than {limit} tokens, which leaves no room for {new} "
            f"new ones: {', '.join(long[:10])}{'…' * (len(long) > 10)}. Shorten them."
        )
    return ids
