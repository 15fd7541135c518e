"""Make report.html of a run's folder, also of a killed run; of several, one that compares them."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys

    import command

    sys.exit(command.start("report", sys.argv[1:]))

import argparse
from pathlib import Path

import guard
import record
import reporting


@guard.guarded
def main(argv: guard.Arguments = None) -> None:
    """Parse, read, write."""
    parser = argparse.ArgumentParser("report.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a folder of train_qa or search")
    parser.add_argument("--out", help="the file; by default report.html in the only folder")
    options = parser.parse_args(argv)
    folders = [Path(name) for name in options.folders]
    if len(folders) > 1 and options.out is None:
        raise ValueError("Several runs are compared in a file of your own: give --out FILE.")
    out = Path(options.out) if options.out else folders[0] / reporting.REPORT
    reporting.put(out, reporting.html([record.read(place) for place in folders]))
    print(f"See {out}")
