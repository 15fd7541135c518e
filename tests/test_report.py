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
from tests.script_runs import record_of, rows, write_rows


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
def run(demo_run) -> Path:
    return demo_run[0]


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


def shown(folder: Path) -> str:
    """The text of a run's report."""
    return Page((folder / "report.html").read_text(encoding="utf-8")).text


def test_every_run_ends_with_its_report(demo_run):
    folder, said = demo_run
    assert "report.html" in said
    assert (folder / "report.html").stat().st_size < 150_000
    text, record = shown(folder), record_of(folder)
    for answer in record["answers"]:
        assert answer["tuned"].strip().split()[0] in text
        assert answer["prompt"].strip() in text
    assert record["commands"]["use"] in text
    assert "19,446,528" in text


def test_the_numbers_are_the_records(run, script):
    steps, record = rows(run / "metrics.jsonl"), script("page.read").read(run)
    page, room = (run / "report.html").read_text(encoding="utf-8"), script("page.page")
    titles = {"lr": "Learning rate", "grad_norm": "Gradient norm before clipping", "loss": "Loss"}
    for key, title in titles.items():
        chart = room.loss(record) if key == "loss" else room.over_steps(record, key, title)
        assert drawn(page, title)[0] == placed(chart, [(s["step"], s[key]) for s in steps])
    (share,) = {f"{100 * u['update'] / u['weight']:.3g} %" for u in record.run["updates"][:1]}
    assert share in Page(page).text


def test_the_same_record_gives_the_same_bytes(run, script, tmp_path):
    before = (run / "report.html").read_bytes()
    assert script("report").main([str(run), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == before


def test_a_run_that_was_killed_is_reported(run, script, tmp_path):
    place = tmp_path / "killed"
    place.mkdir()
    shutil.copy(run / "options.yaml", place)
    lines = (run / "metrics.jsonl").read_text().splitlines()[:50]
    (place / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 51, "lo')
    assert script("report").main([str(place)]) == 0
    assert "stopped after 50 steps" in shown(place)
    assert len(drawn((place / "report.html").read_text(), "Loss")[0]) == 50


def test_text_is_text(run, script, tmp_path):
    evil = "</script><img src=x onerror=alert(1)> & <b>"
    place = tmp_path / "evil"
    shutil.copytree(run, place)
    record = record_of(place)
    for answer in record["answers"]:
        answer |= {"prompt": evil, "base": evil, "tuned": f"{evil} tuned", "trained": [evil]}
    record["config"]["data"] = record["commands"]["use"] = evil
    (place / "run.json").write_text(json.dumps(record))
    assert script("report").main([str(place)]) == 0
    page = Page((place / "report.html").read_text(encoding="utf-8"))
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [given for _, given in page.tags if any(name.startswith("on") for name in given)]
    assert page.text.count(evil) >= 3 * len(record["answers"])


def test_several_tasks_and_searches_that_were_killed_are_reported(script, tmp_path, run, found):
    """A search in its trials, and one while it wrote its end, of which run.json is the last."""
    tasks, search, late = (tmp_path / name for name in ("tasks", "search", "late"))
    for name in ("sea", "land"):
        (tasks / name).mkdir(parents=True)
        shutil.copy(run / "metrics.jsonl", tasks / name)
    (tasks / "options.yaml").write_text("tasks: [sea.jsonl, land.jsonl, air.jsonl]\nseed: 7\n")
    search.mkdir()
    shutil.copytree(found, late)
    (late / "run.json").unlink()
    for place in (search, late):
        (place / "options.yaml").write_text("space: {lr: [1, 2]}\ndata: mine.jsonl\n")
    for place, said in ((tasks, "Training: land"), (search, "mine.jsonl"), (late, "mine.jsonl")):
        assert script("report").main([str(place)]) == 0
        assert "was stopped" in shown(place)
        assert said in shown(place)


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


def test_no_spike_is_lost_and_a_decade_is_half_of_two(script):
    charts = script("page.charts")
    for log, share in ((True, 0.5), (False, 9 / 99)):
        assert charts.Axis(1, 100, log).at(10) == pytest.approx(share)
    points = [(i, 1.0) for i in range(100_000)]
    points[777], points[70_001], points[5] = (777, 9.0), (70_001, -3.0), (5, float("nan"))
    kept = charts.thinned(points)
    assert len(kept) <= 3 * charts.BUCKETS
    assert {points[777], points[70_001], points[0], points[-1]} <= set(kept)
    assert any(y != y for _, y in kept)


def test_losses_that_are_not_finite_are_shown(run, script, tmp_path):
    place = tmp_path / "blown"
    shutil.copytree(run, place)
    steps = rows(place / "metrics.jsonl")
    for step in steps[30:]:
        step["loss"] = step["grad_norm"] = float("nan")
    write_rows(place / "metrics.jsonl", steps)
    assert script("report").main([str(place)]) == 0
    assert len(drawn((place / "report.html").read_text(), "Loss")[0]) == 30
    assert "not finite" in shown(place)


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
        "rungs": rungs, "winner": {"trial": 0, **both}, "default": both, "indistinguishable": [2],
        "winner_on_test": "alike", "adapter_steps": 65_000,
        "verdict": "it is not distinguishable from 2 over 2 seeds.",
    }  # fmt: skip
    (place / "run.json").write_text(json.dumps(record))
    write_rows(place / "leaderboard.jsonl", board)
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
    text = Page(page).text
    assert "ended: </script><b>NaN" in text
    assert "it is not distinguishable from 2 over 2 seeds." in text
    choices = "[c_attn], [c_attn, c_fc]"  # of several targets
    assert script("page.page").shown([["c_attn"], ["c_attn", "c_fc"]]) == choices


# Several.


def test_several_runs_are_compared(run, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "other")
    record = record_of(Path("other"))
    record["config"]["lr"] = 0.123
    Path("other", "run.json").write_text(json.dumps(record))
    assert script("report").main([str(run), "other"]) == 0
    page = Path("comparison.html").read_text(encoding="utf-8")
    assert "0.123" in Page(page).text
    assert re.findall(r'class="key line c-\d">(\w+)<', page) == ["demo", "other"]
    assert len(drawn(page, "Loss")) == 2
    Path("comparison.html").write_text("mine")
    capsys.readouterr()
    for more, odd in ([], "comparison.html"), (["--output", "other"], "other"):
        assert script("report").main([str(run), "other", *more]) == 2
        assert capsys.readouterr().err.startswith(f"{odd} is no report: choose another")
    assert Path("comparison.html").read_text() == "mine"


def test_tasks_show_every_adapter_and_the_mixture(script, quick, tmp_path):
    names = ("sea", "land")
    for name in names:
        lines = [{"prompt": f"{name} {i}:", "completion": f" {i} {name}"} for i in range(12)]
        write_rows(tmp_path / f"{name}.jsonl", lines)
    files, place = [str(tmp_path / f"{name}.jsonl") for name in names], tmp_path / "out"
    options = ["--steps", "4", "--validation", "0.4", "--eval_every", "2", "--res_path", str(place)]
    assert script("train_qa").main([*quick, *options, "--tasks", *files]) == 0
    page, text = (place / "report.html").read_text(encoding="utf-8"), shown(place)
    for answer in record_of(place)["answers"]:
        assert {"base", *names, "mixture", "references"} <= answer.keys()
        assert all(answer[name].strip() in text for name in ("base", *names, "mixture"))
    for number, name in enumerate(names):
        own = record_of(place / name)
        chart = script("page.page").loss(script("page.read").read(place / name))
        points = [(int(step), loss) for step, loss in own["validation"]["losses"].items()]
        assert drawn(page, "Loss", number)[-1] == placed(chart, points)
        assert f"best: step {own['validation']['best_step']}" in text
        assert own["passage"]["held_out"]


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
    page: location.pathname.split("/").pop().split(".")[0],
  }), "*");
});
</script>"""
LISTEN = """<body style="margin:0"><script>
addEventListener("message", (e) => (document.body.dataset[JSON.parse(e.data).page] = e.data));
</script>"""
FRAME = '<iframe src="{name}.html" style="width:{width}px;height:900px;border:0"></iframe>'
DARK, PRINT = "(prefers-color-scheme: dark)", "print"
PAPER = 718  # pixels of CSS between the margins of a sheet of A4, with Chromium's 1 cm


def look(pages: dict[str, tuple[Path, int, str]], tmp_path: Path) -> tuple[dict[str, dict], str]:
    """What a browser finds in each page of a width and a medium, and what its console says.

    The pages are in frames, since no window is as narrow as a phone.
    """
    mark = b64encode(sha256(PROBE[8:-9].encode()).digest()).decode()
    frames = LISTEN
    for name, (folder, width, media) in pages.items():
        text = (folder / "report.html").read_text(encoding="utf-8")
        if media:
            assert f"@media {media}" in text
            text = text.replace(f"@media {media}", "@media all")
        probed = f"default-src 'none'; script-src 'sha256-{mark}'"
        inner = text.replace("<main>", f"{PROBE}<main>", 1)
        inner = inner.replace("default-src 'none'", probed, 1)
        (tmp_path / f"{name}.html").write_text(inner, encoding="utf-8")
        frames += FRAME.format(name=name, width=width)
    (tmp_path / "frames.html").write_text(frames)
    own = [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run([CHROMIUM, *FLAGS, *own], capture_output=True, text=True, timeout=60)
    (body,) = (given for tag, given in Page(done.stdout).tags if tag == "body")
    seen = {name: json.loads(body[f"data-{name}"]) for name in pages}
    return seen, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_all_of_it_and_paper_cuts_no_column(run, found, script, tmp_path):
    varied = tmp_path / "varied"  # in all that a search may vary
    shutil.copytree(found, varied)
    board = rows(varied / "leaderboard.jsonl")
    for row in board:
        four = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        more = {"b_ratio": 16, "alpha_over_r": 4.0, "weight_decay": 0.1, "epochs": 100}
        row["params"] |= {**more, "targets": four}
    write_rows(varied / "leaderboard.jsonl", board)
    for folder in (found, varied):
        assert script("report").main([str(folder)]) == 0
    screens = {"desk": (run, 1280, ""), "phone": (run, 390, DARK), "search": (found, 390, "")}
    sheets = {"sheet": (found, PAPER, PRINT), "varied": (varied, PAPER, PRINT)}
    seen, said = look(screens | sheets, tmp_path)
    assert said == ""
    for name, (_, width, media) in screens.items():
        page = seen[name]
        assert page["errors"] == page["out"] == page["asked"] == []
        assert page["scroll"] == page["width"] == width
        assert (page["paper"] == "rgb(21, 22, 23)") == (media == DARK)
    for name in sheets:
        assert seen[name]["cut"] == seen[name]["out"] == seen[name]["folded"] == []


# What is recorded for it.


def test_norms_and_log_probabilities_are_those_of_the_model(run, demo, tokenizer):
    record, model = record_of(run), copy.deepcopy(demo)
    ids = torch.tensor([tokenizer.encode("".join(record["passage"]["tokens"]).split("<|")[0])])
    ids = torch.cat([ids, torch.tensor([[50256]])], 1)
    for name in ("base", "adapter"):
        if name == "adapter":
            lora.load(model, run / "adapter")
        with torch.no_grad():
            found = model(ids).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert found.tolist() == pytest.approx(record["passage"][name], abs=2e-4)
    for row in record["updates"]:
        layer = model.get_submodule(row["layer"])
        delta = next(iter(layer.updates.values())).delta().detach()
        assert row["update"] == pytest.approx(float(delta.norm()), rel=1e-4)
        assert row["weight"] == pytest.approx(float(layer.weight_out_in.norm()), rel=1e-4)
