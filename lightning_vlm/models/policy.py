"""The model as algorithms see it: rows in, hidden states of the scored tokens out.

Images are encoded once per distinct image and handed to the family's own forward through one seam, so that placeholder
scatter, M-RoPE and deepstack stay the family's code. Shape suffixes: B physical rows, T padded length, N scored tokens,
D width, V vocabulary, I distinct images, O image occurrences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_vlm.losses.kernel import Divergences, divergences, token_scores

from .attention import prompt_mask
from .batch import ModelBatch
from .families import Family

if TYPE_CHECKING:
    from .vision_cache import VisionCache


class Scores(NamedTuple):
    """What a policy says about the scored tokens of a batch; flat over N tokens, row-major.

    Attributes:
        logprobs: [N] log π(token), nats, differentiable.
        entropies: [N] entropy of the next-token distribution, nats, differentiable.
        top_logprobs: [N] log-probability of the most likely token.
        top_ids: [N] the most likely token.
        rows: [N] index of the token's row in the batch.
        uniform_logprobs: [N] mean of log π over the vocabulary, nats, differentiable; where it was asked for.
    """

    logprobs: Tensor
    entropies: Tensor
    top_logprobs: Tensor
    top_ids: Tensor
    rows: Tensor
    uniform_logprobs: Tensor | None = None

    def per_row(self, values: Tensor, count: int) -> Tensor:
        """[count] sums of per-token `values` [N] over each row."""
        return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, self.rows, values)


class HeadInput(NamedTuple):
    """A policy's distributions before the head: hidden states [N, D] and head weight [V, D]."""

    hidden: Tensor
    weight: Tensor


class Policy(nn.Module):
    """A Hugging Face image-text-to-text model with its family.

    Everything that reads weights happens inside `forward`, so that a Policy can be the root of a sharded module.

    Args:
        model: the top model (`...ForConditionalGeneration`).
        family: `family_of(model)`.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.vision_cache: VisionCache | None = None  # where its frozen tower's outputs come from

    def forward(
        self,
        batch: ModelBatch,
        *,
        temperature: float = 1.0,
        against: HeadInput | None = None,
        beta: float = 0.5,
        raw: bool = False,
        patch_heads: bool = False,
        uniform: bool = False,
        head_loss: Callable[[Tensor, Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Score a batch; the one way to read this policy's distributions, for weights may be sharded outside of it.

        Args:
            batch: padded rows on this policy's device.
            temperature: of the distribution that is scored.
            against: another policy's `HeadInput` at the same tokens; gives the divergences of this policy from it.
            beta: weight of p in the Jensen–Shannon form.
            raw: return this policy's own `HeadInput`, to be given as `against`.
            patch_heads: return what the modules of `self.heads` say of every image token, [image tokens, classes] each,
                images in order of occurrence; the language model is not run.
            uniform: also give the mean log-prob over the vocabulary, which label smoothing needs.
            head_loss: return what this makes of hidden states [N, D], head weight [V, D] and labels [N]: losses that
                read the head in a way of their own.
        """
        if patch_heads:
            features = self.image_features(batch)
            return [head(features) for head in self.heads]
        hidden, weight = self.hidden_states(batch), self.head_weight()
        if raw:
            return HeadInput(hidden, weight)
        if against is not None:
            return divergences(hidden, weight, *against, beta=beta, temperature=temperature)
        if head_loss is not None:
            return head_loss(hidden, weight, batch.labels)
        scores = token_scores(hidden, weight, batch.labels, temperature=temperature)
        mean = None
        if uniform:  # mean_v log π_v = log π_y − h·(w_y − mean_v w_v)/T, without the other logits
            wide = scores.logprobs.dtype
            apart = weight[batch.labels].to(wide) - weight.mean(0, dtype=wide)
            mean = scores.logprobs - (hidden.to(wide) * apart).sum(-1) / temperature
        return Scores(*scores, batch.row_index, mean)

    def score(self, batch: ModelBatch, *, temperature: float = 1.0) -> Scores:
        """Log-probs and entropies of the scored tokens, through `forward` so that hooks run."""
        return self(batch, temperature=temperature)

    def divergence(self, batch: ModelBatch, other: HeadInput, *, beta: float = 0.5) -> Divergences:
        """Per-token KL, reverse KL, JS and TV of this policy (p) from `other` (q), through `forward`."""
        return self(batch, against=other, beta=beta)

    @property
    def head(self) -> nn.Module:
        """The output projection D → V."""
        return self.model.get_output_embeddings()

    def head_weight(self) -> Tensor:
        """[V, D] weight of the output projection, a LoRA adapter on it included. Read it inside `forward` only."""
        head = self.head
        if not hasattr(head, "lora_A") or head.disable_adapters:
            return head.weight
        weight = head.base_layer.weight
        for name in head.active_adapters:
            delta = head.lora_B[name].weight @ head.lora_A[name].weight
            weight = weight + (head.scaling[name] * delta).to(weight.dtype)
        return weight

    def hidden_states(self, batch: ModelBatch) -> Tensor:
        """Last hidden states that predict the scored tokens.

        Args:
            batch: padded on either side; without images the vision tower is not touched.

        Returns:
            [N, D], in the order of `batch.labels`.

        Raises:
            ValueError: placeholder ids and image features differ in number.
        """
        with self.inputs(batch) as inputs:
            if batch.segments is not None:
                inputs["position_ids"] = self.positions(batch, inputs) - batch.shifts
                inputs["attention_mask"] = prompt_mask(batch.segments)
            elif "mm_token_type_ids" not in inputs:
                inputs["position_ids"] = self.positions(batch, inputs)
            out = self.model.model(**inputs, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)[batch.predictors]

    def image_features(self, batch: ModelBatch) -> Tensor:
        """[Σ image tokens, D] projected features of all images in order of occurrence, each encoded once."""
        if not batch.pixels:
            return self.head.weight.new_zeros(0, self.head.weight.shape[1])
        with self._image_seam(batch):
            features = self.model.model.get_image_features().pooler_output
        return features.flatten(0, -2) if isinstance(features, Tensor) else torch.cat(list(features))

    @contextmanager
    def inputs(self, batch: ModelBatch) -> Iterator[dict[str, Any]]:
        """Keyword arguments for the inner model's forward, or for `model.generate`, while images come from the seam.

        To sample a prompt n times repeat its row (its images are still encoded once), not `num_return_sequences`.

        Yields:
            `input_ids`, `attention_mask`, and with images what the family needs to know of them.

        Raises:
            ValueError: placeholder ids and image features differ in number.
        """
        ids = batch.input_ids
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": batch.attention_mask}
        placeholders = ids == self.model.config.image_token_id
        _check_counts(batch, placeholders)
        if self.family.patch_rows:
            # Offsets of an earlier batch, which the family would otherwise apply to text without images.
            self.model.model.rope_deltas = None
        if not batch.pixels:
            yield inputs
            return
        inputs["pixel_values"] = batch.pixels["pixel_values"]
        if self.family.patch_rows:
            # From one grid per occurrence and the kind of each token the family computes its M-RoPE positions.
            inputs["image_grid_thw"] = batch.pixels["image_grid_thw"][batch.image_index]
            inputs["mm_token_type_ids"] = placeholders.int()
        with self._image_seam(batch):
            yield inputs

    def _image_seam(self, batch: ModelBatch) -> AbstractContextManager[None]:
        """Images once each; their tower's outputs from the cache where there is one."""
        cache = self.vision_cache
        return _image_seam(self.model.model, batch, cache and (lambda: cache.answering(self, batch)))

    def positions(self, batch: ModelBatch, inputs: dict[str, Any]) -> Tensor:
        """[B, T] positions that skip the padding; [3, B, T] for the Qwen line, where two axes can mean packed rows."""
        if "mm_token_type_ids" in inputs:
            known = {name: inputs[name] for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
            return self.model.model.get_rope_index(inputs["input_ids"], **known)[0]
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        return positions.expand(3, *positions.shape) if self.family.patch_rows else positions


def _check_counts(batch: ModelBatch, placeholders: Tensor) -> None:
    """Placeholders of each physical row against the tokens its images fill, on what the host already knows."""
    found = placeholders.sum(1).tolist()
    if found == batch.expected:
        return
    first = next(i for i, (want, have) in enumerate(zip(batch.expected, found, strict=True)) if want != have)
    row = batch.rows[first] if len(batch.rows) == len(found) else batch.rows[0]
    raise ValueError(
        f"row {row.id} has {found[first]} image placeholder ids, its {len(row.images)} images fill "
        f"{batch.expected[first]}"
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _image_seam(
    inner: PreTrainedModel, batch: ModelBatch, known: Callable[[], AbstractContextManager[None]] | None
) -> Iterator[None]:
    """Lets `inner.get_image_features` answer with the batch's images, each encoded once, in order of occurrence.

    `known` opens what answers in the tower's place, if anything does.
    """
    original = inner.get_image_features
    order = batch.image_index.tolist()

    def per_occurrence(features: Any) -> Any:
        """[ΣP, D], or one tensor per image → the same kind, one entry per occurrence."""
        single = isinstance(features, Tensor)
        flat = features.flatten(0, -2) if single else torch.cat([f.flatten(0, -2) for f in features])
        if len(flat) != sum(batch.image_tokens):
            raise ValueError(f"images fill {sum(batch.image_tokens)} placeholders, the model gave {len(flat)} features")
        images = flat.split(batch.image_tokens)
        chosen = [images[i] for i in order]
        # One tensor may hold [tiles, tokens of a tile, D]: the family's scatter counts on its shape.
        return torch.cat(chosen).unflatten(0, (-1, *features.shape[1:-1])) if single else chosen

    @wraps(original)
    def seam(*args: Any, **kwargs: Any) -> Any:
        with known() if known else nullcontext():
            out = original(**batch.pixels, return_dict=True)
        out.pooler_output = per_occurrence(out.pooler_output)
        if getattr(out, "deepstack_features", None) is not None:
            out.deepstack_features = [per_occurrence(level) for level in out.deepstack_features]
        return out

    inner.get_image_features = seam
    try:
        yield
    finally:
        del inner.get_image_features
