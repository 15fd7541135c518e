"""The report: its numbers are the record's, its text is text, it asks for nothing."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import lora
from tests.script_runs import QUICK


class Page(HTMLParser):
    """What a browser makes of a page: the tags, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


@pytest.fixture
def run(demo_run):
    return demo_run


def drawn(page: str, title: str, number: int = 0) -> list[list[tuple[int, int]]]:
    """The points of each path of a chart of this title, in thousandths of its frame."""
    figures = re.findall(r'<figure class="chart">\s*(<figcaption><b>.*?)</figure>', page, re.S)
    figure = [f for f in figures if f.startswith(f"<figcaption><b>{title}</b>")][number]
    paths = re.findall(r'<path d="([^"]*)" class="c-', figure)
    return [[(int(x), int(y)) for x, y in re.findall(r"(\d+) (\d+)", path)] for path in paths]


def placed(chart, points) -> list[tuple[int, int]]:
    """Where points belong in the frame of a chart, whose axes hold all of them."""
    x, y = chart.axes()
    assert (y.at(y.low), y.at(y.high), x.at(x.low), x.at(x.high)) == (0, 1, 0, 1)
    shares = [(x.at(a), y.at(b)) for a, b in points]
    assert all(0 <= share <= 1 for pair in shares for share in pair)
    return [(round(1000 * a), 1000 - round(1000 * b)) for a, b in shares]


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_run_ends_with_its_report(run):
    folder, said = run
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "report.html" in said
    assert len(page) < 150_000
    shown = Page(page).text
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for answer in record["answers"]:
        assert answer["tuned"].strip().split()[0] in shown
        assert answer["prompt"].strip() in shown
    assert record["commands"]["use"] in shown
    assert "19,446,528" in shown


def test_the_numbers_are_the_records(run, script):
    steps, record = rows(run[0] / "metrics.jsonl"), script("page.read").read(run[0])
    page, room = (run[0] / "report.html").read_text(encoding="utf-8"), script("page.page")
    titles = {"lr": "Learning rate", "grad_norm": "Gradient norm before clipping", "loss": "Loss"}
    for key, title in titles.items():
        chart = room.loss(record) if key == "loss" else room.over_steps(record, key, title)
        assert drawn(page, title)[0] == placed(chart, [(s["step"], s[key]) for s in steps])


def test_the_same_record_gives_the_same_bytes(run, script, tmp_path, capsys):
    before = (run[0] / "report.html").read_bytes()
    assert script("report").main([str(run[0]), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == before


def test_a_run_that_was_killed_is_reported(run, script, tmp_path):
    place = tmp_path / "killed"
    place.mkdir()
    shutil.copy(run[0] / "options.yaml", place)
    lines = (run[0] / "metrics.jsonl").read_text().splitlines()[:50]
    (place / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 51, "lo')
    assert script("report").main([str(place)]) == 0
    page = (place / "report.html").read_text()
    assert "stopped after 50 steps" in page
    assert len(drawn(page, "Loss")[0]) == 50


def test_text_is_text(run, script, tmp_path):
    evil = "</script><img src=x onerror=alert(1)> & <b>"
    place = tmp_path / "evil"
    shutil.copytree(run[0], place)
    record = json.loads((place / "run.json").read_text(encoding="utf-8"))
    for answer in record["answers"]:
        answer |= {"prompt": evil, "base": evil, "tuned": f"{evil} tuned", "trained": [evil]}
    record["config"]["data"] = record["commands"]["use"] = evil
    (place / "run.json").write_text(json.dumps(record))
    assert script("report").main([str(place)]) == 0
    page = Page((place / "report.html").read_text(encoding="utf-8"))
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [given for _, given in page.tags if any(name.startswith("on") for name in given)]
    assert page.text.count(evil) >= 3 * len(record["answers"])


def test_several_tasks_and_a_search_that_were_killed_are_reported(script, tmp_path, run):
    tasks, search = tmp_path / "tasks", tmp_path / "search"
    for name in ("sea", "land"):
        (tasks / name).mkdir(parents=True)
        shutil.copy(run[0] / "metrics.jsonl", tasks / name)
    (tasks / "options.yaml").write_text("tasks: [sea.jsonl, land.jsonl, air.jsonl]\nseed: 7\n")
    search.mkdir()
    (search / "options.yaml").write_text("space: {lr: [1, 2]}\ndata: mine.jsonl\n")
    for place, said in ((tasks, "Training: land"), (search, "mine.jsonl")):
        assert script("report").main([str(place)]) == 0
        shown = Page((place / "report.html").read_text()).text
        assert "was stopped" in shown
        assert said in shown


def test_a_search_that_was_killed_while_it_wrote_its_end_is_reported(found, script, tmp_path):
    place = tmp_path / "late"
    shutil.copytree(found, place)
    (place / "run.json").unlink()  # it is written last
    (place / "options.yaml").write_text("space: {lr: [1, 2]}\n")
    assert script("report").main([str(place)]) == 0
    assert "was stopped" in Page((place / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("run.json", text) for text in ("\0", "3")),
        *(("options.yaml", text) for text in ("- 1", "a: [")),
        *((f"{name}.jsonl", "{\n{}\n") for name in ("metrics", "leaderboard")),
    ],
)
def test_a_damaged_file_of_a_run_is_named(name, text, script, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("seed: 1\n")
    (tmp_path / name).write_text(text)
    assert script("report").main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(str(tmp_path / name))
    assert not (tmp_path / "report.html").exists()


def test_a_folder_is_no_report(run, script, tmp_path, capsys):
    assert script("report").main([str(run[0]), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path} is no report: choose another")


def test_no_spike_is_lost(script):
    charts = script("page.charts")
    points = [(i, 1.0) for i in range(100_000)]
    points[777], points[70_001], points[5] = (777, 9.0), (70_001, -3.0), (5, float("nan"))
    kept = charts.thinned(points)
    assert len(kept) <= 3 * charts.BUCKETS
    assert {points[777], points[70_001], points[0], points[-1]} <= set(kept)
    assert any(y != y for _, y in kept)


def test_choices_of_several_targets_stay_apart(script):
    shown = script("page.page").shown
    assert shown([["c_attn"], ["c_attn", "c_fc"]]) == "[c_attn], [c_attn, c_fc]"
    assert shown(["c_attn", "c_fc"]) == "c_attn, c_fc"


def test_losses_that_are_not_finite_are_shown(run, script, tmp_path):
    place = tmp_path / "blown"
    shutil.copytree(run[0], place)
    steps = rows(place / "metrics.jsonl")
    for step in steps[30:]:
        step["loss"] = step["grad_norm"] = float("nan")
    (place / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert script("report").main([str(place)]) == 0
    page = (place / "report.html").read_text()
    assert len(drawn(page, "Loss")[0]) == 30
    assert "not finite" in Page(page).text


# In a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --enable-logging=stderr "
    "--hide-scrollbars --window-size=1400,1000 --virtual-time-budget=4000 --dump-dom"
).split()
PROBE = """<script>
const errors = [];
addEventListener("error", (e) => errors.push(e.message));
addEventListener("load", () => {
  const frames = [...document.querySelectorAll(".wide")];
  const out = [...document.querySelectorAll("main *")]
    .filter((e) => !frames.some((f) => f !== e && f.contains(e)) && e.getClientRects().length)
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
    .map((e) => `${e.tagName} ${e.className}`);
  const cut = frames.filter((f) => f.scrollWidth > f.clientWidth + 1).map((f) => f.textContent);
  const folded = [...document.querySelectorAll("details")]
    .filter((d) => !d.lastElementChild.checkVisibility({ contentVisibilityAuto: true }))
    .map((d) => d.firstElementChild.textContent);
  parent.postMessage(JSON.stringify({
    width: innerWidth, out, cut, folded, scroll: document.documentElement.scrollWidth, errors,
    paper: getComputedStyle(document.body).backgroundColor,
    asked: performance.getEntriesByType("resource").map((e) => e.name),
  }), "*");
});
</script>"""
FRAME = """<body style="margin:0">
<iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>
addEventListener("message", (e) => (document.body.dataset.seen = e.data));
</script>"""


def look(file: Path, tmp_path: Path, width: int, media: str = "") -> tuple[dict, str]:
    """What a browser finds in a page so wide, and what it says on its console.

    The page is in a frame, since no window is as narrow as a phone; it is shown as `media`.
    """
    text = file.read_text(encoding="utf-8")
    if media:
        assert f"@media {media}" in text
        text = text.replace(f"@media {media}", "@media all")
    inner = text.replace("<main>", f"{PROBE}<main>", 1)
    mark = b64encode(sha256(PROBE[8:-9].encode()).digest()).decode()
    inner = inner.replace(
        "default-src 'none'", f"default-src 'none'; script-src 'sha256-{mark}'", 1
    )
    (tmp_path / "inner.html").write_text(inner, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    own = [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()]
    command = [CHROMIUM, *FLAGS, *own]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (seen,) = (given["data-seen"] for tag, given in Page(done.stdout).tags if tag == "body")
    return json.loads(seen), "\n".join(s for s in done.stderr.splitlines() if "CONSOLE" in s)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_all_of_it(run, tmp_path, width, dark):
    media = "(prefers-color-scheme: dark)" if dark else ""
    seen, said = look(run[0] / "report.html", tmp_path, width, media)
    assert said == ""
    assert seen["errors"] == seen["out"] == seen["asked"] == []
    assert seen["scroll"] == seen["width"] == width
    assert (seen["paper"] == "rgb(21, 22, 23)") == dark


# A search.


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """What a search leaves, of 512 trials of 2,500 steps in the last rung, as its record has it."""
    place = tmp_path_factory.mktemp("searched") / "many"
    place.mkdir()
    draw = random.Random(1)
    totals, alive = (39, 156, 625, 2500), (512, 128, 32, 8)
    targets = [["c_attn"], ["c_attn", "c_fc"]]
    params = [
        {"lr": 10 ** draw.uniform(-4, -1), "r": draw.choice([2, 4, 8, 16]),
         "dropout": draw.choice([0.0, 0.1]), "targets": draw.choice(targets)}
        for _ in range(512)
    ]  # fmt: skip
    board = []
    for trial in range(512):
        rung = sum(trial < n for n in alive)
        losses = {str(n): 5 / n + draw.random() for n in range(1, rung + 1)}
        state = "winner" if trial == 0 else "finalist" if trial < 4 else "retired"
        board.append({"place": trial + 1, "trial": trial, "state": state, "params": params[trial],
                      "rung": rung, "steps": totals[rung - 1], "losses": losses,
                      "ended": None})  # fmt: skip
        if trial < 4:
            board[-1] |= {"seeds": {str(n): draw.random() for n in (1, 2, 3)}, "mean": 0.5}
    board[-1] |= {"losses": {}, "rung": 0, "ended": "</script><b>NaN"}
    told = {"seeds": {"1": 0.5, "2": None}, "mean": None}
    both = {"params": params[0], "selection": told, "test": {**told, "mean": 0.5}}
    rungs = [{"rung": i + 1, "share": 0.1, "alive": n, "steps": 9} for i, n in enumerate(alive)]
    record = {
        "kind": "search", "config": {"space": {"lr": [1, 2]}, "data": "d.jsonl"},
        "rungs": rungs, "winner": {"trial": 0, **both}, "default": both, "not_told_apart": [2],
        "winner_on_test": "alike", "adapter_steps": 65_000,
        "verdict": "it cannot be told apart from 2 over 2 seeds.",
    }  # fmt: skip
    (place / "run.json").write_text(json.dumps(record))
    lines = "".join(json.dumps(row) + "\n" for row in board)
    (place / "leaderboard.jsonl").write_text(lines)
    return place


def test_a_search_of_512_trials(found, script, tmp_path):
    assert script("report").main([str(found)]) == 0
    page = (found / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 1_000_000
    board, record = rows(found / "leaderboard.jsonl"), script("page.read").read(found)
    over = next(c for c in script("page.searched").over_each(record) if c.title == "lr")
    points = [(r["params"]["lr"], r["losses"][str(r["rung"])]) for r in board[:-1]]
    assert {p for path in drawn(page, "lr") for p in path} >= {*placed(over, points)}
    tree = script("page.searched").by_rung(record)
    points = [(int(rung), loss) for row in board for rung, loss in row["losses"].items()]
    dots = [point for path in drawn(page, "Loss by rung")[1::2] for point in path]
    assert sorted(dots) == sorted(placed(tree, points))
    shown = Page(page).text
    assert "ended: </script><b>NaN" in shown
    assert "it cannot be told apart from 2 over 2 seeds." in shown


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_a_search(found, script, tmp_path):
    assert script("report").main([str(found)]) == 0
    seen, said = look(found / "report.html", tmp_path, 390)
    assert said == ""
    assert seen["errors"] == seen["out"] == seen["asked"] == []
    assert seen["scroll"] == 390


PAPER = 718  # pixels of CSS between the margins of a sheet of A4, with Chromium's 1 cm


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("wide", [True, False])
def test_paper_cuts_no_column_and_hides_no_row(found, script, tmp_path, wide):
    place = tmp_path / "printed"
    shutil.copytree(found, place)
    board = rows(place / "leaderboard.jsonl")
    for row in board if wide else ():  # all that a search may vary
        four = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        more = {"b_ratio": 16, "alpha_over_r": 4.0, "weight_decay": 0.1, "epochs": 100}
        row["params"] |= {**more, "targets": four}
    (place / "leaderboard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in board))
    assert script("report").main([str(place)]) == 0
    seen, _ = look(place / "report.html", tmp_path, PAPER, "print")
    assert seen["cut"] == seen["out"] == []
    assert seen["folded"] == []


# Several.


def test_several_runs_are_compared(run, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run[0], tmp_path / "other")
    record = json.loads((tmp_path / "other" / "run.json").read_text(encoding="utf-8"))
    record["config"]["lr"] = 0.123
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    assert script("report").main([str(run[0]), "other"]) == 0
    page = Path("comparison.html").read_text(encoding="utf-8")
    assert "0.123" in Page(page).text
    assert re.findall(r'class="key line c-\d">(\w+)<', page) == ["demo", "other"]
    assert len(drawn(page, "Loss")) == 2
    Path("comparison.html").write_text("mine")
    assert script("report").main([str(run[0]), "other"]) == 2
    assert "is no report" in capsys.readouterr().err
    assert Path("comparison.html").read_text() == "mine"
    assert script("report").main(["nowhere"]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err


def test_tasks_show_every_adapter_and_the_mixture(script, tmp_path):
    for name in ("sea", "land"):
        lines = [{"prompt": f"{name} {i}:", "completion": f" {i} {name}"} for i in range(12)]
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("sea", "land")]
    place = tmp_path / "out"
    options = ["--steps", "4", "--validation", "0.4", "--eval_every", "2", "--res_path", str(place)]
    assert script("train_qa").main([*QUICK, *options, "--tasks", *files]) == 0
    page = (place / "report.html").read_text(encoding="utf-8")
    shown, record = Page(page).text, json.loads((place / "run.json").read_text())
    for answer in record["answers"]:
        assert {"base", "sea", "land", "mixture", "references"} <= answer.keys()
        assert all(answer[name].strip() in shown for name in ("base", "sea", "land", "mixture"))
    for number, name in enumerate(("sea", "land")):
        own = json.loads((place / name / "run.json").read_text())
        chart = script("page.page").loss(script("page.read").read(place / name))
        points = [(int(step), loss) for step, loss in own["validation"]["losses"].items()]
        assert drawn(page, "Loss", number)[-1] == placed(chart, points)
        assert f"best: step {own['validation']['best_step']}" in shown
        assert own["passage"]["held_out"]


# What is recorded for it.


def test_norms_and_log_probabilities_are_those_of_the_model(run, demo, tokenizer):
    record = json.loads((run[0] / "run.json").read_text(encoding="utf-8"))
    model = copy.deepcopy(demo)
    ids = torch.tensor([tokenizer.encode("".join(record["passage"]["tokens"]).split("<|")[0])])
    ids = torch.cat([ids, torch.tensor([[50256]])], 1)
    for name in ("base", "adapter"):
        if name == "adapter":
            lora.load(model, run[0] / "adapter")
        with torch.no_grad():
            found = model(ids).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert found.tolist() == pytest.approx(record["passage"][name], abs=2e-4)
    for row in record["updates"]:
        layer = model.get_submodule(row["layer"])
        delta = next(iter(layer.updates.values())).delta().detach()
        assert row["update"] == pytest.approx(float(delta.norm()), rel=1e-4)
        assert row["weight"] == pytest.approx(float(layer.weight_out_in.norm()), rel=1e-4)
