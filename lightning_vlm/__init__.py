"""Post-training of vision-language models: which recipe makes this model better, and by how much, for certain?

Nothing heavy is imported here, so that `lightning-vlm --help` answers at once.
"""

from lightning_vlm._version import __version__
