"""Continue a prompt with a GPT-2, and with an adapter if one is given."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from jsonargparse import ArgumentParser

import cli
import gpt2
import lora


@cli.guarded
def main(argv: cli.Arguments = None) -> None:
    """Parse, build, stream to stdout."""
    parser = ArgumentParser(prog="generate.py", description=__doc__, exit_on_error=False)
    add = parser.add_argument
    add(
        "prompt", type=str, help=r"text to continue, such as $'Q: What is overfitting?\nA:' in bash"
    )
    add("--base", default="demo", help="demo, gpt2, org/repo, a folder or a .safetensors file")
    add("--adapter", type=str | None, help="a folder that train_qa.py, or PEFT, saved")
    add("--device", type=str | None, help="by default the GPU if there is one")
    parser.add_class_arguments(gpt2.GenerateConfig, as_group=False)
    options = parser.parse_args(argv)
    config = cli.build(gpt2.GenerateConfig, options)
    tokenizer = gpt2.Tokenizer()
    model = gpt2.GPT2.from_pretrained(options.base, device=cli.pick_device(options.device))
    if options.adapter is not None:
        lora.load(model, options.adapter)
    rows = gpt2.stream(model, [tokenizer.encode(options.prompt)], config)
    print(options.prompt, end="", flush=True)
    for piece in pieces((token for (token,) in rows if token is not None), tokenizer):
        print(piece, end="", flush=True)
    print()


def pieces(tokens: Iterable[int], tokenizer: gpt2.Tokenizer) -> Iterator[str]:
    """The text of the tokens as they come; a character that is not whole yet waits for the rest."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        whole = tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
        yield whole[len(shown) :]
        shown = whole
    yield tokenizer.decode(ids)[len(shown) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
