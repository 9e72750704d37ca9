"""The embedded world: small pictures with captions, counting, bar charts and geometry, made on the fly."""

from lightning_vlm.data.world.families import FAMILIES
from lightning_vlm.data.world.scene import LABEL_CLASSES, LABELS, Scene, masks, patch_labels, picture, render
from lightning_vlm.data.world.source import SPLITS, WorldSource
