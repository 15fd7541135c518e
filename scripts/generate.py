"""Continue a prompt with a GPT-2, and an adapter."""

if __name__ == "__main__":  # before slow imports
    import sys

    sys.path[0] = __file__.rpartition("scripts")[0]
    from scripts.cli.guard import start

    sys.exit(start("generate", sys.argv[1:]))

import gpt2
import lora

from .cli.guard import Arguments, guarded
from .cli.options import add_model_options, build, parse, parser
from .runs import answers, data, folder


@guarded
def main(argv: Arguments = None) -> None:
    """Parse, build, stream to stdout."""
    to = parser("generate", __doc__)
    to.add_argument("prompt", type=str, help=r"such as $'Q: Why?\nA:' in bash")
    add_model_options(to)
    to.add_class_arguments(gpt2.GenerateConfig, as_group=False)
    options = parse(to, argv or [])
    config = build(gpt2.GenerateConfig, options)
    reader = data.Reader(options, options.base or folder.base_of(options.adapter))
    if options.adapter is not None:
        lora.load(reader.model, folder.adapter_in(options.adapter))
    ids = reader.encode_prompts([data.Prompt(options.prompt, ())], config)
    if config.num_beams > 1:
        tokens = iter(gpt2.generate(reader.model, ids, config)[0])
    else:
        steps = gpt2.stream(reader.model, ids, config)
        tokens = (token for (token,) in steps if token is not None)
    print(options.prompt, end="", flush=True)
    for piece in answers.pieces(tokens, reader.tokenizer):
        print(piece, end="", flush=True)
    print()
