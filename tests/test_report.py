"""The report: its numbers are the record's, its text is text, it asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

for package in ("jsonargparse", "docstring_parser", "yaml", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the scripts need the extra 'scripts'")

from tests.test_scripts import run  # noqa: E402, F401


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


def numbers(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_run_ends_with_its_report(run):  # noqa: F811
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


def test_the_numbers_are_the_records(run):  # noqa: F811
    steps = rows(run[0] / "metrics.jsonl")
    found = numbers((run[0] / "report.html").read_text(encoding="utf-8"))
    for chart, key in (("loss", "loss"), ("lr", "lr"), ("grad_norm", "grad_norm")):
        series = found[f"{chart} demo"]["series"][0]
        assert series["x"] == [s["step"] for s in steps]
        assert series["y"] == [s[key] for s in steps]


def test_the_same_record_gives_the_same_bytes(run, script, tmp_path, capsys):  # noqa: F811
    before = (run[0] / "report.html").read_bytes()
    assert script("report").main([str(run[0]), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == before


def test_a_run_that_was_killed_is_reported(run, script, tmp_path):  # noqa: F811
    place = tmp_path / "killed"
    place.mkdir()
    shutil.copy(run[0] / "options.yaml", place)
    lines = (run[0] / "metrics.jsonl").read_text().splitlines()[:50]
    (place / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 51, "lo')
    assert script("report").main([str(place)]) == 0
    page = (place / "report.html").read_text()
    assert "stopped after 50 steps" in page
    assert numbers(page)["loss killed"]["series"][0]["x"] == list(range(1, 51))


def test_text_is_text(run, script, tmp_path):  # noqa: F811
    evil = "</script><img src=x onerror=alert(1)>\u202e\x00 & <b>"
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
    shown = "</script><img src=x onerror=alert(1)>\\x202e\\x00 & <b>"
    assert page.text.count(shown) >= 3 * len(record["answers"])


def test_no_spike_is_lost(script):
    charts = script("charts")
    points = [(i, 1.0) for i in range(100_000)]
    points[777], points[70_001], points[5] = (777, 9.0), (70_001, -3.0), (5, float("nan"))
    kept = charts.thinned(points)
    assert len(kept) <= 3 * charts.BUCKETS
    assert {points[777], points[70_001], points[0], points[-1]} <= set(kept)
    assert any(y != y for _, y in kept)


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
  const plot = document.querySelector("figure[data-chart] .plot");
  const box = plot.getBoundingClientRect();
  const where = { clientX: box.left + box.width / 2, clientY: box.top + 20, bubbles: true };
  plot.dispatchEvent(new PointerEvent("pointermove", where));
  parent.postMessage(JSON.stringify({
    width: innerWidth, out, scroll: document.documentElement.scrollWidth, errors,
    tip: document.getElementById("tip").textContent,
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


def look(file: Path, tmp_path: Path, width: int, dark: bool = False) -> tuple[dict, str]:
    """What a browser finds in a page so wide, and what it says on its console.

    The page is in a frame, since no window is as narrow as a phone.
    """
    text = file.read_text(encoding="utf-8")
    if dark:
        text = text.replace("@media (prefers-color-scheme: dark)", "@media all")
    inner = text.replace("<main>", f"{PROBE}<main>", 1)
    (tmp_path / "inner.html").write_text(inner, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    own = [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()]
    command = [CHROMIUM, *FLAGS, *own]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (seen,) = (given["data-seen"] for tag, given in Page(done.stdout).tags if tag == "body")
    return json.loads(seen), "\n".join(s for s in done.stderr.splitlines() if "CONSOLE" in s)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_all_of_it(run, tmp_path, width, dark):  # noqa: F811
    seen, said = look(run[0] / "report.html", tmp_path, width, dark)
    assert said == ""
    assert seen["errors"] == seen["out"] == seen["asked"] == []
    assert seen["scroll"] == seen["width"] == width
    assert "at 1" in seen["tip"], "the value under the pointer"
    assert (seen["paper"] == "rgb(21, 22, 23)") == dark
