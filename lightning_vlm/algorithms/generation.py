"""Who generates for an algorithm: the policy itself, a copy of it in another precision, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lightning_vlm.export.directory import full_state_dict
from lightning_vlm.models.adapters import trained_tensors
from lightning_vlm.models.batch import Row
from lightning_vlm.models.policy import Policy
from lightning_vlm.rollouts import Completion, PolicyEngine, Sampling, ServerEngine
from lightning_vlm.strategies.sync import unsharded

if TYPE_CHECKING:
    from lightning_vlm.algorithms.base import Algorithm


class Generation:
    """Generates with the policy's present weights.

    Args:
        module: the algorithm.
        batch_size: sequences generated together.
        dtype: of a copy that generates; None for the policy itself.
        server: address of a vLLM server; None generates in this process.
    """

    def __init__(self, module: Algorithm, *, batch_size: int, dtype: str | None, server: str | None) -> None:
        self.module, self.batch_size, self.dtype, self.server = module, batch_size, dtype, server
        self._copy: Policy | None = None
        self._remote: ServerEngine | None = None
        self._sent = False  # whether the server has the weights of a rollout before this

    @property
    def exact(self) -> bool:
        """Whether the engine's log-probs are the trainer's but for rounding."""
        low = getattr(self.module.trainer.strategy, "mixed_precision", "none") != "none"
        return self.dtype is None and self.server is None and not low and self.module.trainer.precision == "32-true"

    def prepare(self) -> None:
        """Make the copy, while the policy is still whole."""
        if self.dtype is not None:
            self._copy = self.module.build_policy(replace(self.module.backbone, dtype=self.dtype))
            self._copy.requires_grad_(False).eval()

    def start(self) -> None:
        """The policy sits on its device."""
        if self._copy is not None:
            self._copy.to(self.module.device)
        if self.server is not None:
            self._remote = ServerEngine(self.server, self.module.processor)

    def generate(
        self, rows: Sequence[Row], *, n: int, sampling: Sampling, keys: tuple[int, int]
    ) -> list[list[Completion]]:
        """As `Engine.generate`; all ranks call this together, and need not stay in step inside."""
        module = self.module
        policy, context = module.policy, unsharded
        if self._remote is not None:
            self._send(self._remote)
            return self._remote.generate(rows, n=n, sampling=sampling, keys=keys)
        if self._copy is not None:
            with unsharded(policy), torch.no_grad():
                for own, theirs in zip(self._copy.parameters(), policy.parameters(), strict=True):
                    if theirs.requires_grad:
                        own.copy_(theirs)
            policy, context = self._copy, None
        engine = PolicyEngine(policy, module.processor, batch_size=self.batch_size, context=context)
        return engine.generate(rows, n=n, sampling=sampling, keys=keys)

    def _send(self, remote: ServerEngine) -> None:
        """The present weights to the server, by the first rank; tied ones once, those of an adapter-only run's frozen
        parts the first time alone.
        """
        module = self.module
        # Either gathers, so every rank takes part.
        moved = self._sent and module.adapter_only
        state = trained_tensors(module.policy) if moved else full_state_dict(module.policy.model)
        self._sent = True
        if module.trainer.is_global_zero:
            own = {id(tensor): (name, tensor) for name, tensor in reversed(state.items())}
            remote.sync((name, tensor.to(module.device)) for name, tensor in reversed(own.values()))
        module.trainer.strategy.barrier()
