"""The report of a study: known numbers in every form, foreign texts without effect, the same bytes each time."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from scipy import stats

from lightning_vlm.studies.report import write_report
from lightning_vlm.studies.report.scale import scale_of, ticks
from lightning_vlm.studies.report.series import over_seeds
from lightning_vlm.studies.report.shapes import COLOURS, dash
from lightning_vlm.studies.report.style import DARK, LIGHT, SCRIPT
from lightning_vlm.studies.report.text import clean, duration, listed, number

from .report_kit import HOSTILE, broken, study


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    """Name → text of each file."""
    return {path.name: path.read_text() for path in write_report(results, tmp_path_factory.mktemp("out"))}


class Page(HTMLParser):
    """Elements of a page: (tag, attributes), and the text of each, its children's left out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def plain(html: str) -> str:
    """The page's words, without tags, with single blanks."""
    return " ".join(unescape(re.sub(r"<(style|script)>.*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL)).split())


# -------------------------------------------------------------------------------------------------- known numbers


def test_the_page_has_the_numbers(report):
    """OPD, few prompts: k = 11, 12, 13 of 20, so pass@1 = .60, .65, .70: mean .65, sd .05, ± t(2) · .05/√3."""
    half = stats.t.ppf(0.975, 2) * 5 / 3**0.5
    assert f"{65 - half:.1f} {65 + half:.1f}" == "52.6 77.4"
    text = plain(report["report.html"])
    assert "OPD 65.0 [52.6, 77.4]" in text and "none 40.0 [27.6, 52.4]" in text
    assert (
        "condition: few prompts: “OPD” has the highest mean, 65.0 %. It is better than “none” and “SFT, over-trained”."
        in text
    )
    # Three seeds of sd 5 each: t(4) · 5 · √(2/3) = 11.3 around 25; 0.022 = 6 · p, the least of six pairs.
    p = 2 * stats.t.sf(25 / (5 * (2 / 3) ** 0.5), 4)
    assert f"{6 * p:.3f}" == "0.022"
    assert "OPD > none by 25.0 points [13.7, 36.3], 3 seeds" in text
    assert "none − SFT, over-trained: not distinguishable (−5.0 points [−16.3, 6.3], 3 seeds); needs about" in text
    assert "OPD 80.0 [67.6, 92.4]" in text  # pass@16 = (k + 4)/20
    assert "neither direction is better" in text and "2 of 3 pairs are told apart." in text  # entropy
    assert "holds condition: few prompts : OPD · few prompts > none · few prompts by 25.0 points" in text
    assert "contradicted condition: many prompts : none · many prompts − OPD" in text
    assert "70 for each of 3 seeds steps equal" in text


def test_pass_at_k_before_and_after(report):
    """Before: 16 of 20 problems right in 4 of 16 answers: pass@2 = .8 · (1 − C(12, 2)/C(16, 2)) = .8 · .45 = .36."""
    (figure,) = (f for f in json.loads(report["report.json"])["curves"] if f["title"].startswith("pass@k"))
    before = next(s for s in figure["series"] if s["stage"] == "before" and s["label"] == "OPD")
    after = next(s for s in figure["series"] if s["stage"] == "after" and s["label"] == "OPD · few prompts")
    assert before["x"] == list(range(1, 17)) and before["mean"][:2] == pytest.approx([0.2, 0.36])
    assert before["mean"][15] == pytest.approx(0.8) and before["low"] == [None] * 16  # one evaluation: no band
    assert after["mean"][1] == pytest.approx(12 / 20 + 4 / 20 * 0.45)
    half = stats.t.ppf(0.975, 2) * 0.05 / 3**0.5
    assert (after["low"][0], after["high"][0]) == pytest.approx((0.65 - half, 0.65 + half))
    assert "k = 1: 20.0 → 65.0 % (+45.0); k = 16: 80.0 → 80.0 % (+0.0)" in plain(report["report.html"])


def test_charts_say_their_numbers(report):
    page = Page(report["report.html"])
    charts = [svg for svg in page.of("svg") if svg.get("class") == "chart"]
    assert len(charts) == 2 + 2 + 6 + 2  # accuracy, entropy, pass@k of six arms, probe
    assert all(svg["role"] == "img" for svg in charts)
    accuracy = charts[0]["aria-label"]
    # Accuracy of seed s at step t: (k + 1)/20 · t/70.
    assert accuracy.startswith("Accuracy during RL: condition: few prompts. Mean [95 % interval]. none (3 seeds): ")
    assert "OPD (3 seeds): 0.0929 [0.0751, 0.111] at step 10, then 0.65 [0.526, 0.774] at step 70." in accuracy
    probe = charts[-1]["aria-label"]  # −.2 − .001 · 70 · (s + 1): mean −.34
    assert "at step 0, then −0.34 [" in probe
    tables = [caption for tag, caption in page.texts if tag == "span" and "mean [95 % interval over seeds]" in caption]
    assert len(tables) == len(charts)


def test_costs_of_an_arm_count_what_it_uses(report):
    """base 100 s, before 40 s, rl 60 + 61 + 62 s, after 3 · 30 s: 413 s and, at 1.5 threads, 619.5 s."""
    costs = json.loads(report["report.json"])["costs"]
    arm = next(cost for cost in costs["arms"] if cost["label"] == "OPD · few prompts")
    assert (arm["seconds"], arm["cpu_seconds"], arm["runs"]) == (413.0, 619.5, 8)
    assert (arm["steps"], arm["tokens"], arm["peak_gib"]) == (600 + 3 * 70, 50_000 + 3 * 1000, 1.0)
    assert costs["total"]["seconds"] == 100 + 3 * 40 + 6 * (183 + 90)
    rl = [cost for cost in costs["stages"] if (cost["what"], cost["label"]) == ("rl", "OPD · few prompts")]
    assert [(cost["seconds"], cost["steps"]) for cost in rl] == [(183.0, 210.0)]
    text = plain(report["report.html"])
    assert "OPD · few prompts 8 6 min 53 s 10 min 20 s 810 53,000 1" in text and "base all arms 1 1 min 40 s" in text


def test_samples_are_side_by_side(report):
    page = Page(report["report.html"])
    pictures = page.of("img")
    assert [picture["alt"] for picture in pictures] == [f"Picture 1 of q-{i}" for i in range(3)]  # once, not per arm
    assert len({picture["src"] for picture in pictures}) == 3
    outputs = [attrs["class"] for attrs in page.of("li") if "output " in attrs.get("class", "")]
    assert outputs == ["output right"] * 18
    assert plain(report["report.html"]).count("right in 48 of 48 answers (3 × 16)") == 18
    at = report["report.html"].index
    assert at("q-0</h3>") < at("a red square") < at("q-1</h3>") < at("a blue circle")


def test_markdown_and_tables(report, results):
    text = report["report.md"]
    assert "| OPD | 65.0 | \\[52.6, 77.4\\] | 3 | 5.0 | seeds |" in text
    assert "OPD &gt; none by 25.0 points" in text and "k = 16: 80.0 → 55.0 % (−25.0)" in text
    rows = list(csv.DictReader(report["endpoints.csv"].splitlines()))
    assert len(rows) == 3 * 6
    first = next(row for row in rows if row["arm"] == "OPD · few prompts")
    assert (first["endpoint"], first["seeds"], first["unit"]) == ("pass@1, in domain", "0 1 2", "fraction")
    assert float(first["mean"]) == pytest.approx(0.65)
    assert [float(mean) for mean in first["seed_means"].split()] == pytest.approx([0.6, 0.65, 0.7])
    pairs = list(csv.DictReader(report["pairs.csv"].splitlines()))
    assert len(pairs) == 3 * 6  # three pairs in each of two conditions
    told = next(row for row in pairs if (row["a"], row["b"]) == ("none · few prompts", "OPD · few prompts"))
    assert (told["verdict"], told["better"]) == ("better", "OPD · few prompts")
    assert float(told["diff"]) == pytest.approx(-0.25) and told["sentence"].startswith("OPD · few prompts is better")
    stages = list(csv.DictReader(report["stages.csv"].splitlines()))
    assert [row["name"] for row in stages] == [row.name for row in results.stages]
    assert (stages[-1]["stage"], stages[-1]["seconds"], stages[-1]["exit"]) == ("after", "30.0", "0")


# ------------------------------------------------------------------------------------------------------- safety


def test_foreign_texts_have_no_effect(report):
    """A hostile output is text, and nothing in the page is from elsewhere or runs but our own few lines."""
    html = report["report.html"]
    page = Page(html)
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in html and "<b>not bold" not in html
    assert "\x1b" not in html and "\u202e" not in html and "\u202e" in HOSTILE
    assert not {"iframe", "object", "embed", "link", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert (attrs.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert (attrs.get("href") or "#").startswith("#") and "style" not in attrs
    assert page.of("script") == [{}] and html.count(SCRIPT) == 1
    assert "url(" not in re.sub(r"url\(#[\w-]+-clip\)", "", html) and "@import" not in html
    # In Markdown it stands in a fence, and names are escaped.
    assert re.search(r"```+text\n<script>alert", report["report.md"])


def test_names_are_escaped(tmp_path, results):
    bad = replace(results, question='<i>"?"</i> | [x](y)', about="a & b", text="</pre><script>alert(2)</script>")
    write_report(bad, tmp_path)
    html, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<title>&lt;i&gt;" in html and "<i>" not in html and "alert(2)</script>" not in html
    assert text.startswith('# &lt;i&gt;"?"&lt;/i&gt; \\| \\[x\\](y)') and "```yaml\n</pre><script>" in text


def test_the_same_bytes(results, report, tmp_path):
    """Neither the time nor the place of the study or of the report is in it."""
    other = study(tmp_path / "elsewhere")
    for path in write_report(other, tmp_path / "again"):
        assert path.read_text() == report[path.name], path.name
        assert str(tmp_path) not in path.read_text() and str(results.run_dir) not in path.read_text()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(report)


# ------------------------------------------------------------------------------------------- what is not there


def test_what_is_missing_is_said_and_the_rest_is_there(tmp_path, results):
    write_report(broken(results), tmp_path)
    text = plain((tmp_path / "report.html").read_text())
    assert "Not finished: 2 of 40 runs of stages" in text and "38 done, 1 failed, 1 waiting" in text
    assert "rl-OPD-many-prompts-2 failed exit code 1" in text and "after-OPD-many-prompts-2 waiting" in text
    assert "epoch 1 ValueError: reward is NaN <at step 12>" in text  # the log, without its colours
    assert "Not equal: the arms did not spend the same in rl" in text and "70, 70, 12 steps not equal" in text
    assert "Not shown: rl-OPD-many-prompts-2 has no csv" in text  # the endpoint, relative to the study's folder
    assert "Not shown: rl-OPD-many-prompts-2: failed" in text
    assert "OPD 65.0 [52.6, 77.4]" in text and "a red square" in text
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["unfinished"][0] == {"name": "rl-OPD-many-prompts-2", "state": "failed"}
    assert summary["endpoints"][2]["comparison"] is None
    assert "**Not finished: 2 of 40 runs of stages.**" in (tmp_path / "report.md").read_text()


def test_reports_of_what_no_run_has(tmp_path, results):
    asked = {
        "curves": [{"stage": "rl", "metric": "train/nothing"}, {"stage": "nowhere", "metric": "x"}],
        "probes": [{"stage": "rl", "probe": "other", "metric": "chosen"}],
        "samples": {"stage": "after", "benchmark": "greedy"},
    }
    write_report(replace(results, report=asked, measured=[], claims=[], budget=[]), tmp_path)
    text = plain((tmp_path / "report.html").read_text())
    assert "rl-OPD-few-prompts-0 logged no metric 'train/nothing'" in text
    assert "the study has no stage 'nowhere'" in text and "has no probe 'other'; it has: probe" in text
    assert "was not evaluated on 'greedy'" in text and "The study declares no budget" in text


def test_pictures_whose_ids_are_not_known_are_left_out(tmp_path):
    """Pictures carry a number, not an id: without the table that tells which is whose, none is shown."""
    found = study(tmp_path / "s", conditions={}, seeds={0: 3})
    for table in found.run_dir.rglob("table.html"):
        table.write_text("<table><tr><td><pre>q-0</pre></td></tr></table>")
    write_report(found, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "<img" not in html and "no evaluation kept pictures" in html
    assert html.index("q-0</h3>") < html.index("q-1</h3>") < html.index("q-10</h3>")  # by id instead


def test_other_problems_under_the_same_ids_are_kept_apart(tmp_path):
    """Conditions of the data may draw other problems that are called the same."""
    found = study(tmp_path / "s", seeds={0: 3})
    for file in found.run_dir.glob("after-*-many-*/evaluations/*/*/per_example.jsonl"):
        file.write_text(file.read_text().replace("What is shown?", "How many?"))
    write_report(found, tmp_path)
    html = (tmp_path / "report.html").read_text()
    blocks = [plain(block) for block in html.split('<article class="sample">')[1:]]
    assert len(blocks) == 2 * 3 and blocks[0].startswith("q-0 condition: few prompts prompt What is shown?")
    assert blocks[3].startswith("q-0 condition: many prompts prompt How many?")
    assert all(block.count(" right ") + block.count(" wrong ") >= 3 for block in blocks)
    assert "many prompts" not in blocks[0] and html.count("<img") == 6


def test_many_unfinished_runs_are_counted(tmp_path, results):
    waiting = [row if row.stage != "after" else replace(row, state="waiting", record={}) for row in results.stages]
    write_report(replace(results, stages=waiting), tmp_path)
    text = plain((tmp_path / "report.html").read_text())
    assert "Not shown: 18 of 18 runs of after: waiting" in text and "Waiting or running: 18" in text


def test_one_seed_is_of_checkpoints(tmp_path):
    write_report(study(tmp_path / "s", conditions={}, seeds={0: 9}), tmp_path)
    text = plain((tmp_path / "report.html").read_text())
    assert "This is of checkpoints with one seed, not of recipes." in text
    assert "none 50.0 [" in text and "1 – problems" in text and "these checkpoints" in text
    assert json.loads((tmp_path / "report.json").read_text())["curves"][0]["series"][0]["low"] == [None] * 7


def test_lower_is_better(tmp_path, results):
    first = results.measured[0]
    turned = replace(first, endpoint=replace(first.endpoint, higher="worse"))
    write_report(replace(results, measured=[turned]), tmp_path)
    assert "condition: few prompts: “none” has the lowest mean, 40.0 %." in plain(
        (tmp_path / "report.html").read_text()
    )


# ------------------------------------------------------------------------------------------------- accessibility


def test_structure_for_readers_of_text(report):
    html = report["report.html"]
    page = Page(html)
    assert page.of("html") == [{"lang": "en"}] and len(page.of("title")) == len(page.of("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("a")} <= set(ids)
    labelled = {attrs["aria-labelledby"] for attrs in page.of("section")}
    assert labelled <= set(ids)
    assert len(page.of("table")) == len(page.of("caption")) and all("scope" in attrs for attrs in page.of("th"))
    for svg in page.of("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and re.search(r"\d", svg["aria-label"]))
    assert all(picture["alt"] for picture in page.of("img"))


def contrast(a: str, b: str) -> float:
    """WCAG 2.2: (L + .05)/(l + .05) of relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrasts(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name in ("text", "muted", "accent"):
        assert min(contrast(theme[name], theme[ground]) for ground in ("bg", "panel")) >= 4.5, name
    for name in ("good", "bad", "vague", "warn"):
        assert contrast(theme[name], theme[f"{name}-bg"]) >= 4.5, name
    assert contrast(theme["accent"], theme["vague-bg"]) >= 4.5  # "different"
    for index in range(COLOURS):
        assert contrast(theme[f"s{index}"], theme["panel"]) >= 3, index


def test_arms_are_told_apart_without_colour():
    """Eight markers for the first eight; sixteen arms differ in marker or dashes."""
    assert len({dash(look) for look in range(COLOURS)}) == COLOURS
    assert len({(look % COLOURS, dash(look)) for look in range(2 * COLOURS)}) == 2 * COLOURS


# -------------------------------------------------------------------------------------------------------- parts


def test_series_over_seeds():
    """The mean and the t interval where all seeds are; longer seeds keep their own points."""
    series = over_seeds("a", {0: {1.0: 1.0, 2.0: 4.0, 3.0: 9.0}, 1: {1.0: 3.0, 2.0: 4.0}})
    half = stats.t.ppf(0.975, 1) * 2**0.5 / 2**0.5
    assert (series.x, series.mean) == ([1.0, 2.0], [2.0, 4.0])
    assert (series.low[0], series.high[0]) == pytest.approx((2 - half, 2 + half))
    assert series.low[1] != series.low[1]  # NaN: no spread
    assert series.seeds[0] == ([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])
    with pytest.raises(ValueError, match="the seeds of 'a' have no step in common"):
        over_seeds("a", {0: {1.0: 1.0}, 1: {2.0: 1.0}})


def test_long_series_are_pooled():
    """301 steps in blocks of three: the first is the mean of 0, 1, 2, the last of 300 alone."""
    series = over_seeds("a", {0: {float(x): 2.0 * x for x in range(301)}})
    assert (series.pooled, len(series.x)) == (3, 101)
    assert (series.x[0], series.mean[0], series.x[-1], series.mean[-1]) == (1.0, 2.0, 300.0, 600.0)


def test_scales():
    assert ticks(0, 1, 5) == (pytest.approx((0.0, 0.2, 0.4, 0.6, 0.8, 1.0)), 1)
    assert ticks(-0.31, 0.12, 4) == (pytest.approx((-0.3, -0.2, -0.1, 0.0, 0.1)), 1)
    assert ticks(3, 71, 6, whole=True)[0] == tuple(range(10, 71, 10))
    assert ticks(0.0, 0.01, 4)[1] == 4  # steps of .0025
    wide = scale_of([0.4, 0.5], [-3.0, 4.0])  # two seeds' interval: at most .6 ranges to either side, and a margin
    assert (wide.low, wide.high) == pytest.approx((0.34 - 0.011, 0.56 + 0.011))
    assert scale_of([0.4, 0.5], [0.39, 0.52], bounds=(0.395, 1)).low == 0.395
    flat = scale_of([2.0, 2.0])
    assert flat.low < 2 < flat.high and flat.ticks


@pytest.mark.parametrize(
    "seconds, text",
    [
        (None, "–"),
        (0.26, "0.3 s"),
        (41, "41 s"),
        (59.7, "1 min"),
        (725, "12 min 5 s"),
        (3599.6, "1 h"),
        (11_520, "3 h 12 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_texts():
    assert [number(v) for v in (None, 3, 0.12345, -0.5, 1234567.8, float("nan"), 1e-7)] == [
        "–", "3", "0.123", "−0.5", "1,234,568", "–", "1e−07",
    ]  # fmt: skip
    assert clean("a\r\nb\x00\ud800\u202ec\td") == "a\nb���c\td"
    assert clean("x" * 30, 10) == "x" * 10 + " … (20 more characters)"
    assert clean(["a", "b"]) == "a\nb" and clean(None) == ""
    assert [listed(some) for some in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
