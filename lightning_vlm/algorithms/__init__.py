"""One LightningModule per algorithm."""

from lightning_vlm.algorithms.base import Algorithm
from lightning_vlm.algorithms.sft import SFT
from lightning_vlm.algorithms.visual_warmup import VisualWarmup

__all__ = ["SFT", "Algorithm", "VisualWarmup"]
