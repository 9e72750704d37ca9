"""What the commands of a study import, imported once: processes forked afterwards start at once."""

import importlib
import os

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
for _name in ("lightning_vlm.cli.app", "lightning_vlm.compose", "lightning_vlm.algorithms"):
    importlib.import_module(_name)  # by name: the command line stands above studies
