"""Skywork R1V's recipe on the embedded world: an adapter alone teaches a reasoning language model to see.

    python -m tools.r1v_study --run_dir runs/r1v --seeds 0 1 2 [--combine intersection]

Every stage is a `lightning-vlm` command, printed before it runs; what is there already is not made again. The encoder
and the two language models are made once; adapters, data and rollouts have a seed of their own. Ends with the table of
docs/r1v.md, written to run_dir/table.md and run_dir/table.json; `--combine intersection` goes on behind the same stage
1 and writes table-intersection. All stages run in forks of one process, which has imported everything before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_vlm.metrics.statistics import mean_interval
from tools.commands import Runner, run_forked

FAMILIES = ("count", "bars", "angle", "perimeter")
THRESHOLDS = (2, 3, 4, 5)  # τ of the rounds
# The paper's 2e-4 : 4e-5 : 4e-5 : 1e-4 : 2e-5, fifty times as large; the first two stand in the experiments.
STAGE_1_LR, ROUND_LR = ("--model.lr", "5.0e-3"), ("--model.lr", "1.0e-3")
POOL = 640  # questions of which chains are written
POOL_SEED = 100  # + the run's seed: pictures that neither the encoder nor the first pass has seen
MODEL = ("-c", "model/llava-student")
ROWS = {
    "init-1": "substitute VLM, all data",
    "init-2": "substitute VLM, selected data",
    "init-3": "substitute VLM, chains",
    "swap": "after the swap of language models",
    "stage-1": "stage 1",
    **{f"round-{t}": f"stage 2, τ = {threshold}" for t, threshold in enumerate(THRESHOLDS, 1)},
    "grpo": "stage 3, GRPO",
}
METRICS = {
    "accuracy": ("test", "accuracy"),
    "direct": ("test", "direct"),
    **{name: ("test", f"family/{name}") for name in FAMILIES},
    "out of domain": ("ood", "accuracy"),
}


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each stage.

    Attributes:
        warmup, vlm: the VLM whose encoder is taken, and whose language model is the ancestor of both others.
        substitute, reasoning: their further training on text.
        all, selected, chains: the three passes of the initialisation. stage_1, round, grpo: the hybrid optimisation.
    """

    warmup: int = 200
    vlm: int = 700
    substitute: int = 100
    reasoning: int = 300
    all: int = 150
    selected: int = 40
    chains: int = 40
    stage_1: int = 60
    round: int = 30
    grpo: int = 30


class Recipe:
    """The stages of one run directory.

    Args:
        root: where everything lies.
        combine: `union` or `intersection` of well scored and failed samples in the rounds.
        steps: of each stage.
        pool: questions of which chains are written.
        run: runs one command; see `run_forked`.
    """

    def __init__(
        self,
        root: Path,
        *,
        combine: str = "union",
        steps: Steps | None = None,
        pool: int = POOL,
        run: Runner = run_forked,
    ) -> None:
        self.root, self.combine, self.steps, self.pool, self.run = root, combine, steps or Steps(), pool, run
        self.names = folders(combine)

    def call(self, words: Sequence[str | Path | int | float], done: Path, log: Path) -> None:
        """Run a command unless what it makes is there.

        Raises:
            RuntimeError: it failed, or did not make it; names its log.
        """
        if done.exists():
            return
        if code := self.run([str(word) for word in words], log):
            raise RuntimeError(f"failed with code {code}; see {log}")
        if not done.exists():
            raise RuntimeError(f"{done} was not made; see {log}")

    def fit(self, where: Path, experiment: str, start: Path | str | None, steps: int, *settings: str | Path) -> Path:
        """A training run; its model."""
        words = ["fit", "-c", f"experiment/{experiment}", *MODEL] if start is None else _fit_from(experiment, start)
        words += ["-c", "logger/csv", "--logger.MLFlow", "null", "--run_dir", where, "--trainer.max_steps", steps]
        resume = ["--resume"] if (where / "config.yaml").exists() else []
        self.call([*words, *settings, *resume], where / "model", where.with_suffix(".log"))
        return where / "model"

    def test(self, where: Path, model: Path) -> None:
        """Greedy answers of a model, in `where`-test."""
        out = where.with_name(f"{where.name}-test")
        words = ["test", "-c", "experiment/world-r1v-test", "--logger.MLFlow", "null", "--run_dir", out]
        self.call([*words, "--backbone.path", model], out / "evaluations" / "ood", out.with_suffix(".log"))

    def prepare(self) -> None:
        """The encoder and the two language models, both descendants of one."""
        root, steps = self.root / "common", self.steps
        warm = self.fit(root / "warmup", "world-warmup", None, steps.warmup)
        curriculum = ("--data.train.world.options.chains_first", str(32 * int(0.7 * steps.vlm)))
        vlm = self.fit(root / "vlm", "world-sft", warm, steps.vlm, *curriculum)
        self.test(root / "vlm", vlm)
        self.call(["take-encoder", vlm, "--out", root / "encoder"], root / "encoder", root / "take.log")
        short, chains = ("--vars.direct_fraction", "0.5"), ("--vars.direct_fraction", "0.0", "--model.lr", "2.0e-3")
        for name, length, own in (("substitute", steps.substitute, short), ("reasoning", steps.reasoning, chains)):
            shell = self.fit(root / name, "world-r1v-language", vlm, length, *own)
            out = root / f"{name}-llm"
            self.call(["take-language", shell, "--out", out], out, root / "take.log")

    def distill(self, where: Path, model: Path, seed: int) -> Path:
        """The model's own chains on the pool, judged, rewritten where wrong, scored."""
        out, data = where / "chains.jsonl", where / "pool.yaml"
        where.mkdir(parents=True, exist_ok=True)
        options = {"size": self.pool, "families": list(FAMILIES), "seed": POOL_SEED + seed, "direct_fraction": 0.0}
        data.write_text(json.dumps({"world": {"kind": "world", "split": "train", "options": options}}) + "\n")
        words = ["distill", "--data", data, "--model", model, "--out", out, "--seed", seed]
        self.call([*words, "--max_new_tokens", 48, "--batch_size", 256, "--jobs", 1], out, where / "distill.log")
        return out

    def select(self, scored: Path, out: Path, *settings: str | Path | int) -> Path:
        """Some of the samples."""
        self.call(["select", "--scored", scored, *settings, "--out", out], out, out.with_suffix(".log"))
        return out

    def answers(self, where: Path, model: Path, scored: Path) -> Path:
        """The model's greedy answers to the samples of a file."""
        out = where / "answers.jsonl"
        words = ["predict", "-c", "experiment/world-r1v-chains", "--logger.MLFlow", "null", "--run_dir", where]
        words += ["--vars.chains", scored, "--backbone.path", model, "--out", out]
        self.call(words, out, where / "answers.log")
        return out

    def seed(self, seed: int) -> None:
        """One run of the recipe."""
        common, root, steps = self.root / "common", self.root / f"seed-{seed}", self.steps
        own = ("--seed_everything", str(seed))

        def chains(name: str, start: Path, file: Path, steps: int, *settings: str) -> Path:
            words = ("--vars.chains", file, *own, *settings)
            model = self.fit(root / name, "world-r1v-chains", start, steps, *words)
            self.test(root / name, model)
            return model

        # The adapter is initialised in front of the substitute language model: all data, selected data, chains.
        start = root / "composed"
        words = ["compose", "--vision", common / "encoder", "--language", common / "substitute-llm"]
        words += ["--vision_feature_layer", -1]  # what the encoder was trained to be read at
        self.call([*words, "--out", start, "--seed", seed], start, root / "compose.log")
        model = self.fit(root / "init-1", "world-r1v-adapter", start, steps.all, *own)
        self.test(root / "init-1", model)
        pool = self.distill(root / "init-data", model, seed)
        model = chains("init-2", model, self.select(pool, root / "init-2.jsonl", "--min_score", 4), steps.selected)
        model = chains("init-3", model, self.select(pool, root / "init-3.jsonl", "--min_score", 5), steps.chains)

        # Re-assembly: nothing is tuned.
        swapped = root / "swap"
        words = ["swap-language", model, "--language", common / "reasoning-llm", "--out", swapped]
        self.call(words, swapped, root / "swap.log")
        self.test(swapped, swapped)

        # Hybrid optimisation; chains are written anew by each model before the next learns from them.
        model = chains(
            "stage-1", swapped, self.distill(root / "stage-1-data", swapped, seed), steps.stage_1, *STAGE_1_LR
        )
        for number, threshold in enumerate(THRESHOLDS, 1):
            name = self.names[f"round-{number}"]
            data = root / f"{name}-data"
            pool = self.distill(data, model, seed)
            answers = self.answers(data, model, pool)
            # Of its own chains: rewritten ones have nearly all the full score, no threshold would tell them apart.
            rule = ("--answers", answers, "--threshold", threshold, "--combine", self.combine, "--column", "own_score")
            model = chains(name, model, self.select(pool, data / "selected.jsonl", *rule), steps.round, *ROUND_LR)
        name = self.names["grpo"]
        best = self.select(pool, root / f"{name}.jsonl", "--min_score", 5)
        model = self.fit(root / name, "world-r1v-grpo", model, steps.grpo, "--vars.chains", best, *own)
        self.test(root / name, model)
        self.verify(root)

    def verify(self, root: Path) -> None:
        """Everything but the adapter is, bit for bit, what the encoder's VLM and the language models hold.

        Raises:
            RuntimeError: a tensor differs; says which.
        """
        common = self.root / "common"
        vision = _tensors(common / "vlm" / "model", "vision_tower.")
        for name in self.names.values():
            model = root / name if name == "swap" else root / name / "model"
            llm = "substitute" if name.startswith("init") else "reasoning"
            expected = vision | _tensors(common / llm / "model", "language_model.")
            found = _tensors(model, "vision_tower.") | _tensors(model, "language_model.")
            for tensor, value in expected.items():
                if tensor not in found or not value.equal(found[tensor]):
                    raise RuntimeError(f"{tensor} of {model} is not what {llm} or the encoder holds: it was trained")


def folders(combine: str) -> dict[str, str]:
    """Stage → its folder: what comes behind stage 1 has one of its own for each rule of combining."""
    own = "" if combine == "union" else f"-{combine}"
    return {name: f"{name}{own}" if name.startswith(("round", "grpo")) else name for name in ROWS}


def _fit_from(experiment: str, start: Path | str) -> list[str | Path]:
    return ["fit", "-c", f"experiment/{experiment}", "--backbone.path", start]


def _tensors(model: Path, prefix: str) -> dict:
    """The tensors of a model directory whose names begin so.

    Directories differ in where their names say `model`, as transformers writes them or not: it is left out.
    """
    from safetensors.torch import load_file

    tensors = {name: value for file in sorted(model.glob("*.safetensors")) for name, value in load_file(file).items()}
    tensors = {".".join(p for p in name.split(".") if p != "model"): value for name, value in tensors.items()}
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}


def scores(where: Path) -> dict[str, float]:
    """Figures of one evaluation, %."""
    found = {}
    for column, (benchmark, metric) in METRICS.items():
        (file,) = (where / "evaluations" / benchmark).glob("step-*/scores.json")
        found[column] = 100 * json.loads(file.read_text())[metric]
    return found


def cell(values: Sequence[float]) -> str:
    """Mean and half the 95 % t-interval over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2 or min(values) == max(values):
        return f"{mean:.1f}"
    low, high = mean_interval(values)
    return f"{mean:.1f} ± {(high - low) / 2:.1f}"


def table(figures: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: one row per stage, one column per metric.

    Args:
        figures: stage → one dict of figures (%) per seed; the stage before is what `change` is paired with.
    """
    lines = ["| stage | " + " | ".join(METRICS) + " | change |", "|---" * (len(METRICS) + 2) + "|"]
    before: list[dict[str, float]] | None = None
    for name, own in figures.items():
        pairs = zip(own, before or [], strict=False)
        change = cell([now["accuracy"] - then["accuracy"] for now, then in pairs]) if before else ""
        lines.append(
            f"| {ROWS.get(name, name)} | " + " | ".join(cell([o[c] for o in own]) for c in METRICS) + f" | {change} |"
        )
        before = own
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/r1v"), help="default runs/r1v")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default 0 1 2)")
    parser.add_argument("--combine", choices=("union", "intersection"), default="union", help="default union")
    parser.add_argument("--report", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    if not args.report:
        os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
        import lightning_vlm.cli.app  # noqa: F401  (forks start with it)

        recipe = Recipe(args.run_dir, combine=args.combine)
        recipe.prepare()
        for seed in args.seeds:
            recipe.seed(seed)
    names, end = folders(args.combine), "" if args.combine == "union" else f"-{args.combine}"
    figures = {
        n: [scores(args.run_dir / f"seed-{s}" / f"{where}-test") for s in args.seeds] for n, where in names.items()
    }
    text, told = table(figures), {"seeds": args.seeds, "combine": args.combine, "figures": figures}
    (args.run_dir / f"table{end}.json").write_text(json.dumps(told, indent=1) + "\n")
    (args.run_dir / f"table{end}.md").write_text(text)
    print(f"\n{text}\n%, means over seeds {' '.join(map(str, args.seeds))} with 95 % t-intervals")


if __name__ == "__main__":
    main()
