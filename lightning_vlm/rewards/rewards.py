"""The reward: named weighted parts, scored together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_vlm.rewards.functions import Functions, Outcome
from lightning_vlm.rewards.parts import make_part
from lightning_vlm.rewards.settings import Reward
from lightning_vlm.rewards.table import Group, RewardTable, reward_error


class Rewards:
    """Scores completions by named parts. Close it, or use it as a context manager, to end its processes.

    Args:
        rewards: name → part.
        workers: processes for users' functions and patterns.
        max_new_tokens: longest completion of the rollout, in tokens: the default limit of `overlong`.
        device: of reward models.
        progress: show a progress bar when scoring takes longer than a few seconds (main process, terminal only).

    Raises:
        ValueError: no parts, a bad name, a file that is missing or not what it must be, a function that cannot be
            imported or has no known signature. Functions are imported in a worker process, never here.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        *,
        workers: int = 2,
        max_new_tokens: int | None = None,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> None:
        if not rewards:
            raise ValueError("model.rewards is empty: name a part, for example accuracy: {kind: accuracy, rule: exact}")
        if workers < 1:
            raise ValueError(f"model.rewards: workers must be at least 1, got {workers}")
        for name in rewards:
            if not name or not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"model.rewards: {name!r} is no name for a part: use letters, digits, _ and -")
        self.rewards, self.workers, self.progress = dict(rewards), workers, progress
        self.names = tuple(rewards)
        self.weights = tuple(float(reward.weight) for reward in rewards.values())
        self._parts = {
            name: make_part(name, reward, max_new_tokens=max_new_tokens, device=device)
            for name, reward in rewards.items()
            if not reward.apart
        }
        self._functions: Functions | None = None
        self._start()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_functions": None}

    def close(self) -> None:
        """Ends the worker processes; scoring again starts new ones."""
        functions, self._functions = self._functions, None
        if functions is not None:
            functions.close()

    def score(self, groups: Sequence[Group]) -> RewardTable:
        """The rewards of all completions of all groups, in order.

        Raises:
            RewardError: a part raised, or gave no number; a completion that no part applies to.
        """
        n = sum(len(group.completions) for group in groups)
        values = torch.full((n, len(self.names)), math.nan, dtype=torch.float64)
        timed_out = dict.fromkeys(self.names, 0)
        details: dict[str, Tensor] = {}
        with self._threads() as threads, self._bar(n) as bar:
            # Worker processes are busy while this one scores its own parts.
            waiting = {
                name: [threads.submit(self._functions.group, name, group) for group in groups]
                for name, reward in self.rewards.items()
                if reward.apart
            }
            for name, part in self._parts.items():
                scored = part.score(groups, bar.update)
                values[:, self.names.index(name)] = torch.tensor(scored.values, dtype=torch.float64)
                timed_out[name] = scored.timed_out
            for name, futures in waiting.items():
                outcomes = _collected(futures, bar.update)
                found = [math.nan if outcome.value is None else outcome.value for outcome in outcomes]
                values[:, self.names.index(name)] = torch.tensor(found, dtype=torch.float64)
                timed_out[name] = sum(outcome.timed_out for outcome in outcomes)
                details |= _details(name, outcomes)
        self._check_applies(groups, values)
        totals = (values.nan_to_num(nan=0.0) * torch.tensor(self.weights, dtype=torch.float64)).sum(dim=1)
        return RewardTable(self.names, values, totals, timed_out, details)

    def _start(self) -> None:
        """The worker processes, where a part needs them: new ones after `close`, and in a forked copy."""
        apart = {name: reward for name, reward in self.rewards.items() if reward.apart}
        if apart and (self._functions is None or not self._functions.owned):
            self._functions = Functions(apart, workers=self.workers)

    @contextmanager
    def _threads(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that wait for the worker processes. An error ends these, so that no thread waits in vain."""
        self._start()
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="rewards")
        try:
            yield threads
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            if self._functions is not None:
                self._functions.stop()
            threads.shutdown()
            self.close()
            raise
        threads.shutdown()

    def _check_applies(self, groups: Sequence[Group], values: Tensor) -> None:
        nothing = values.isnan().all(dim=1).tolist()
        each = ((group.sample, completion) for group in groups for completion in group.completions)
        for bare, (sample, completion) in zip(nothing, each, strict=True):
            if bare:
                functions = ", ".join(f"{name} ({self.rewards[name].what})" for name in self.names)
                problem = "every part returned None, so there is no reward; let one of them return a number"
                raise reward_error(self.names[0], functions, problem, sample, completion.text)

    def _bar(self, n: int) -> Any:
        from tqdm import tqdm

        other = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        hidden = True if other or not self.progress else None  # None: shown on a terminal only
        total = n * len(self.names)
        return tqdm(total=total, desc="scoring", unit="reward", leave=False, delay=5, disable=hidden)


def _collected(futures: Sequence[Future], tick: Any) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for future in futures:
        found = future.result()
        outcomes += found
        tick(len(found))
    return outcomes


def _details(name: str, outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    """Columns of what the functions returned beside their rewards."""
    keys = dict.fromkeys(key for outcome in outcomes for key in outcome.details)
    return {
        f"{name}/{key}": torch.tensor([o.details.get(key, math.nan) for o in outcomes], dtype=torch.float64)
        for key in keys
    }
