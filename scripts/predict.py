"""Continue each prompt of a file; the same command goes on after a stop."""

if __name__ == "__main__":  # before slow imports
    import sys

    sys.path[0] = __file__.rpartition("scripts")[0]
    from scripts.cli.guard import start

    sys.exit(start("predict", sys.argv[1:]))

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

import gpt2
import lora
from gpt2.training import snapshots

from .cli.console import bar
from .cli.guard import Arguments, guarded
from .cli.options import FLAG, AtLeastOne, add_model_options, build, parse, parser
from .runs import answers, data, folder, scores

AGREE = "keep the text most like other adapters'"
AGAIN = "Name another --output, or pass --overwrite true."


@guarded
def main(argv: Arguments = None) -> None:
    """Parse, build, predict, append."""
    to = parser("predict", __doc__)
    add = to.add_argument
    add("prompts", type=str, help="file; its answers are references")
    add_model_options(to, several=True)
    add("--score", type=str | None, help=f"of the texts: {scores.NAMES}")
    add("--agree", type=str | None, nargs="?", const="bleu", help=AGREE)
    add("--output", type=str | None, help="by default beside the adapter")
    add("--overwrite", type=bool, help="replace the output", **FLAG)
    add("--fields", type=dict[str, str] | None, help="--fields.question NAME")
    add("--batch_size", type=AtLeastOne | None, help="by default 64, on a GPU 512")
    to.add_class_arguments(gpt2.GenerateConfig, as_group=False)
    options = parse(to, argv or [])
    config = build(gpt2.GenerateConfig, options)
    prompts = data.distinct(gpt2.read_examples(options.prompts, options.fields, prompts=True))

    agree = None if options.agree is None else scores.named(options.agree)
    if options.score is not None:
        scores.named(options.score)  # may raise
    paths: list[str] = options.adapter or []
    if (len(paths) > 1) != (agree is not None):
        raise ValueError("--agree takes several adapters.")
    adapters = [folder.adapter_in(path) for path in paths]

    options.base = options.base or folder.base_of(paths[0] if paths else None)
    reader = data.Reader(options, options.base)
    model = reader.model.requires_grad_(False)
    ids = reader.encode_prompts(prompts, config)
    made = made_with(options, model)
    beside = adapters[0].parent if adapters else Path()
    file = Path(options.output or beside / "predictions.jsonl")

    def predictions(first: int) -> Iterator[dict[str, Any]]:
        rows = answers.continued(model, ids, config, options.batch_size, first=first)
        return ({"prediction": reader.tokenizer.decode(row)} for (row,) in rows)

    def most_alike(first: int) -> Iterator[dict[str, Any]]:
        assert agree
        for texts in [*zip(*by_adapter, strict=True)][first:]:
            best = scores.agreed(texts, agree)
            more = {"adapter": paths[best], "predictions": texts}
            yield {"prediction": texts[best], **more}

    by_adapter: list[list[str]] = []
    how: dict[str, Any] = {"overwrite": options.overwrite, "score": options.score}
    for number, adapter in enumerate(adapters or [None], 1):
        one, with_it = file, dict(made)
        if adapter is not None:
            lora.load(model, adapter, adapter="one")
            with_it["adapter"] = digest(sorted(adapter.glob("adapter_*")))
        if agree:
            one = file.with_name(f"{file.stem}-{number}{file.suffix}")

        lines = write(reader, one, with_it, prompts, predictions, **how)
        by_adapter.append([line["prediction"] for line in lines])
        if adapter is not None:
            lora.remove(model, "one")
    if agree:
        made["adapters"] = [digest(sorted(a.glob("adapter_*"))) for a in adapters]
        made["agree"] = options.agree
        write(reader, file, made, prompts, most_alike, **how)


def write(
    reader: data.Reader,
    file: Path,
    made: Mapping[str, Any],
    prompts: list[data.Prompt],
    answered: Callable[[int], Iterator[dict[str, Any]]],
    *,
    overwrite: bool,
    score: str | None,
) -> list[dict[str, Any]]:
    """Append a line a prompt to a file, from the first that it lacks; returns all lines."""
    with begun(file, made, len(prompts), overwrite=overwrite) as done:
        output = file.open("a", encoding="utf-8", newline="\n", buffering=1)
        with output as stream, bar(reader.console, "prompts", len(prompts), done) as advance:
            for prompt, answer in zip(prompts[done:], answered(done), strict=True):
                line: dict[str, Any] = {"prompt": prompt.text, **answer}
                if prompt.references:
                    line["references"] = prompt.references
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                advance(1)

        lines = _lines(file)
        known = [line for line in lines if "references" in line]
        exact = sum(line["prediction"] in line["references"] for line in known)
        if known:
            share = f"{exact / len(known):.1%}"
            print(f"{exact:,} of {len(known):,} answered as a reference ({share}).")
            if score is not None:
                texts = [line["prediction"] for line in known]
                print(
                    scores.line(scores.scored(score, texts, [line["references"] for line in known]))
                )
        reader.console.print(f"Predictions: {file}", soft_wrap=True)
        return lines


def made_with(options: Namespace, base: gpt2.GPT2) -> dict[str, Any]:
    """All that decides the answers, but for adapters."""
    names = ("base", "fields", "separator", *(f.name for f in fields(gpt2.GenerateConfig)))
    values = {name: options[name] for name in names}
    values["prompts"] = digest([Path(options.prompts)])
    values["base's weights"] = snapshots.of_base(base)
    return values


def digest(files: Iterable[Path]) -> str:
    """A fingerprint of the files."""
    parts = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@contextmanager
def begun(file: Path, made: Mapping[str, Any], total: int, *, overwrite: bool) -> Iterator[int]:
    """Lock a file that is new or made alike; yields its number of answers."""
    about = file.with_name(f"{file.name}.made.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.open("a").close()
    with folder.locked(file, option="--output"):
        if overwrite or not file.stat().st_size:
            os.truncate(file, 0)
            folder.write_whole(about, json.dumps(made, indent=2))
        elif not about.is_file():
            raise ValueError(f"{about.name} is missing beside {file}. {AGAIN}")
        elif odd := folder.differences(json.loads(about.read_text("utf-8")), made):
            raise ValueError(f"{file} was made with other options: {odd}. {AGAIN}")
        try:
            yield len(_lines(file))
        except BaseException as stop:
            done = f"{len(_lines(file)):,} of {total:,} prompts are answered in {file}"
            stop.add_note(f"{done}; the same command goes on from there.")
            raise


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file, whose torn last line is cut off."""
    whole, _, torn = file.read_bytes().rpartition(b"\n")
    os.truncate(file, file.stat().st_size - len(torn))
    return [json.loads(line) for line in whole.splitlines()]
