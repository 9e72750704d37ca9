"""FSDP2 as a Lightning strategy: one YAML line from one device to many."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_vlm.models.families import blocks
from lightning_vlm.models.parts import part_parameters
from lightning_vlm.models.policy import Policy


class FSDP2(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state over all processes (`fully_shard`), block by block.

    Args:
        mixed_precision: `bf16` computes in bfloat16 over float32 sharded weights and reduces gradients in float32;
            `none` computes in the weights' dtype. Leave `trainer.precision` at 32-true with either.
        save_distributed_checkpoint: one file per rank, which loads on another number of ranks; False gathers on rank 0.
    """

    def __init__(
        self, *, mixed_precision: Literal["none", "bf16"] = "none", save_distributed_checkpoint: bool = True
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
        )
        self.mixed_precision = mixed_precision

    def setup_environment(self) -> None:
        """All processes shard the data; Lightning's `auto` would make them tensor-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard_policy(policy: Policy, mesh: DeviceMesh, mixed_precision: Literal["none", "bf16"] = "none") -> None:
    """Shard every repeated block, then what is left (embeddings, head, projector) as the root, in place.

    Args:
        policy: the policy; its `forward` becomes the root all hooks hang on.
        mesh: a mesh with a `data_parallel` dimension, as the strategy makes it.
        mixed_precision: as for `FSDP2`.
    """
    data = mesh["data_parallel"]
    inner, root = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if mixed_precision == "bf16":
        inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        root = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    apart = whole_parameters(policy)
    for param in apart:  # what is not sharded is not moved either
        param.data = param.data.to(mesh.device_type)
    for block in blocks(policy.model).values():
        if not apart & set(block.parameters()):
            fully_shard(block, mesh=data, mp_policy=inner)
    fully_shard(policy, mesh=data, mp_policy=root, ignored_params=apart)


def whole_parameters(policy: Policy) -> set[nn.Parameter]:
    """Those every rank keeps whole: a tower behind a cache, which a rank runs for the images it alone lacks."""
    if policy.vision_cache is None:
        return set()
    return {param for _, param in part_parameters(policy, policy.family)["vision"]}
