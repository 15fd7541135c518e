"""report.html: what it shows, that it is safe and whole, and how a real browser shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

for package in ("jsonargparse", "docstring_parser", "yaml", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the scripts need the extra 'scripts'")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
EVIL = "</script><img src=x onerror=\"document.title='ran'\"><b>&amp;"
QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --hide-scrollbars"
).split()


def metrics(n: int, spike: int | None = None) -> list[dict]:
    return [
        {"step": i, "epoch": 1, "lr": 0.01 / i, "grad_norm": 1.0 + i % 3, "tokens": 20,
         "loss": 50.0 if i == spike else 1 + 1 / i, "seconds": i / 10}
        for i in range(1, n + 1)
    ]  # fmt: skip


def put_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A run whose texts are hostile."""
    place = tmp_path / "run"
    place.mkdir()
    put_lines(place / "metrics.jsonl", metrics(5000, spike=3211))
    answer = {"prompt": f"Q: {EVIL}", "base": EVIL, "tuned": f"yes {EVIL}", "stopped": True,
              "trained": ["no"], "references": [], "verdict": "differs"}  # fmt: skip
    run = {
        "config": {"model_name": EVIL, "lr": 0.01, "lora": {"r": 8, "alpha": 16.0}},
        "device": "cuda:0",
        "machine": "NVIDIA H100 80GB HBM3",
        "parameters": {"LoRA": {"trainable": 65536, "total": 19512064}},
        "validation": {"losses": {"0": 4.0, "2500": 1.25, "5000": 1.5}, "best_step": 2500},
        "answers": [answer],
        "observed": {
            "from": "Held-out text",
            "passages": [{"tokens": [["A", None, None], [EVIL, -5.25, -1.125], [" c", -1, -2]]}],
            "updates": [{"layer": "h.0", "update": 1.5, "weight": 30.0}],
        },
    }
    (place / "run.json").write_text(json.dumps(run))
    return place


@pytest.fixture
def searched(tmp_path):
    """A search of 512 trials of 2,500 steps, all of them to their end."""
    place = tmp_path / "search"
    place.mkdir()
    trials = [
        {"place": n + 1, "trial": n, "state": "winner" if not n else "retired", "rung": 1 + n % 3,
         "params": {"lr": 10 ** -(1 + n / 128), "r": 2 ** (n % 5), "targets": ["c_attn", "c_fc"]},
         "losses": {str(k): 1 + n / 100 + 1 / k for k in range(1, 2 + n % 3)}, "ended": None,
         "steps": 2500, "total": 2500, **({} if n else {"seeds": {"1": 0.5, "2": 0.75}})}
        for n in range(512)
    ]  # fmt: skip
    trials[5] |= {"losses": {}, "ended": "the loss is not finite"}
    curve = [2 + math.sin(i * 1.7) + (i * 7919 % 97) / 97 for i in range(2500)]
    put_lines(place / "leaderboard.jsonl", trials)
    rows = [
        {"trial": n, "training": [v + n % 7 for v in curve], "selection": {}} for n in range(512)
    ]
    rows[5]["training"][100:] = [None] * 2400
    put_lines(place / "curves.jsonl", rows)
    rungs = [{"rung": k + 1, "alive": 512 // 4**k, "share": 0.25 ** (2 - k)} for k in range(3)]
    run = {"kind": "search", "rungs": rungs, "winner": {"trial": 0}, "config": {}, "device": "cpu"}
    (place / "run.json").write_text(json.dumps(run))
    return place


@pytest.fixture
def made(script):
    """The page of folders."""
    records, reporting = script("record"), script("reporting")
    return lambda *places: reporting.html([records.read(place) for place in places])


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="record">(.*?)</script>', page, re.DOTALL)[1])


def test_every_run_ends_with_its_report(script, tmp_path, monkeypatch):
    place = tmp_path / "real"
    monkeypatch.chdir(tmp_path)
    argv = ["--device", "cpu", "--epochs", "null", "--steps", "4", "--res_path", str(place)]
    argv += ["--generate.max_new_tokens", "4"]
    assert script("train_qa").main(argv) in (0, None)
    page, run = (place / "report.html").read_text(), json.loads((place / "run.json").read_text())
    assert data_of(page)["run"] == run
    seen = run["observed"]
    assert {row["layer"].split(".")[-1] for row in seen["updates"]} == {"c_attn"}
    assert len(seen["updates"]) == 8
    assert all(0 < row["update"] < row["weight"] for row in seen["updates"])
    told = [row for row in seen["passages"][0]["tokens"] if row[1] is not None]
    assert told
    assert all(base <= 0 and tuned <= 0 for _, base, tuned in told)
    for heading in ("Answers", "Training", "What the adapter changed", "Where the update is"):
        assert f"<h2>{heading}</h2>" in page
    assert len(page) <= 150_000
    before = (place / "report.html").read_bytes()
    assert script("report").main([str(place)]) in (0, None)
    assert (place / "report.html").read_bytes() == before


def test_the_size_of_an_update_is_that_of_the_product(script):
    import gpt2
    import lora

    model = gpt2.GPT2.from_pretrained("demo")
    lora.inject(model, r=3, targets=["c_attn", "mlp.c_fc"], seed=1)
    for layer in lora.algebra.factors(model).values():
        layer.B.normal_()
    with_b = lora.algebra.factors(model)
    lora.algebra.implant(fresh := gpt2.GPT2.from_pretrained("demo"), with_b)
    rows = script("observed").updates(fresh, "default")
    assert len(rows) == 16
    for row in rows:
        pair = with_b[row["layer"]]
        assert row["update"] == pytest.approx(float((pair.B @ pair.A).norm()), rel=1e-5)
    base = gpt2.GPT2.from_pretrained("demo").get_submodule(rows[0]["layer"]).weight
    assert rows[0]["weight"] == pytest.approx(float(base.detach().norm()), rel=1e-6)


def test_texts_stay_text_and_numbers_are_the_records(folder, made):
    page, run = made(folder), json.loads((folder / "run.json").read_text())
    assert "<img" not in page
    assert page.count("&lt;/script&gt;&lt;img src=x onerror=") >= 5
    data = data_of(page)
    assert data["run"] == run
    losses = {row["step"]: row["loss"] for row in metrics(5000, spike=3211)}
    drawn = data["charts"]["loss"][0]["points"]
    assert [3211, 50.0] in drawn
    assert all(losses[step] == loss for step, loss in drawn)
    assert "best held-out loss, step 2,500" in page
    assert "1.2500" in page
    assert "+4.125 nats: -5.250 before, -1.125 after" in page
    assert "5.00 %" in page
    rate = 20 * 5000 / 500
    assert f"{rate:,.0f} supervised tokens a second" in page
    assert f"{rate / (790e12 / (4 * 19512064)):.1%}" in page
    assert len(page) <= 150_000
    assert page == made(folder)
    assert not re.search(r"https?://", page)


def test_min_and_max_keep_every_extreme(script):
    thinned = script("charts").thinned
    points = [(i, math.sin(i * i)) for i in range(10_000)]
    points[777], points[5001] = (777, 9.0), (5001, math.nan)
    kept = thinned(points, 200)
    assert len(kept) <= 3 * 200
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (777, 9.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert thinned([], 10) == []


def test_a_killed_run_reports_what_it_wrote(folder, made, script):
    (folder / "run.json").unlink()
    (folder / "options.yaml").write_text("model_name: demo\nlr: 0.003\nlora: {r: 8}\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5001, "lo')
    page = made(folder)
    assert "did not come to its end" in page
    assert "5,000" in page
    assert "demo, adapted by LoRA of rank 8" in page
    empty = folder.parent / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        script("record").read(empty)


def test_a_run_that_diverged_is_shown(folder, made):
    rows = metrics(50)
    rows[20]["loss"] = math.nan
    rows[30]["loss"] = math.inf
    put_lines(folder / "metrics.jsonl", rows)
    page = made(folder)
    assert "2 steps have no finite loss, the first is 21" in page
    assert not [d for d in re.findall(r"<svg.*?</svg>", page) if "nan" in d or "inf" in d]
    assert data_of(page)["charts"]["loss"][0]["points"][20] == [21, None]


def test_several_runs_are_compared(folder, made, tmp_path, script):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    page = made(folder, other)
    assert "2 runs compared" in page
    assert [line["name"] for line in data_of(page)["charts"]["loss"]] == ["run", "other"]
    out = tmp_path / "two.html"
    assert script("report").main([str(folder), str(other), "--out", str(out)]) in (0, None)
    assert out.read_text() == page
    assert script("report").main([str(folder), str(other)]) == 2


def test_a_search_of_512_trials_fits_a_megabyte(searched, made):
    page = made(searched)
    assert len(page.encode()) <= 1_000_000
    for heading in ("Halving", "Loss over each parameter", "All trials", "Leaderboard"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count('<path class="l') >= 512
    assert "ended: the loss is not finite" in page
    assert '<path class="whisk"' in page


PROBE = """<script>addEventListener("load", () => { const wide = [...document.querySelectorAll("*")]
.filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll,svg"));
const paint = performance.getEntriesByType("navigation")[0];
document.documentElement.dataset.probe = JSON.stringify({title: document.title, width: innerWidth,
scroll: document.documentElement.scrollWidth, wide: wide.map((e) => e.outerHTML.slice(0, 80)),
images: document.images.length, loaded: performance.getEntriesByType("resource").length,
charts: document.querySelectorAll(".read").length, ready: paint.domContentLoadedEventEnd,
back: getComputedStyle(document.documentElement).backgroundColor}); });</script>"""


@browser
@pytest.mark.parametrize("kind", ["run", "search"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_whole(folder, searched, made, tmp_path, kind, dark):
    page = made(folder if kind == "run" else searched)
    # A window of headless Chromium is at least 500 wide, so a phone's width is a frame's.
    probed = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", PROBE + "</body>")
    (tmp_path / "probed.html").write_text(probed)
    (tmp_path / "page.html").write_text(page)
    frames = "".join(
        f'<iframe src="probed.html" style="width:{w}px;height:900px;border:0"></iframe>'
        for w in (1280, 390)
    )
    read = """<script>addEventListener("load", () => { document.body.dataset.all = JSON.stringify(
    [...document.querySelectorAll("iframe")].map((f) =>
    JSON.parse(f.contentDocument.documentElement.dataset.probe))); });</script>"""
    (tmp_path / "both.html").write_text(f"<body>{frames}{read}</body>")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    shown, said = dumped(tmp_path, "both.html", *scheme, "--allow-file-access-from-files")
    found = json.loads(re.search(r'data-all="([^"]*)"', shown)[1].replace("&quot;", '"'))
    for probe in found:
        assert probe["wide"] == []
        assert probe["scroll"] <= probe["width"]
        assert probe["images"] == probe["loaded"] == 0
        assert probe["title"] != "ran"
        assert probe["charts"] == (3 if kind == "run" else 0)
        assert probe["back"] == ("rgb(20, 22, 26)" if dark else "rgb(251, 250, 248)")
    assert [probe["width"] for probe in found] == [1280, 390]
    # The page itself, with its policy: no error. It lets nothing be loaded.
    _, said = dumped(tmp_path, "page.html", "--enable-logging=stderr", "--v=0")
    assert ":CONSOLE" not in said
    assert "default-src 'none'" in page


def dumped(tmp_path: Path, name: str, *flags: str) -> tuple[str, str]:
    """The page as Chromium has it after its scripts, and what it logged."""
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--timeout=8000",
               "--window-size=1400,1900", *flags, "--dump-dom",
               (tmp_path / name).as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    return done.stdout, done.stderr
