"""What the encoder probes say of one cell of `tools.pivot_study`, and the pictures of its gradient maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = 4  # questions whose gradient maps are kept for pictures
QUESTIONS, CAPTIONS = 200, 400
PROBED = {
    "linear": "24 pairs of colour and shape from mean-pooled patches of noisy pictures: accuracy, %",
    "segmentation": "patch probe on noisy pictures: recall, mean over classes, %",
    "IoU": "the same probe: intersection over union, mean over classes, %",
    "energy": "share of the gradient that falls on what is asked about, through the model of stage 2, %",
    "energy, new model": "the same through the new model, %",
    "pointing": "largest gradient on what is asked about, through the model of stage 2, %",
    "alignment": "mutual 10-NN with the fresh language model's captions, %",
    "moved: vision": "‖after − before‖ / ‖before‖ of stage 2, %",
    "moved: projector": "the same of the projector, %",
    "moved: language": "the same of the language model, %",
}


def probe_cell(*, vlm: Path, before: Path, encoder: Path, new: Path, language: Path, out: Path) -> None:
    """Probe one cell and write its figures, by column of `PROBED`, and maps of a few questions as JSON.

    Args:
        vlm: the model after stage 2. before: the model that stage 2 started from. encoder: the bare tower of `vlm`.
        new: the re-assembled model. language: a VLM of the fresh language model before it learned here. out: the file.
    """
    from lightning_vlm.data.world import WorldSource
    from lightning_vlm.probes import encoder as probes
    from lightning_vlm.probes.encoder.alignment import language_of

    tower = probes.load_encoder(encoder)
    linear = probes.linear_probe(tower, probes.world_classes(train=480, test=960))
    patches = probes.segmentation_probe(tower, probes.world_segments(train=100, test=200), seeds=(0,), steps=150)
    figures = {"linear": 100 * linear.accuracy, "segmentation": 100 * patches.recall, "IoU": 100 * patches.iou}
    questions = probes.world_questions(size=QUESTIONS)
    maps = {}
    for name, path in (("", vlm), (", new model", new)):
        found = probes.gradient_maps(probes.load_encoder(path), questions)
        summary = found.summary()
        figures[f"energy{name}"] = 100 * summary["energy"][0]
        if not name:
            figures["pointing"] = 100 * summary["pointing"][0]
        first = [n for n, inside in enumerate(found.inside) if inside is not None][:SHOWN]
        maps["new model" if name else "vlm"] = {questions[n].id: found.maps[n].tolist() for n in first}
    captions = list(WorldSource(split="test", size=CAPTIONS, families=["caption"], questions_per_image=1))
    aligned = probes.alignment(tower, captions, language=language_of(probes.load_encoder(language)))
    figures["alignment"] = 100 * aligned.score
    if vlm != before:
        for update in probes.part_updates(before, vlm):
            if update.block is None and update.part != "head":
                figures[f"moved: {update.part}"] = 100 * update.relative
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"figures": figures, "maps": maps}, indent=1) + "\n")


def read_probes(file: Path) -> dict[str, float]:
    """The figures of a cell; an untouched model has moved nothing."""
    figures: dict[str, float] = json.loads(file.read_text())["figures"]
    return {name: figures.get(name, 0.0) for name in PROBED}


def draw_maps(files: dict[str, Path], out: Path, *, seed: int = 0) -> None:
    """A picture of gradient maps: a row per question, the image, what is asked about, then one map per arm.

    Every map is scaled to its own largest value.

    Args:
        files: title → what `probe_cell` wrote. out: the PNG. seed: which is said in the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lightning_vlm.data.images import load_image
    from lightning_vlm.probes import encoder as probes

    maps: dict[str, dict[str, Any]] = {
        title: json.loads(file.read_text())["maps"]["vlm"] for title, file in files.items()
    }
    samples = {sample.id: sample for sample in probes.world_questions(size=QUESTIONS)}
    ids = list(next(iter(maps.values())))
    figure = Figure(figsize=(1.5 * (len(maps) + 2), 1.75 * len(ids)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ids), len(maps) + 2, squeeze=False)
    for row, id in enumerate(ids):
        sample = samples[id]
        image = np.asarray(load_image(sample.images[0]))
        _, masks = probes.data.asked_about(sample)
        panels = [image, masks.any(0), *(np.array(of[id]) for of in maps.values())]
        for column, panel in enumerate(panels):
            ax = axes[row, column]
            ax.set_axis_off()
            ax.imshow(panel, **({} if panel.ndim == 3 else {"cmap": "magma", "vmin": 0, "vmax": panel.max() or 1}))
            if row == 0:
                ax.set_title(["image", "asked about", *maps][column], fontsize=8)
        question = " ".join(p.get("text", "") for p in sample.prompt()[-1]["content"]).strip()
        axes[row, 0].text(0, -0.12, question, transform=axes[row, 0].transAxes, fontsize=6)
    figure.suptitle(f"gradient maps, seed {seed}", fontsize=9)
    figure.savefig(out, dpi=80)
