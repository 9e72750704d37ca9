"""Alternating steps of several contenders, and what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tools.bench.material import Material, Size
from tools.bench.ratios import Ratio, median, paired_ratio
from tools.bench.worker import Worker
from tools.bench.works import WARM_UP, Contender, Work

TOLERANCE = 1e-4  # relative, between losses and gradient norms of both sides
Say = Callable[[str], None]


class Unequal(Exception):
    """Two sides that were to compute the same do not; nothing is timed."""


def groups(works: Sequence[Work]) -> list[list[Work]]:
    """Works of the same peers together, so that the peers' steps are timed once."""
    found: dict[tuple[str, ...], list[Work]] = {}
    for work in works:
        found.setdefault(tuple(peer.name for peer in work.peers()), []).append(work)
    return list(found.values())


def run_group(works: Sequence[Work], material: Material, *, pairs: int, threads: int, say: Say) -> list[dict[str, Any]]:
    """Time works that share their peers.

    Every contender is a process that stays alive. Each round lets each of them do one optimizer step, in an order that
    turns round from one round to the next, so that whatever else the machine does hits all of them.

    Args:
        works: with the same peers.
        material: model and data, enough for `WARM_UP + pairs` steps.
        pairs: rounds that are timed.
        threads: of every process.
        say: takes a line of progress.

    Returns:
        A result per work, ready for JSON.

    Raises:
        Unequal: losses or gradient norms of the warm-up differ.
        RuntimeError: a process died.
    """
    timed: dict[str, Contender] = {c.name: c for work in works for c in work.timed()}
    steps = WARM_UP + pairs
    filling = fill_caches(works, material, steps=steps, threads=threads, say=say)
    checked = {c.name: c for work in works if (c := work.check) is not None}
    workers: dict[str, Worker] = {}
    try:
        for contender in [*timed.values(), *checked.values()]:
            workers[contender.name] = Worker(contender, material, threads=threads, steps=steps)
        for worker in workers.values():
            say(f"loading {worker.contender.name}")
            worker.wait_until_ready()
        for n in range(WARM_UP):
            for worker in workers.values():
                say(f"warm-up {n + 1} of {WARM_UP}: {worker.contender.name}")
                worker.step()
        gaps = {work.name: compare(work, workers) for work in works}
        for name in checked:
            workers.pop(name).stop()
        for n in range(pairs):
            order = list(workers.values())
            for worker in order if n % 2 == 0 else reversed(order):
                say(f"round {n + 1} of {pairs}: {worker.contender.name}")
                worker.step()
        return [result(work, workers, gaps[work.name], filling, material.size) for work in works]
    finally:
        for worker in workers.values():
            worker.stop()


def fill_caches(works: Sequence[Work], material: Material, *, steps: int, threads: int, say: Say) -> float | None:
    """Have the reference log-probs of all steps computed and kept, as after a first epoch or run.

    Returns:
        Seconds of the step that computed them, an optimizer step included; None where nothing is cached.
    """
    cached = [c for work in works for c in work.timed() if c.settings.get("reference") == "cache"]
    if not cached:
        return None
    say("filling the reference cache")
    worker = Worker(cached[0], material, threads=threads, steps=steps)
    try:
        worker.wait_until_ready()
        return worker.step().seconds
    finally:
        worker.stop()


def compare(work: Work, workers: dict[str, Worker]) -> float:
    """Largest relative difference between ours and the peers in the losses and gradient norms of the warm-up.

    Raises:
        Unequal: it is above `TOLERANCE`.
    """
    ours = [work.check] if work.check else [work.ours, *work.variants.values()]
    loss, norm = work.compared
    worst = 0.0
    for mine in ours:
        for peer in work.peers():
            steps = list(enumerate(zip(workers[mine.name].steps, workers[peer.name].steps, strict=True), start=1))
            values = [(f"{loss} of step {n}", x.loss, y.loss) for n, (x, y) in steps]
            values += [(f"{norm} of step {n}", x.grad_norm, y.grad_norm) for n, (x, y) in steps[: work.norms]]
            for what, x, y in values:
                gap = abs(x - y) / max(abs(y), 1e-12)
                if not gap <= TOLERANCE:
                    raise Unequal(
                        f"{work.name}: {what} is {x:.8g} of {mine.name} and {y:.8g} of {peer.name}, {gap:.1e} apart "
                        f"(relative; allowed {TOLERANCE:.0e}): they do not compute the same, so nothing is timed"
                    )
                worst = max(worst, gap)
    return worst


def result(work: Work, workers: dict[str, Worker], gap: float, filling: float | None, size: Size) -> dict[str, Any]:
    """All figures of one work. Ratios are peer / ours in time (above 1: ours is faster), ours / peer in memory.

    Figures of the compacted peer are there where it is another than the peer as shipped.
    """
    ours, shipped = workers[work.ours.name], workers[work.shipped.name]
    peers = {"": shipped} | ({"_compacted": workers[work.compacted.name]} if work.compacted else {})
    out: dict[str, Any] = {
        "work": work.name,
        "title": work.title,
        "shape": work.shape.format(**asdict(size), image_tokens=size.image_tokens),
        **_against(ours, peers),
        **{f"peer{form}_s": median(seconds(peer)) for form, peer in peers.items()},
        **{f"peak_ratio{form}": peak(ours) / peak(peer) for form, peer in peers.items()},
        "peak_ratio_above": (peak(ours) - ours.base) / (peak(shipped) - shipped.base),
        "compared": " and ".join(work.compared),
        "largest_gap": gap,
        "cache_filling_s": filling,
        "note": work.note,
        "variants": {},
        "contenders": {},
    }
    for name, contender in work.variants.items():
        variant = workers[contender.name]
        peaks = {"peak_ratio": peak(variant) / peak(shipped)}
        out["variants"][name] = _against(variant, peers) | peaks
    for contender in work.timed():
        worker = workers[contender.name]
        out["contenders"][contender.name] = {
            "seconds": seconds(worker),
            "cpu_seconds": cpu_seconds(worker),
            "losses": [step.loss for step in worker.steps],
            "lengths": [list(step.lengths) for step in worker.steps[WARM_UP:]],
            "peak_bytes": peak(worker),
            "loaded_bytes": worker.base,
        }
    return out


def _against(ours: Worker, peers: Mapping[str, Worker]) -> dict[str, float]:
    figures = {"ours_s": median(seconds(ours))}
    for form, peer in peers.items():
        ratio: Ratio = paired_ratio(seconds(peer), seconds(ours))
        name = f"ratio{form}"
        figures |= {name: ratio.median, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
        figures[f"{name}_cpu"] = paired_ratio(cpu_seconds(peer), cpu_seconds(ours)).median
        figures["coverage"] = ratio.coverage
    return figures


def seconds(worker: Worker) -> list[float]:
    """Wall seconds of the timed steps."""
    return [step.seconds for step in worker.steps[WARM_UP:]]


def cpu_seconds(worker: Worker) -> list[float]:
    """Processor seconds of the timed steps: what they would take on a machine of their own, nearly."""
    return [step.cpu for step in worker.steps[WARM_UP:]]


def peak(worker: Worker) -> int:
    """Highest resident memory, bytes."""
    return worker.steps[-1].peak


def waiting(results: Sequence[dict[str, Any]]) -> float:
    """Share of the timed seconds in which a process of one thread did not get a processor."""
    contenders = [c for r in results for c in r["contenders"].values()]
    wall = sum(sum(c["seconds"]) for c in contenders)
    return max(0.0, 1 - sum(sum(c["cpu_seconds"]) for c in contenders) / wall)
