"""Fold an adapter into its base and write the result, which needs no LoRA to run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser

import cli
import gpt2
import lora


@cli.guarded
def main(argv: cli.Arguments = None) -> None:
    """Parse, load, merge, save."""
    parser = ArgumentParser(prog="merge.py", description=__doc__, exit_on_error=False)
    add = parser.add_argument
    add("adapter", type=str, help="a folder that train_qa.py, or PEFT, saved")
    add("out", type=str, help="a new or empty folder for the merged model")
    add("--base", default="demo", help="demo, gpt2, org/repo, a folder or a .safetensors file")
    dtypes = Literal["float32", "bfloat16", "float16"]
    add("--dtype", type=dtypes, default="float32", help="of the merged weights")
    options = parser.parse_args(argv)
    out = Path(options.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(
            f"{out} is not an empty folder; merge.py overwrites nothing. Name a new one."
        )
    model = gpt2.GPT2.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
    paths = lora.load(model, options.adapter)
    lora.eject(model, merge=True)
    model.save_pretrained(str(out))
    print(f"{options.adapter} is folded into {len(paths)} layers of {options.base}: see {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
