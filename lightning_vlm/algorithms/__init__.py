"""One LightningModule per algorithm."""

from lightning_vlm.algorithms.base import Algorithm
from lightning_vlm.algorithms.dpo import DPO
from lightning_vlm.algorithms.grpo import GRPO
from lightning_vlm.algorithms.opd import OPD
from lightning_vlm.algorithms.sft import SFT
from lightning_vlm.algorithms.sft_c import SFTC
from lightning_vlm.algorithms.visual_warmup import VisualWarmup

__all__ = ["DPO", "GRPO", "OPD", "SFT", "SFTC", "Algorithm", "VisualWarmup"]
