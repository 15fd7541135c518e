"""Continue every prompt of a file with a GPT-2, and with an adapter if one is given.

The answers are written as they come, a line of JSON a prompt; the same command goes on where it
was stopped.
"""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # rooms are known by their package alone
    from scripts.cli.guard import start

    sys.exit(start("predict", sys.argv[1:]))

from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

import gpt2
import lora
from gpt2.training import fingerprints

from .cli.console import Plain, bar
from .cli.guard import Arguments, guarded
from .cli.options import build, parse, parser
from .runs import answers, data, folder, predictions, processes, recipe


def options_of(argv: Arguments) -> Namespace:
    """The script's own options, and the library's."""
    to = parser("predict", __doc__)
    add = to.add_argument
    add("prompts", type=str, help="file of prompts; answers in it are references")
    recipe.add_model_options(to)
    add("--output", type=str | None, help="by default predictions.jsonl beside the adapter")
    flag = {"type": bool, "nargs": "?", "const": True, "default": False}
    add("--overwrite", **flag, help="replace what the output holds")
    add("--fields", type=dict[str, str] | None, help="--fields.question NAME: the file's own names")
    rows = "rows at a time, num_beams of them a prompt; by default 64, and 512 on a GPU"
    add("--batch_size", type=recipe.AtLeastOne | None, help=rows)
    to.add_class_arguments(gpt2.GenerateConfig, as_group=False)
    return parse(to, argv or ())


@guarded
def main(argv: Arguments = None) -> None:
    """Parse, build, predict, append."""
    options, console = options_of(argv), Plain()
    config, tokenizer = build(gpt2.GenerateConfig, options), gpt2.Tokenizer()
    prompts = data.distinct(gpt2.read_prompts(options.prompts, options.fields))
    adapter = None if options.adapter is None else folder.adapter_in(options.adapter)
    options.base = options.base or folder.base_of(options.adapter)
    device = processes.pick_device(options.device)
    model = gpt2.GPT2.from_pretrained(options.base, device=device).requires_grad_(False)
    made_with = decided(options, model, adapter)
    if adapter is not None:
        lora.load(model, adapter)
    ids = data.encode_prompts(prompts, tokenizer, model, config, options.separator)
    rows = options.batch_size or answers.rows_of(model)
    place = Path() if adapter is None else adapter.parent
    output = place / "predictions.jsonl" if options.output is None else Path(options.output)
    with predictions.begun(output, made_with, overwrite=options.overwrite) as done:
        with predictions.counted(output, len(ids)), bar(console, "prompts", len(ids), done) as more:
            for batch in answers.continued(model, ids, config, rows, first=done):
                texts = [tokenizer.decode(row) for (row,) in batch]
                predictions.append(output, prompts[done : done + len(texts)], texts)
                done += len(texts)
                more(len(texts))
        console.print(f"{predictions.score(output)}Predictions: {output}", soft_wrap=True)


def decided(options: Namespace, base: gpt2.GPT2, adapter: Path | None) -> dict[str, Any]:
    """All that decides what the answers are."""
    names = ("base", "fields", "separator", *(f.name for f in fields(gpt2.GenerateConfig)))
    values = {name: options[name] for name in names}
    values["prompts"] = predictions.digest([Path(options.prompts)])
    values["base's weights"] = fingerprints.of_base(base)
    if adapter is not None:
        values["adapter"] = predictions.digest(sorted(adapter.glob("adapter_*")))
    return values
