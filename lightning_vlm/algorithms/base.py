"""The template every algorithm fills in: one `training_step` = everything between two looks at the data.

A subclass says what it computes (`losses`), how much of it there is (`counts`), and, if one loader batch feeds several
optimizer steps, how it is divided (`optimizer_batches`). The base divides each term once by its count over the whole
optimizer step, keeps ranks together, clips, steps, counts, logs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lightning_vlm.algorithms.adapter_only import check_resumed, trained_state
from lightning_vlm.algorithms.building import build_policy
from lightning_vlm.algorithms.evaluation import EvaluationMixin
from lightning_vlm.algorithms.groups import build_optimizer
from lightning_vlm.algorithms.guard import PartGuard, require_finite
from lightning_vlm.algorithms.micro import Item, micro_batches
from lightning_vlm.algorithms.optimizer import PartOptimizer, Schedule, lr_factor
from lightning_vlm.algorithms.totals import Micro, StepTotals, peak_memory
from lightning_vlm.data.loading import StepBatch
from lightning_vlm.losses.terms import objective
from lightning_vlm.models.adapters import frozen_sample
from lightning_vlm.models.attention import shares_prompts
from lightning_vlm.models.batch import ModelBatch, Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.packing import Pack, laid_out
from lightning_vlm.models.parts import PartPolicy, projector_alone
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import Processor, load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rollouts import Sampling
from lightning_vlm.strategies.fsdp import shard_policy
from lightning_vlm.strategies.sync import GradientSync, max_over_ranks, sum_over_ranks


class Algorithm(EvaluationMixin, L.LightningModule):
    """Base of all algorithms.

    Args:
        backbone: the model to start from (linked from the top-level `backbone`).
        parts: what trains and how, by part (`vision`, `projector`, `language`, `head`).
        lr: learning rate of every part that sets none of its own.
        optimizer: update rule of 2-D hidden matrices, `adamw` or `muon`; embeddings, heads, norms, biases keep AdamW.
        weight_decay: decoupled weight decay of matrices; vectors are never decayed.
        betas: AdamW's moments.
        eps: AdamW's denominator.
        schedule: learning rate after the warm-up: `constant`, `linear`, `cosine`, `wsd` (constant, then linear decay).
        warmup_steps: optimizer steps of linear warm-up.
        decay_fraction: share of the run over which `wsd` decays.
        min_lr_ratio: floor of the decayed learning rate, as a share of the peak.
        clip_norm: largest gradient norm over all parameters; 0 turns clipping off.
        micro_batch_tokens: padded tokens of one forward and backward; changes memory and speed, never the gradient.
        adapter_only: train the projector alone: vision, language and head are frozen, checkpoints hold the projector.
        vision_cache: keep what a frozen vision tower says of each image on disk (`$LVLM_CACHE`) and never run it
            again; or the folder of such a store. Costs disk: see the line that the run prints.
        share_images: encode an image shown by several rows of a micro-batch once.
        share_prompts: compute a prompt that several rows continue (chosen and rejected) once; None does so wherever the
            attention backend can, which is all but flash_attention_2. Never changes the gradient.
        master_weights: float32 master weights and optimizer state beside low-precision weights.
        seed: every random draw of training, evaluation and prediction is a function of it.
        sampling: how `lightning-vlm predict` draws answers; greedy by default.
        samples: answers drawn per prompt by `lightning-vlm predict`.
    """

    encoding: Literal["conversation", "pair", "answer", "prompt"] = "conversation"
    steps_per_batch: int = 1  # optimizer steps that one loader batch feeds
    steps_loaded: int = 1  # of these, how many have samples of their own in it
    temperature: float = 1.0  # of the distributions that are scored
    other_processors: tuple[Processor, ...] = ()  # of models that see training prompts in their own way
    needs_pictures: bool = False  # whether training prompts carry their pictures, for an engine elsewhere

    def __init__(
        self,
        *,
        backbone: Backbone,
        parts: dict[str, PartPolicy] | None = None,
        adapter_only: bool = False,
        vision_cache: bool | str = False,
        lr: float = 1e-5,
        optimizer: Literal["adamw", "muon"] = "adamw",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Schedule = "cosine",
        warmup_steps: int = 0,
        decay_fraction: float = 0.4,
        min_lr_ratio: float = 0.0,
        clip_norm: float = 1.0,
        micro_batch_tokens: int = 8192,
        share_images: bool = True,
        share_prompts: bool | None = None,
        master_weights: bool = False,
        seed: int = 0,
        sampling: Sampling | None = None,
        samples: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if lr <= 0 or min(warmup_steps, clip_norm, weight_decay) < 0:
            raise ValueError(
                "model.lr must be positive, and warmup_steps, clip_norm and weight_decay not negative; got "
                f"{lr}, {warmup_steps}, {clip_norm}, {weight_decay}"
            )
        self.backbone, self.parts = backbone, projector_alone(parts) if adapter_only else parts or {}
        self.adapter_only, self.vision_cache = adapter_only, vision_cache
        self.strict_loading = not adapter_only  # its checkpoints hold the projector alone
        self.lr, self.optimizer, self.weight_decay = lr, optimizer, weight_decay
        self.betas, self.eps = betas, eps
        self.schedule, self.warmup_steps, self.decay_fraction = schedule, warmup_steps, decay_fraction
        self.min_lr_ratio, self.clip_norm, self.master_weights = min_lr_ratio, clip_norm, master_weights
        self.micro_batch_tokens, self.share_images, self.seed = micro_batch_tokens, share_images, seed
        if share_prompts and not shares_prompts(backbone.attention):
            raise ValueError(
                f"model.share_prompts is true, but attention {backbone.attention!r} cannot: set backbone.attention to "
                "sdpa, or leave model.share_prompts out"
            )
        self.share_prompts = shares_prompts(backbone.attention) if share_prompts is None else share_prompts
        self.sampling, self.samples = sampling or Sampling(), samples
        if samples < 1 or (samples > 1 and self.sampling.greedy):
            raise ValueError(
                f"model.samples is {samples} with temperature {self.sampling.temperature}: greedy answers are all the "
                "same; set model.sampling.temperature above 0, or samples to 1"
            )
        self.policy: Policy | None = None
        self.processor = None
        self.clock = self.clock_before = self.batches_done = 0
        self.last_step: dict[str, Any] = {}
        self.seen: dict[str, float] = {}  # tokens and samples that losses saw since somebody last counted
        self.idle = False  # whether the step that was done last had nothing to learn from
        self._total_steps = 0
        self._evaluated: dict[str, int] = {}
        self.records, self.summaries, self.fresh_metrics = {}, {}, set()

    # --- what a subclass fills in -----------------------------------------------------------------------------------

    def losses(self, batch: ModelBatch) -> Micro:
        """Loss terms of one micro-batch, summed, with gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define losses()")

    def counts(self, items: list[Item]) -> dict[str, float]:
        """Units of each loss term in these items, from masks alone; the step sums them over ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define counts()")

    def optimizer_batches(self, batch: StepBatch) -> Iterable[list[Item]]:
        """Items of each optimizer step that this loader batch feeds; one step by default."""
        yield batch.items

    def extend_policy(self) -> None:
        """What else belongs to the policy before it is sharded, such as modules dropped on export; none by default."""

    # --- building ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load, freeze, adapt and, under a sharding strategy, shard the policy."""
        if self.policy is not None:
            return
        self.policy = self.build_policy(self.backbone)
        self.extend_policy()
        self.shard(self.policy)

    def build_policy(self, backbone: Backbone) -> Policy:
        """A policy as this run trains it, before anything is learned: loaded, frozen and adapted, whole, on the CPU."""
        return build_policy(self, backbone)

    def shard(self, policy: Policy) -> None:
        """Shard a policy in place under a strategy that shards."""
        if self.device_mesh is not None:
            shard_policy(policy, self.device_mesh, getattr(self.trainer.strategy, "mixed_precision", "none"))

    def setup(self, stage: str) -> None:
        """Bind the processor (the data module's where there is one)."""
        data = self.trainer.datamodule
        self.processor = getattr(data, "processor", None) or load_processor(self.backbone)

    def configure_optimizers(self) -> PartOptimizer:
        """One optimizer over the trainable parameters of all parts."""
        return build_optimizer(
            self.policy,
            self.parts,
            kind=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup=self.warmup_steps,
            betas=self.betas,
            eps=self.eps,
            master_weights=self.master_weights,
        )

    def on_fit_start(self) -> None:
        """Prepare what a step needs once the policy sits on its device."""
        self.sync = GradientSync(self.policy)
        self.guard = PartGuard(self.policy, self.clock)
        self._total_steps = self.trainer.max_steps
        if self._total_steps < 1:
            raise ValueError("set trainer.max_steps or trainer.max_epochs: schedules need to know where the run ends")

    # --- the step ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Every optimizer step this batch feeds."""
        self.clock_before = self.clock
        for items in self.optimizer_batches(batch):
            self.optimize(items, skipped=len(batch.skipped))
        self.batches_done += 1

    def optimize(self, items: list[Item], *, skipped: int = 0) -> None:
        """One optimizer step over `items` of this rank."""
        start = time.perf_counter()
        optimizer = self.optimizers()
        # Draws inside the model (dropout) depend on the step alone.
        torch.manual_seed(hash((self.seed, self.clock)) % 2**63)
        counts, report, step = self.gradient(items)
        skipped = sum_over_ranks([float(skipped)], self.device)[0]
        self._require_finite(report, items)
        norms = self._apply_gradients(optimizer)
        self._require_finite({"grad_norm": norms["total"]}, items)
        rates = self._step(optimizer)
        total = norms.pop("total")
        if any(counts.values()) and not self.idle:  # a step that could learn nothing says nothing about parts
            self.guard.observe(self.clock, norms, images=any(row.images for item in items for row in item))
        report |= {"grad_norm": total, "skipped": skipped, "memory_gib": peak_memory(self.device)}
        self._report(report | {"seconds": time.perf_counter() - start}, norms, rates, step)

    def gradient(self, items: list[Item]) -> tuple[dict[str, float], dict[str, float], StepTotals]:
        """The objective's gradient over the items of all ranks; one pass over them by default.

        Returns:
            Units of each term, what the step reports, and its sums on this rank.
        """
        return self.accumulate(items, self.losses, self.counts(items))

    def accumulate(
        self, items: list[Item], losses: Callable[[ModelBatch], Micro], counts: dict[str, float]
    ) -> tuple[dict[str, float], dict[str, float], StepTotals]:
        """From zero gradients, one forward and backward per micro-batch.

        Args:
            items: of this rank. losses: micro-batch → its terms. counts: units of each term on this rank.

        Returns:
            As `gradient`: units and report over all ranks.
        """
        self.optimizers().zero_grad()
        counts = dict(zip(counts, sum_over_ranks(counts.values(), self.device), strict=True))
        step = StepTotals()
        for batch, last in self.micro_batches(items):
            self.sync.before_backward(last=last)
            micro = losses(batch)
            loss = objective(micro.terms, counts) * self.sync.scale
            if loss.requires_grad:  # text alone tells a projector nothing
                with self._replicas_apart():
                    self.manual_backward(loss)
            step.add(micro, batch)
        return counts, step.over_ranks(counts, self.device), step

    def micro_batches(self, items: list[Item]) -> Iterator[tuple[ModelBatch, bool]]:
        """Micro-batches on the device, and whether it is the last; equally many on ranks that must keep in step."""
        plan = micro_batches(items, self.micro_batch_tokens, share_prompts=self.share_prompts)
        rounds = int(max_over_ranks([len(plan)], self.device)[0]) if self.sync.in_step else len(plan)
        rounds = max(rounds, 1)
        for index in range(rounds):
            yield self._collate(plan[index] if index < len(plan) else []), index == rounds - 1

    def _collate(self, items: list[Item]) -> ModelBatch:
        rows: list[Row | Pack] = [row for item in items for row in laid_out(item, self.share_prompts)]
        lacks_image = not any(row.images for item in items for row in item)
        if not rows or (self.sync.in_step and lacks_image):
            rows.append(self._dummy_row(with_image=self.sync.in_step))
        batch = collate(rows, self.policy.family, self.processor.pad_id, share_images=self.share_images)
        return batch.to(self.device)

    def _dummy_row(self, with_image: bool) -> Row:
        """A row nothing is scored on, so that every rank runs through the same modules."""
        from PIL import Image

        ids, images = [self.processor.pad_id] * 2, []
        if with_image:
            picture, expanded = self.processor.image(Image.new("RGB", (64, 64)))
            ids, images = [*expanded, *ids], [picture]
        tensor = torch.tensor(ids, dtype=torch.long)
        return Row(id="(dummy)", input_ids=tensor, loss_mask=torch.zeros_like(tensor, dtype=torch.bool), images=images)

    def low_precision(self) -> AbstractContextManager:
        """The precision that a sharding strategy computes in, for whole models outside of it."""
        mixed = getattr(self.trainer.strategy, "mixed_precision", "none") == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    def _replicas_apart(self) -> AbstractContextManager:
        """DDP would average each micro-batch by itself; `GradientSync` sums the whole step instead."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()

    def _apply_gradients(self, optimizer) -> dict[str, float]:
        """Reduce, measure per part, clip; returns norms by part and `total` (before clipping)."""
        gradients = optimizer.optimizer.gradients()
        self.sync.reduce(gradients)
        by_part: dict[str, list[Tensor]] = {}
        for group in optimizer.optimizer.param_groups:
            by_part.setdefault(group["part"], []).extend(gradients[p] for p in group["params"])
        norms = {part: _plain(get_total_norm(g)) for part, g in by_part.items()}
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        if self.clip_norm > 0:
            clip_grads_with_norm_(list(optimizer.optimizer.work.values()), self.clip_norm, total)
        values = torch.stack([*norms.values(), total]).tolist()
        return dict(zip([*norms, "total"], values, strict=True))

    def _step(self, optimizer) -> dict[str, float]:
        rates: dict[str, float] = {}
        for group in optimizer.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(
                self.clock,
                total=self._total_steps,
                warmup=group["warmup"],
                schedule=self.schedule,
                decay_fraction=self.decay_fraction,
                min_ratio=self.min_lr_ratio,
            )
            rates[group["part"]] = group["lr"]
        optimizer.step()
        self.clock += 1
        return rates

    def _require_finite(self, values: dict[str, float], items: list[Item]) -> None:
        path = Path(self.trainer.default_root_dir) / f"nonfinite_step{self.clock}_rank{self.global_rank}.json"
        require_finite(values, step=self.clock, ids=(row.id for item in items for row in item), path=path)

    def _report(self, report, norms, rates, step: StepTotals) -> None:
        """Log the step under `train/` on the clock of optimizer steps and keep it for monitors."""
        metrics = {f"train/{name}": value for name, value in report.items()}
        metrics |= {f"train/grad_norm/{part}": value for part, value in norms.items()}
        metrics |= {f"train/lr/{part}": rate for part, rate in rates.items()}
        self.last_step = {**step.tokens(), "metrics": metrics}
        for name, count in (("tokens", report["tokens"]), ("samples", report["rows"])):
            self.seen[name] = self.seen.get(name, 0.0) + count
        self.log_dict(metrics, batch_size=1)
        self.log("step", float(self.clock), batch_size=1)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All weights; of an adapter-only run those that train, for the others are the backbone's."""
        state = super().state_dict(*args, **kwargs)
        return trained_state(self, state) if self.adapter_only else state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Plain facts only, so that checkpoints load with `weights_only`."""
        start = Path(self.backbone.path)
        # A relative directory means nothing to who exports from elsewhere.
        path = str(start.resolve()) if start.is_dir() else self.backbone.path
        checkpoint["lightning_vlm"] = {
            "algorithm": f"{type(self).__module__}.{type(self).__qualname__}",
            "backbone": dict(vars(self.backbone)) | {"path": path},
            "parts": {name: dict(vars(policy)) for name, policy in self.parts.items()},
            "adapter_only": self.adapter_only,
            "step": self.clock,
            "batches_done": self.batches_done,
            **self.evaluation_state(),
            **({"beside": frozen_sample(self.policy.model)} if self.adapter_only else {}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the clock and the place in the data."""
        ours = checkpoint["lightning_vlm"]
        check_resumed(self, ours, checkpoint.get("state_dict"))
        self.clock = self.clock_before = ours["step"]
        self.batches_done = ours["batches_done"]
        self.restore_evaluation_state(ours)


def _plain(norm: Tensor) -> Tensor:
    """A norm over sharded gradients as an ordinary tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
