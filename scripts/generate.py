"""Continue a prompt with a GPT-2, and with an adapter if one is given."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # rooms are known by their package alone
    from scripts.cli.guard import start

    sys.exit(start("generate", sys.argv[1:]))

from collections.abc import Iterable, Iterator

import gpt2
import lora

from .cli.guard import Arguments, guarded
from .cli.options import build, parse, parser
from .runs import folder, processes, recipe


@guarded
def main(argv: Arguments = None) -> None:
    """Parse, build, stream to stdout."""
    to = parser("generate", __doc__)
    prompt = r"text to continue, such as $'Q: What is overfitting?\nA:' in bash"
    to.add_argument("prompt", type=str, help=prompt)
    recipe.add_model_options(to)
    to.add_class_arguments(gpt2.GenerateConfig, as_group=False)
    options = parse(to, argv or ())
    config = build(gpt2.GenerateConfig, options)
    tokenizer, device = gpt2.Tokenizer(), processes.pick_device(options.device)
    base = options.base or folder.base_of(options.adapter)
    model = gpt2.GPT2.from_pretrained(base, device=device)
    if options.adapter is not None:
        lora.load(model, folder.adapter_in(options.adapter))
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
