"""Make `report.html` of a run's folder, ended or killed, or one page that compares several."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # rooms are known by their package alone
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
    place = f"by default {folder.REPORT} in the run's folder; of several {COMPARED} here"
    to.add_argument("--output", type=str | None, help=place)
    options = parse(to, argv or ())
    places = [Path(run) for run in options.runs]
    records = [read(place) for place in places]
    usual = COMPARED if len(places) > 1 else places[0] / folder.REPORT
    file = Path(options.output) if options.output else usual
    if file.exists() and not (file.is_file() and page.is_ours(file)):
        raise ValueError(f"{file} is no report and is left as it is: choose another --output.")
    folder.write_whole(file, page.html(records))
    print(file)
