"""Continue every prompt of a file with a GPT-2, and with an adapter if one is given.

The answers are written as they come, a line of JSON a prompt; the same command goes on where it
was stopped.
"""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # the rooms are in a package, by one name
    from scripts.command import start

    sys.exit(start("predict", sys.argv[1:]))

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

import gpt2
import lora
from gpt2.training import fingerprints

from .cli import bars, cli, guard
from .cli import options as opts
from .runs import continuing, inputs, predictions


def parse(argv: guard.Arguments) -> Namespace:
    """The script's own options, and the library's."""
    parser = cli.parser("predict", __doc__)
    add = parser.add_argument
    add("prompts", type=str, help="file of prompts; answers in it are references")
    add("--base", type=str | None, help="demo, gpt2, org/repo, a folder; by default the adapter's")
    add("--adapter", type=str | None, help="a folder of train_qa.py, or of an adapter, PEFT's too")
    add("--output", type=str | None, help="by default predictions.jsonl beside the adapter")
    flag = {"type": bool, "nargs": "?", "const": True, "default": False}
    add("--overwrite", **flag, help="replace what the output holds")
    add("--fields", type=dict[str, str] | None, help="--fields.question NAME: the file's own names")
    rows = "rows at a time, num_beams of them a prompt; by default 64, and 512 on a GPU"
    add("--batch_size", type=int | None, help=rows)
    add("--separator", type=int | None, help="the token id after each prompt in training")
    add("--device", type=str | None, help="by default the GPU if there is one")
    parser.add_class_arguments(gpt2.GenerateConfig, as_group=False)
    options = opts.flags(parser, argv)
    options.device = cli.pick_device(options.device)
    if options.batch_size is None:
        options.batch_size = continuing.rows_of(torch.device(options.device).type)
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {options.batch_size}.")
    return options


@guard.guarded
def main(argv: guard.Arguments = None) -> None:
    """Parse, build, predict, append."""
    options, console = parse(argv), cli.Plain()
    config, tokenizer = cli.build(gpt2.GenerateConfig, options), gpt2.Tokenizer()
    wanted = inputs.asked(gpt2.read_prompts(options.prompts, options.fields))
    adapter = None if options.adapter is None else cli.adapter_folder(options.adapter)
    options.base = options.base or cli.base_of(options.adapter)
    model = gpt2.GPT2.from_pretrained(options.base, device=options.device).requires_grad_(False)
    made_with = made(options, model, adapter)
    if adapter is not None:
        lora.load(model, adapter)
    ids = inputs.encode_prompts(wanted, tokenizer, model, config, options.separator)
    place = Path() if adapter is None else adapter.parent
    output = place / "predictions.jsonl" if options.output is None else Path(options.output)
    with predictions.begun(output, made_with, wanted, overwrite=options.overwrite) as done:
        with (
            predictions.told_where(output, len(ids)) as written,
            bars.bar(console, "prompts", len(ids), done) as advance,
        ):
            written.append(done)
            for rows in continuing.continued(model, ids, config, options.batch_size, first=done):
                some = wanted[sum(written) : sum(written) + len(rows)]
                said = zip(some, map(tokenizer.decode, rows), strict=True)
                predictions.append(output, said)
                written.append(len(rows))
                advance(len(rows), None)
        console.print(f"{predictions.score(output)}Predictions: {output}", soft_wrap=True)


def made(options: Namespace, base: gpt2.GPT2, adapter: Path | None) -> dict[str, Any]:
    """All that decides what the answers are."""
    names = ("base", "fields", "separator", *(f.name for f in fields(gpt2.GenerateConfig)))
    decided = {name: options[name] for name in names}
    decided["prompts"] = predictions.digest([Path(options.prompts)])
    decided["base's weights"] = fingerprints.of_base(base)
    if adapter is not None:
        decided["adapter"] = predictions.digest(sorted(adapter.glob("adapter_*")))
    return decided
