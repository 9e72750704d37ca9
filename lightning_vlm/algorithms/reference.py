"""Where the reference's log-probs come from: kept on disk, a second model, or the model without its adapters.

The reference is the policy at the start of the stage. Its log-probs are written into each row before the step counts
its units, so that losses and filters find them there whatever their source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_vlm.algorithms.micro import Item
from lightning_vlm.models.batch import Row
from lightning_vlm.models.guard import config_fingerprint, weights_fingerprint
from lightning_vlm.models.lora import adapters_off, is_lora
from lightning_vlm.models.policy import Policy, evaluating
from lightning_vlm.models.processor import load_processor
from lightning_vlm.store import Store, content_key, default_root
from lightning_vlm.strategies.sync import is_sharded, max_over_ranks, unsharded

if TYPE_CHECKING:
    from lightning_vlm.algorithms.base import Algorithm

Kind = Literal["cache", "online", "adapters_off"]
LOGPROB = "reference_logprob"  # in Row.info: log π_ref of the row's scored tokens together, nats
TOKENS = "reference_logprobs"  # in Row.info: log π_ref of each, [tokens] on the host, where the reference has just run
STORE = "reference-logprobs"


class Reference:
    """Writes log π_ref of rows into their `info`.

    Args:
        module: the algorithm whose start is the reference.
        model: path of another model to refer to; None for the stage's own start.
    """

    def __init__(self, module: Algorithm, model: str | None) -> None:
        self.module, self.model = module, model

    def annotate(self, items: list[Item]) -> None:
        """Fill in `info[LOGPROB]` of every row; all ranks call this together."""
        raise NotImplementedError(f"{type(self).__name__} must define annotate()")

    def suspicion(self) -> str:
        """What may be wrong where reference and policy differ though they are one model."""
        return (
            "the forward is not the same twice (dropout in the model, or kernels that are not deterministic); set "
            "dropout to 0 in its config.json"
        )

    def start(self) -> None:
        """The policy sits on its device; training begins or goes on."""

    def _score(self, items: list[Item], policy: Policy) -> None:
        """Forward passes in step over the ranks, as sharded weights want them."""
        score_rows(self.module, policy, items, TOKENS)
        for row in (row for item in items for row in item):
            row.info[LOGPROB] = float(row.info[TOKENS].sum(dtype=torch.float64))

    def _load(self) -> Policy:
        """The reference as a model of its own, frozen, whole, on the CPU.

        Raises:
            ValueError: a tokenizer or processor other than the policy's.
        """
        module, backbone = self.module, self.module.backbone
        if self.model is not None:
            backbone = replace(backbone, path=self.model, adapter=None)
            check_same_inputs(self.model, load_processor(backbone), module.processor)
        return module.build_policy(backbone).requires_grad_(False).eval()


class OnlineReference(Reference):
    """A second, frozen model in memory, run on every step's rows; sharded like the policy."""

    def __init__(self, module: Algorithm, model: str | None) -> None:
        super().__init__(module, model)
        # In a dict, so that neither checkpoints nor the optimizer know of it.
        self.frozen = {"reference": self._load()}
        module.shard(self.frozen["reference"])

    def start(self) -> None:
        """Move to the device."""
        if not is_sharded(self.frozen["reference"]):
            self.frozen["reference"].to(self.module.device)

    def annotate(self, items: list[Item]) -> None:
        """One forward over the items."""
        self._score(items, self.frozen["reference"])


class AdaptersOffReference(Reference):
    """The policy's own weights without their LoRA adapters."""

    def annotate(self, items: list[Item]) -> None:
        """One forward over the items, adapters switched off."""
        with adapters_off(self.module.policy.model), evaluating(self.module.policy):
            self._score(items, self.module.policy)


class CachedReference(Reference):
    """Log-probs on disk, keyed by content; the reference runs only where some are missing.

    A key covers all that the model is shown: ids (and so template, tokenizer and texts), which of them are scored, and
    the processed pixels. The folder covers what shows it: weights, their dtype, the precision of the forward.

    Args:
        module: the algorithm. model: as for `Reference`.
        folder: a store made elsewhere, used as it is; None for the common one (`$LVLM_CACHE`).

    Raises:
        ValueError: `folder` holds log-probs of other weights, dtype or precision.
    """

    def __init__(self, module: Algorithm, model: str | None, folder: str | None) -> None:
        super().__init__(module, model)
        weights = module.policy.model if model is None else self._load().model
        facts = {
            "weights": weights_fingerprint(weights),
            "config": config_fingerprint(weights.config),
            "dtype": module.backbone.dtype,
            "precision": str(module.trainer.precision),
            "mixed_precision": getattr(module.trainer.strategy, "mixed_precision", "none"),
        }
        if folder is None:
            self.store = Store(default_root(), STORE, facts)
        else:
            self.store = Store.at(Path(folder).expanduser(), STORE, facts)
        self.computed = 0

    def suspicion(self) -> str:
        """The cache is stale."""
        return f"the reference cache is stale; delete {self.store.folder}, or leave model.reference_cache out"

    def annotate(self, items: list[Item]) -> None:
        """Look the rows up; where some are missing, compute those and all that this run has still to draw."""
        missing = self._look_up(row for item in items for row in item)
        if missing:
            self.store.refresh()  # another rank or run may have computed them
            missing = self._look_up(missing)
        drawn = [row for row in missing if not row.info.get("generated")]
        some, ahead = max_over_ranks([float(len(missing)), float(len(drawn))], self.module.device)
        if some:
            self._fill(missing, ahead=ahead > 0)
            assert not self._look_up(missing)

    def _look_up(self, rows: Iterable[Row]) -> list[Row]:
        missing = []
        for row in rows:
            known = self.store.get(_key(row))
            if known is None:
                missing.append(row)
            else:
                row.info[LOGPROB] = float(known.sum(dtype="float64"))
        return missing

    def _fill(self, missing: list[Row], *, ahead: bool) -> None:
        """A pass of the reference; whole weights on every rank, so that ranks need not stay in step."""
        from tqdm import tqdm

        with self._whole() as policy, torch.no_grad():
            if ahead:
                loader = self.module.trainer.datamodule.upcoming()
                bar = tqdm(loader, desc="reference log-probs", unit="batch", leave=False, delay=5, disable=None)
                for batch in bar:
                    self._compute(batch.items, policy)
                max_over_ranks([0.0], self.module.device)  # all have written theirs
                self.store.refresh()
            self._compute([[row] for row in missing], policy)

    def _compute(self, items: list[Item], policy: Policy) -> None:
        found: dict[str, torch.Tensor] = {}
        unknown = [item for item in items if any(_key(row) not in self.store for row in item)]
        for batch in self.module.evaluation_batches(unknown):
            logprobs = policy.score(batch).logprobs.cpu()
            counts = torch.bincount(batch.row_index, minlength=len(batch.rows)).tolist()
            found |= {_key(row): part for row, part in zip(batch.rows, logprobs.split(counts), strict=True)}
            self.computed += len(batch.rows)
        self.store.put(found)

    @contextmanager
    def _whole(self) -> Iterator[Policy]:
        """The reference: the policy itself while it has learned nothing, else loaded for the occasion."""
        module = self.module
        if self.model is None and module.clock == 0:
            with unsharded(module.policy), evaluating(module.policy):
                yield module.policy
            return
        with module.low_precision():
            yield self._load().to(module.device)


def make_reference(
    module: Algorithm,
    kind: Kind | None,
    *,
    model: str | None = None,
    folder: str | None = None,
    generated: bool = False,
) -> Reference:
    """The reference of an algorithm whose policy is built but not yet sharded.

    Args:
        module: the algorithm.
        kind: None takes `cache` where a folder is given, `adapters_off` where LoRA matrices are all that trains, else
            `online` for generated texts, which no cache can know beforehand, else `cache`.
        model, folder: as for the classes. generated: whether texts are generated in training.

    Raises:
        ValueError: a setting that does not fit the kind.
    """
    trains = [name for name, p in module.policy.model.named_parameters() if p.requires_grad]
    only_lora = bool(trains) and all(is_lora(name) for name in trains)
    fits = only_lora and module.backbone.adapter is None and model is None
    if kind is None and folder is None:
        kind = "adapters_off" if fits else "online" if generated else "cache"
    kind = kind or "cache"
    if folder is not None and kind != "cache":
        raise ValueError(f"model.reference_cache has no effect with model.reference {kind!r}: leave one of them out")
    if kind == "adapters_off" and not fits:
        cause = "a reference_model was given" if model else "it starts from an adapter"
        cause = cause if only_lora else f"{next((n for n in trains if not is_lora(n)), 'nothing')} trains, too"
        raise ValueError(
            "model.reference is adapters_off, but the model without adapters is not the start of the run: "
            f"{cause}; set model.reference to cache or online"
        )
    if kind == "cache":
        return CachedReference(module, model, folder)
    return OnlineReference(module, model) if kind == "online" else AdaptersOffReference(module, None)


def score_rows(module: Algorithm, policy: Policy, items: list[Item], name: str) -> None:
    """Write log-probs of each row's scored tokens, [tokens] on the host, into its `info[name]`.

    Forward passes are in step over the ranks, as sharded weights want them; log-probs are at the module's temperature.
    """
    with torch.no_grad():
        for batch, _ in module.micro_batches(items):
            logprobs = policy.score(batch, temperature=module.temperature).logprobs.cpu()
            counts = torch.bincount(batch.row_index, minlength=len(batch.rows)).tolist()
            for row, part in zip(batch.rows, logprobs.split(counts), strict=True):
                row.info[name] = part


def check_same_inputs(path: str, processor: Any, own: Any) -> None:
    """Refuse a reference that reads other tokens or other pixels than the policy, whose rows it is shown.

    Raises:
        ValueError: the tokenizers, or the kinds of processor, differ.
    """
    theirs, ours = processor.tokenizer.get_vocab(), own.tokenizer.get_vocab()
    if theirs != ours:
        odd = sorted(set(theirs.items()) ^ set(ours.items()), key=str)
        raise ValueError(
            f"model.reference_model {path!r} has another vocabulary than backbone.path ({len(theirs)} and {len(ours)} "
            f"tokens, first difference {odd[0][0]!r}): log-probs of other tokens cannot be compared; take a reference "
            "of the same tokenizer"
        )
    kinds = [type(p.hf).__name__ for p in (processor, own)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"model.reference_model {path!r} has a {kinds[0]}, backbone.path a {kinds[1]}: they look at other pixels; "
            "take a reference of the same architecture"
        )


def _key(row: Row) -> str:
    key = row.info.get("content_key")
    if key is None:
        key = content_key(row.input_ids, row.loss_mask, [image.key for image in row.images])
        row.info["content_key"] = key
    return key
