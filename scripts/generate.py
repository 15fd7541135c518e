"""Continue a prompt with a GPT-2, and with an adapter if one is given."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # the rooms are in a package, by one name
    from scripts.command import start

    sys.exit(start("generate", sys.argv[1:]))

from collections.abc import Iterable, Iterator

import gpt2
import lora

from .cli import cli, guard
from .cli import options as opts


@guard.guarded
def main(argv: guard.Arguments = None) -> None:
    """Parse, build, stream to stdout."""
    parser = cli.parser("generate", __doc__)
    add = parser.add_argument
    add(
        "prompt", type=str, help=r"text to continue, such as $'Q: What is overfitting?\nA:' in bash"
    )
    add("--base", type=str | None, help="demo, gpt2, org/repo, a folder; by default the adapter's")
    add("--adapter", type=str | None, help="a folder of train_qa.py, or of an adapter, PEFT's too")
    add("--device", type=str | None, help="by default the GPU if there is one")
    add("--separator", type=int | None, help="the token id after each prompt in training")
    parser.add_class_arguments(gpt2.GenerateConfig, as_group=False)
    options = opts.flags(parser, argv)
    config = cli.build(gpt2.GenerateConfig, options)
    tokenizer, device = gpt2.Tokenizer(), cli.pick_device(options.device)
    model = gpt2.GPT2.from_pretrained(options.base or cli.base_of(options.adapter), device=device)
    if options.adapter is not None:
        lora.load(model, cli.adapter_folder(options.adapter))
    last = [] if options.separator is None else [options.separator]
    ids = [tokenizer.encode(options.prompt) + last]
    if config.num_beams > 1:  # known when the search has ended, and not before
        tokens = iter(gpt2.generate(model, ids, config)[0])
    else:
        tokens = (token for (token,) in gpt2.stream(model, ids, config) if token is not None)
    print(options.prompt, end="", flush=True)
    for piece in pieces(tokens, tokenizer):
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
