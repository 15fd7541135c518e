"""Make `report.html` of a run's folder, ended or killed, or one page that compares several."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # the rooms are in a package, by one name
    from scripts.command import start

    sys.exit(start("report", sys.argv[1:]))

from pathlib import Path

from .cli import cli, guard
from .cli import options as opts
from .page import page, record
from .runs import folder

COMPARED = Path("comparison.html")


@guard.guarded
def main(argv: guard.Arguments = None) -> None:
    """Parse, read, write, say where."""
    parser = cli.parser("report", __doc__)
    parser.add_argument("runs", type=str, nargs="+", help="folders of train_qa.py or search.py")
    place = f"by default {folder.REPORT} in the run's folder; of several {COMPARED} here"
    parser.add_argument("--output", type=str | None, help=place)
    options = opts.flags(parser, argv)
    places = [Path(run) for run in options.runs]
    pages = [record.read(place) for place in places]
    usual = COMPARED if len(places) > 1 else places[0] / folder.REPORT
    file = Path(options.output) if options.output else usual
    if file.exists() and not (file.is_file() and page.is_ours(file)):
        raise ValueError(f"{file} is no report and is left as it is: choose another --output.")
    print(page.put(file, page.html(pages)))
