"""The experiments on GRPO and on-policy distillation that docs/rollouts.md reports, on questions of the embedded world.

    python -m tools.rollout_study --seeds 0,1,2

Every run is a `lightning-vlm` command in runs/rollouts, printed before it starts; what is there already is not run
again. All arms start from one model (SFT, stopped early) and differ in training seeds; the teacher is a larger model
that learned longer. The table stands in runs/rollouts/table.md: means over seeds with 95 % t-intervals.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning_vlm.metrics.statistics import mean_interval
from tools.commands import run_logged

BASE_STEPS, TEACHER_STEPS = 600, 1000
FAMILIES = ("count", "bars", "angle", "perimeter")
QUESTIONS = 9600  # of the control arms: 150 steps of 64, as on-policy distillation sees
LARGER = ("-c", "model/qwen2_5_vl-teacher")

# Arm → experiment and settings; all from the base, with a seed of their own.
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "GRPO": ("world-grpo", ()),
    "OPD": ("world-opd", ("--vars.teacher", "{root}/teacher/model")),
    "SFT, gold chains": ("world-sft-questions", ()),
    "SFT, teacher's text": ("world-sft-text", ("--vars.text", "{root}/teacher.jsonl")),
}
COLUMNS = {
    "greedy": ("greedy", "accuracy"),
    "pass@1": ("sampled", "pass_at_1"),
    "pass@4": ("sampled", "pass_at_4"),
    "pass@16": ("sampled", "pass_at_16"),
    "direct": ("sampled", "direct"),
    "ood numbers pass@1": ("ood", "pass_at_1"),
    "ood numbers pass@16": ("ood", "pass_at_16"),
    "ood pairs pass@1": ("ood_pairs", "pass_at_1"),
    "ood pairs pass@16": ("ood_pairs", "pass_at_16"),
    **{name: ("greedy", f"family/{name}") for name in FAMILIES},
}


def call(words: list[str], done: Path, log: Path) -> None:
    """Run a lightning-vlm command unless what it makes is there.

    Raises:
        RuntimeError: it failed; names its log.
    """
    if done.exists():
        return
    if code := run_logged(words, log):
        raise RuntimeError(f"failed with code {code}; see {log}")


def fit(root: Path, name: str, experiment: str, *settings: str) -> Path:
    """A training run and its evaluation; the run's folder."""
    where = root / name
    words = ["fit", "-c", f"experiment/{experiment}", "-c", "logger/csv", "--logger.MLFlow", "null"]
    resume = ["--resume"] if (where / "config.yaml").exists() else []
    call([*words, "--run_dir", str(where), *settings, *resume], where / "model", root / f"{name}.log")
    return where


def test(root: Path, name: str) -> None:
    """Greedy and sampled answers of a run's model."""
    words = ["test", "-c", "experiment/world-samples-test", "--logger.MLFlow", "null"]
    words += ["--run_dir", str(root / f"{name}-test"), "--backbone.path", str(root / name / "model")]
    call(words, root / f"{name}-test" / "evaluations" / "ood_pairs", root / f"{name}-test.log")


def prepare(root: Path) -> None:
    """The model that all arms start from, and the teacher."""
    for name, steps, model in (("base", BASE_STEPS, ()), ("teacher", TEACHER_STEPS, LARGER)):
        warm = fit(root, f"{name}-warmup", "world-warmup", *model)
        chains = ("--data.train.world.options.chains_first", str(32 * int(0.7 * steps)))
        start = ("--backbone.path", str(warm / "model"))
        fit(root, name, "world-sft", *start, *chains, "--trainer.max_steps", str(steps))
        test(root, name)


def write_teachers_text(root: Path) -> None:
    """The teacher's sampled answers to the questions that on-policy distillation asks, as conversations."""
    out = root / "teacher.jsonl"
    if out.exists():
        return
    from PIL import Image

    from lightning_vlm.data.images import load_image
    from lightning_vlm.data.world import WorldSource

    where = root / "teacher-text"
    words = ["predict", "-c", "experiment/world-samples-test", "--logger.MLFlow", "null", "--run_dir", str(where)]
    words += ["--backbone.path", str(root / "teacher" / "model"), "--model.sampling.temperature", "1.0"]
    words += ["--model.sampling.max_new_tokens", "48", "--data.predict.world.split", "train"]
    words += ["--data.predict.world.options.size", str(QUESTIONS)]
    call(words, where / "predictions.jsonl", root / "teacher-text.log")
    answers = [json.loads(line) for line in (where / "predictions.jsonl").read_text().splitlines()]
    source = WorldSource(size=QUESTIONS, families=FAMILIES)
    lines = []
    for index, answer in enumerate(answers):
        sample = source[index]
        picture = where / "images" / f"{index // 2}.png"
        if not picture.exists():
            picture.parent.mkdir(exist_ok=True)
            image: Image.Image = load_image(sample.images[0])
            image.save(picture)
        parts = [p if p["type"] == "text" else {"type": "image"} for p in sample.prompt()[-1]["content"]]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer["output"]}]
        lines.append(json.dumps({"id": str(index), "messages": messages, "images": [str(picture.resolve())]}))
    out.write_text("\n".join(lines) + "\n")


def scores(root: Path, name: str) -> dict[str, float]:
    """Figures of one evaluation, %, by column; entropy of the rollouts' last tenth, nats, where there are rollouts."""
    found = {}
    for column, (benchmark, metric) in COLUMNS.items():
        (file,) = (root / f"{name}-test" / "evaluations" / benchmark).glob("step-*/scores.json")
        found[column] = 100 * json.loads(file.read_text())[metric]
    return found


def entropies(root: Path, name: str) -> tuple[float, float] | None:
    """Mean entropy of the sampled tokens, nats, over the first and the last five logged steps of a run."""
    import csv

    files = list((root / name).glob("**/metrics.csv"))
    if not files:
        return None
    with files[0].open() as file:
        values = [float(row["train/entropy"]) for row in csv.DictReader(file) if row.get("train/entropy")]
    return statistics.fmean(values[:5]), statistics.fmean(values[-5:])


def cell(values: list[float]) -> str:
    """Mean and half the 95 % interval over seeds."""
    mean = statistics.fmean(values)
    digits = 1 if mean >= 1 else 2
    if len(values) < 2 or min(values) == max(values):
        return f"{mean:.{digits}f}"
    low, high = mean_interval(values)
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def table(root: Path, arms: list[str], seeds: list[int]) -> str:
    """Markdown: one row per arm."""
    lines = ["| arm | " + " | ".join(COLUMNS) + " | entropy, start → end |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in ("base", "teacher"):
        own = scores(root, name)
        lines.append(f"| {name} | " + " | ".join(cell([own[c]]) for c in COLUMNS) + " | |")
    for arm in arms:
        names = [folder(arm, seed) for seed in seeds]
        own = [scores(root, name) for name in names]
        told = [pair for name in names if (pair := entropies(root, name))]
        ends = " → ".join(cell(list(side)) for side in zip(*told, strict=True)) if told else ""
        lines.append(f"| {arm} | " + " | ".join(cell([o[c] for o in own]) for c in COLUMNS) + f" | {ends} |")
    return "\n".join(lines) + "\n"


def folder(arm: str, seed: int) -> str:
    """Name of a run's folder."""
    return "".join(c if c.isalnum() else "_" for c in arm) + f"-{seed}"


def main() -> None:
    """Run, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=";".join(ARMS), help="by semicolons (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="training seeds (default 0,1,2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each (default 2)")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/rollouts"), help="default runs/rollouts")
    parser.add_argument("--report", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    arms = args.arms.split(";")
    if unknown := [name for name in arms if name not in ARMS]:
        parser.error(f"no arm is named {unknown[0]!r}; choose among {'; '.join(ARMS)}")
    root, seeds = args.run_dir, [int(seed) for seed in args.seeds.split(",")]

    def one(arm: str, seed: int) -> None:
        experiment, settings = ARMS[arm]
        name = folder(arm, seed)
        words = [word.format(root=root) for word in settings]
        start = ("--backbone.path", str(root / "base" / "model"), "--seed_everything", str(seed))
        fit(root, name, experiment, *start, *words)
        test(root, name)

    if not args.report:
        prepare(root)
        if "SFT, teacher's text" in arms:
            write_teachers_text(root)
        with ThreadPoolExecutor(args.jobs) as pool:
            for job in [pool.submit(one, arm, seed) for arm in arms for seed in seeds]:
                job.result()
    text = table(root, arms, seeds)
    (root / "table.md").write_text(text)
    print(f"\n{text}\n%, means over seeds {args.seeds} with 95 % t-intervals; entropy in nats per token")


if __name__ == "__main__":
    main()
