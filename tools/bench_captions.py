"""Time of each stage of the COCO caption suite, Java's apart, and of CIDEr-D as a reward.

    python -m tools.bench_captions --images 5000 --repeats 3
    python -m tools.bench_captions --file magic_result.json

Every repeat runs all stages once, in turn; medians and the range are printed. Captions are synthetic, or those of a
JSON list of records with `image_name`, `captions` (the references) and `prediction`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from lightning_vlm.metrics.captions.cider import DocumentFrequencies, cider_d, cider_of_tokens
from lightning_vlm.metrics.captions.inputs import tokenize, tokenize_groups
from lightning_vlm.metrics.captions.java import meteor_sums
from lightning_vlm.metrics.captions.suite import bleu_sums, rouge_l, score_captions

Stages = dict[str, Callable[[], object]]


def synthetic(images: int, seed: int = 0) -> list[dict]:
    """Records of about ten words a caption and five references an image; common words are common."""
    draw = random.Random(seed)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("ck", "ll", "n", "rt", "sh", "ss", "x")]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def caption() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(7, 13))).capitalize() + "."

    rows = [(caption(), [caption() for _ in range(5)]) for _ in range(images)]
    return [{"image_name": str(i), "captions": refs, "prediction": own} for i, (own, refs) in enumerate(rows)]


def stages(records: list[dict], generations: int) -> tuple[Stages, Stages]:
    """Stages in Python and stages in Java, on the same captions."""
    predictions = {r["image_name"]: r["prediction"] for r in records}
    references = {r["image_name"]: r["captions"] for r in records}
    raw, raw_groups = list(predictions.values()), list(references.values())
    captions, groups = tokenize(raw, "python"), tokenize_groups(raw_groups, "python")
    scores = score_captions(predictions, references, tokenizer="python", allow_empty=True)
    frequencies = DocumentFrequencies.of_tokens(groups, "python")
    many = [(text, group) for text, group in zip(raw, raw_groups, strict=True) for _ in range(generations)]

    def both(tokenizer: str) -> None:
        tokenize(raw, tokenizer)
        tokenize_groups(raw_groups, tokenizer)

    return {
        "tokenizer: python": lambda: both("python"),
        "BLEU": lambda: bleu_sums(captions, groups),
        "ROUGE-L": lambda: rouge_l(captions, groups),
        "document frequencies": lambda: DocumentFrequencies.of_tokens(groups, "python"),
        "CIDEr": lambda: cider_of_tokens(captions, groups, frequencies),
        "intervals": scores.intervals,
        f"reward, {generations} an image": lambda: cider_d([t for t, _ in many], [g for _, g in many], frequencies),
    }, {"tokenizer: ptb": lambda: both("ptb"), "METEOR": lambda: meteor_sums(captions, groups)}


def main() -> None:
    """Run all stages in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="records to use instead of synthetic captions")
    parser.add_argument("--images", type=int, default=5000, help="synthetic images, 5 references each (default 5000)")
    parser.add_argument(
        "--generations", type=int, default=8, help="captions of one image scored as rewards (default 8)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="times that all stages are run (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    records = json.loads(args.file.read_text()) if args.file else synthetic(args.images)
    in_python, in_java = stages(records, args.generations)
    if shutil.which("java") is None:
        print("no java on PATH: its stages are left out")
        in_java = {}
    seconds: dict[str, list[float]] = {name: [] for name in (*in_python, *in_java)}
    for _ in range(args.repeats):
        for name, stage in (in_python | in_java).items():
            start = time.perf_counter()
            stage()
            seconds[name].append(time.perf_counter() - start)
    references = sum(len(r["captions"]) for r in records)
    print(f"{len(records)} images, {references} references, {args.repeats} repeats; seconds: median [range]")
    for title, names in (("Python", in_python), ("Java", in_java)):
        for name in names:
            values = seconds[name]
            spread = f"[{min(values):.2f}, {max(values):.2f}]"
            print(f"  {title:7}{name:24}{statistics.median(values):8.2f} {spread}")
    rewards = len(records) * args.generations / statistics.median(seconds[f"reward, {args.generations} an image"])
    print(f"  rewards a second, one core: {rewards:.0f}")
    if args.json:
        args.json.write_text(json.dumps({"images": len(records), "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
