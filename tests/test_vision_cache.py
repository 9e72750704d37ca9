"""A frozen tower's outputs kept on disk: nothing changes but that the tower no longer runs."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.parts import PartPolicy, apply_parts, projector_alone
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny
from lightning_vlm.models.vision import tower_of
from lightning_vlm.models.vision_cache import KIND, VisionCache
from lightning_vlm.rollouts.engine import PolicyEngine
from lightning_vlm.rollouts.sampling import Sampling
from lightning_vlm.store import Store

from .conftest import run_scenarios

SIZES = ((64, 64), (64, 64), (80, 60), (150, 270))  # height, width; the last has several attention windows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family → directory of a tiny model."""
    folder = tmp_path_factory.mktemp("models")
    return {family: make_tiny(family, folder / family) for family in TINY_FAMILIES}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LVLM_CACHE", str(tmp_path / "stores"))
    return tmp_path / "stores" / KIND


def frozen_policy(directory):
    """A policy whose projector alone trains, its processor, and four rows of one image each."""
    backbone = Backbone(path=str(directory))
    model, processor = load_model(backbone).eval(), load_processor(backbone)
    policy = Policy(model, family_of(model))
    apply_parts(model, policy.family, projector_alone(None))
    draw, encoder = np.random.default_rng(0), Encoder(processor, max_length=8192)
    rows = []
    for n, (height, width) in enumerate(SIZES):
        picture = Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))
        turns = [message("user", image(), text("what is it?")), message("assistant", text("a b c"))]
        rows.append(encoder.encode(Sample(f"s{n}", turns, images=[picture])))
    return policy, processor, rows


def learned(policy, batch):
    """Log-probs of a batch and the gradient of their sum."""
    policy.zero_grad()
    logprobs = policy.score(batch).logprobs
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def no_tower(policy):
    """A tower whose attention must not run; Qwen's own forward does, around blocks that are left out."""

    def refuse(*args, **kwargs):
        raise AssertionError("the tower ran")

    tower = tower_of(policy.model, policy.family)
    (tower.blocks[0].attn if policy.family.patch_rows else tower).forward = refuse


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_losses_and_gradients_are_equal_bit_for_bit(models, family, own_cache):
    policy, processor, rows = frozen_policy(models[family])
    batches = [
        collate([rows[i] for i in places], policy.family, processor.pad_id) for places in ((0, 2, 0, 3), (1, 0, 2))
    ]
    want = [learned(policy, batch) for batch in batches]
    assert want[0][1], "nothing learns"
    policy.vision_cache = VisionCache(policy, processor)
    for turn in range(2):  # computed, then found
        if turn:
            no_tower(policy)
        for (logprobs, gradients), batch in zip(want, batches, strict=True):
            got, moved = learned(policy, batch)
            assert torch.equal(got, logprobs)
            assert moved.keys() == gradients.keys()
            assert all(torch.equal(moved[name], gradients[name]) for name in gradients)
    assert policy.vision_cache.computed == 4  # distinct images; the second batch brought one more
    assert policy.vision_cache.found == 2 + 6


def test_another_run_finds_what_one_has_computed_and_generates_without_the_tower(models, own_cache):
    policy, processor, rows = frozen_policy(models["qwen2_5_vl"])
    sampling = Sampling(temperature=1.0, max_new_tokens=5)
    ids = [
        [c.ids for c in own]
        for own in PolicyEngine(policy, processor).generate(rows, n=2, sampling=sampling, keys=(0, 0))
    ]
    policy.vision_cache = VisionCache(policy, processor)
    policy.score(collate(rows, policy.family, processor.pad_id))

    other, processor, rows = frozen_policy(models["qwen2_5_vl"])
    other.vision_cache = VisionCache(other, processor)
    other.score(collate(rows[:1], other.family, processor.pad_id))  # checks the first image it finds
    no_tower(other)
    found = PolicyEngine(other, processor).generate(rows, n=2, sampling=sampling, keys=(0, 0))
    assert [[c.ids for c in own] for own in found] == ids
    assert other.vision_cache.computed == 0
    assert other.vision_cache.store.nbytes(rows[0].images[0].key) == 16 * 32 * 4  # patches, width, bytes
    assert "vision features: 4 images" in str(other.vision_cache)


def test_a_tower_that_trains_is_refused(models, own_cache):
    backbone = Backbone(path=str(models["llava_clip_qwen2"]))
    model, processor = load_model(backbone), load_processor(backbone)
    policy = Policy(model, family_of(model))
    apply_parts(model, policy.family, {"language": PartPolicy(freeze=True)})
    with pytest.raises(
        ValueError, match=r"frozen vision tower.*model\.vision_tower.* trains: set parts\.vision\.freeze"
    ):
        VisionCache(policy, processor)


def folder_of(own_cache):
    (folder,) = own_cache.iterdir()
    return folder


def test_a_named_store_of_other_weights_or_other_pixels_is_refused(models, own_cache):
    policy, processor, _ = frozen_policy(models["llava_clip_qwen2"])
    VisionCache(policy, processor)
    folder = folder_of(own_cache)
    VisionCache(policy, processor, folder=folder)

    processor.hf.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="was made with image_processor"):
        VisionCache(policy, processor, folder=folder)
    processor = load_processor(Backbone(path=str(models["llava_clip_qwen2"])))
    with torch.no_grad():
        tower_of(policy.model, policy.family).encoder.layers[0].mlp.fc1.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="was made with weights"):
        VisionCache(policy, processor, folder=folder)
    with pytest.raises(ValueError, match=r"no store of vision-features"):
        VisionCache(policy, processor, folder=own_cache / "elsewhere")


def test_other_pixels_of_the_same_picture_are_not_found(models, own_cache):
    """Keys are of what the tower sees: with another image processor it is run, never answered from the old store."""
    policy, processor, rows = frozen_policy(models["llava_clip_qwen2"])
    policy.vision_cache = VisionCache(policy, processor)
    policy.score(collate(rows, policy.family, processor.pad_id))
    processor.hf.image_processor.image_mean = [0.1, 0.2, 0.3]
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert processor.image(picture)[0].key not in policy.vision_cache.store


def test_features_that_the_tower_would_not_give_are_found_out(models, own_cache):
    policy, processor, rows = frozen_policy(models["llava_clip_qwen2"])
    cache = VisionCache(policy, processor)
    key = rows[0].images[0].key
    wrong = 0.1 * torch.ones(1, 1, 17, 32)
    Store.at(cache.store.folder, KIND, cache.store.facts).put({key: wrong})
    policy.vision_cache = VisionCache(policy, processor)
    with pytest.raises(ValueError, match="is stale: the tower gives other features"):
        policy.score(collate(rows[:1], policy.family, processor.pad_id))


LENGTH = {"group_size": 2, "rollout": {"temperature": 1.0, "max_new_tokens": 6, "stop": ["e"]}}
LENGTH |= {"rewards": {"length": {"kind": "length", "target": 4}}}
ALGORITHMS = {
    "SFT": {},
    "DPO": {"weighting": "cooling", "reference": "online"},
    "GRPO": LENGTH | {"kl_beta": 0.1},
    "OPD": {k: v for k, v in LENGTH.items() if k != "rewards"} | {"teacher": "embedded:qwen2_5_vl-small"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Records by name: every algorithm with the cache and without, alone, and on two processes."""
    folder = tmp_path_factory.mktemp("cached")

    def spec(name, algorithm, **changes):
        settings = {"lr": 1e-2, "micro_batch_tokens": 200, "adapter_only": True} | ALGORITHMS[algorithm]
        settings |= {"vision_cache": True} if "cached" in name else {}
        base = {"model": "embedded:qwen2_5_vl-tiny", "world": {"size": 12, "pairs": True}, "steps": 4, "batch_size": 4}
        base |= {"algorithm": algorithm, "name": name, "run_dir": str(folder / name), "settings": settings}
        return base | {"cache": str(folder / name / "stores")} | changes

    one = [
        spec(f"{kind} {algorithm}", algorithm, dtype=dtype)
        for algorithm in ALGORITHMS
        for kind, dtype in (("plain", "float32"), ("cached", "float32"))
    ]
    one.append(spec("plain", "SFT"))
    two = [
        spec(f"{kind} {strategy}", "SFT", strategy=strategy)
        for strategy in ("ddp", "fsdp2")
        for kind in ("plain", "cached")
    ]
    mixed = spec("cached bf16", "SFT", strategy="fsdp2", dtype="float32", mixed_precision="bf16")
    records = {}
    for name, specs, processes in (("one", one, 1), ("two", [*two, mixed], 2)):
        done = run_scenarios(specs, folder / name, processes=processes)
        assert done.returncode == 0, done.stderr
        records |= torch.load(folder / name / "records.pt")
    return records


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_is_the_same_bit_for_bit(runs, algorithm):
    plain, cached = runs[f"plain {algorithm}"], runs[f"cached {algorithm}"]
    assert plain["losses"] == cached["losses"] and len(plain["losses"]) == 4
    assert all(torch.equal(weight, cached["weights"][name]) for name, weight in plain["weights"].items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_look_up_what_they_need(runs, strategy):
    """Not every rank misses the same images, nor does the tower run on every rank."""
    for name in (f"plain {strategy}", f"cached {strategy}"):
        assert runs[name]["losses"] == pytest.approx(runs["plain"]["losses"], rel=1e-9)
        for parameter, weight in runs["plain"]["weights"].items():
            assert torch.allclose(runs[name]["weights"][parameter], weight, atol=1e-9)


def test_the_projector_of_a_sharded_run_computes_in_its_precision(runs):
    assert runs["cached bf16"]["losses"] == pytest.approx(runs["plain"]["losses"], rel=2e-2)
