"""GRPO whose completions come from a server: weights go there before each rollout, pictures with each prompt."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_vlm.algorithms import generation
from lightning_vlm.models.load import load_model
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rollouts import ServerEngine

from .runs.scenarios import run
from .runs.vllm_server import VLLMServer
from .server_kit import RENDER, UPDATE, WireTransport

MODEL = "embedded:qwen2_5_vl-tiny"


def spec(tmp_path, server, **settings) -> dict:
    own = {
        "server": server.url,
        "rewards": {"letter": {"kind": "format", "pattern": ".*c.*"}},
        "group_size": 4,
        "lr": 1e-2,
    }
    own |= {"rollout": {"temperature": 1.0, "max_new_tokens": 10}, "correction": "truncate"}
    return {
        "name": "server",
        "model": MODEL,
        "dtype": "float32",
        "world": {"size": 12},
        "algorithm": "GRPO",
        "steps": 2,
        "batch_size": 3,
        "run_dir": str(tmp_path),
        "settings": own | settings,
    }


@pytest.fixture
def server(monkeypatch):
    with VLLMServer(load_processor(Backbone(path=MODEL))) as running:
        made = partial(ServerEngine, transport=WireTransport(running.wire))
        monkeypatch.setattr(generation, "ServerEngine", made)
        yield running


@pytest.mark.parametrize("lora", [False, True])
def test_two_steps_with_a_server(server, lora, tmp_path):
    """The server has the start's weights before the first rollout and the first step's before the second."""
    parts = (
        {"parts": {"language": {"lora_rank": 4}, "vision": {"freeze": True}, "projector": {"freeze": True}}}
        if lora
        else {}
    )
    record = run(spec(tmp_path, server, max_gap=100.0, **parts), 1)
    assert len(record["losses"]) == 2
    asked = [route for route, _ in server.calls]
    assert asked.count(RENDER) == 6  # a picture with every prompt
    assert [route for route in asked if route in UPDATE] == UPDATE * 2
    plain = load_model(Backbone(path=MODEL)).state_dict()
    assert set(server.weights) <= set(plain) and not any("lora" in name for name in server.weights)
    assert {name for name in plain if "lm_head" not in name} <= set(server.weights)
    moved = {name for name, tensor in server.weights.items() if not torch.equal(tensor, plain[name])}
    assert moved and (not lora or all("language_model" in name for name in moved))
    # What the server says of its draws is what correction weighs by.
    assert 0 < record["metrics"]["train/correction"] <= 2.0


def test_an_adapter_only_run_sends_what_is_frozen_once(server, tmp_path, monkeypatch):
    sent, sync = [], ServerEngine.sync
    taken = lambda named: [sent[-1].append(name) or (name, tensor) for name, tensor in named]  # noqa: E731
    monkeypatch.setattr(ServerEngine, "sync", lambda own, named: sent.append([]) or sync(own, taken(named)))
    run(spec(tmp_path, server, max_gap=100.0, adapter_only=True), 1)
    whole, moved = map(set, sent)
    plain = load_model(Backbone(path=MODEL)).state_dict()
    assert {name for name in plain if "lm_head" not in name} <= whole
    assert moved == {name for name in plain if "visual.merger" in name}
    assert {name for name, tensor in server.weights.items() if not torch.equal(tensor, plain[name])} <= moved


def test_a_server_that_draws_from_another_model_stops_the_run(server, tmp_path):
    with pytest.raises(ValueError, match="engine and trainer differ by"):
        run(spec(tmp_path, server), 1)
