"""`lora-gpt2 train|generate|predict|merge|export|search|report`: the scripts, anywhere."""

import sys

from .cli.guard import VERBS, start

USAGE = f"usage: lora-gpt2 {{{','.join(VERBS)}}} ... (--help of each), or --version"


def main() -> int:
    """The installed command; returns an exit code."""
    verb = "".join(sys.argv[1:2])
    if verb == "--version":
        from importlib.metadata import version

        print(version("lora-gpt2"))
    elif verb in ("-h", "--help"):
        print(USAGE)
    elif verb in VERBS:
        return start(VERBS[verb], sys.argv[2:])
    else:
        print(USAGE, file=sys.stderr)
        return 2
    return 0
