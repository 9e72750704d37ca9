"""torchmetrics classes over records: each example counts once, two ranks give what one gives."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.multiprocessing as mp

from lightning_vlm.metrics.calibration import reliability
from lightning_vlm.metrics.records import CalibrationError, CaptionScores, MeanScore, PassAtK, Records


def test_each_example_counts_once():
    mean = MeanScore()
    mean.update(["a", "b", "b"], [1.0, 0.0, 0.0])
    mean.update(["a"], torch.tensor([1.0]))
    assert mean.compute().item() == 0.5
    with pytest.raises(ValueError, match="one score per id"):
        mean.update(["a"], [1.0, 2.0])


def test_nothing_scored_is_no_number():
    mean = MeanScore()
    mean.update([], [])
    assert math.isnan(mean.compute())


def test_one_example_with_two_scores_is_an_error():
    records = Records()
    records.update([{"id": "a", "score": 1.0}, {"id": "a", "score": 0.0}])
    with pytest.raises(ValueError, match="two different scores for example 'a'"):
        records.compute()


def test_records_come_back_whole_and_in_order():
    """Draws are examples of their own; text of any kind, line separators included, and all digits survive."""
    given = [{"id": "b", "text": "a\u2028b\r\n\x00é\ud800"}, {"id": "a", "sample": 1, "x": 0.1 + 0.2}, {"id": "a"}]
    records = Records()
    records.update(given)
    assert records.compute() == [given[2], given[1], given[0]]


def test_pass_at_k_of_a_batch():
    """One of four right, and all four: pass@2 is (1 − C(3,2)/C(4,2) + 1) / 2 = 3/4."""
    metric = PassAtK(k=2)
    metric.update(["a"] * 4 + ["b"] * 4, list(range(4)) * 2, [0, 1, 0, 0, 1, 1, 1, 1])
    assert metric.compute().item() == pytest.approx(0.75)
    too_few = PassAtK(k=5)
    too_few.update(["a"] * 4, range(4), [0, 1, 0, 0])
    with pytest.raises(ValueError, match="pass@5 needs at least 5"):
        too_few.compute()


SCORES = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0, "e": 1.0}
CONFIDENCE = {"a": 0.9, "b": 0.4, "c": 0.6, "d": 0.2, "e": 1.0}
CAPTIONS = {"a": "a red cube", "b": "two dogs run", "c": "a man on a horse", "d": "the sea at night", "e": "one cat"}
REFERENCES = {
    "a": ["a red cube lies there", "the cube is red"],
    "b": ["two dogs are running", "dogs run"],
    "c": ["a man rides a horse"],
    "d": ["night at the sea", "dark water"],
    "e": ["two cats"],
}


def _metrics(ids: list[str]) -> dict[str, float]:
    mean, calibration, drawn, captions = MeanScore(), CalibrationError(), PassAtK(k=1), CaptionScores("python")
    if ids:
        mean.update(ids, [SCORES[i] for i in ids])
        calibration.update(ids, [CONFIDENCE[i] for i in ids], [SCORES[i] for i in ids])
        drawn.update(ids, [0] * len(ids), [SCORES[i] for i in ids])
        captions.update({i: CAPTIONS[i] for i in ids}, REFERENCES)
    values = {"mean": mean, "ece": calibration, "pass@1": drawn}
    return {n: m.compute().item() for n, m in values.items()} | {n: v.item() for n, v in captions.compute().items()}


def _on_rank(rank: int, port: int, out) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    # Five examples over two ranks, the last batch filled up by repeating `a`; then all of them on the first rank.
    uneven = _metrics(["a", "b", "c"] if rank == 0 else ["d", "e", "a"])
    out[rank] = (uneven, _metrics(list(SCORES) if rank == 0 else []))
    torch.distributed.destroy_process_group()


def test_two_ranks_give_what_one_gives():
    out = mp.get_context("spawn").Manager().dict()
    mp.spawn(_on_rank, args=(20000 + os.getpid() % 20000, out), nprocs=2)
    alone = _metrics(list(SCORES))
    assert alone["mean"] == pytest.approx(0.6) and 0 < alone["CIDEr"] < 10
    for rank in (0, 1):
        for values in out[rank]:
            assert values == pytest.approx(alone, rel=1e-12)


def test_reliability_by_hand():
    """Bins of a fifth: .25 and .35 (one right) lie in (.2, .4], .9 and 1 (both right) in (.8, 1].

    The error is 2/4 · |.5 − .3| + 2/4 · |1 − .95| = .125.
    """
    curve = reliability(torch.tensor([0.25, 0.35, 0.9, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0]), bins=5)
    assert curve.count.tolist() == [2, 2]
    assert curve.confidence.tolist() == pytest.approx([0.3, 0.95])
    assert curve.accuracy.tolist() == [0.5, 1.0]
    assert curve.error == pytest.approx(0.125)


def test_reliability_of_a_sure_and_of_a_perfectly_calibrated_model():
    assert reliability(torch.ones(4), torch.tensor([1.0, 0, 0, 0])).error == pytest.approx(0.75)
    calibrated = torch.full((10,), 0.7)
    assert reliability(calibrated, (torch.arange(10) < 7).float()).error == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("confidences", "correct"),
    [([], []), ([0.5], [1, 0]), ([1.5], [1]), ([float("nan")], [1]), ([0.5], [float("nan")]), ([-0.1], [0])],
)
def test_calibration_refuses_what_is_no_probability(confidences, correct):
    with pytest.raises(ValueError, match="calibration"):
        reliability(torch.tensor(confidences), torch.tensor(correct))
