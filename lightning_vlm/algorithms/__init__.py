"""One LightningModule per algorithm."""

from lightning_vlm.algorithms.base import Algorithm
from lightning_vlm.algorithms.sft import SFT

__all__ = ["SFT", "Algorithm"]
