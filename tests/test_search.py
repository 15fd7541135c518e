"""A search: each trial is what it would be alone, the halving is fair, and nothing is lost."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import gpt2
import lora
from gpt2.population.training import PopulationTraining
from gpt2.training.loop import Training
from tests.devices import pretended_device
from tests.script_runs import command, environment, record_of, rows, two_processes, write_rows
from tests.toys import tiny_data as data
from tests.toys import tiny_gpt2

SPACE = {
    "lr": {"low": 1e-3, "high": 1e-1},
    "r": [1, 2, 4],
    "alpha_over_r": [1, 2],
    "b_ratio": [1, 4],
    "dropout": [0.0, 0.2],
    "targets": [["c_attn"], ["c_attn", "mlp.c_fc"]],
    "weight_decay": [0.0, 0.1],
    "steps": {"low": 8, "high": 12},
}


@pytest.fixture
def made(script, tmp_path_factory):
    """A function that makes a course on a tiny model; what it is told replaces the usual."""
    kinds, halving, waving, searching = (
        script(f"tuner.{name}") for name in ("trials", "halving", "waves", "search")
    )

    def make(folder=None, given=SPACE, rungs=3, keep=2, trials=8, model=None, **plan):
        usual = kinds.Recipe(
            adapter=lora.LoRAConfig(r=2, alpha=4, targets=("c_attn",), dropout=0.1),
            training=gpt2.TrainConfig(steps=8, batch_size=2, lr=1e-2, seed=3),
            b_ratio=1.0,
        )
        space = kinds.read_space(given, trials, usual)
        how = {"slots": 3, "sampler": "random", "finalists": 2, "seeds": 3} | plan
        how |= {"trials": trials, "rungs": rungs, "keep": keep}
        model = model or tiny_gpt2(dtype=torch.float64)
        searched = halving.Plan(space=space, usual=usual, **how)
        waves = waving.Waves(model, data(7), data(5), searched)
        files = script("tuner.checkpoint").Checkpoint(folder or tmp_path_factory.mktemp("made"))
        files.begin({"of": "a test"})
        return searching.Search(waves=waves, checkpoint=files)

    return make


def facts(course) -> list[object]:
    """All that must be equal."""
    runs = [*course.runs, *(run for own in course.again.values() for run in own)]
    curves = [
        (r.trial, r.recipe.training.seed, r.curve, sorted(r.losses.items()), r.ended) for r in runs
    ]
    return [curves, course.rungs, course.winner, course.finalists, course.values, course.tested]


def assert_alike(course, wanted):
    """But for rounding: a product of more rows is added up in another order."""
    assert facts(course)[1:5] == facts(wanted)[1:5]
    for run, other in zip(course.runs, wanted.runs, strict=True):
        assert run.curve == pytest.approx(other.curve, rel=1e-12)
        assert run.losses == pytest.approx(other.losses, rel=1e-12)


def cooled(training, recipe, total: int) -> float:
    """The loss after an eighth more steps, in which the rate falls to zero; of a copy."""
    taken, model = training.taken, copy.deepcopy(training.model)
    if taken < total:
        ends = {"steps": taken + max(1, taken // 8), "schedule": "linear"}
        groups = lora.parameter_groups(model, recipe.training.lr, b_ratio=recipe.b_ratio)
        own = Training(model, data(7), replace(recipe.training, **ends), groups)
        own.resume(copy.deepcopy(training.state()))
        steps = [record.step for record in own]
        assert steps[-1] == own.total == own.taken > taken
    return gpt2.evaluate(model, data(5)).loss


def test_each_trial_is_what_its_configuration_is_alone(made):
    """The steps of every rung, the loss at each one's end, dropout on; the other seeds too."""
    course = made()
    course.search(data(4))
    assert [len(trials) for trials in course.rungs] == [8, 4, 2]
    complete = [course.runs[n] for n in course.rungs[-1]]
    again = course.again[course.winner] + course.again["default"]
    assert len(again) == 5
    for run in (*complete, *again):
        model, recipe = tiny_gpt2(dtype=torch.float64), run.recipe
        lora.inject(model, recipe.adapter)
        groups = lora.parameter_groups(model, recipe.training.lr, b_ratio=recipe.b_ratio)
        curve, losses = list[float](), dict[int, float]()
        training = Training(model, data(7), recipe.training, groups)
        for record in training:
            curve.append(record.loss)
            if record.step in run.losses:
                losses[record.step] = cooled(training, recipe, run.total)
        assert len(curve) == run.total == recipe.training.steps
        assert curve == pytest.approx(run.curve, rel=1e-11)
        assert losses == pytest.approx(run.losses, rel=1e-6)  # sums of float32
    for run in complete:
        assert [*run.losses] == [run.total // 4, run.total // 2, run.total]


def test_a_search_on_an_apple_gpu_finds_what_one_on_a_cpu_does(made):
    space, found = {"b_ratio": [1, 4], "dropout": [0.0]}, []
    with pretended_device() as device:
        for where in ("cpu", device):
            model = tiny_gpt2(dropout=0.0, device=str(where))
            few = {"trials": 2, "rungs": 2, "finalists": 1, "seeds": 2}
            course = made(model=model, given=space, **few)
            course.search(data(4))
            found.append([[*run.losses.values(), *run.curve] for run in course.runs])
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_all_of_a_rung_rest_at_the_same_share_and_the_worst_retire(made, script):
    course = made()
    course.search(None)
    board = [*script("tuner.outcome").leaderboard(course)]
    assert [row["rung"] for row in board] == [3, 3, 2, 2, 1, 1, 1, 1]
    means = {n: sum(course.losses_of(n)) for n in course.finalists}
    assert board[0]["trial"] == course.winner == min(means, key=means.__getitem__)
    losses = [row["losses"][row["rung"]] for row in board]
    assert losses[2:4] + losses[4:] == sorted(losses[2:4]) + sorted(losses[4:])
    for rung, trials in enumerate(course.rungs):
        losses = {n: course.by_rung(n)[rung + 1] for n in trials}
        on = course.rungs[rung + 1] if rung < 2 else course.finalists
        assert on == sorted(losses, key=losses.__getitem__)[: len(on)]
    retired = {*range(8)} - {*course.rungs[1]}
    assert {course.runs[n].taken for n in retired} == {course.runs[n].total // 4 for n in retired}
    assert all(course.runs[n].position is None for n in retired)
    copies = 8 + 4  # one step each
    assert course.plan.cost(10) > course.done == copies + sum(
        run.taken for run in [*course.runs, *(r for own in course.again.values() for r in own)]
    )  # fmt: skip


def test_the_slots_change_nothing_but_rounding(made):
    wanted = made(slots=8)
    wanted.search(data(4))
    for slots in (1, 3):
        course = made(slots=slots)
        course.search(data(4))
        assert_alike(course, wanted)


def test_tpe_learns_from_wave_to_wave_and_proposes_the_same_again(made):
    one, other, random = (made(sampler=s, trials=12, slots=4) for s in ("tpe", "tpe", "random"))
    for course in (one, other, random):
        course.search(None)
    assert facts(one) == facts(other)
    assert one.values != random.values
    assert len({json.dumps(v) for v in one.values}) == 12, "no trial stands twice"


def test_a_choice_is_exhausted_without_a_trial_twice(made):
    course = made(given={"r": [1, 2], "targets": [["c_attn"], ["mlp.c_fc"]]}, trials=4)
    course.search(None)
    assert sorted(map(str, course.values)) == sorted(map(str, course.plan.space.all()))


def test_a_trial_that_blows_up_comes_to_an_end_of_its_own(made):
    """A learning rate without measure: no other bit moves."""
    course = made(given={"lr": [1e-2, 1e300], "r": [1, 2], "b_ratio": [1, 2]}, trials=8)
    course.search(None)
    for run in course.runs:
        if run.recipe.training.lr > 1:
            assert str(run.ended).startswith("Step 2: the loss is nan")
            assert run.position is None
    assert {n for n in range(8) if course.runs[n].recipe.training.lr == 1e-2} >= {*course.rungs[1]}
    assert course.runs[course.winner].recipe.training.lr == 1e-2
    course = made(given={"lr": [1e299, 1e300], "b_ratio": [1, 2, 3, 4]})
    with pytest.raises(RuntimeError, match="No trial came to the end of rung 1: Step 2: the loss"):
        course.search(None)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_search_stopped_anywhere_goes_on_to_the_same_end(
    made, script, monkeypatch, tmp_path, seconds
):
    """Whether what was trained of a wave is kept or not."""
    monkeypatch.setitem(script("tuner.waves").TICKS, "cpu", 2)
    monkeypatch.setattr(script("tuner.checkpoint"), "SAVE_EVERY", seconds)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes most of the time
    wanted = made(tmp_path / "wanted", sampler="tpe")
    wanted.search(data(4))
    calls, under_way = [0], list[bool]()
    for stop in (1, 3, 2, 5, 4, 1, 2, 3):
        course = made(tmp_path / "cut", sampler="tpe")
        calls[0] = 0

        def progress(steps, stop=stop):
            calls[0] += steps > 0
            if steps and calls[0] == stop:
                raise KeyboardInterrupt

        course.progress = progress
        with pytest.raises(KeyboardInterrupt):
            course.search(data(4))
        under_way.append(any(map(unfinished, (tmp_path / "cut" / "waves").glob("*.safetensors"))))
    assert any(under_way) == (seconds == 0)
    course = made(tmp_path / "cut", sampler="tpe")
    course.search(data(4))
    assert facts(course) == facts(wanted)
    for file in (tmp_path / "wanted" / "waves").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / "waves" / file.name).read_bytes()


def unfinished(file: Path) -> bool:
    """Whether what is kept of a wave is not its end."""
    with safe_open(file, "pt") as opened:
        runs = json.loads(opened.metadata()["runs"])
    return not all(run["ended"] or run["losses"] for run in runs)


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


# The script.


def examples(answer: str = "") -> list[dict]:
    return [{"question": f"{i} and {i % 3}", "answer": answer or f"{i % 3}"} for i in range(24)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, small_base) -> list[str]:
    """The arguments of a search in seconds."""
    place = tmp_path_factory.mktemp("tiny")
    write_rows(place / "data.jsonl", examples())
    options = {
        "data": str(place / "data.jsonl"),
        "model_name": small_base,
        "device": "cpu",
        "base_dropout": 0.0,
        "validation": "0.25",
        "test": "0.2",
        "steps": 8,
        "lr": 1e-3,
        "train_batch_size": 2,
        "lora": {"r": 2, "alpha": 4, "dropout": 0.1, "targets": ["c_attn"]},
        "space": {
            "lr": {"low": 1e-3, "high": 1e-1},
            "r": [1, 2],
            "b_ratio": [1, 4],
            "targets": [["c_attn"], ["mlp.c_proj", "c_attn"]],
        },
        "trials": 4,
        "slots": 3,
        "rungs": 2,
        "keep": 2,
        "finalists": 2,
        "seeds": 2,
    }
    (place / "search.yaml").write_text(yaml.safe_dump(options))
    return ["--config", str(place / "search.yaml")]


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory) -> Path:
    """The folder of a search that came to its end; beside it lies what it printed."""
    place = tmp_path_factory.mktemp("found") / "run"
    search = importlib.import_module("scripts.search").main
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert search([*tiny, "--res_path", str(place)]) == 0
    (place.parent / "printed.txt").write_text(printed.getvalue())
    return place


def test_what_a_search_leaves_behind(found, script):
    board, run = rows(found / "leaderboard.jsonl"), record_of(found)
    assert [row["place"] for row in board] == [1, 2, 3, 4]
    assert sorted(row["trial"] for row in board) == [0, 1, 2, 3]
    assert [row["state"] for row in board] == ["winner", "finalist", "retired", "retired"]
    assert [row["rung"] for row in board] == [2, 2, 1, 1]
    assert run["winner"]["trial"] == board[0]["trial"]
    assert {*board[0]["seeds"]} == {"42", "43"} == {*run["winner"]["test"]["seeds"]}
    for row in board:
        assert row["steps"] == (8 if row["rung"] == 2 else 4)
        assert [*row["losses"]] == [str(rung + 1) for rung in range(row["rung"])]
    assert run["default"]["params"]["r"] == 2
    assert run["rungs"][0]["alive"] == 4
    assert run["adapter_steps"] == 4 * (4 + 1) + 2 * 4 + 2 * 8 + 2 * 8
    assert run["winner_on_test"] in ("better", "worse", "alike")
    assert (found / "search.png").stat().st_size > 10_000
    report = (found / "report.html").read_text()
    assert all(f"<td>{row['state']}</td>" in report for row in board)
    assert "What the winner changed" in report
    assert not (found / "waves").exists()
    optuna = script("tuner.sampler").optuna()
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{found / 'study.db'}")
    assert [t.state.name for t in study.trials].count("COMPLETE") == 2
    assert study.best_value == min(row["losses"]["2"] for row in board[:2])
    record = script("page.read").read(found)
    record.run["default"]["params"]["r"] = None  # as epochs, where it counts steps: not drawn
    charts = [chart for chart in script("page.searched").over_each(record) if chart.title == "r"]
    assert [series.color for series in charts[0].series].count("2") == 0


def test_train_qa_alone_gives_the_winner_again(found, tmp_path, script):
    config = str(found / "best" / "train.yaml")
    alone = ["--config", config, "--device", "cpu", "--res_path", str(tmp_path / "r")]
    assert script("train_qa").main(alone) == 0
    name = "adapter_model.safetensors"
    wanted = load_file(found / "best" / name)
    made = load_file(tmp_path / "r" / "last" / name)
    assert wanted.keys() == made.keys()
    for key, factor in wanted.items():
        assert (made[key] - factor).norm() <= 1e-3 * factor.norm(), key
    winner, again = record_of(found)["winner"], record_of(tmp_path / "r")
    selection, test = (winner[name]["seeds"]["42"] for name in ("selection", "test"))
    assert again["validation"]["losses"]["8"] == pytest.approx(selection, rel=1e-4)
    assert again["validation"]["best_step"] == 8
    assert again["test"]["loss"] == pytest.approx(test, rel=1e-4)


def test_a_search_that_is_killed_goes_on_to_the_same_bytes(found, tiny, tmp_path, script, capsys):
    place, name = tmp_path / "run", "rung-1-wave-2.safetensors"
    started = command("search.py", *tiny, "--res_path", str(place))
    child = subprocess.Popen(started, stdout=subprocess.DEVNULL, env=environment())
    while not (place / "waves" / "rung-1-wave-1.safetensors").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (place / "waves" / name).exists(), "in the middle of a rung"
    assert not (place / "run.json").exists()
    resume = ["--resume", str(place)]
    other = write_rows(tmp_path / "other.jsonl", examples("another"))
    for option, value, was in (
        ("space", '{"r": [1, 3, 4, 5]}', "space was {"),
        ("seed", "7", "seed was 42, is 7"),
        ("trials", "5", "trials was 4, is 5"),
        ("base_dropout", "0.1", "base_dropout was 0.0, is 0.1"),
        ("data", str(other), "splits was ["),
    ):
        assert script("search").main([*resume, f"--{option}", value]) == 2
        said = capsys.readouterr().err
        assert "cannot be resumed" in said
        assert was in said
    assert script("search").main(resume) == 0
    clocked = ("study.db", "report.html")  # which shows the clock of run.json
    for file in (f for f in found.rglob("*") if f.is_file() and f.name not in clocked):
        again = place / file.relative_to(found)
        if file.name == "run.json":
            one, other = record_of(found), record_of(place)
            for record in (one, other):
                del record["seconds"], record["config"]["res_path"], record["config"]["resume"]
                del record["commands"]  # which name the folder
            assert one == other
        else:
            assert file.read_bytes() == again.read_bytes(), file
    assert script("search").main(resume) == 2
    assert "or the run has ended" in capsys.readouterr().err


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "fault", "code"),
    [
        ("waves:Waves.train", stopped, 130),
        ("sampler:write_study", stopped, 130),
        ("checkpoint:write_tensors", full, 2),
    ],
    ids=["in training", "while it writes", "a full disk"],
)
def test_what_ends_a_search_says_how_to_go_on(
    place, fault, code, tiny, tmp_path, script, capsys, monkeypatch
):
    room, _, name = place.partition(":")
    monkeypatch.setattr(f"scripts.tuner.{room}.{name}", fault)
    run = tmp_path / "run"
    assert script("search").main([*tiny, "--res_path", str(run)]) == code
    said = "Interrupted."
    if fault is full:
        said = f"{run / 'waves' / 'rung-1-wave-1.safetensors'} cannot be written: "
        said += "[Errno 28] No space left on device."
    assert capsys.readouterr().err == f"{said} Go on with --resume {run}.\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--space", "{}"], "The space is empty"),
        (["--space", '{"r": [2]}'], "nothing in it varies"),
        (["--space", '{"r": [2, 3]}'], "it has 2 different trials, and 4 are asked for"),
        (["--trials", "99999999999"], "trials must be at most 100,000, got 99,999,999,999"),
        (["--rungs", "5"], "5 rungs, each 2 times as long"),
        (["--warmup_steps", "4"], "the first ends after 4 steps and the warm-up takes 4"),
        (["--finalists", "3"], "there are 3 finalists, and 2 in the last rung"),
        (["--sampler", "tpe", "--slots", "4"], "tpe learns from wave to wave"),
        (["--validation", "null"], "A search needs validation data"),
        (["--validation", "0.9", "--test", "0.2"], "of the data: lower them"),
        (["--seeds", "1"], "1 does not conform to restriction v>=2"),
        (["--test", ""], "test is empty: leave it out"),
        (["--lora.targets", "nothing"], "No module matches target 'nothing'"),
        (["--space", '{"r": [2, 400], "lr": [0.1, 0.2]}'], "400 is above"),
        (["--resume", "nowhere"], "nowhere has nothing to resume"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, script, capsys, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    arguments = tiny if more[0] != "--resume" else []
    assert script("search").main([*arguments, *more]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "runs").exists(), "nothing is begun"


def test_a_folder_of_its_own_or_one_without_another_searchs_options(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = script("runs.folder")
    places = [folder.prepare(None, "search", ["best"]), folder.prepare(None, "qa", ["best"])]
    assert [str(place) for place in places] == ["runs/search-1", "runs/qa-1"]
    place = tmp_path / "here"
    for name in ("best", "waves"):
        (place / name).mkdir(parents=True)
    (place / "best" / "train.yaml").write_text("of: another search")
    folder.prepare(str(place), "search", ["best"])
    assert [*place.rglob("*")] == [place / "best"]


@pytest.mark.parametrize(
    ("script_name", "text"), [("train_qa", "space:\n  r: [1, 2]\n"), ("search", "tasks: [a]\n")]
)
def test_a_run_of_the_other_script_is_one_line(script_name, text, script, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    for named in (["--resume", str(tmp_path)], ["--resume", "--res_path", str(tmp_path)]):
        assert script(script_name).main(named) == 2
        assert capsys.readouterr().err.startswith(f"{file}: There is no option {text[:5]}")
    assert [file.name for file in tmp_path.iterdir()] == ["options.yaml"]


def test_all_faults_of_a_space_are_told_at_once(script, made):
    given = {
        "lr": {"low": 2, "high": 1}, "width": 3, "dropout": [1.0], "r": [], "steps": 3,
        "epochs": 2, "weight_decay": {"low": 1}, "b_ratio": [1, 1],
        "alpha_over_r": [0],
    }  # fmt: skip
    with pytest.raises(ValueError, match="The space is contradictory") as error:
        script("tuner.trials").read_space(given, 3, made().plan.usual)
    for said in (
        "width is none of lr", "lr needs 0 < low < high", "dropout must be", "r has no choice",
        "steps and epochs exclude", "weight_decay must have low and high",
        "b_ratio has a choice twice", "alpha",
    ):  # fmt: skip
        assert said in str(error.value)
    for again in (["c_fc", "c_attn"], ["c_attn", "c_fc", "c_attn"]):
        given = {"targets": [["c_attn", "c_fc"], again]}
        with pytest.raises(ValueError, match="targets has a choice twice"):
            script("tuner.trials").read_space(given, 2, made().plan.usual)


def test_optuna_missing_names_the_extra(tiny, script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert script("search").main(tiny) == 2
    assert capsys.readouterr().err == "optuna is missing: pip install 'lora-gpt2[search]'.\n"


def test_slots_that_do_not_fit_in_memory_are_refused_with_what_fits(
    tiny, tmp_path, script, capsys, monkeypatch
):
    monkeypatch.setattr(script("tuner.waves"), "available", lambda device: 4e-4)
    place = tmp_path / "run"
    assert script("search").main([*tiny, "--res_path", str(place)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("3 slots take about 0.0")
    assert said.count("\n") == 1
    fit = int(said.partition("--slots ")[2].rstrip(".\n"))
    assert fit < 3
    assert not place.exists()
    monkeypatch.setattr(script("tuner.waves").Waves, "train", stopped)  # which is reached
    assert script("search").main([*tiny, "--slots", str(fit), "--res_path", str(place)]) == 130


def test_two_processes_find_what_one_finds(found, tiny, tmp_path):
    """Each trains trials of its own; to rounding, since a product of fewer rows is another."""
    place = tmp_path / "run"
    (code, out, _), *others = two_processes("search.py", *tiny, "--res_path", str(place))
    assert (code, out.count("Saved in")) == (0, 1)
    assert others == [(0, "", "")]
    boards = (rows(folder / "leaderboard.jsonl") for folder in (place, found))
    for row, wanted in zip(*boards, strict=True):
        assert row["losses"] == pytest.approx(wanted["losses"], rel=1e-3)
        assert row.get("seeds", {}) == pytest.approx(wanted.get("seeds", {}), rel=1e-3)
        assert (row["trial"], row["params"]) == (wanted["trial"], wanted["params"])
    one, other = record_of(place), record_of(found)
    for name in ("finalists", "indistinguishable", "winner_on_test", "adapter_steps"):
        assert one[name] == other[name], name
    for name in ("winner", "default"):
        tested = other[name]["test"]["seeds"]
        assert one[name]["test"]["seeds"] == pytest.approx(tested, rel=1e-3)


def test_what_varies_takes_the_place_of_the_usual_and_nothing_else_does(made):
    plan = made().plan
    # Shares and no steps, since a trial's schedule may be longer than another's.
    assert "8/4/2 trials train to 25/50/100 % of their schedules, 3 at a time;" in plan.message()
    usual = plan.usual
    assert usual.varied({"lr": 0.5}) == replace(usual, training=replace(usual.training, lr=0.5))
    assert usual.varied({"r": 8}).adapter == replace(usual.adapter, r=8, alpha=16)
    assert usual.varied({"alpha_over_r": 3}).adapter == replace(usual.adapter, alpha=6)
    of_epochs = usual.varied({"epochs": 2}).training
    assert (of_epochs.epochs, of_epochs.steps) == (2, None)
    targets = usual.varied({"targets": '["c_attn", "c_fc"]'})
    assert targets.adapter.targets == ("c_attn", "c_fc")
    assert targets.values(("targets", "b_ratio")) == {"targets": ["c_attn", "c_fc"], "b_ratio": 1}
    seeded = usual.seeded(9)
    assert seeded.adapter.seed == seeded.training.seed == 9


def test_what_a_search_prints_and_reports_is_of_use(found):
    """No loss before there is one; who won among whom; the commands that use it."""
    out = (found.parent / "printed.txt").read_text()
    run = record_of(found)
    claim = run["verdict"]
    assert "The test is Student's paired t-test over the seeds" in claim
    assert " ".join(claim.split()) in " ".join(out.split())
    assert claim.replace("'", "&#39;") in (found / "report.html").read_text()
    assert "rung 1 · 4 trials" in out
    assert "\nfinals · 2 trials · best " in out  # the longest part
    assert "nan" not in out
    assert out.endswith(f"To use it:\n{run['commands']['use']}\n")


def test_the_cost_of_judging_grows_with_the_waves_and_not_with_their_square(
    made, script, monkeypatch
):
    halving = script("tuner.halving").Halving
    calls, real = [0], halving.survivors

    def counted(plan, losses, rung):
        calls[0] += len(losses)
        return real(plan, losses, rung)

    monkeypatch.setattr(halving, "survivors", counted)
    course = made(given={"lr": {"low": 1e-3, "high": 1e-1}}, trials=48, slots=16, rungs=2, keep=4)
    course.search(None)
    assert calls[0] < 48 * 8  # once a wave and a few times a rung, not once a trial


def test_a_search_stopped_before_its_first_file_can_begin_again(
    tiny, tmp_path, script, monkeypatch
):
    arguments = [*tiny, "--res_path", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(script("tuner.checkpoint").Checkpoint, "begin", stopped)
        assert script("search").main(arguments) == 130
    assert script("search").main([*arguments, "--trials", "2", "--finalists", "1"]) == 0


def test_a_gpu_without_memory_gets_fewer_slots_and_the_same_result(made, monkeypatch):
    """An error as torch raises it, where more than two slots are trained."""
    wanted, course, lines = made(slots=8), made(slots=8), []
    wanted.search(data(4))
    real = PopulationTraining.advance

    def advance(self, ticks):
        if len(self.trainings) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, ticks)

    monkeypatch.setattr(PopulationTraining, "advance", advance)
    course.waves.tell = lines.append
    course.search(data(4))
    assert lines == [
        "Memory ran out with 8 slots: 4 are trained at a time.",
        "Memory ran out with 4 slots: 2 are trained at a time.",
    ]
    assert_alike(course, wanted)


def test_all_processes_of_a_machine_share_its_memory(made, monkeypatch, script):
    course, each = made(), 1 << 20
    monkeypatch.setattr(course.waves, "_measured", lambda: each)
    monkeypatch.setattr(script("tuner.waves"), "available", lambda device: 6.9 * each / 0.9 / 2**30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # twice three slots
    course.waves.check_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 slots of each of 3 processes .* about 2 fit"):
        course.waves.check_memory()
