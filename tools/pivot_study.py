"""PIVOT's recipe on the embedded world: does DPO leave a better vision encoder than SFT on the same triples?

    python -m tools.pivot_study --run_dir runs/pivot --seeds 0 1 2

Stage 1 puts an encoder in front of a language model that learned from text: projector alone, then all parts. Stage 2
goes on with {nothing, SFT, DPO} on the same triples, in several amounts and shares of a new distribution. The encoder
is then taken out, frozen, and put in front of a fresh projector and another language model, of which first the
projector and then both learn. The new model answers questions, and probes look at the encoder. Seeds differ in triples,
projectors and data from stage 2 on; with --own_start in all of it.

Every stage is a `lightning-vlm` command, printed before it runs; what is there already is not made again. A cell's
seeds are done one after the other; the tables of what there is go to run_dir/table.md and run_dir/results.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.commands import Runner, run_forked
from tools.pivot_probes import draw_maps, probe_cell
from tools.pivot_report import Results, draw_gaps, report

TRIPLES = 640  # amount 1
KINDS_OF_NEW = 3  # sources of data/world-pivot-new
SIZES = {"student": "model/llava-student", "small": "model/llava-small"}
CENTRE = (1.0, 0.4)  # amount and share where both axes cross
OTHERS = ((1.0, 0.8), (1.0, 0.0), (2.0, 0.4), (0.25, 0.4), (0.5, 0.4))
Word = str | int | float | Path


@dataclass(frozen=True)
class Cell:
    """One encoder of one seed.

    Attributes:
        arm: `untouched`, `sft` or `dpo`.
        amount: triples of stage 2, as a multiple of `TRIPLES`. share: of them that are of the new distribution.
        size: language model of stages 1 and 2, of `SIZES`.
    """

    arm: str
    amount: float = 0.0
    share: float = 0.0
    size: str = "student"

    @property
    def name(self) -> str:
        """`dpo-1-.4-student`."""
        told = () if self.arm == "untouched" else (f"{self.amount:g}", f"{self.share:g}")
        return "-".join((self.arm, *told, self.size))

    @property
    def triples(self) -> tuple[int, int]:
        """Triples of the distribution of stage 1, and of each kind of the new one."""
        total = round(self.amount * TRIPLES)
        new = round(self.share * total / KINDS_OF_NEW)
        return total - KINDS_OF_NEW * new, new


def plan() -> list[Cell]:
    """Every cell: a cross of amounts and shares for one size, and its centre for the other."""
    cells = [Cell("untouched"), *(Cell(arm, *at) for at in (CENTRE, *OTHERS) for arm in ("sft", "dpo"))]
    return [*cells, Cell("untouched", size="small"), *(Cell(arm, *CENTRE, size="small") for arm in ("sft", "dpo"))]


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each stage; stage 2 takes three epochs of its triples.

    Attributes:
        language: each language model, on text. warmup: the encoder before language. projector, all: stage 1.
        fresh_projector, fresh: the new model.
    """

    language: int = 300
    warmup: int = 30
    projector: int = 80
    all: int = 500
    fresh_projector: int = 80
    fresh: int = 250


@dataclass(frozen=True)
class Rates:
    """Learning rates of stage 2: each the best of three by validation answers, on triples that no cell uses."""

    sft: float = 1e-4
    dpo: float = 3e-5


class Recipe:
    """The stages of one run directory.

    Args:
        root: where everything lies.
        steps: of each stage. rates: of stage 2.
        own_start: whether each seed has an encoder and a stage 1 of its own; else all start from those of seed 0.
        run: runs the words after `lightning-vlm`, its output appended to a log; gives the exit code.
    """

    def __init__(
        self,
        root: Path,
        *,
        steps: Steps | None = None,
        rates: Rates | None = None,
        own_start: bool = False,
        run: Runner = run_forked,
    ) -> None:
        self.root, self.steps, self.rates, self.run = root, steps or Steps(), rates or Rates(), run
        self.own_start = own_start

    def call(self, done: Path, log: Path, *words: Word) -> Path:
        """Run a command unless what it makes is there; what it makes.

        Raises:
            RuntimeError: it failed, or did not make it; names its log.
        """
        if not done.exists():
            if code := self.run([str(word) for word in words], log):
                raise RuntimeError(f"failed with code {code}; see {log}")
            if not done.exists():
                raise RuntimeError(f"{done} was not made; see {log}")
        return done

    def fit(self, where: Path, experiments: Sequence[str], *settings: Word) -> Path:
        """A training run; its model."""
        files = [word for name in experiments for word in ("-c", name)]
        resume = ["--resume"] if (where / "config.yaml").exists() else []
        common = ("-c", "logger/csv", "--logger.MLFlow", "null", "--data.workers", 0, "--run_dir", where)
        log = where.with_name(f"{where.name}.log")
        return self.call(where / "model", log, "fit", *files, *common, *settings, *resume)

    def language(self, name: str, size: str, seed: int) -> Path:
        """A language model that learned from text, as a directory of its own."""
        where = self.root / f"language-{name}"
        model = self.fit(
            where,
            ("experiment/world-pivot-language", SIZES[size]),
            *("--backbone.seed", seed, "--seed_everything", seed, "--trainer.max_steps", self.steps.language),
        )
        out = self.root / f"language-{name}-alone"
        return self.call(out, where.with_name(f"{where.name}.log"), "take-language", model, "--out", out)

    def compose(self, where: Path, encoder: Path, language: Path, seed: int) -> Path:
        """A VLM of an encoder, a new projector and a language model."""
        words = ("compose", "--vision", encoder, "--language", language, "--form", "llava", "--seed", seed)
        layer = ("--vision_feature_layer", -1)  # as in the embedded models: the last one has learned
        return self.call(where, where.with_name(f"{where.name}.log"), *words, *layer, "--out", where)

    def take_encoder(self, model: Path, out: Path) -> Path:
        """The bare tower of a VLM."""
        return self.call(out, out.with_name(f"{out.name}.log"), "take-encoder", model, "--out", out)

    def encoder(self, seed: int) -> Path:
        """The encoder before any language: a short visual warm-up, so that there is something left to learn."""
        where = self.root / f"seed-{seed}" / "warmup"
        steps = ("--trainer.max_steps", self.steps.warmup, "--seed_everything", seed, "--backbone.seed", seed)
        model = self.fit(where, ("experiment/world-warmup", SIZES["student"]), *steps, "--callbacks.Checkpoint", "null")
        return self.take_encoder(model, where.with_name("encoder"))

    def learn(self, where: Path, start: Path, experiment: str, steps: int, seed: int) -> Path:
        """One stage of learning from questions and captions."""
        words = ("--backbone.path", start, "--trainer.max_steps", steps, "--seed_everything", seed)
        return self.fit(where, (f"experiment/{experiment}",), *words)

    def stage_1(self, size: str, seed: int) -> Path:
        """Encoder in front of a language model: projector alone, then all parts."""
        seed = seed if self.own_start else 0
        where = self.root / f"seed-{seed}" / f"stage-1-{size}"
        language = self.language(size, size, 1000 + list(SIZES).index(size))
        start = self.compose(where / "composed", self.encoder(seed), language, seed)
        start = self.learn(where / "projector", start, "world-pivot-projector", self.steps.projector, 200 + seed)
        return self.learn(where / "all", start, "world-pivot-all", self.steps.all, seed)

    def stage_2(self, cell: Cell, seed: int) -> Path:
        """The VLM after post-training."""
        start = self.stage_1(cell.size, seed)
        if cell.arm == "untouched":
            return start
        near, new = cell.triples
        files = [f"experiment/world-pivot-{cell.arm}", *(("data/world-pivot-new",) if new else ())]
        sizes: list[Word] = ["--vars.near", near, *(("--vars.new", new) if new else ())]
        words = ("--backbone.path", start, "--seed_everything", 100 + seed, "--model.lr", getattr(self.rates, cell.arm))
        return self.fit(self.root / f"seed-{seed}" / cell.name / "post", files, *sizes, *words)

    def cell(self, cell: Cell, seed: int) -> None:
        """All stages of a cell, its answers and its probes."""
        where = self.root / f"seed-{seed}" / cell.name
        where.mkdir(parents=True, exist_ok=True)
        vlm = self.stage_2(cell, seed)
        self.test(where / "post-test", vlm)
        encoder = self.take_encoder(vlm, where / "encoder")
        language = self.language("fresh", "student", 1002)
        composed = self.compose(where / "composed", encoder, language, 300 + seed)
        steps = self.steps
        model = self.learn(where / "projector", composed, "world-pivot-projector", steps.fresh_projector, 300 + seed)
        model = self.learn(where / "fresh", model, "world-pivot-fresh", steps.fresh, 400 + seed)
        self.test(where / "fresh-test", model)
        self.probe(where / "probes.json", vlm, self.stage_1(cell.size, seed), encoder, model, composed)

    def probe(self, out: Path, vlm: Path, before: Path, encoder: Path, new: Path, language: Path) -> None:
        """What the probes say of a cell."""
        if not out.exists():
            probe_cell(vlm=vlm, before=before, encoder=encoder, new=new, language=language, out=out)

    def test(self, where: Path, model: Path) -> None:
        """Greedy answers of a model."""
        words = ("test", "-c", "experiment/world-pivot-test", "--logger.MLFlow", "null", "--data.workers", 0)
        done = where / "test.json"
        self.call(done, where.with_name(f"{where.name}.log"), *words, "--run_dir", where, "--backbone.path", model)


def draw(results: Results, root: Path) -> None:
    """gaps.png, and maps.png: gradient maps before and after each arm at the centre, of the first seed there is."""
    if results.pairs("new model"):
        draw_gaps(results, root / "gaps.png")
    cells = {"untouched": Cell("untouched"), "SFT": Cell("sft", *CENTRE), "DPO": Cell("dpo", *CENTRE)}
    if seeds := results.seeds("probes", *(cell.name for cell in cells.values())):
        files = {title: root / f"seed-{seeds[0]}" / cell.name / "probes.json" for title, cell in cells.items()}
        draw_maps(files, root / "maps.png", seed=seeds[0])


def preload() -> None:
    """Import what every stage needs, so that the forks need not; one thread is fastest for models this small."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    import torch
    import transformers  # noqa: F401

    import lightning_vlm.cli.app
    import lightning_vlm.compose  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/pivot"), help="default runs/pivot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default 0 1 2)")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these, such as dpo-1-0.4-student")
    parser.add_argument("--own_start", action="store_true", help="a stage 1 per seed (default: all share seed 0's)")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    cells = plan()
    names = [cell.name for cell in cells]
    if unknown := [name for name in args.cells or () if name not in names]:
        parser.error(f"no cell is named {unknown[0]!r}; choose among {', '.join(names)}")
    recipe = Recipe(args.run_dir, own_start=args.own_start)
    if not args.report:
        preload()
        for cell in cells:  # every seed of a cell before the next one: what is there has its intervals
            for seed in args.seeds if not args.cells or cell.name in args.cells else ():
                recipe.cell(cell, seed)
    results = Results(args.run_dir, cells, args.seeds)
    print(report(results))
    draw(results, args.run_dir)


if __name__ == "__main__":
    main()
