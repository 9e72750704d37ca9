"""The report of a study in a real browser: wide, narrow, dark and printed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_vlm.studies.report import write_report
from lightning_vlm.studies.report.style import DARK, LIGHT

from .report_kit import ARMS, broken, study

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

WIDTHS = {"narrow": 390, "wide": 1200}
LONG = "OPD, stopped where its entropy on the held-out prompts was highest"
# Runs in each page and tells the page around it what it found.
PROBE = """<script>addEventListener("load",()=>{
const box=e=>e.getBoundingClientRect();
const name=e=>e.tagName+"."+(e.className.baseVal??e.className)+" "+e.textContent.slice(0,30);
const out=[],cut=[],overlaps=[];
const scrolls=e=>e.closest(".scroll");
for(const e of document.querySelectorAll("body *"))
 if(!scrolls(e)&&!e.closest("svg")&&!e.closest("details:not([open])")&&!e.classList.contains("skip")&&box(e).right>innerWidth+1)
  out.push(name(e));
for(const svg of document.querySelectorAll("svg.chart,svg.mark")){
 const s=box(svg),texts=[...svg.querySelectorAll("text")];
 for(const t of texts){const b=box(t);
  if(b.left<s.left-.5||b.right>s.right+.5||b.top<s.top-.5||b.bottom>s.bottom+.5)cut.push(name(t))}
 texts.forEach((t,i)=>texts.slice(i+1).forEach(u=>{const a=box(t),b=box(u);
  if(a.left<b.right-1&&b.left<a.right-1&&a.top<b.bottom-1&&b.top<a.bottom-1)overlaps.push(name(t)+" / "+name(u))}));
}
const style=getComputedStyle(document.body),line=document.querySelector("svg.chart .line.s0");
parent.postMessage({name:window.name,inner:innerWidth,scroll:document.documentElement.scrollWidth,out,cut,overlaps,
 background:style.backgroundColor,text:style.color,line:line&&getComputedStyle(line).stroke,
 folded:document.querySelectorAll("details:not([open])").length},"*")})</script>"""


def chromium(profile: Path, *args: str) -> subprocess.CompletedProcess:
    """Run it headless with nothing of its own going on."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    done = subprocess.run([CHROMIUM, *quiet, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Reports of a usual study, of one with failures, of many arms with long names, of one seed."""
    root = tmp_path_factory.mktemp("pages")
    many = ARMS | {LONG: 6} | {f"arm {i}": i for i in range(4)}
    usual = study(root / "usual")
    made = {
        "usual": usual,
        "broken": broken(usual),
        "many": study(root / "many", arms=many, conditions={"few prompts": 0, "many prompts of all families": 1}),
        "single": study(root / "single", conditions={}, seeds={0: 3}),
        "two": study(root / "two", conditions={}, seeds={0: 3, 1: 4}),
        "long": study(root / "long", conditions={}),
    }
    for number, file in enumerate(sorted((root / "long").rglob("metrics.csv"))):  # long ticks on both axes
        rows = [f"{step},{-1e-4 * step / 250_000 - 1e-6 * number},{step / 7:.1f}" for step in range(0, 250_001, 500)]
        file.write_text("step,train/entropy,val/greedy/accuracy\n" + "\n".join(rows) + "\n")
    return {name: write_report(results, root / f"{name}-report")[0] for name, results in made.items()}


def probed(pages: dict[str, Path], folder: Path, *args: str) -> dict[str, dict]:
    """What the probe finds in each page at each width: frames of that width inside one page."""
    frames = ""
    for name, path in pages.items():
        # The page forbids scripts other than its own: the copy with the probe is without that rule.
        text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, path.read_text())
        assert count == 1
        (folder / f"{name}.html").write_text(text)
        for kind, width in WIDTHS.items():
            frames += f'<iframe name="{name}-{kind}" src="{name}.html" width="{width}" height="3000"></iframe>'
    listen = "const got=[];addEventListener('message',e=>{got.push(e.data);found.textContent=JSON.stringify(got)})"
    (folder / "frames.html").write_text(f"<pre id=found></pre><script>{listen}</script>{frames}")
    url = f"file://{folder}/frames.html"
    done = chromium(folder / "profile", "--virtual-time-budget=20000", "--dump-dom", *args, url)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    return {found["name"]: found for found in json.loads(html.unescape(match[1]))}


def rgb(colour: str) -> str:
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)})"


def test_nothing_is_cut_or_overlaps(pages, tmp_path):
    """At 390 and at 1200 pixels: no scrolling of the page as a whole, labels of charts inside and apart."""
    found = probed(pages, tmp_path, "--blink-settings=preferredColorScheme=1")
    assert sorted(found) == sorted(f"{name}-{kind}" for name in pages for kind in WIDTHS)
    for name, seen in found.items():
        assert seen["inner"] == WIDTHS[name.rpartition("-")[2]], name
        assert seen["scroll"] <= seen["inner"], name
        assert (seen["out"], seen["cut"], seen["overlaps"]) == ([], [], []), name
        assert (seen["background"], seen["line"]) == (rgb(LIGHT["bg"]), rgb(LIGHT["s0"])), name
        assert seen["folded"] > 0


def test_dark(pages, tmp_path):
    """Charts follow the page: their colours are its variables."""
    found = probed({"usual": pages["usual"]}, tmp_path, "--blink-settings=preferredColorScheme=0")["usual-wide"]
    assert (found["background"], found["text"]) == (rgb(DARK["bg"]), rgb(DARK["text"]))
    assert found["line"] == rgb(DARK["s0"])


@pytest.mark.parametrize("name", ["usual", "broken"])
def test_nothing_is_said_in_the_console(pages, tmp_path, name):
    """The page as it is: its rules let its own style, script and pictures through, and nothing fails."""
    done = chromium(tmp_path, "--enable-logging=stderr", "--dump-dom", f"file://{pages[name]}")
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert "Which warm start serves RL best?" in done.stdout


def test_printed(pages, tmp_path):
    """On paper what is folded and belongs there is open: the PDF has text of the study file."""
    pdf = tmp_path / "report.pdf"
    chromium(tmp_path / "profile", "--no-pdf-header-footer", f"--print-to-pdf={pdf}", f"file://{pages['usual']}")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and 4 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 25
