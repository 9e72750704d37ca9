"""Ours against TRL on the very same completions: loss and every gradient of GRPO and its variants."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_vlm.algorithms import GRPO
from lightning_vlm.algorithms.reference import TOKENS
from lightning_vlm.algorithms.rollout import ADVANTAGES, ENGINE, OLD
from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.sources import SourceSpec, open_source
from lightning_vlm.losses.terms import objective
from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.packing import laid_out
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rewards import Reward
from lightning_vlm.rollouts import Sampling
from tools.bench.material import SIZES, make_material

pytest.importorskip("trl", reason="TRL is not installed (extra `trl`)")

LONGEST = 40
KL = {"beta": 0.3}
# Ours → TRL's: settings of the trainer, and of its arguments.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token mean": ({}, {"loss_type": "dapo"}),
    "clip higher": ({"clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "mean of means": ({"aggregation": "sequence"}, {"loss_type": "grpo"}),
    "constant": ({"aggregation": "constant"}, {"loss_type": "dr_grpo"}),
    "dual clip": ({"dual_clip": 1.3}, {"loss_type": "dapo", "delta": 1.3}),
    # TRL bounds the ratio by epsilon_high itself, and not from below.
    "cispo": (
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.2},
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ),
    "sapo": ({"surrogate": "sapo", "aggregation": "sequence"}, {"loss_type": "sapo"}),
    "sequence ratio": (
        {"importance": "sequence", "aggregation": "sequence", "clip_low": 0.03, "clip_high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
    "kl": ({"kl_beta": 0.3}, {"loss_type": "dapo"} | KL),
    "kl, mean of means": ({"kl_beta": 0.3, "aggregation": "sequence"}, {"loss_type": "grpo"} | KL),
    "kl, constant": ({"kl_beta": 0.3, "aggregation": "constant"}, {"loss_type": "dr_grpo"} | KL),
    "kl, cispo": (
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.2, "kl_beta": 0.3},
        {"loss_type": "cispo", "epsilon_high": 1.2} | KL,
    ),
    "kl, sequence ratio": (
        {"kl_beta": 0.3, "importance": "sequence", "aggregation": "sequence", "clip_low": 0.03, "clip_high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04} | KL,
    ),
}


class Both(NamedTuple):
    """A batch of completions with what is known of their tokens, our policy, and TRL's trainer with its inputs."""

    rows: list[Row]
    policy: Policy
    pad_id: int
    trainer: Any
    inputs: dict[str, Any]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Both:
    """Two prompts with pictures, two completions of different lengths of each."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    material = make_material(folder, SIZES["tiny"], steps=1)
    data = material.data("preference")
    data.write_text(data.read_text().replace('"rejected": "', '"rejected": "a longer answer, '))
    backbone = Backbone(path=str(material.model))
    model, processor = load_model(backbone), load_processor(backbone)
    policy, encoder = Policy(model, family_of(model)), Encoder(processor)
    source = open_source(SourceSpec(kind="preference", path=str(data)), for_training=True)
    rows = [row for index in range(len(source)) for row in encoder.encode_pair(source[index])]
    with torch.no_grad():
        scores = policy.score(collate(rows, policy.family, processor.pad_id))
    g = torch.Generator().manual_seed(3)
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.5])
    for row, logprobs, advantage in zip(
        rows, scores.logprobs.split([row.scored for row in rows]), advantages, strict=True
    ):
        old, reference = (logprobs + 0.3 * torch.randn(row.scored, generator=g) for _ in range(2))
        row.info |= {ENGINE: logprobs, OLD: old, TOKENS: reference, ADVANTAGES: advantage.expand(row.scored)}
    config = GRPOConfig(
        str(folder / "out"),
        per_device_train_batch_size=len(rows),
        num_generations=2,
        max_completion_length=LONGEST,
        use_bias_correction_kl=False,  # on by default there: DeepSeek-V3.2's KL, weighed by the ratio
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = GRPOTrainer(
        str(material.model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}] * len(rows)),
        processing_class=processor.hf,
    )
    trainer.current_gradient_accumulation_steps = 1
    inputs = as_inputs(rows, policy, processor.pad_id) | {"advantages": advantages}
    return Both(rows, policy, processor.pad_id, trainer, inputs)


def padded(parts: list[Tensor], value: float, side: str) -> Tensor:
    """[B, T] of [t] each."""
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)


def as_inputs(rows: list[Row], policy: Policy, pad_id: int) -> dict[str, Any]:
    """What TRL's trainer makes of a rollout: prompts padded on the left, completions on the right."""
    prompts, completions = zip(*(row.input_ids.split([len(row) - row.scored, row.scored]) for row in rows), strict=True)
    tensors = {"prompt_ids": padded(prompts, pad_id, "left"), "completion_ids": padded(completions, pad_id, "right")}
    tensors["prompt_mask"] = padded([torch.ones_like(ids) for ids in prompts], 0, "left")
    tensors["completion_mask"] = padded([torch.ones_like(ids) for ids in completions], 0, "right")
    ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
    tensors["mm_token_type_ids"] = (ids == policy.model.config.image_token_id).int()
    for ours, theirs in ((OLD, "old_per_token_logps"), (TOKENS, "ref_per_token_logps")):
        tensors[theirs] = padded([row.info[ours] for row in rows], 0.0, "right")
    pictures = policy.family.merge([image for row in rows for image in row.images])
    counts = {"num_images": [len(row.images) for row in rows]}
    return tensors | pictures | counts | {"num_items_in_batch": torch.tensor(float(sum(row.scored for row in rows)))}


def theirs(both: Both, settings: dict[str, Any], monkeypatch) -> tuple[float, dict[str, Tensor]]:
    """TRL's loss and gradients, by its trainer's own `_compute_loss`."""
    trainer = both.trainer
    monkeypatch.setattr(trainer.args, "delta", settings.get("delta"))
    defaults = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token"}
    for name, value in (defaults | settings).items():
        if name != "delta":
            monkeypatch.setattr(trainer, name, value)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model.train(), both.inputs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}


class Ours(NamedTuple):
    """Our loss, gradients, and means over tokens of what the step reports."""

    loss: float
    gradients: dict[str, Tensor]
    means: dict[str, float]


def ours(both: Both, settings: dict[str, Any], share_prompts: bool) -> Ours:
    """By `losses` and `counts`."""
    module = GRPO(
        backbone=Backbone(path="-"),
        rewards={"length": Reward(kind="length", target=6)},
        rollout=Sampling(temperature=1.0, max_new_tokens=LONGEST),
        **{"dual_clip": None} | settings,
    )
    module.policy = both.policy
    both.policy.zero_grad()
    micro = module.losses(collate(laid_out(both.rows, share_prompts), both.policy.family, both.pad_id))
    loss = objective(micro.terms, module.counts([both.rows]))
    loss.backward()
    means = {name: float(total) / count for name, (total, count) in micro.metrics.items()}
    return Ours(loss.item(), {name: p.grad for name, p in both.policy.model.named_parameters()}, means)


def test_the_completions_are_of_different_lengths_and_their_log_probs_are_known(both):
    lengths = [row.scored for row in both.rows]
    assert len(set(lengths)) > 2 and max(lengths) <= LONGEST and len(both.rows) == 4
    inputs = both.inputs
    ids, mask = (torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    shown = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    width = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        peer, _, _ = both.trainer._get_per_token_logps_and_entropies(both.trainer.model, ids, mask, width, **shown)
    for row, logprobs in zip(both.rows, peer, strict=True):
        torch.testing.assert_close(logprobs[: row.scored], row.info[ENGINE], rtol=0, atol=1e-5)


@pytest.mark.parametrize("share_prompts", [True, False], ids=["prompts shared", "rows apart"])
@pytest.mark.parametrize("case", CASES)
def test_grpo_equals_trl(both, monkeypatch, case, share_prompts):
    own, other = CASES[case]
    want, gradients = theirs(both, other, monkeypatch)
    loss, mine, means = ours(both, own, share_prompts)
    assert abs(want) > 1e-3 and abs(means["ratio"] - 1) > 1e-4
    if own.get("surrogate") != "sapo":
        assert means["clip_high"] > 0 and (means["clip_low"] > 0 or own.get("surrogate") == "cispo")
    assert loss == pytest.approx(want, rel=1e-5)
    assert mine.keys() == gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert (mine[name] - gradient).abs().max() / scale < 1e-5, name


def test_what_our_default_bounds_and_theirs_does_not(both, monkeypatch):
    """Dual clip at 3 is on by default here and off there; among these tokens no ratio reaches it."""
    want, _ = theirs(both, {"loss_type": "dapo"}, monkeypatch)
    assert ours(both, {"dual_clip": 3.0}, True).loss == pytest.approx(want, rel=1e-5)
    assert abs(ours(both, {"dual_clip": 1.3}, True).loss - want) > 1e-3
