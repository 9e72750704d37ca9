"""The same samples give the same gradient, however the step is cut up and over how many processes it is spread.

The reference is one process, one micro-batch, fp64. Everything else runs through the whole path (loader, Lightning,
micro-batches, reduction) and must agree to 1e-9 in fp64 and to 1e-5 relative in fp32.
"""

import json

import pytest
import torch
from PIL import Image

from lightning_vlm.models.tiny import make_tiny

from .conftest import run_scenarios

BIG = 10**6
SETTINGS = {"lr": 1e-3, "clip_norm": 0.0, "micro_batch_tokens": BIG}


def write_data(folder, name, pictured):
    """Rows with one or two small images where `pictured(i)`, text alone elsewhere; answers of different length."""
    folder.mkdir(parents=True, exist_ok=True)
    for color in range(3):
        Image.new("RGB", (28 * (1 + color % 2), 28), (80 * color, 20, 200)).save(folder / f"{color}.png")
    lines = []
    for i in range(13):
        images = [f"{(i + k) % 3}.png" for k in range(1 + i % 2)] if pictured(i) else []
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": f"Question {i}: what is it?"}]
        answer = {"role": "assistant", "content": "word " * (1 + i % 5) + str(i)}
        lines.append({"id": f"s{i}", "messages": [{"role": "user", "content": content}, answer], "images": images})
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Model and data directories, the two-process records and the one-process records of the scenarios."""
    folder = tmp_path_factory.mktemp("step")
    model = str(make_tiny("qwen2_5_vl", folder / "model"))
    tied = str(make_tiny("llava_clip_qwen2", folder / "tied", tie_word_embeddings=True))
    mixed = write_data(folder, "mixed", lambda i: i % 3 > 0)
    even = write_data(folder, "even", lambda i: i % 2 == 0)  # in order, rank 1 of 2 never sees an image
    base = {"model": model, "data": mixed, "settings": SETTINGS, "shuffle": False, "batch_size": 7}
    frozen = SETTINGS | {"parts": {"vision": {"freeze": True}}}

    def spec(name, **changes):
        return base | {"name": name, "run_dir": str(folder / "runs" / name)} | changes

    one = [
        spec("reference"),
        spec("fp32", dtype="float32"),
        *(spec(f"budget{b}", settings=SETTINGS | {"micro_batch_tokens": b}) for b in (1, 120, 300)),
        spec("budget120_fp32", dtype="float32", settings=SETTINGS | {"micro_batch_tokens": 120}),
        spec("recomputed", settings=SETTINGS | {"share_images": False, "micro_batch_tokens": 300}),
        spec("chunks", chunk_bytes=8 * 200),
        spec("even", data=even, steps=2),
        spec("two_terms", algorithm="TwoTerms"),
        spec("two_terms_cut", algorithm="TwoTerms", settings=SETTINGS | {"micro_batch_tokens": 120}),
        spec("tied", model=tied),
        spec("frozen", settings=frozen),
        spec("autocast", dtype="float32", precision="bf16-mixed"),
        spec("masters", dtype="bfloat16", settings=SETTINGS | {"master_weights": True, "micro_batch_tokens": 120}),
        spec("clipped", settings=SETTINGS | {"clip_norm": 0.1}, steps=3),
    ]
    asked = {"model": "embedded:qwen2_5_vl-tiny", "world": {"size": 8}, "benchmark": {"size": 5}, "steps": 2}
    one.append(spec("asked", **asked))
    two = [
        *(spec(f"{s}_asked", strategy=s, **asked) for s in ("ddp", "fsdp2")),
        *(spec(f"{s}", strategy=s) for s in ("ddp", "fsdp2")),
        *(spec(f"{s}_cut", strategy=s, settings=SETTINGS | {"micro_batch_tokens": 120}) for s in ("ddp", "fsdp2")),
        *(spec(f"{s}_even", strategy=s, data=even, steps=2) for s in ("ddp", "fsdp2")),
        *(spec(f"{s}_two_terms", strategy=s, algorithm="TwoTerms") for s in ("ddp", "fsdp2")),
        *(spec(f"{s}_tied", strategy=s, model=tied) for s in ("ddp", "fsdp2")),
        *(spec(f"{s}_frozen", strategy=s, settings=frozen) for s in ("ddp", "fsdp2")),
        *(spec(f"{s}_clipped", strategy=s, settings=SETTINGS | {"clip_norm": 0.1}, steps=3) for s in ("ddp", "fsdp2")),
        spec("ddp_fp32", strategy="ddp", dtype="float32"),
        spec("fsdp2_bf16", strategy="fsdp2", dtype="float32", mixed_precision="bf16"),
    ]
    records = {}
    for processes, specs in ((1, one), (2, two)):
        done = run_scenarios(specs, folder / f"p{processes}", processes=processes)
        assert done.returncode == 0, done.stderr[-4000:]
        records |= torch.load(folder / f"p{processes}" / "records.pt")
    return records


def gap(a, b):
    """Largest difference of two sets of tensors, relative to the largest value."""
    assert a.keys() == b.keys()
    scale = max(t.abs().max().item() for t in b.values())
    return max((a[k].double() - b[k].double()).abs().max().item() for k in b) / scale


@pytest.mark.parametrize("name", ["budget1", "budget120", "budget300", "recomputed", "chunks"])
def test_one_process_fp64(world, name):
    assert gap(world[name]["gradients"], world["reference"]["gradients"]) < 1e-9
    assert world[name]["losses"] == pytest.approx(world["reference"]["losses"], rel=1e-12)


def test_budgets_really_cut_the_step(world):
    cut = [world[n]["metrics"]["train/micro_batches"] for n in ("reference", "budget300", "budget120", "budget1")]
    assert cut[0] == 1 < cut[1] < cut[2] < cut[3] == 7


def test_fp32(world):
    assert gap(world["budget120_fp32"]["gradients"], world["fp32"]["gradients"]) < 1e-5
    assert gap(world["ddp_fp32"]["gradients"], world["fp32"]["gradients"]) < 1e-5
    assert gap(world["fp32"]["gradients"], world["reference"]["gradients"]) < 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("suffix", ["", "_cut"])
def test_two_processes_with_four_and_three_samples(world, strategy, suffix):
    assert gap(world[strategy + suffix]["gradients"], world["reference"]["gradients"]) < 1e-9
    assert gap(world[strategy + suffix]["weights"], world["reference"]["weights"]) < 1e-9


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["even", "tied", "frozen", "clipped"])
def test_two_processes_no_image_on_one_rank_tied_frozen_clipped(world, strategy, name):
    assert gap(world[f"{strategy}_{name}"]["gradients"], world[name]["gradients"]) < 1e-9
    assert gap(world[f"{strategy}_{name}"]["weights"], world[name]["weights"]) < 1e-8
    assert world[f"{strategy}_{name}"]["losses"] == pytest.approx(world[name]["losses"], rel=1e-8)


@pytest.mark.parametrize("name", ["two_terms_cut", "ddp_two_terms", "fsdp2_two_terms"])
def test_two_terms_keep_their_own_denominators(world, name):
    assert gap(world[name]["gradients"], world["two_terms"]["gradients"]) < 1e-9


def test_frozen_vision_has_no_gradient_and_does_not_move(world):
    vision = [n for n in world["frozen"]["weights"] if ".visual." in n and ".merger." not in n]
    assert vision and not any(n in world["frozen"]["gradients"] for n in vision)
    moved = world["reference"]["weights"], world["frozen"]["weights"]
    assert any(not torch.equal(moved[0][n], moved[1][n]) for n in vision)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_evaluation_gives_the_same_records_on_two_ranks(world, strategy):
    """Five questions, two samples each, on two ranks of three and two: each asked once, and answered alike."""
    records = world["asked"]["records"]["world"]
    assert len(records) == 10 and len({(r["id"], r["sample"]) for r in records}) == 10
    assert len({r["output"] for r in records}) > 1
    assert world[f"{strategy}_asked"]["records"]["world"] == records
    (scores,) = world["asked"]["evaluated"]
    assert {"val/world/accuracy", "val/world/pass_at_2"} <= scores.keys()
    assert world[f"{strategy}_asked"]["evaluated"] == [scores, scores]


def test_scoring_that_fails_on_the_first_rank_ends_both(tmp_path):
    """The second rank waits for the scores; it must hear of the error instead of waiting for ever."""
    spec = {"name": "asked", "model": "embedded:qwen2_5_vl-tiny", "world": {"size": 8}, "benchmark": {"size": 5}}
    spec |= {"strategy": "ddp", "steps": 1, "unscorable": True, "run_dir": str(tmp_path / "run")}
    done = run_scenarios([spec], tmp_path, processes=2, timeout=120)
    assert done.returncode == 1 and done.stderr.count("ValueError: the scorer is not installed") == 2


@pytest.mark.parametrize("name", ["autocast", "masters", "fsdp2_bf16"])
def test_bfloat16_computes_nearly_the_same_over_float32_gradients(world, name):
    """bfloat16 keeps 8 bits: losses agree to half a per cent, gradients to five, in float32."""
    assert world[name]["losses"] == pytest.approx(world["fp32"]["losses"], rel=5e-3)
    assert gap(world[name]["gradients"], world["fp32"]["gradients"]) < 5e-2
    assert {g.dtype for g in world[name]["gradients"].values()} == {torch.float32}
    kept = torch.bfloat16 if name == "masters" else torch.float32
    assert {w.dtype for w in world[name]["weights"].values()} == {kept}
