"""Many processes: sharding and how ranks agree."""

from lightning_vlm.strategies.fsdp import FSDP2

__all__ = ["FSDP2"]
