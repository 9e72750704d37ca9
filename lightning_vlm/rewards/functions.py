"""Users' reward functions over groups: several processes, hangs cut, the culprit found."""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_vlm.rewards.settings import Reward
from lightning_vlm.rewards.table import Group, RewardError, prompt_text, reward_error, text_of
from lightning_vlm.rewards.worker import Failed, Hung, Worker


class Outcome(NamedTuple):
    """What a function said of one completion: `value` None where it does not apply."""

    value: float | None
    details: dict[str, float]
    timed_out: bool = False


class Functions:
    """The parts that are computed in worker processes.

    Args:
        rewards: name → part, all `apart`.
        workers: processes.

    Raises:
        ValueError: a function that cannot be imported, or whose signature is unknown.
    """

    def __init__(self, rewards: Mapping[str, Reward], *, workers: int) -> None:
        specs = {
            name: {
                "function": reward.function,
                "pattern": reward.pattern,
                "style": reward.style,
                "options": dict(reward.options),
                "columns": dict(reward.columns),
            }
            for name, reward in rewards.items()
        }
        self._rewards = rewards
        self._owner = os.getpid()
        self._workers = [Worker(specs) for _ in range(workers)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        try:
            self._loaded = self._workers[0].load()
        except RuntimeError as error:
            self.close()
            raise ValueError(f"model.rewards: {error}") from None
        for name, found in self._loaded.items():
            if "error" in found:
                self.close()
                problem = f"model.rewards.{name}: {rewards[name].what}: {found['error']}"
                raise ValueError("\n".join(filter(None, (problem, found["trace"].rstrip()))))

    @property
    def owned(self) -> bool:
        """Whether this is the process that started the workers; a forked copy must not talk into their pipes."""
        return self._owner == os.getpid()

    def group(self, part: str, group: Group) -> list[Outcome]:
        """What a part says of each completion of a group. Thread-safe for as many threads as there are workers.

        Raises:
            RewardError: the function raised, ended its process, or returned what is no reward.
        """
        worker = self._free.get()
        try:
            return self._outcomes(worker, part, group)
        finally:
            self._free.put(worker)

    def stop(self) -> None:
        """Kills all processes for good, also those that a thread is waiting for."""
        for worker in self._workers:
            worker.stop()

    def close(self) -> None:
        """Ends all processes; nothing may be waiting for them."""
        if self.owned:
            self.stop()
            for worker in self._workers:
                worker.close()

    def _outcomes(self, worker: Worker, part: str, group: Group) -> list[Outcome]:
        everyone = list(range(len(group.completions)))
        chunks = [everyone] if self._loaded[part]["together"] else [[index] for index in everyone]
        outcomes: list[Outcome] = []
        for chunk in filter(None, chunks):
            try:
                outcomes += self._call(worker, part, group, chunk)
            except Hung:
                outcomes += self._one_by_one(worker, part, group, chunk)
            except Failed as failure:
                raise self._culprit(worker, part, group, chunk, failure) from None
        return outcomes

    def _one_by_one(self, worker: Worker, part: str, group: Group, chunk: Sequence[int]) -> list[Outcome]:
        """After a call hung: only what hangs by itself counts as cut off."""
        cut = Outcome(self._rewards[part].on_timeout, {}, timed_out=True)
        if len(chunk) == 1:
            return [cut]
        outcomes = []
        for index in chunk:
            try:
                outcomes += self._call(worker, part, group, [index])
            except Hung:
                outcomes.append(cut)
            except Failed as failure:
                raise self._error(part, group, index, failure) from None
        return outcomes

    def _culprit(self, worker: Worker, part: str, group: Group, chunk: Sequence[int], failure: Failed) -> RewardError:
        """After a call failed: the error of the completion that it fails for, by itself."""
        if failure.at is not None:
            return self._error(part, group, chunk[failure.at], failure)
        if len(chunk) == 1:
            return self._error(part, group, chunk[0], failure)
        for index in chunk:
            try:
                self._call(worker, part, group, [index])
            except Hung:
                continue
            except Failed as own:
                return self._error(part, group, index, own)
        together = f"{failure.problem} (for the group of {len(chunk)} together; for none of them alone)"
        return self._error(part, group, None, Failed(together, trace=failure.trace))

    def _error(self, part: str, group: Group, index: int | None, failure: Failed) -> RewardError:
        text = None if index is None else group.completions[index].text
        return reward_error(part, self._rewards[part].what, failure.problem, group.sample, text, failure.trace)

    def _call(self, worker: Worker, part: str, group: Group, chunk: Sequence[int]) -> list[Outcome]:
        self._same_code(worker, part)
        reward, sample = self._rewards[part], group.sample
        messages = reward.kind == "python" and reward.completions == "messages"
        completions = [group.completions[index] for index in chunk]
        arguments: dict[str, Any] = {
            "messages": messages,
            "prompt": _messages(group) if messages else prompt_text(sample),
            "texts": [completion.text for completion in completions],
            "ids": [list(completion.ids) for completion in completions],
            "columns": columns_of(group) if reward.kind == "python" else {},
        }
        return [Outcome(*found) for found in worker.call(part, arguments, reward.seconds)]

    def _same_code(self, worker: Worker, part: str) -> None:
        """A process that starts later reads the file again; by then it may be another reward.

        Raises:
            RewardError: the file was edited after the first process had read it.
        """
        try:
            found = worker.load()[part]
        except RuntimeError as error:
            raise RewardError(f"model.rewards.{part}: {error}") from None
        if "error" in found or found["digest"] != self._loaded[part]["digest"]:
            raise RewardError(
                f"model.rewards.{part}: {self._rewards[part].what}: its file changed while the run was going; "
                "start the run again"
            )


def columns_of(group: Group) -> dict[str, Any]:
    """A sample's columns: all of `info` that is data (pictures made when asked for are not), id, answer, source."""
    sample = group.sample
    info = {name: value for name, value in sample.info.items() if not callable(value)}
    return info | {"id": sample.id, "answer": sample.answer, "source": sample.source}


def _messages(group: Group) -> list[dict[str, Any]]:
    """The prompt as TRL has it: text as a string, a list of parts where there are images."""
    pictured = bool(group.sample.images)
    return [
        {"role": message["role"], "content": list(message["content"]) if pictured else text_of(message)}
        for message in group.sample.prompt()
    ]
