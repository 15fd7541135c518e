"""Find the best adapter: many are trained side by side, the worse retire, the best run again."""

from __future__ import annotations

if __name__ == "__main__":  # on top, so that Ctrl-C during the imports below ends in one line
    import sys
    from pathlib import Path

    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # the rooms are in a package, by one name
    from scripts.command import start

    sys.exit(start("search", sys.argv[1:]))

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

import gpt2

from .cli import bars, cli, guard
from .cli import options as opts
from .runs import folder, inputs, inside, processes, recipe, results, shown, starting, validation
from .runs.validation import Apart
from .tuner import leaderboard, proposals, searching, verdict
from .tuner.course import Course
from .tuner.plan import Plan
from .tuner.team import Team
from .tuner.waves import Waves

DEMO = Path(__file__).resolve().parent / "configs" / "search_demo.yaml"
SPACE = f"what varies: [choices], or {{low, high}} in logarithms; of {', '.join(searching.NAMES)}"
DATA = inputs.DATA / "weather.jsonl"


def parse(argv: guard.Arguments) -> Namespace:
    """The options of a search, and those of its usual configuration as `train_qa.py` has them."""
    parser = cli.parser("search", __doc__)
    add = parser.add_argument
    add("--config", type=str | None, help="YAML file of options, by default the demo's; flags win")
    add("--space", type=dict[str, Any], default={}, help=SPACE)
    add("--trials", type=int, default=64, help="configurations in the first rung")
    add("--slots", type=int, default=16, help="trainings at a time, in one batch")
    add("--rungs", type=int, default=3, help="how often the worse retire, plus one")
    add("--keep", type=int, default=4, help="one in so many goes on, and so many times as far")
    add("--sampler", type=str, default="random", help="random, or tpe, which learns by waves")
    add("--finalists", type=int, default=4, help="trials of the last rung that run again")
    add("--seeds", type=int, default=3, help="of each finalist and of the default, at least 2")
    recipe.add_options(parser, str(DATA))
    starting.add_options(parser, "search")
    validation.add_options(parser)
    options = opts.with_config(parser, argv, starting.options_file("search", DEMO))
    recipe.check(options, {"slots": 1, "finalists": 1, "seeds": 2})
    return options


@guard.guarded
def main(argv: guard.Arguments = None) -> None:
    """Parse, search, show, save."""
    clock = results.Clock()
    with processes.joined():
        with processes.agreed():
            options = parse(argv)
            proposals.optuna()  # raises where it is missing
            space = searching.checked(options)
            searching.check(options)
            device = processes.own_device(cli.pick_device(options.device))
            source = inputs.source(options.data, options)
            model = inputs.base(options, device)
            console = cli.Plain(quiet=processes.rank() > 0)
            reader = inputs.Reader(gpt2.Tokenizer(), model, options, console)
            apart = validation.apart(source, reader)
            plan = searching.planned(options, space, apart)
            waves = searching.waves(plan, model, apart)
        console.print(searching.told(plan, apart), soft_wrap=True)
        clock.lap("load")
        with starting.begun(options, [folder.WINNER]) as place, waves:
            search(plan, waves, place, reader, apart, clock)


def search(
    plan: Plan, waves: Waves, place: Path, reader: inputs.Reader, apart: Apart, clock: results.Clock
) -> None:
    """Search, and leave behind what was found."""
    options, console = reader.options, reader.console
    team = Team(rank=processes.rank(), size=processes.size(), gather=processes.gathered)
    files = searching.files(place, options, plan, waves.model, apart)
    with searching.resumable(place):
        with bars.searching(console) as progress:
            course = Course(plan=plan, waves=waves, files=files, progress=progress, team=team)
            course.search(apart.tested)
        if processes.rank():
            return  # the first goes on alone
        clock.lap("search")
        about = searching.about(reader, apart, clock, place)
        leaderboard.write(course, options, place, about, inside.looked(apart, reader.tokenizer))
    files.remove()  # the search is over
    ranked = leaderboard.ranked(course)
    console.print(verdict.finalist_table(course, ranked), verdict.said(course), sep="\n")
    shown.end(console, place, about["commands"])
