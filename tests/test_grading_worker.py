"""Grading in worker processes: the same verdicts, hangs cut by the clock, errors passed on."""

from __future__ import annotations

import pytest

from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.schema import Sample
from lightning_vlm.metrics import grading_worker
from lightning_vlm.metrics.grading_worker import GradingTimeout, GradingWorker

EQUAL = "mathematics.math_equal"
HANGS = "9^{9^{9^{9^9}}}"


@pytest.fixture(scope="module")
def worker():
    worker = GradingWorker(seconds=20)
    yield worker
    worker.close()


def test_the_worker_agrees_and_passes_errors_on(worker):
    assert worker.call(EQUAL, r"\sqrt{128}", r"8\sqrt{2}")
    assert not worker.call(EQUAL, "2", "3")
    with pytest.raises(ValueError, match="empty"):
        worker.call(EQUAL, "2", "")


def test_a_hang_is_cut_and_the_next_call_works(worker):
    worker.seconds = 1.0
    with pytest.raises(GradingTimeout, match="more than"):
        worker.call(EQUAL, HANGS, "5")
    worker.seconds = 20
    assert worker.call(EQUAL, "2", "2.0")


def test_a_dead_worker_is_an_error_and_not_a_verdict(worker):
    worker.call(EQUAL, "1", "1")
    with pytest.raises(RuntimeError, match="died with exit code"):
        worker.call("mathematics.no_such_function", "1")
    assert worker.call(EQUAL, "1", "1")


def test_text_that_is_hard_to_send(worker):
    for text in ("\udcff", "line\nbreak", "\x00", "\u2028", "é" * 1000):
        assert worker.call(EQUAL, text, "5") is False


def test_a_time_limit_must_be_positive():
    with pytest.raises(ValueError, match="must be positive"):
        GradingWorker(seconds=0)


def test_many_answers_are_graded_in_order_by_several_processes(monkeypatch):
    """A thousandth of them hangs: it is cut off, marked, counts as wrong, and the others are not touched."""
    monkeypatch.setattr(grading_worker.grade_apart, "__kwdefaults__", {"seconds": 2.0})
    rule = RULES["geometry3k/freeform"]
    samples = [Sample(str(n), [], answer=str(n)) for n in range(60)]
    outputs = [rf"\boxed{{{n if n % 3 else n + 1}}}" for n in range(60)]
    outputs[7] = rf"\boxed{{{HANGS}}}"
    records = list(grade_all(rule, list(zip(outputs, samples, strict=True)), workers=2))
    assert [r["score"] for r in records] == [float(n % 3 > 0 and n != 7) for n in range(60)]
    assert [n for n, r in enumerate(records) if "timed_out" in r] == [7]
    assert records[7]["extraction"] == HANGS


def test_a_gold_answer_that_cannot_be_graded_is_an_error():
    rule = RULES["geometry3k/freeform"]
    answers = [(r"\boxed{5}", Sample("good", [], answer="5")), (r"\boxed{5}", Sample("bad", [], answer="°"))]
    with pytest.raises(ValueError, match="'°' is empty"):
        list(grade_all(rule, answers, workers=2))
