"""Make the report of a run, or a page that compares runs."""

if __name__ == "__main__":  # before slow imports
    import sys

    sys.path[0] = __file__.rpartition("scripts")[0]
    from scripts.cli.guard import start

    sys.exit(start("report", sys.argv[1:]))

from pathlib import Path

from .cli.guard import Arguments, guarded
from .cli.options import parse, parser
from .page import page
from .page.read import read
from .runs import folder

COMPARED = Path("comparison.html")


@guarded
def main(argv: Arguments = None) -> None:
    """Parse, read, write, print where."""
    to = parser("report", __doc__)
    to.add_argument("runs", type=str, nargs="+", help="folders of train_qa.py or search.py")
    to.add_argument("--output", type=str | None, help=f"of several: {COMPARED}")
    options = parse(to, argv or [])
    runs = [Path(run) for run in options.runs]
    records = [read(run) for run in runs]
    file = Path(options.output or (COMPARED if len(runs) > 1 else runs[0] / folder.REPORT))
    if file.exists() and not (file.is_file() and page.GENERATOR in file.read_text("utf-8")):
        raise ValueError(f"{file} is no report: choose another --output.")
    folder.write_whole(file, page.html(records))
    print(file)
