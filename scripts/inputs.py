"""What a run reads: the examples of each file, and the prompts that show what was learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

import gpt2

DATA = Path(__file__).resolve().parent / "data"
ARTICLE, PROMPTS = DATA / "article.jsonl", DATA / "article_prompts.jsonl"
FORMATS = ".jsonl, .json, .csv, .tsv, .parquet or .txt file to train on"
TRIED = 6  # prompts that are taken from the examples where no file of prompts is given


def read(
    files: Sequence[str], options: Namespace
) -> tuple[list[list[gpt2.Example]], list[gpt2.Example]]:
    """The examples of each file, and the prompts, whose completions are references.

    Prompts come from the file that `--prompts` names, for the article's data from the article's,
    and else from the examples themselves.
    """
    examples = [gpt2.read_examples(file, options.fields) for file in files]
    if options.prompts is not None:
        return examples, gpt2.read_prompts(options.prompts, options.fields)
    if all(DATA in Path(file).resolve().parents for file in files):
        return examples, gpt2.read_prompts(PROMPTS)
    distinct = dict.fromkeys(e.prompt for texts in examples for e in texts if e.prompt)
    return examples, [gpt2.Example(prompt, "") for prompt in list(distinct)[:TRIED]]


def base(options: Namespace, device: str) -> gpt2.GPT2:
    """The base that `--model_name` names, with the dropouts of `--base_dropout` if it is given."""
    name, dropout = options.model_name, options.base_dropout
    return gpt2.GPT2.from_pretrained(name, device=device, dropout=dropout)


def encode(
    examples: Sequence[gpt2.Example],
    tokenizer: gpt2.Tokenizer,
    model: gpt2.GPT2,
    options: Namespace,
) -> gpt2.Dataset:
    """Tokenise examples as the options say, none longer than the model's context."""
    return gpt2.encode(
        examples,
        tokenizer,
        max_length=min(options.max_token_length, model.config.block_size),
        eos=options.eos,
        answer_only=options.answer_only,
        separator=options.separator,
    )


def encode_prompts(
    prompts: Sequence[gpt2.Example],
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
    ids = [tokenizer.encode(example.prompt) + last for example in prompts]
    long = [str(number) for number, row in enumerate(ids, 1) if len(row) > limit]
    if long:
        raise ValueError(
            f"{len(long)} prompts have more than {limit} tokens, which leaves no room for {new} "
            f"new ones: {', '.join(long[:10])}{'…' * (len(long) > 10)}. Shorten them."
        )
    return ids
