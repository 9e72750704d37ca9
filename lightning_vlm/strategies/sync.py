"""How ranks agree on one optimizer step: counts before it, gradients in it, reports after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

BUCKET_BYTES = 64 * 2**20


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Iterable[float], device: torch.device) -> list[float]:
    """Element-wise sums over all ranks, in float64."""
    return _reduced(values, device, "sum")


def max_over_ranks(values: Iterable[float], device: torch.device) -> list[float]:
    """Element-wise maxima over all ranks, in float64."""
    return _reduced(values, device, "max")


def _reduced(values: Iterable[float], device: torch.device, how: str) -> list[float]:
    values = list(values)
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return tensor.tolist()


def gather_over_ranks(value: Any) -> list[Any]:
    """What each rank has, by rank; plain data."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def is_sharded(policy: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the policy."""
    return isinstance(policy, FSDPModule)


class GradientSync:
    """Gradient exchange of one policy over ranks.

    A sharded policy (FSDP2) reduces its gradients in the backward of the last micro-batch, so every rank must run the
    same number of micro-batches, each through the vision tower; FSDP2 averages, hence `scale`. Replicas (DDP) sum their
    gradients once, after the last micro-batch: any parameter may be missing on any rank.

    Args:
        policy: the module the step runs.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.policy, self.sharded, self.world = policy, is_sharded(policy), world_size()

    @property
    def in_step(self) -> bool:
        """Whether all ranks must run equal numbers of forwards through the same modules."""
        return self.sharded and self.world > 1

    @property
    def scale(self) -> float:
        """Factor on the loss so that the reduced gradient is the sum over ranks."""
        return float(self.world) if self.sharded else 1.0

    def before_backward(self, last: bool) -> None:
        """Announce a micro-batch; only the last one reduces."""
        if self.sharded:
            self.policy.set_requires_gradient_sync(last)
            self.policy.set_is_last_backward(last)

    def reduce(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Sum replicas' gradients in place over ranks; nothing to do for sharded ones."""
        if self.sharded or self.world == 1:
            return
        for bucket in _buckets(list(gradients.values())):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket


@contextmanager
def unsharded(policy: nn.Module) -> Iterator[None]:
    """Full weights on every rank for as long as the context lasts, so that ranks need not stay in step.

    For generation and evaluation of a policy under FSDP2: no all-gather happens inside, lengths and call counts may
    differ between ranks. Costs the memory of the whole policy. Does nothing for a policy that is not sharded.
    """
    if not is_sharded(policy):
        yield
        return
    modules = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    policy._get_fsdp_state()._lazy_init()  # unshard() needs the root to know its children
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        # FSDP2 notes every forward and gathers in backward what it noted before; ranks may have run none in here.
        policy._get_fsdp_state()._comm_ctx.post_forward_order.clear()
        for module in modules:
            if (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                group._post_forward_indices.clear()
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)
