"""A finished study on disk with numbers that can be done by hand, as `lightning_vlm.studies.report` reads it.

Sixteen answers to each of 20 problems after RL: k problems always right, four right in 4 of 16, the rest never. So
pass@1 = (16 k + 4 · 4) / 320 = (k + 1) / 20 and pass@16 = (k + 4) / 20. Before: 16 problems right in 4 of 16, so that
pass@1 = .2 and pass@16 = .8.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lightning_vlm.studies.claims import judge
from lightning_vlm.studies.endpoints import RunAt, measure, parse_claim, parse_endpoint
from lightning_vlm.studies.results import Measured, Results, StageRow

DRAWS, PROBLEMS = 16, 20
ARMS = {"none": 0, "SFT, over-trained": 1, "OPD": 5}  # what each adds to k
CONDITIONS = {"few prompts": 6, "many prompts": 8}
SEEDS = {0: 0, 1: 1, 2: 2}
HOSTILE = '<script>alert("x")</script><img src="https://example.org/x.png" onerror="alert(1)">\x1b[31m\u202e'
YAML = "question: Which warm start serves RL best?\naxes:\n  arm: {none: {}, OPD: {}}  # <b>not bold</b>\n"


def study(
    root: Path, *, arms: dict[str, int] = ARMS, conditions: dict[str, int] = CONDITIONS, seeds: dict[int, int] = SEEDS
) -> Results:
    """A study with everything: arms start RL from other models, under each condition, with each seed.

    Args:
        root: folder of its runs. arms, conditions, seeds: name → what it adds to k.
    """
    groups = [{"condition": name} for name in conditions] if conditions else [{}]
    labels = [" · ".join([arm, *condition]) for arm in arms for condition in ([[c] for c in conditions] or [[]])]
    axes = {"arm": [*arms], "condition": [*conditions], "seed": [str(seed) for seed in seeds]}
    found = Results(
        name="warm-start",
        question="Which warm start serves RL best?",
        about="Each arm starts RL from another model.\n\nAll else is equal.",
        file=Path("configs/study/warm-start.yaml"),
        text=YAML,
        run_dir=root,
        axes={axis: values for axis, values in axes.items() if values},
        labels=labels,
        groups=groups,
        seeds=list(seeds),
        stages=[],
        measured=[],
        claims=[],
        budget=[],
        budget_note="Budgets are steps, measured, in rl.",
        report=REPORT,
        environment={"versions": {"torch": "2.13.0"}, "devices": ["cpu"], "commits": ["abc123"]},
        differences=[],
    )
    _base(found)
    for arm, gain in arms.items():
        start = _row(found, "before", {"arm": arm}, None, {"backbone.path": "base"}, 40.0)
        evaluation(start.folder, "sampled", [4] * 16 + [0] * 4, arm=arm, seed=None)
        for condition, more in conditions.items() or [("", 0)]:
            for seed, luck in seeds.items():
                _run(found, arm, condition, seed, gain + more + luck)
    _ask(found)
    return found


def _base(found: Results) -> None:
    """What all arms share, with a cost of its own."""
    _row(found, "base", {}, None, {}, 100.0, steps=600, tokens=50_000)


def _run(found: Results, arm: str, condition: str, seed: int, k: int) -> None:
    at = {"arm": arm, **({"condition": condition} if condition else {})}
    rl = _row(found, "rl", at, seed, {"backbone.path": "base"}, 60.0 + seed, steps=70, tokens=1000)
    lines = ["step,epoch,train/entropy,val/greedy/accuracy"]
    for step in range(10, 71, 10):
        entropy = 0.9 - 0.01 * step + 0.01 * seed + 0.1 * (arm == "OPD") + 0.02 * (arm == "none")
        lines.append(f"{step},0,{entropy:.4f},{(k + 1) / 20 * step / 70:.4f}")
    _write(rl.folder / "csv" / "metrics.csv", "\n".join(lines) + "\n")
    probes = [{"step": step, "chosen": -0.2 - 0.001 * step * (seed + 1), "n": 8.0} for step in (0, 35, 70)]
    _write(rl.folder / "probes" / "probe" / "summary.jsonl", "".join(json.dumps(line) + "\n" for line in probes))
    after = _row(found, "after", at, seed, {"backbone.path": rl.name}, 30.0)
    evaluation(after.folder, "sampled", [16] * k + [4] * 4 + [0] * (16 - k), arm=arm, seed=seed)


def _row(
    found: Results,
    stage: str,
    at: dict[str, str],
    seed: int | None,
    inputs: dict[str, str],
    seconds: float,
    **costs: Any,
) -> StageRow:
    parts = [stage, *at.values(), *([] if seed is None else [str(seed)])]
    name = "-".join(parts).replace(" ", "-").replace(",", "")
    began = 1_700_000_000.0 + 100 * len(found.stages)
    given = {key: {"instance": value, "path": "model", "fingerprint": f"of-{at}"} for key, value in inputs.items()}
    record = {
        "name": name,
        "stage": stage,
        "state": "done",
        "exit": 0,
        "seconds": seconds,
        "cpu_seconds": seconds * 1.5,
        "peak_gib": 0.5 + 0.25 * len(at),
        "threads": 1,
        "started": began,
        "ended": began + seconds,
        "inputs": given,
    }
    folder = found.run_dir / name
    place = at | ({} if seed is None else {"seed": str(seed)})
    row = StageRow(
        name=name,
        stage=stage,
        label=" · ".join(at.values()) or stage,
        seed=seed,
        at=place,
        state="done",
        folder=folder,
        record=record,
        costs=costs,
    )
    _write(folder / "stage.json", json.dumps(record))
    _write(folder / "costs.json", json.dumps(costs))
    found.stages.append(row)
    return row


def evaluation(folder: Path, benchmark: str, right: list[int], *, arm: str, seed: int | None) -> None:
    """What an evaluation leaves: answers, scores, and pictures of the first samples.

    Args:
        folder: of the run. right: how many of its answers are right, for each problem.
    """
    place = folder / "evaluations" / benchmark / "step-00000070"
    lines = []
    for index, count in enumerate(right):
        for draw in range(DRAWS):
            output = f"a {_colour(index)} {_shape(index)}" if draw < count else "a grey cloud, I suppose"
            if arm == "OPD" and index == 1 and draw == 0:
                output = HOSTILE
            record = {
                "id": f"q-{index}",
                "sample": draw,
                "prompt": "<image>What is shown?",
                "output": output,
                "extraction": output,
                "gold": f"a {_colour(index)} {_shape(index)}",
                "score": float(draw < count),
            }
            lines.append(json.dumps(record) + "\n")
    _write(place / "per_example.jsonl", "".join(sorted(lines)))  # by id, as texts: q-10 before q-2
    start = {"path": "base", "hash": f"{arm}-hash"}
    conditions = {"benchmark": benchmark, "rule": "world/exact", "prompt_id": "world/default", "sampling": {"n": DRAWS}}
    provenance = {"provenance": {"arm": arm, "seed": seed, "start": start, "step": 70, "model": None}}
    _write(place / "conditions.json", json.dumps(conditions | provenance))
    _write(place / "scores.json", json.dumps({"rule": "world/exact", "n": len(right), "intervals": {}}))
    (place / "images").mkdir()
    rows = []
    for index in range(3):
        _picture(index).save(place / "images" / f"{index:03d}-0.png")
        rows += [f'<tr class="right"><td><pre>q-{index}</pre></td><td><img src="data:,"></td></tr>'] * DRAWS
    _write(place / "table.html", f"<table><tr><th>id</th></tr>{''.join(rows)}</table>")


def _colour(index: int) -> str:
    return ("red", "blue", "green", "orange")[index % 4]


def _shape(index: int) -> str:
    return ("square", "circle", "triangle")[index % 3]


def _picture(index: int) -> Image.Image:
    picture = Image.new("RGB", (160, 160), "white")
    pen, box = ImageDraw.Draw(picture), (40, 40, 120, 120)
    if _shape(index) == "square":
        pen.rectangle(box, fill=_colour(index))
    elif _shape(index) == "circle":
        pen.ellipse(box, fill=_colour(index))
    else:
        pen.polygon([(80, 40), (120, 120), (40, 120)], fill=_colour(index))
    return picture


ENDPOINTS = {
    "pass@1, in domain": {"stage": "after", "benchmark": "sampled", "metric": "pass@1"},
    "pass@16": {"stage": "after", "benchmark": "sampled", "metric": "pass@16"},
    "entropy at the end of RL": {
        "stage": "rl",
        "curve": "train/entropy",
        "at": "end",
        "higher": "neither",
        "unit": "nats",
    },
}
REPORT = {
    "curves": [
        {"stage": "rl", "metric": "val/greedy/accuracy", "title": "Accuracy during RL"},
        {"stage": "rl", "metric": "train/entropy"},
    ],
    "pass_at_k": {"before": "before", "after": "after", "benchmark": "sampled"},
    "samples": {"stage": "after", "benchmark": "sampled", "count": 3},
    "probes": [{"stage": "rl", "probe": "probe", "metric": "chosen"}],
}


def _ask(found: Results) -> None:
    """Endpoints, claims, budget and the rest of what the lead's part fills in."""
    at = {row.label: {a: v for a, v in row.at.items() if a != "seed"} for row in found.stages}
    labels = {label: at[label] for label in found.labels}
    pairs = [
        (a, b)
        for i, a in enumerate(found.labels)
        for b in found.labels[i + 1 :]
        if labels[a].get("condition") == labels[b].get("condition")
    ]
    for name, keys in ENDPOINTS.items():
        endpoint = parse_endpoint(name, keys)
        runs = [RunAt(row.label, row.at, row.seed, row.folder) for row in found.runs(endpoint.stage)]
        found.measured.append(Measured(endpoint=endpoint, comparison=measure(endpoint, runs, pairs=pairs)))
    first, *_, last = (place["arm"] for place in labels.values())
    claims = [
        {"says": f"{last} ends above {first}.", "expect": {"greater": last, "than": first}},
        {"says": "Arms end within two points of each other.", "expect": {"within": 2.0}},
    ]
    for claim in claims:
        parsed = parse_claim(
            claim | {"source": "the article", "endpoint": "pass@1, in domain"}, [m.endpoint for m in found.measured]
        )
        found.claims.extend(judge(parsed, found.measured[0].comparison, labels, found.groups))
    for label in found.labels:
        values = [float(row.costs["steps"]) for row in found.runs("rl") if row.label == label]
        found.budget.append({"label": label, "stage": "rl", "unit": "steps", "values": values, "equal": True})
    values = {label: f"{place['arm']}/model" for label, place in labels.items()}
    found.differences.append({"key": "rl: backbone.path", "values": values})


def broken(found: Results) -> Results:
    """The study with a failed run of RL, its evaluation waiting, unequal budgets, an endpoint without numbers."""
    lost, needy = found.runs("rl")[-1], found.runs("after")[-1]
    log = "epoch 1\n\x1b[31mValueError: reward is NaN <at step 12>\x1b[0m\n"
    _write(found.run_dir / "logs" / f"{lost.name}.log", log)
    new = {
        lost.name: replace(lost, state="failed", record=lost.record | {"exit": 1}),
        needy.name: replace(needy, state="waiting", record={}),
    }
    return replace(
        found,
        stages=[new.get(row.name, row) for row in found.stages],
        budget=[*found.budget[:-1], found.budget[-1] | {"values": [70.0, 70.0, 12.0], "equal": False}],
        measured=[
            *found.measured[:-1],
            replace(found.measured[-1], comparison=None, missing=f"{found.run_dir}/{lost.name} has no csv"),
        ],
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
