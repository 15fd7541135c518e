"""Write an adapter for llama.cpp or MLX, or merged; compare the answers."""

if __name__ == "__main__":  # before slow imports
    import sys

    sys.path[0] = __file__.rpartition("scripts")[0]
    from scripts.cli.guard import start

    sys.exit(start("export", sys.argv[1:]))

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gpt2
import lora

from .cli.guard import Arguments, guarded
from .cli.options import parse, parser
from .runs import data, exports, folder

FORMATS = Literal["gguf", "gguf-lora", "mlx", "merged"]


@guarded
def main(argv: Arguments = None) -> None:
    """Parse, load, write, compare."""
    to = parser("export", __doc__)
    add = to.add_argument
    add("adapter", type=str, help="folder of a run or an adapter")
    add("out", type=str, help="new file of a gguf or gguf-lora; else a new or empty folder")
    add("--format", type=FORMATS, required=True, help="gguf is the merged model")
    add("--base", type=str | None, help="by default the adapter's")
    add("--dtype", type=Literal["float32", "float16"], default="float32", help="of a gguf")
    add("--check", type=bool | None, help="else where the format's reader is installed")
    options = parse(to, argv or [])

    form = options.format
    out = folder.unused(options.out)
    reader = exports.READERS[form]
    needed = ["gguf"] * form.startswith("gguf") + [reader] * bool(options.check)
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(missing)} must be installed first.")

    base = options.base or folder.base_of(options.adapter)
    model = gpt2.GPT2.from_pretrained(base)
    lora.load(model, folder.adapter_in(options.adapter))
    texts = prompts(Path(options.adapter))
    room = model.config.block_size - exports.NEW_TOKENS
    ids = [row[-room:] for row in map(gpt2.Tokenizer().encode, texts)]
    config = gpt2.GenerateConfig(max_new_tokens=exports.NEW_TOKENS)
    ours = gpt2.generate(model, ids, config)
    leads = exports.margins(model, ids, ours)
    exports.write(form, model, out, options.dtype)
    print(f"{options.adapter}, on {base}, is written as {form} to {out}.")

    if options.check is False or find_spec(reader) is None:
        return
    theirs = exports.answers(form, model, out, ids)
    same, tokens, differing = exports.agreement(ours, theirs, leads)
    line = f"{same} of {tokens} greedy tokens after {len(ids)} prompts are {reader}'s too"
    if differing is not None and options.dtype == "float32":
        raise ValueError(f"Only {line}; the first that differs: {texts[differing]!r}.")
    print(f"{line}.")


def prompts(path: Path) -> list[str]:
    """Those that a run answered, or the article's."""
    texts = list[str]()
    with suppress(OSError, ValueError, KeyError):
        record = json.loads((path / folder.RUN).read_bytes())
        texts = [answer["prompt"] for answer in record["answers"]]
    article = gpt2.read_examples(data.ARTICLE_PROMPTS, prompts=True)
    return texts or [example.prompt for example in article]
