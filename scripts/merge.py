"""Merge an adapter into its base, and save the model."""

if __name__ == "__main__":  # before slow imports
    import sys

    sys.path[0] = __file__.rpartition("scripts")[0]
    from scripts.cli.guard import start

    sys.exit(start("merge", sys.argv[1:]))

from typing import Literal

import torch

import gpt2
import lora

from .cli.guard import Arguments, guarded
from .cli.options import parse, parser
from .runs import folder


@guarded
def main(argv: Arguments = None) -> None:
    """Parse, load, merge, save."""
    to = parser("merge", __doc__)
    add = to.add_argument
    add("adapter", type=str, help="folder of a run or an adapter")
    add("out", type=str, help="new or empty folder")
    add("--base", type=str | None, help="by default the adapter's")
    add("--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="of it")
    options = parse(to, argv or [])
    out = folder.unused(options.out)
    base = options.base or folder.base_of(options.adapter)
    model = gpt2.GPT2.from_pretrained(base, dtype=getattr(torch, options.dtype))
    paths = lora.load(model, folder.adapter_in(options.adapter))
    lora.eject(model, merge=True)
    model.save_pretrained(out)
    gpt2.Tokenizer().save_pretrained(out)
    print(f"{options.adapter} is merged into {len(paths)} layers of {base}: see {out}")
