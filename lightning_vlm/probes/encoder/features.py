"""A vision encoder as probes see it: pictures in, features on a grid of patches out.

The features are those that the model's projector is given, before anything is merged; of a tower without a model, its
last hidden state. Every picture is shown whole and once: towers of a fixed size get it squeezed to their square, tiling
and cropping are off. So patch (y, x) of a grid [h, w] shows the same part of every picture, and of its masks.

Shapes: h, w patches of a picture, D width, P rows of a picture in the tower (patches or tiles), L levels that the model
reads, T tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lightning_vlm.data.images import load_image
from lightning_vlm.models.batch import ImageInput
from lightning_vlm.models.families import Family, Pixels, blocks
from lightning_vlm.models.policy import Policy, evaluating
from lightning_vlm.models.processor import Processor
from lightning_vlm.models.vision import image_rows, tower_outputs
from lightning_vlm.probes.influence import Track, untracked


@dataclass(frozen=True)
class VisionEncoder:
    """A tower with its preprocessing, and the whole model where there is one.

    Attributes:
        path: what it was loaded from.
        model: the top model, or a `BareTower` in its place.
        family: of the model; for a tower alone the one whose tensors it takes.
        prepare: one RGB picture → its tensors, leading dimension kept.
        patch: pixels along a patch.
        side: pixels along the square that pictures are squeezed to; None where the tower takes any size.
        policy: the model that answers questions; None for a tower alone.
        processor: of the model; None for a tower alone.
        layer: the block whose output is taken, from 1, or from −1 backwards; None for what the projector is given.
    """

    path: str
    model: Any
    family: Family
    prepare: Callable[[Image.Image], Pixels]
    patch: int
    side: int | None
    policy: Policy | None = None
    processor: Processor | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        depth = len(blocks(self.tower))
        if self.layer is not None and not 1 <= abs(self.layer) <= depth:
            raise ValueError(
                f"layer is {self.layer}: the tower of {self.path} has {depth} blocks, choose 1 to {depth}, or -1 to "
                f"{-depth} counted from the last"
            )

    @property
    def tower(self) -> nn.Module:
        """The module that sees the pictures."""
        return self.model.get_submodule(self.family.vision[0])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.tower.parameters()).device

    def view(self, image: Any) -> Image.Image:
        """The picture as the tower is shown it: RGB, squeezed to the tower's square where it has one.

        Args:
            image: what `load_image` takes.

        Raises:
            BadImage: it cannot be read.
        """
        picture = load_image(image)
        if self.side is None or picture.size == (self.side, self.side):
            return picture
        return picture.resize((self.side, self.side), Image.Resampling.BICUBIC)

    @torch.no_grad()
    def features(self, images: Sequence[Any], *, batch_size: int = 32, track: Track = untracked) -> Iterator[Tensor]:
        """The features of each picture, [h, w, D] float32 on the CPU.

        Args:
            images: what `load_image` takes. batch_size: pictures in the tower at a time.
            track: wraps (batches, what is done), to show progress.

        Raises:
            ValueError: pictures that cannot be read or batched, or a tower whose tokens are no grid.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        with evaluating(self.model):
            for part in track(parts, "features"):
                pixels = [self.prepare(self.view(image)) for image in part]
                for own, outputs in zip(pixels, self._outputs(pixels), strict=True):
                    yield self.on_grid(outputs, own).float().cpu()

    def pooled(self, images: Sequence[Any], *, batch_size: int = 32, track: Track = untracked) -> Tensor:
        """[pictures, D] the mean over each picture's patches; else as `features`."""
        means = [grid.mean((0, 1)) for grid in self.features(images, batch_size=batch_size, track=track)]
        if not means:
            raise ValueError("there are no pictures to take features of")
        return torch.stack(means)

    def on_grid(self, outputs: Tensor, pixels: Pixels) -> Tensor:
        """A picture's features in their places: [h, w, L·D], the levels that the model reads side by side.

        Args:
            outputs: [P, L, T, D] or, for rows of patches, [P, L, D], as `tower_outputs` gives them (or their gradient).
            pixels: the picture's own tensors.

        Raises:
            ValueError: the tokens do not fill the picture's patches.
        """
        if self.family.patch_rows:
            _, h, w = pixels["image_grid_thw"][0].tolist()
            m = self.tower.spatial_merge_size
            # Patches that are merged into one token stand together.
            grid = outputs.flatten(1).view(h // m, w // m, m, m, -1)
            return grid.permute(0, 2, 1, 3, 4).reshape(h, w, -1)
        h, w = (pixels["pixel_values"].shape[-2] // self.patch, pixels["pixel_values"].shape[-1] // self.patch)
        tokens = outputs[0].transpose(0, 1).flatten(1)  # where there are several tiles, the first is the whole picture
        before = len(tokens) - h * w  # class and register tokens stand first
        if not 0 <= before <= 16:
            raise ValueError(
                f"{self.path}: the tower gives {len(tokens)} tokens for {h} x {w} patches: probes need one per patch"
            )
        return tokens[before:].unflatten(0, (h, w))

    def _outputs(self, pixels: Sequence[Pixels]) -> list[Tensor]:
        merged = self.family.merge([ImageInput(str(n), own, 0) for n, own in enumerate(pixels)])
        merged = {name: value.to(self.device) for name, value in merged.items()}
        rows = [image_rows(self.family, own) for own in pixels]
        if self.layer is None:
            return tower_outputs(self.model, self.family, merged, rows)
        return self._block_outputs(merged, rows)

    def _block_outputs(self, pixels: Pixels, rows: Sequence[int]) -> list[Tensor]:
        """As `tower_outputs`, of the block `layer`."""
        units = list(blocks(self.tower).values())
        chosen = units[self.layer - 1 if self.layer > 0 else self.layer]
        taken: list[Tensor] = []

        def take(module: nn.Module, args: Any, out: Any) -> None:
            taken.append(out if isinstance(out, Tensor) else out[0])

        def put(module: nn.Module, args: Any, out: Any) -> Any:
            return taken[0] if isinstance(out, Tensor) else (taken[0], *out[1:])

        hooks = [chosen.register_forward_hook(take)]
        if self.family.patch_rows:
            # The block's patches take the place of the last one's, so that they come back in the order of the others.
            hooks.append(units[-1].register_forward_hook(put))
        try:
            found = tower_outputs(self.model, self.family, pixels, rows)
        finally:
            for hook in hooks:
                hook.remove()
        if self.family.patch_rows:
            return [own[:, :1] for own in found]
        return list(taken[0][:, None].split(list(rows)))


class BareTower(nn.Module):
    """A tower alone, under the names that a model's has.

    Args:
        tower: with `last_hidden_state` in what it gives.
        family: whose tensors it takes.
    """

    def __init__(self, tower: nn.Module, family: Family) -> None:
        super().__init__()
        self.tower, self.family = tower, family
        self.config = tower.config

    @property
    def model(self) -> BareTower:
        """Itself: there is no head around it."""
        return self

    def get_submodule(self, target: str) -> nn.Module:
        """The tower, by the path it has in a model."""
        return self.tower if target == self.family.vision[0] else super().get_submodule(target)

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **_: Any) -> Any:
        """What the tower says of merged tensors."""
        pixel_values = pixel_values.to(next(self.tower.parameters()).dtype)
        if image_grid_thw is None:
            return self.tower(pixel_values)
        out = self.tower(pixel_values, grid_thw=image_grid_thw)
        out.pooler_output = [out.pooler_output]  # models give a list
        return out
