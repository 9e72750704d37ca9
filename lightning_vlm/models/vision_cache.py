"""Outputs of a frozen vision tower on disk, by the content they were computed from: each image is seen once.

Folder and key together cover all the outputs depend on: the folder the tower's weights, configuration, dtype and the
precision of the forward, the key the processed pixels. So it is shared between samples, epochs and runs. Ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_vlm.store import Store, content_key, default_root

from .batch import ImageInput, ModelBatch
from .guard import config_fingerprint, weights_fingerprint
from .parts import part_parameters
from .vision import image_rows, replayed, tower_of, tower_outputs

if TYPE_CHECKING:
    from .policy import Policy
    from .processor import Processor

KIND = "vision-features"
_CLOSE = 0.02  # other kernels differ in their last digits, other weights by more


class VisionCache:
    """What a policy's frozen tower says of each image, looked up or computed and kept.

    Args:
        policy: its tower is frozen; weights whole, not yet sharded.
        processor: decides the pixels.
        folder: a store made elsewhere, used as it is; None for the common one (`$LVLM_CACHE`).
        precision: of the forward, where it is not that of the weights.

    Attributes:
        computed: images that the tower saw through this object.
        found: images that were looked up, each occurrence counted.

    Raises:
        ValueError: the tower trains, or `folder` holds outputs of another tower, dtype, precision or image processor.
    """

    def __init__(
        self, policy: Policy, processor: Processor, *, folder: str | Path | None = None, precision: str = ""
    ) -> None:
        model, family = policy.model, policy.family
        trains = [name for name, p in part_parameters(model, family)["vision"] if p.requires_grad]
        if trains:
            raise ValueError(
                f"model.vision_cache keeps what a frozen vision tower says, but {trains[0]} trains: set "
                "parts.vision.freeze to true, or leave model.vision_cache out"
            )
        config = model.config
        facts = {
            "weights": weights_fingerprint(model, part="vision"),
            "config": config_fingerprint(config.vision_config),
            "layers": str(getattr(config, "vision_feature_layer", "last")),
            "dtype": str(next(tower_of(model, family).parameters()).dtype).removeprefix("torch."),
            "precision": precision,
            "image_processor": content_key(processor.hf.image_processor.to_json_string()),
        }
        where = Path(folder).expanduser() if folder is not None else None
        self.store = Store(default_root(), KIND, facts) if where is None else Store.at(where, KIND, facts)
        self.computed = self.found = 0
        self._projector = part_parameters(model, family)["projector"][0][0]
        self._trusted, self._used = False, set[str]()

    def __str__(self) -> str:
        """What it did, for the end of a run."""
        bytes = sum(self.store.nbytes(key) for key in self._used)
        each = f", {bytes / len(self._used) / 2**20:.3g} MiB each" if self._used else ""
        return (
            f"vision features: {len(self._used):,} images{each}; the tower saw {self.computed:,}, {self.found:,} times "
            f"it was not run; in {self.store.folder}"
        )

    @contextmanager
    def answering(self, policy: Policy, batch: ModelBatch) -> Iterator[None]:
        """Inside, the policy's tower answers for the batch's distinct images from the cache."""
        device = batch.input_ids.device
        # Where a sharding strategy computes in less than the weights' precision, the projector does, too.
        dtype = policy.model.get_parameter(self._projector).dtype
        outputs = [output.to(device, dtype, non_blocking=True) for output in self._outputs(policy, batch)]
        with replayed(policy.model, policy.family, outputs):
            yield

    def _outputs(self, policy: Policy, batch: ModelBatch) -> list[Tensor]:
        """Of the distinct images in their order; those that are missing are computed together."""
        missing = [place for place, key in enumerate(batch.image_keys) if key not in self.store]
        if missing:
            self.store.refresh()  # another rank or run may have computed them
            missing = [place for place in missing if batch.image_keys[place] not in self.store]
        if missing:
            new = self._compute(policy, batch, missing)
            self.store.put({batch.image_keys[place]: output for place, output in zip(missing, new, strict=True)})
            self.computed += len(missing)
        elif not self._trusted:
            self._check(policy, batch)
        self._trusted = True
        self._used.update(batch.image_keys)
        self.found += len(batch.image_keys) - len(missing)
        return [self.store.get_tensor(key) for key in batch.image_keys]

    def _compute(self, policy: Policy, batch: ModelBatch, places: list[int]) -> list[Tensor]:
        family = policy.family
        each = family.slice(batch.pixels, batch.image_tokens)
        images = [ImageInput(batch.image_keys[place], each[place], batch.image_tokens[place]) for place in places]
        rows = [image_rows(family, image.tensors) for image in images]
        return tower_outputs(policy.model, family, family.merge(images), rows)

    def _check(self, policy: Policy, batch: ModelBatch) -> None:
        """The tower's own word on the first image that was found."""
        (fresh,) = self._compute(policy, batch, [0])
        kept = self.store.get_tensor(batch.image_keys[0]).to(fresh.device)
        far = (fresh - kept).float().norm() > _CLOSE * fresh.float().norm() if fresh.shape == kept.shape else True
        if far:
            raise ValueError(
                f"{self.store.folder} is stale: the tower gives other features for an image than it holds; delete the "
                "folder, and they are computed anew"
            )
