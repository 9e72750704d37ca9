"""Weights of the trained model on their way to a vLLM server: what is asked over HTTP, and what carries the tensors.

`Transport` is the seam between the two. The HTTP half runs anywhere and is contract-tested against a local test server
(`tests/runs/vllm_server.py`); `NCCLTransport`, the half that needs vLLM and CUDA, has never been run.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor

from .server_http import PAUSES, Http, ServerError, field


def together(request: Callable[[], Any], local: Callable[[], Any], timeout_s: float) -> None:
    """Runs a request and this process's part of the same transfer at once: each waits for the other.

    The first error of either is raised at once. The other part may then hang for good, inside NCCL say, so both run in
    threads that do not keep the process alive.

    Raises:
        ServerError: neither done nor failed after `timeout_s` seconds.
    """
    ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(part: Callable[[], Any]) -> None:
        try:
            part()
        except BaseException as error:
            ends.put(error)
        else:
            ends.put(None)

    threads = [threading.Thread(target=run, args=(part,), daemon=True) for part in (request, local)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + timeout_s
    for _ in range(2):
        try:
            error = ends.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise ServerError(f"a weight transfer was not over within {timeout_s:g} s: raise timeout_s?") from None
        if error is not None:
            raise error
    for thread in threads:
        thread.join()  # so that none holds on to tensors that have been sent


class Transport(Protocol):
    """Carries whole tensors from this process to every worker of the server.

    Attributes:
        init_extra: what belongs into `init_info` beside address and ranks.
        update_extra: what belongs into `update_info` beside names, dtypes and shapes.
    """

    init_extra: Mapping[str, Any]
    update_extra: Mapping[str, Any]

    def address(self) -> tuple[str, int]:
        """Host and port at which the workers find this process, which is rank 0."""
        ...

    def join(self, init_info: Mapping[str, Any]) -> None:
        """Waits until all `init_info["world_size"]` ranks have met; called once, while the server is asked to join."""
        ...

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Sends the tensors in the order in which they were announced, while the server receives."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...


class NCCLTransport:
    """vLLM's own NCCL group and packed broadcast, as TRL 1.16 drives them; never run yet.

    vLLM 0.28 moved the `packed` flag from each update to the start and replaced the engine's static methods.

    Args:
        device: CUDA device of this process that sends.
        port: free port of this process for the rendezvous.
        host: address of this machine as the server sees it; None asks vLLM.

    Raises:
        RuntimeError: vLLM or CUDA is missing.
    """

    def __init__(self, *, device: str = "cuda", port: int = 51216, host: str | None = None) -> None:
        try:
            installed = version("vllm")
        except PackageNotFoundError:
            raise RuntimeError(
                "weights go to a vLLM server through vLLM's own NCCL group, and vllm is not installed here: pip "
                "install the server's version of vllm"
            ) from None
        from packaging.version import Version

        self._stateful = Version(installed) >= Version("0.28.0")
        self.device = torch.device(device)
        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(
                f"weights go to a vLLM server over NCCL, which needs a CUDA device in this process; device is {device}"
            )
        self.host, self.port = host, port
        packed = {"packed": True}
        self.init_extra, self.update_extra = (packed, {}) if self._stateful else ({}, packed)
        self._group: Any = None

    def address(self) -> tuple[str, int]:
        """See `Transport.address`."""
        if self.host is None:
            from vllm.utils.network_utils import get_ip

            self.host = get_ip()
        return self.host, self.port

    def join(self, init_info: Mapping[str, Any]) -> None:
        """See `Transport.join`."""
        with torch.cuda.device(self.device):  # vLLM takes the thread's current device
            if self._stateful:
                from vllm.distributed.weight_transfer.nccl_common import trainer_init
            else:
                from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

                trainer_init = NCCLWeightTransferEngine.trainer_init
            self._group = trainer_init(dict(init_info))

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `Transport.send`."""
        with torch.cuda.device(self.device), torch.no_grad():
            torch.cuda.synchronize()  # vLLM packs on streams of its own, which do not wait for ours
            moved = ((name, tensor.detach().to(self.device)) for name, tensor in tensors)
            if self._stateful:
                from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

                packed_nccl_broadcast_producer(
                    iterator=moved, group=self._group, src=0, post_iter_func=lambda item: item[1]
                )
            else:
                from vllm.distributed.weight_transfer.nccl_engine import (
                    NCCLTrainerSendWeightsArgs,
                    NCCLWeightTransferEngine,
                )

                NCCLWeightTransferEngine.trainer_send_weights(
                    iterator=moved, trainer_args=NCCLTrainerSendWeightsArgs(group=self._group, packed=True)
                )
            torch.cuda.synchronize()

    def close(self) -> None:
        """Drops the sockets to the workers, which the server would wait on."""
        if self._group is not None:
            self._group.group.store = self._group.group.socket = None
            self._group = None


class WeightSync:
    """Sends weights to a server and makes it forget what it computed with the old ones.

    Args:
        http: the server.
        transport: carries the tensors; None for vLLM's NCCL group, made at the first `send`.
        piece_bytes: size in bytes of what is announced, sent and held at once.

    Attributes:
        updating: an update has begun and is not over; after an error the server's weights are undefined.
    """

    def __init__(self, http: Http, transport: Transport | None, piece_bytes: int) -> None:
        self.http, self.transport, self.piece_bytes = http, transport, piece_bytes
        self.updating = self._joined = False

    def join(self) -> None:
        """Meets the server's workers in one group, the first time.

        Raises:
            RuntimeError: vLLM or CUDA is missing here (with the default transport).
            ServerError: the server refuses.
        """
        if self._joined:
            return
        if self.transport is None:
            self.transport = NCCLTransport()
        world = field(self.http.get("/get_world_size"), "world_size", int, "/get_world_size")
        host, port = self.transport.address()
        info = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,  # this process is rank 0, the workers come behind it
            "world_size": world + 1,
            **self.transport.init_extra,
        }
        self._together("/init_weight_transfer_engine", {"init_info": info}, lambda: self.transport.join(info))
        self._joined = True

    def send(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """One whole update, in as many pieces as it needs; only one of them is held at a time.

        Raises:
            ValueError: a name twice, or a tensor that is sharded over processes.
            ServerError: the server refuses, or keeps its prefix cache.
        """
        for piece in self._pieces(named):
            if not self.updating:
                self.updating = True
                self.http.post("/start_weight_update", {})
            info = {
                "names": [name for name, _ in piece],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in piece],
                "shapes": [list(tensor.shape) for _, tensor in piece],
                **self.transport.update_extra,
            }
            self._together("/update_weights", {"update_info": info}, lambda piece=piece: self.transport.send(piece))
            del piece  # while the next one is gathered
        self.http.post("/finish_weight_update", {})
        self._reset()
        self.updating = False

    def close(self) -> None:
        """Leaves the group."""
        if self.transport is not None:
            self.transport.close()
        self._joined = False

    def _pieces(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
        """The tensors in order, in lists of at most `piece_bytes` or of one tensor that is larger."""
        piece: list[tuple[str, Tensor]] = []
        names: set[str] = set()
        held = 0
        for name, tensor in named:
            if name in names:
                raise ValueError(f"weights have the name {name!r} twice")
            if hasattr(tensor, "full_tensor"):
                raise ValueError(f"weight {name!r} is sharded over processes: gather it first (full_tensor())")
            names.add(name)
            if piece and held + tensor.nbytes > self.piece_bytes:
                yield piece
                piece, held = [], 0
            piece.append((name, tensor))
            held += tensor.nbytes
        if piece:
            yield piece

    def _together(self, route: str, body: Mapping[str, Any], local: Callable[[], Any]) -> None:
        together(lambda: self.http.post(route, body), local, self.http.timeout_s)

    def _reset(self) -> None:
        """Empties the prefix cache; vLLM says no while requests still hold parts of it."""
        route = "/reset_prefix_cache"
        for pause in (*PAUSES, None):
            answer = self.http.post(route)
            if answer is None or field(answer, "success", bool, route):  # empty before vLLM 0.26
                return
            if pause is not None:
                time.sleep(pause)
        raise ServerError(f"{self.http.url} does not empty its prefix cache: does another process still generate?")
