"""The reference's log-probs on disk: computed once, of these weights and no others, and by the weights of the start."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from lightning_vlm.models.tiny import make_tiny
from lightning_vlm.store import Store

from .conftest import run_scenarios
from .test_dpo import LORA, other  # noqa: F401
from .test_sft_c import BATCH, MODEL, SETTINGS, SIZE

STEPS, KILL_AT = 5, 3


def store_in(cache: Path) -> Path:
    """The folder of the only store in a cache."""
    (folder,) = (cache / "reference-logprobs").iterdir()
    return folder


def copy_altered(source: Path, target: Path, by: float) -> None:
    """A store under the same manifest whose values are others."""
    target.mkdir(parents=True)
    shutil.copy(source / "manifest.json", target)
    facts = json.loads((source / "manifest.json").read_text())
    old, new = (Store.at(folder, facts["kind"], facts["facts"]) for folder in (source, target))
    new.put({key: old.get(key) + by for key in old._entries})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, other):  # noqa: F811
    """Records of runs that follow each other on the same caches."""
    folder = tmp_path_factory.mktemp("reference")
    base = {"model": MODEL, "world": {"size": SIZE, "pairs": True}, "batch_size": BATCH, "algorithm": "DPO"}
    base |= {"steps": STEPS, "cache": str(folder / "cache")}
    settings = SETTINGS | {"reference": "cache", "lr": 1e-2, "micro_batch_tokens": 300}

    def spec(name, own=None, **changes):
        own = settings | (own or {})
        return base | {"name": name, "run_dir": str(folder / name), "settings": own} | changes

    records = {}

    def run(group, specs, processes=1):
        done = run_scenarios(specs, folder / group, processes=processes)
        assert done.returncode == 0, done.stderr
        records.update(torch.load(folder / group / "records.pt"))

    cut = spec("cut", checkpoint=True, cache=str(folder / "cut_cache"))
    run("first", [spec("whole"), spec("again"), spec("short", steps=2, cache=str(folder / "short"))])
    store = store_in(folder / "cache")
    records["stores"] = [store]
    copy_altered(store, folder / "stale" / "reference-logprobs" / store.name, -0.01)
    copy_altered(store, folder / "elsewhere", 0.0)
    killed = run_scenarios([cut | {"kill_at": KILL_AT}], folder / "killed")
    assert killed.returncode == -signal.SIGKILL
    shutil.rmtree(folder / "cut_cache")
    foreign = str(make_tiny("qwen2_5_vl", folder / "foreign"))
    refused = {"refused": True, "steps": 1}
    run(
        "second",
        [
            spec("cut", checkpoint=True, cache=str(folder / "cut_cache"), resume="last"),
            spec("stale", cache=str(folder / "stale"), **refused),
            spec("made_elsewhere", {"reference_cache": str(folder / "elsewhere"), "reference": None}),
            spec("other", model=other),
            spec("wrong_folder", {"reference_cache": str(store)}, model=other, **refused),
            spec("no_folder", {"reference_cache": str(folder / "nowhere")}, **refused),
            spec("foreign_tokens", {"reference_model": foreign}, **refused),
            spec("foreign_family", {"reference_model": "embedded:llava-tiny"}, **refused),
            spec("off_without_lora", {"reference": "adapters_off"}, **refused),
            spec("off_of_another", LORA | {"reference": "adapters_off", "reference_model": other}, **refused),
            spec("folder_online", {"reference": "online", "reference_cache": str(store)}, **refused),
            spec("folder_under_lora", LORA | {"reference": None, "reference_cache": str(store)}, **refused),
            spec("another_reference", {"reference_model": other}),
        ],
    )
    records["stores"] += sorted(path for path in store.parent.iterdir() if path != store)
    run(
        "both",
        [
            spec("two", steps=2, strategy="ddp", cache=str(folder / "two")),
            spec("two_after_one", steps=2, strategy="ddp", cache=str(folder / "short")),
            spec("two_sharded", steps=2, strategy="fsdp2", cache=str(folder / "sharded")),
        ],
        processes=2,
    )
    run("last", [spec("one_after_two", steps=2, cache=str(folder / "two"))])
    return records


def test_a_second_run_computes_nothing_and_is_equal_to_the_bit(runs):
    """15 pairs over two passes: each row once."""
    assert runs["whole"]["computed"] == 2 * SIZE and runs["again"]["computed"] == 0
    assert runs["again"]["losses"] == runs["whole"]["losses"]
    assert all(torch.equal(w, runs["again"]["weights"][n]) for n, w in runs["whole"]["weights"].items())


def test_other_weights_have_a_folder_of_their_own(runs):
    """The reference of `another_reference` is the model that `other` starts from, and its log-probs are there."""
    assert runs["other"]["computed"] == 2 * SIZE and runs["other"]["losses"] != runs["whole"]["losses"]
    assert len(runs["stores"]) == 2
    assert runs["another_reference"]["computed"] == 0
    known = {row[:2] + row[3:] for step in runs["other"]["rows"][0] for row in step}
    used = {row[:2] + row[3:] for step in runs["another_reference"]["rows"][0] for row in step}
    assert used == known and abs(runs["another_reference"]["losses"][0] - 0.6931) > 1e-3


def test_a_store_made_elsewhere_is_used_as_it_is(runs):
    assert runs["made_elsewhere"]["computed"] == 0
    assert runs["made_elsewhere"]["losses"] == runs["whole"]["losses"]


def test_a_resumed_run_without_its_cache_goes_back_to_the_weights_of_the_start(runs):
    """Bit for bit."""
    assert runs["cut"]["losses"] == runs["whole"]["losses"][KILL_AT:]
    assert all(torch.equal(value, runs["whole"]["weights"][name]) for name, value in runs["cut"]["weights"].items())


@pytest.mark.parametrize("name", ["two", "two_sharded"])
def test_two_processes_share_the_store(runs, name):
    """14 samples, seven on each rank: every row once, whoever needs it; later runs on one or two find all of them."""
    assert runs[name]["computed"] == runs["short"]["computed"] == 2 * 2 * BATCH
    assert runs["two_after_one"]["computed"] == runs["one_after_two"]["computed"] == 0
    for other_name in (name, "two_after_one", "one_after_two"):
        assert runs[other_name]["losses"] == pytest.approx(runs["short"]["losses"], rel=1e-9)


@pytest.mark.parametrize(
    "name, said",
    [
        ("stale", "differs from the policy by 0.01 nats per token before the first step"),
        ("wrong_folder", "was made with weights"),
        ("no_folder", "no manifest.json"),
        ("foreign_tokens", "has another vocabulary than backbone.path"),
        ("foreign_family", "they look at other pixels"),
        ("off_without_lora", "trains, too; set model.reference to cache or online"),
        ("off_of_another", "a reference_model was given"),
        ("folder_online", "model.reference_cache has no effect with model.reference 'online'"),
        ("folder_under_lora", "was made with weights"),
    ],
)
def test_references_that_do_not_fit_are_refused_in_one_line(runs, name, said):
    assert said in runs[name]["error"] and "\n" not in runs[name]["error"]
