"""VLMs composed of encoders and language models, taken apart and re-assembled, as model directories.

Weights go from file to file one tensor at a time; what is not replaced stays bit for bit.
"""

from lightning_vlm.compose.commands import compose, put_encoder, swap_language
from lightning_vlm.compose.take import take_encoder, take_language

__all__ = ["compose", "put_encoder", "swap_language", "take_encoder", "take_language"]
