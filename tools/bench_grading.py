"""Time of grading mathematical answers in one and in several processes, and what hangs among them cost.

    python -m tools.bench_grading --answers 1000 --jobs 1 2 --hangs 5 --repeats 3

Pairs of a hard-to-compare answer and its gold, half of them equal, no two alike, so that nothing is answered from a
cache. Every repeat grades fresh ones by each number of processes in turn, the processes started before the clock;
then once more with answers among them that would compute for ever and are cut off. Medians and the range are printed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from lightning_vlm.benchmarks.grading import grade_all
from lightning_vlm.benchmarks.rules import RULES
from lightning_vlm.data.schema import Sample

RULE = RULES["geometry3k/freeform"]
HANG = r"\boxed{9^{9^{9^{9^9}}}}"


def pairs(count: int, draw: random.Random) -> list[tuple[str, Sample]]:
    """(output, sample): surds, fractions, multiples of π, in other words than the gold's, and as many wrong ones."""
    made = []
    for n in range(count):
        a, b, c = draw.randint(2, 999), draw.randint(2, 99), draw.randint(2, 9)
        gold, equal, other = draw.choice(
            [
                (rf"{a} \sqrt {{ {b} }}", rf"\sqrt{{{a * a * b}}}", rf"\sqrt{{{a * a * b + 1}}}"),
                (rf"\frac {{ {a} }} {{ {b} }}", rf"\frac{{{a * c}}}{{{b * c}}}", rf"\frac{{{a * c + 1}}}{{{b * c}}}"),
                (rf"{a} \pi", rf"\frac{{{a * c}\pi}}{{{c}}}", rf"{a}.{b}\pi"),
                (f"{a}.{b}", rf"\frac{{{a * 100 + b * (10 if b < 10 else 1)}}}{{100}}", str(a)),
            ]
        )
        output = rf"So it is \boxed{{{equal if n % 2 else other}}}."
        made.append((output, Sample(str(n), [], answer=gold)))
    return made


def seconds(answers: list[tuple[str, Sample]], jobs: int) -> float:
    """Wall time of grading all of them."""
    start = time.perf_counter()
    cut = sum("timed_out" in record for record in grade_all(RULE, answers, workers=jobs))
    assert cut == sum(output == HANG for output, _ in answers)
    return time.perf_counter() - start


def main() -> None:
    """Grade in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000, help="answers of one measurement (default 1000)")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--hangs", type=int, default=5, help="answers that never end, 10 s each until cut (default 5)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of all (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default 0)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.answers} answers, {args.repeats} repeats")
    draw = random.Random(args.seed)
    times: dict[str, list[float]] = {}
    for jobs in args.jobs:
        seconds(pairs(2 * jobs, draw), jobs)  # starts the processes
    for _ in range(args.repeats):
        for jobs in args.jobs:
            times.setdefault(f"{jobs} processes", []).append(seconds(pairs(args.answers, draw), jobs))
    if args.hangs:
        for jobs in args.jobs:
            answers = pairs(args.answers - args.hangs, draw)
            for _ in range(args.hangs):
                answers.insert(draw.randrange(len(answers)), (HANG, Sample("hang", [], answer="5")))
            times[f"{jobs} processes, {args.hangs} hangs"] = [seconds(answers, jobs)]
    for name, values in times.items():
        median = statistics.median(values)
        per_answer = 1000 * median / args.answers
        print(f"{name:<24}{median:8.2f} s   [{min(values):.2f}, {max(values):.2f}]   {per_answer:6.2f} ms an answer")
    first, last = (statistics.median(times[f"{jobs} processes"]) for jobs in (args.jobs[0], args.jobs[-1]))
    print(f"{args.jobs[0]} against {args.jobs[-1]} processes: {first / last:.2f} times as long")
    if args.json:
        args.json.write_text(
            json.dumps({"answers": args.answers, "seed": args.seed, "seconds": times}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
