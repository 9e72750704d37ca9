"""The benchmark's statistics, checks and command line; what it measures is not tested."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tools.bench import __main__ as command
from tools.bench.material import SIZES, ending_probability, make_it_end, make_material, write_text
from tools.bench.ratios import median, paired_ratio
from tools.bench.report import draw, lines
from tools.bench.run import Unequal, compare, groups, result, waiting
from tools.bench.scores import checksum, reward
from tools.bench.worker import Step
from tools.bench.works import WARM_UP, WORKS

GIB = 2**30
SMALL = SIZES["small"]


# --- statistics -----------------------------------------------------------------------------------------------------


def test_median():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"),
    [
        (1, 1, 1, 0.0),
        (3, 1, 3, 1 - 2 / 8),
        (5, 1, 5, 1 - 2 / 32),
        (6, 1, 6, 1 - 2 / 64),
        (9, 2, 8, 1 - 2 * (1 + 9) / 512),
        (12, 3, 10, 1 - 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_interval_of_the_median_by_hand(n, low, high, coverage):
    above = [3.0 * i for i in range(1, n + 1)]
    random.Random(n).shuffle(above)
    assert paired_ratio(above, [3.0] * n) == (median(range(1, n + 1)), low, high, pytest.approx(coverage))


def test_ratios_are_of_pairs():
    """A machine that is twice as slow in one round slows both down: the ratio does not see it."""
    assert paired_ratio([4.0, 8.0, 4.0], [1.0, 2.0, 1.0])[:3] == (4.0, 4.0, 4.0)


def test_interval_covers_the_median_as_often_as_it_says():
    draws = random.Random(0)
    held = 0
    for _ in range(2000):
        ratio = paired_ratio([draws.expovariate(1.0) for _ in range(9)], [1.0] * 9)
        held += ratio.low <= 0.6931 <= ratio.high
    assert held / 2000 == pytest.approx(0.961, abs=0.015)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_no_pairs(above, below):
    with pytest.raises(ValueError, match="ratios need pairs"):
        paired_ratio(above, below)


# --- checks and figures ---------------------------------------------------------------------------------------------


def worker(seconds, *, loss=0.7, base=GIB, peak=2 * GIB, grad_norm=1.0, lengths=()):
    """What is left of a process that made warm-up steps and steps of these seconds, half of them on the processor."""
    times = [9.0] * WARM_UP + list(seconds)
    return SimpleNamespace(steps=[Step(t, t / 2, loss, grad_norm, peak, lengths) for t in times], base=base)


def workers(work, **changes):
    lengths = () if work.ours.data == "preference" else (3, 4, 6)
    made = {c.name: worker([1.0, 1.0, 1.0], lengths=lengths) for c in work.timed()} | {"CW-DPO, weight 1": worker([])}
    made[work.shipped.name] = worker([4.0, 5.0, 6.0], base=2 * GIB, peak=6 * GIB, lengths=lengths)
    if work.compacted:
        made[work.compacted.name] = worker([2.0, 2.0, 3.0], peak=4 * GIB, lengths=lengths)
    return made | changes


def test_figures_of_a_work_by_hand():
    work = WORKS["dpo"]
    figures = result(work, workers(work), gap=1e-6, filling=2.0, size=SMALL)
    assert (figures["ours_s"], figures["peer_s"], figures["peer_compacted_s"]) == (1.0, 5.0, 2.0)
    assert (figures["ratio"], figures["ratio_low"], figures["ratio_high"]) == (5.0, 4.0, 6.0)
    assert (figures["ratio_compacted"], figures["ratio_compacted_low"]) == (2.0, 2.0)
    assert figures["peak_ratio"] == pytest.approx(2 / 6)
    assert figures["peak_ratio_above"] == pytest.approx(1 / 4)
    assert figures["variants"]["online"]["ratio"] == 5.0
    assert figures["contenders"]["TRL DPO"]["seconds"] == [4.0, 5.0, 6.0], "warm-up steps must not count"
    assert waiting([figures]) == pytest.approx(0.5)
    assert json.loads(json.dumps(figures)) == figures


def test_a_peer_in_one_form_has_no_second_figures():
    work = WORKS["rollout"]
    figures = result(work, workers(work), gap=0.0, filling=None, size=SMALL)
    assert (figures["ratio"], figures["peer_s"], figures["peak_ratio"]) == (5.0, 5.0, pytest.approx(2 / 6))
    assert not [name for name in figures if "compacted" in name]
    assert figures["contenders"]["Rollout"]["lengths"] == [[3, 4, 6]] * 3


def test_report_names_every_contender_and_draws(tmp_path):
    results = [result(work, workers(work), gap=1e-6, filling=2.0, size=SMALL) for work in WORKS.values()]
    text = "\n".join(line for r in results for line in lines(r))
    assert "4 prompts of 60 tokens and 16 image tokens a step, 8 completions of at most 64 tokens for each" in text
    assert "8 pairs a step, prompts of 60 tokens and 16 image tokens, completions of 64" in text
    assert "peak 2.00 GiB, 1.00 above what was loaded; 4.3 tokens a completion" in text
    for work in WORKS.values():
        assert work.title in text
        assert all(c.name in text for c in work.timed())
    assert "5.00 [4.00, 6.00] than as shipped, 2.00 [2.00, 3.00] than compacted" in text
    assert "TRL has no CW-DPO" in text
    draw(results, tmp_path / "ratios.png", title="by hand")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("change", [{"loss": 0.7001}, {"grad_norm": 0.999}, {"loss": float("nan")}])
@pytest.mark.parametrize("who", ["DPO", "DPO, online reference", "TRL DPO", "TRL DPO, compacted"])
def test_unequal_contenders_are_not_timed(who, change):
    work = WORKS["dpo"]
    same = {c.name: worker([]) for c in work.timed()}
    assert compare(work, same) == 0.0
    assert compare(work, same | {who: worker([], loss=0.70001)}) == pytest.approx(1e-5 / 0.7, rel=1e-3)
    with pytest.raises(Unequal, match=r"^dpo: .* is .* of .* and .* of TRL DPO.*nothing is timed$"):
        compare(work, same | {who: worker([], **change)})


def test_cw_dpo_is_checked_where_it_is_dpo():
    """Its own loss is another one; with weight 1 it must be TRL's."""
    work = WORKS["cw_dpo"]
    made = {c.name: worker([]) for c in (*work.timed(), work.check)}
    made[work.ours.name] = worker([], loss=0.1)
    assert compare(work, made) == 0.0
    with pytest.raises(Unequal, match="CW-DPO, weight 1"):
        compare(work, made | {work.check.name: worker([], loss=0.1)})


def test_gradients_of_all_steps_are_compared_where_the_loss_does_not_see_the_weights():
    """On-policy, GRPO's first loss is the same whatever the weights are: only gradients tell that they are equal."""
    work = WORKS["grpo"]
    made = {c.name: worker([]) for c in work.timed()}
    assert compare(work, made) == 0.0
    made["GRPO"].steps[-1] = made["GRPO"].steps[-1]._replace(grad_norm=1.001)
    with pytest.raises(Unequal, match=r"gradient norm of step 3 is 1\.001 of GRPO and 1 of TRL GRPO"):
        compare(work, made)


def test_works_of_the_same_peers_run_together():
    found = [[work.name for work in group] for group in groups(list(WORKS.values()))]
    assert found == [["dpo", "cw_dpo"], ["grpo"], ["grpo-varied"], ["grpo-336"], ["rollout"], ["opd"]]


def test_works_that_run_together_have_one_material():
    for group in groups(list(WORKS.values())):
        assert len({work.size(SMALL) for work in group}) == 1
    assert WORKS["grpo-336"].size(SMALL).image == 336
    assert WORKS["grpo-varied"].size(SMALL).mean == 25


def test_names_are_unique():
    """Logs, steps and tables go by them."""
    seen = {}
    for work in WORKS.values():
        for contender in (*work.timed(), *([work.check] if work.check else [])):
            assert seen.setdefault(contender.name, contender) == contender


# --- material -------------------------------------------------------------------------------------------------------


def encoder(material):
    from lightning_vlm.data.encode import Encoder
    from lightning_vlm.models.processor import load_processor
    from lightning_vlm.models.spec import Backbone

    return Encoder(load_processor(Backbone(path=str(material.model))))


def test_material_has_the_lengths_it_says(tmp_path):
    from lightning_vlm.data.sources import SourceSpec, open_source

    size = SIZES["tiny"]
    material = make_material(tmp_path, size, steps=2)
    encode = encoder(material).encode_pair
    samples = open_source(SourceSpec(kind="preference", path=str(material.data("preference"))), for_training=True)
    assert len(samples) == 2 * size.batch
    pictures = set()
    for i in range(len(samples)):
        rows = encode(samples[i])
        assert [row.scored for row in rows] == [size.completion] * 2
        assert {len(row) for row in rows} == {size.prompt + size.image_tokens + size.completion}
        assert rows[0].images[0].tokens == size.image_tokens
        pictures.add(rows[0].images[0].key)
    assert len(pictures) == len(samples), "no picture is shown twice"


@pytest.mark.parametrize("kind", ["prompts", "distilled"])
def test_prompts_and_what_is_prepared_for_them(tmp_path, kind):
    from lightning_vlm.data.sources import open_source
    from tools.bench.our_side import source

    size = SIZES["tiny"]
    material = make_material(tmp_path, size, steps=3, kinds=[kind], warm_up=2)
    encode = encoder(material)
    samples = open_source(source(kind, material), for_training=True)
    assert len(samples) == 3 * size.per_step(kind)
    rows = [encode.encode_prompt(samples[i]) for i in range(len(samples))]
    assert {len(row) for row in rows} == {size.prompt + size.image_tokens}
    # By these numbers our side finds what was prepared.
    assert [row.id.rpartition("/")[2] for row in rows] == [str(n) for n in range(len(rows))]

    end = encode.processor.end_of_turn[1]
    steps = material.prepared[kind]
    assert [[len(group) for group in step] for step in steps] == [[size.samples(kind)] * size.per_step(kind)] * 2
    ids = [ids for step in steps for group in step for ids in group]
    assert all(len(i) == size.completion or i[-1] == end for i in ids) and end not in {n for i in ids for n in i[:-1]}
    assert len({len(i) for i in ids}) > 2
    assert material.teacher.is_dir() == (kind == "distilled")


def test_probability_of_the_end_by_hand():
    """Of at most two tokens: one with probability p, else two, so 2 − p on average."""
    assert ending_probability(1.25, 2) == pytest.approx(0.75)
    p = ending_probability(25, 64)
    assert sum(min(n, 64) * p * (1 - p) ** (n - 1) for n in range(1, 5000)) == pytest.approx(25)
    for mean in (1, 2, 3):
        with pytest.raises(ValueError, match=f"cannot have {mean} on average"):
            ending_probability(mean, 2)


def test_a_random_model_that_ends_its_completions(tmp_path):
    import torch
    from transformers import AutoModelForImageTextToText

    material = make_material(tmp_path, SIZES["tiny"], steps=1)
    model = AutoModelForImageTextToText.from_pretrained(material.model)
    ids = torch.randint(400, (16, 50), generator=torch.Generator().manual_seed(0))
    make_it_end(model, ids[:8], end=402, probability=0.2)
    with torch.no_grad():
        said = model(input_ids=ids[8:]).logits.softmax(-1)
    assert said[..., 402].mean().item() == pytest.approx(0.2, abs=0.02)
    assert said[..., 402].std() < 0.1
    others = said.index_fill(-1, torch.tensor(402), 0)
    assert 0.9 < -(others / 0.8 * (others / 0.8 + 1e-30).log()).sum(-1).mean() / math.log(512) <= 1, "still random"


def test_rewards_differ_and_are_the_same_on_both_sides():
    """CRC-32, bit by bit, of the ids as 64-bit integers."""
    register = 2**32 - 1
    for bit in [(id >> n) & 1 for id in (1, 31999) for n in range(64)]:
        register = (register >> 1) ^ (0xEDB88320 if (register ^ bit) & 1 else 0)
    assert checksum([1, 31999]) == (register ^ (2**32 - 1)) / 2**32
    values = reward(completion_ids=[[1, 2], [2, 1], [1, 2, 0], [1, 2]], prompts=None)
    assert len(set(values[:3])) == 3 and values[3] == values[0]


def test_text_of_a_length():
    def words(text):
        return len(text.split())

    assert words(write_text(random.Random(0), words, 7)) == 7
    with pytest.raises(ValueError, match="3 tokens are asked for, but 5 are there without any text"):
        write_text(random.Random(0), lambda text: words(text) + 5, 3)
    with pytest.raises(ValueError, match="no text of 3 tokens"):
        write_text(random.Random(0), lambda text: 2 * words(text), 3)


# --- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--works", "dpo,dppo"], "unknown dppo; valid: dpo, cw_dpo, grpo, grpo-varied, grpo-336, rollout, opd"),
        (["--works", ","], "--works names nothing"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--quick", "--pairs", "5"], "give one of them"),
        (["--json", "absent/x.json"], "--json: there is no folder"),
        (["--image", "absent/x.png"], "--image: there is no folder"),
        (["--suite", "gpu"], "invalid choice: 'gpu'"),
        (["--against", "verl"], "invalid choice: 'verl'"),
    ],
)
def test_wrong_arguments(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    with pytest.raises(SystemExit) as ended:
        command.parse(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_the_peer(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.parse([])
    assert "TRL is not installed" in capsys.readouterr().err


def test_defaults(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    args = command.parse([])
    assert (args.works, args.pairs, args.threads, args.size) == (list(WORKS), 9, 1, "small")
    assert command.parse(["--quick"]).pairs == 3


@pytest.mark.slow
def test_a_tiny_run(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed (extra `trl`)")
    out = tmp_path / "figures.json"
    works = ["dpo", "cw_dpo", "grpo-varied", "rollout", "opd"]
    words = ["--works", ",".join(works), "--size", "tiny", "--pairs", "1", "--json", str(out)]
    run = subprocess.run([sys.executable, "-m", "tools.bench", *words], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    figures = json.loads(out.read_text())
    assert [r["work"] for r in figures["results"]] == works
    for r in figures["results"]:
        assert r["largest_gap"] < 1e-4
        assert r["ratio"] > 0 and r["peak_ratio"] > 0
        assert all(len(c["seconds"]) == 1 for c in r["contenders"].values())
    sampled = {r["work"]: [c["lengths"] for c in r["contenders"].values()] for r in figures["results"]}
    assert sampled["dpo"] == [[[]]] * 4
    assert all(len(lengths[0]) == 2 * 4 and max(lengths[0]) <= 8 for lengths in sampled["grpo-varied"])
    assert sampled["opd"] and all(len(lengths[0]) == 4 for lengths in sampled["opd"])
    assert "leaked" not in run.stderr
