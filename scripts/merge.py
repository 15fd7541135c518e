"""Fold an adapter into its base and write the result, which needs no LoRA to run."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # the rooms are in a package, by one name
    from scripts.command import start

    sys.exit(start("merge", sys.argv[1:]))

from pathlib import Path
from typing import Literal

import torch

import gpt2
import lora

from .cli import cli, guard
from .cli import options as opts


@guard.guarded
def main(argv: guard.Arguments = None) -> None:
    """Parse, load, merge, save."""
    parser = cli.parser("merge", __doc__)
    add = parser.add_argument
    add("adapter", type=str, help="a folder of train_qa.py, or of an adapter, PEFT's too")
    add("out", type=str, help="a new or empty folder for the merged model")
    add("--base", type=str | None, help="demo, gpt2, org/repo, a folder; by default the adapter's")
    dtypes = Literal["float32", "bfloat16", "float16"]
    add("--dtype", type=dtypes, default="float32", help="of the merged weights")
    options = opts.flags(parser, argv)
    out = Path(options.out)
    if not options.out or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(
            f"{options.out or repr('')} is not an empty folder; merge.py overwrites nothing. "
            "Name a new one."
        )
    base = options.base or cli.base_of(options.adapter)
    model = gpt2.GPT2.from_pretrained(base, dtype=getattr(torch, options.dtype))
    paths = lora.load(model, cli.adapter_folder(options.adapter))
    lora.eject(model, merge=True)
    model.save_pretrained(str(out))
    gpt2.Tokenizer().save_pretrained(out)
    print(f"{options.adapter} is merged into {len(paths)} layers of {base}: see {out}")
