"""The vision tower apart from the projector: what it gives, and how the model goes on from what it gave before.

The cut lies where the projector begins, so that a frozen tower need not run again while the projector learns. Shape
suffixes: I images, P rows of one image (patches for the Qwen line, tiles elsewhere), L levels the model reads, T tokens
of a tile, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .families import Family, Pixels


def tower_of(model: PreTrainedModel, family: Family) -> nn.Module:
    """The module whose forward is the tower's; in the Qwen line the projector is within it."""
    (path,) = family.vision
    return model.get_submodule(path)


@torch.no_grad()
def tower_outputs(model: PreTrainedModel, family: Family, pixels: Pixels, rows: Sequence[int]) -> list[Tensor]:
    """What the tower hands to the projector, by image.

    Args:
        model: the top model; its tower runs once over all images.
        family: its family.
        pixels: merged tensors of I images, as the family's forward takes them.
        rows: length-I list, rows of each image (`image_rows`).

    Returns:
        I tensors on the model's device: [P, L, T, D] for towers that see tiles, [P, L, D] for the Qwen line, whose
        patches stand in the order of the tokens they are merged into.

    Raises:
        ValueError: the tower gave another number of rows than the images have.
    """
    levels = _merged_from(model, family, pixels) if family.patch_rows else _tiles_seen(model, family, pixels)
    if len(levels) != sum(rows):
        raise ValueError(f"the vision tower gave {len(levels)} rows for images of {list(rows)}")
    return list(levels.split(list(rows)))


@contextmanager
def replayed(model: PreTrainedModel, family: Family, outputs: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the tower answers with `outputs` instead of looking at pixels; gradients reach the projector.

    Args:
        model, family: as for `tower_outputs`. outputs: of the images asked about, in their order.
    """
    tower = tower_of(model, family)
    levels = [level.contiguous() for level in torch.cat(list(outputs)).unbind(1)]
    with ExitStack() as stack:
        if family.patch_rows:
            # The rest of the tower's forward runs, so that the projector sees rows in the order it always does: sums
            # over rows, such as its gradient, are the same to the last bit.
            stack.enter_context(_forward_as(tower.patch_embed, lambda patches: levels[0]))
            for place, block in enumerate(tower.blocks):
                stack.enter_context(_forward_as(block, partial(_known, _level_behind(tower, place, levels))))
        else:
            stack.enter_context(_forward_as(tower, lambda *args, **kwargs: _written(model, levels)))
        yield


def image_rows(family: Family, image: Pixels) -> int:
    """Rows that one image (`ImageInput.tensors`) gives: patches for the Qwen line, tiles elsewhere."""
    if family.patch_rows:
        return int(image["image_grid_thw"].prod())
    pixels = image["pixel_values"]
    return pixels.shape[0] * pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0]


# --- towers that see tiles -------------------------------------------------------------------------------------------


def _layers(model: PreTrainedModel) -> list[int] | None:
    """Entries of the tower's hidden states that the model reads; None for the last state, norm included."""
    config = model.config
    layer = getattr(config, "vision_feature_layer", None)
    if layer is None or (config.model_type == "internvl" and layer == -1):
        return None
    return [layer] if isinstance(layer, int) else list(layer)


def _tiles_seen(model: PreTrainedModel, family: Family, pixels: Pixels) -> Tensor:
    """[ΣP, L, T, D] of the levels the model reads."""
    layers, taken = _layers(model), []

    def read(module: nn.Module, args: Any, out: Any) -> None:
        taken.extend([out.last_hidden_state] if layers is None else [out.hidden_states[layer] for layer in layers])

    hook = tower_of(model, family).register_forward_hook(read)
    try:
        _image_features(model, pixels)
    finally:
        hook.remove()
    return torch.stack(taken, 1)


def _written(model: PreTrainedModel, levels: Sequence[Tensor]) -> BaseModelOutputWithPooling:
    layers = _layers(model)
    out = BaseModelOutputWithPooling(last_hidden_state=levels[0])
    # Looked up by the layers' own numbers, and by no others.
    out.hidden_states = {} if layers is None else dict(zip(layers, levels, strict=True))
    return out


# --- the Qwen line ---------------------------------------------------------------------------------------------------


def _mergers(tower: nn.Module) -> list[nn.Module]:
    """The merger, then those of the levels that deepstack reads."""
    return [tower.merger, *getattr(tower, "deepstack_merger_list", ())]


def _level_behind(tower: nn.Module, block: int, levels: Sequence[Tensor]) -> Tensor | None:
    """What a block gives, where somebody reads it; towers that sort patches by windows read the last one alone."""
    deep = list(getattr(tower, "deepstack_visual_indexes", ()))
    if block in deep:
        return levels[1 + deep.index(block)]
    return levels[0] if deep and block == len(tower.blocks) - 1 else None


def _known(level: Tensor | None, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden if level is None else level


def _merged_from(model: PreTrainedModel, family: Family, pixels: Pixels) -> Tensor:
    """[ΣP, L, D] of what the mergers are given, the last level first.

    In place of what it merges each merger gives numbers, in which the tower's own order of the tokens shows: that of
    Qwen2.5-VL is by attention windows until the very end.
    """
    tower = tower_of(model, family)
    unit, mergers = tower.spatial_merge_size**2, _mergers(tower)
    taken: dict[int, Tensor] = {}

    def number(place: int, patches: Tensor) -> Tensor:
        taken[place] = patches
        return torch.arange(len(patches) // unit, device=patches.device)[:, None]

    with ExitStack() as stack:
        for place, merger in enumerate(mergers):
            stack.enter_context(_forward_as(merger, partial(number, place)))
        numbers = _image_features(model, pixels).pooler_output
    order = torch.cat(list(numbers))[:, 0]
    tokens = torch.stack([taken[place] for place in range(len(mergers))], 1).unflatten(0, (-1, unit))
    return tokens[order].flatten(0, 1)


def _image_features(model: PreTrainedModel, pixels: Pixels) -> Any:
    """The family's own, whatever stands in for it on this very model."""
    return type(model.model).get_image_features(model.model, **pixels, return_dict=True)


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
