"""From a checkpoint or a policy in memory to a model directory that plain transformers loads."""

from lightning_vlm.export.checkpoint import (
    check_checkpoint,
    export_adapter,
    export_checkpoint,
    load_policy,
    read_checkpoint,
)
from lightning_vlm.export.directory import full_state_dict, save_model_directory
from lightning_vlm.export.provenance import git_state, make_provenance, parent_of
