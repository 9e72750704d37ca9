"""An engine that asks an external `vllm serve` process, over the routes that TRL 1.16's client uses.

| what | routes |
|---|---|
| readiness | `/health`, `/v1/models`, `/server_info` |
| rows without images | `/v1/completions` |
| rows with images | `/v1/chat/completions/render`, then `/inference/v1/generate` |
| weights, once | `/get_world_size`, `/init_weight_transfer_engine` |
| weights, per sync | `/start_weight_update`, `/update_weights`, `/finish_weight_update`, `/reset_prefix_cache` |

What stands here is contract-tested against a local test server (`tests/runs/vllm_server.py`), which TRL's own client
can talk to as well. It has never been run against a real vLLM.

Where vLLM's draws differ from those of the engine in this process:

- A completion's seed is its prompt's `draw_key` plus its index, which vLLM adds itself. So a draw is a function of
  (seed, step, row id, index), and of the other requests only as far as batching changes vLLM's logits.
- The server gives one log-prob per token, with `--logprobs-mode processed_logprobs` the one after penalty, bias,
  temperature and filters: `sampling_logprobs`. `logprobs` is a copy of it, not the full softmax; a trainer recomputes.
- A ban is a logit bias of −100, the most that `/v1/completions` takes. No completion with a banned id is accepted.
- min-p applies before top-k and top-p, not after.
"""

from __future__ import annotations

import base64
import io
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_vlm.data.images import load_image
from lightning_vlm.models.batch import Row

from .engine import Completion
from .sampling import Sampling, draw_key
from .server_http import PAUSES, Http, ServerError, Unreachable, field, logprobs_of
from .server_weights import Transport, WeightSync

if TYPE_CHECKING:
    from lightning_vlm.models.processor import Processor

PICTURES = "pictures"  # key of `Row.info`: the row's pictures, in the order of its images
_BAN = -100.0
_SEEDS = (1 << 62) - 1  # leaves room to add an index, and never gives -1, which vLLM takes for "no seed"
_COLDEST = 0.01  # vLLM raises any temperature between 0 and this one
_FINAL_ONLY = 2  # vLLM's output kind without which it drops all but the last of several completions


class ServerEngine:
    """Generates on a vLLM server and sends it the trained weights; see `rollouts.engine.Engine`.

    A row with images needs its pictures in `row.info["pictures"]`: a list of what `data.images.load_image` takes (PIL
    images, paths, encoded bytes), one per image and in their order. The server processes them itself and must make as
    many image tokens of each as the row has placeholders for it.

    Args:
        url: `http://host:port` of the server.
        processor: gives the end-of-turn, banned and image ids, and decodes.
        model_name: name under which the model is served; None takes the server's only one.
        timeout_s: longest wait for the answer to one request in seconds: one prompt's n completions, or one piece of
            the weights.
        wait_s: how long to wait for a server that is still starting, in seconds.
        progress: show a progress bar when a rollout takes longer than a few seconds (main process, terminal only).
        concurrency: prompts that are asked for at once.
        transport: carries the weights; None for vLLM's NCCL group, made at the first `sync`.
        piece_bytes: tensors are announced and sent in pieces of about this size, so that `sync` can be fed from a
            generator that gathers one tensor after the other.

    Raises:
        ValueError: a url that is none, or a number that is not positive.
    """

    def __init__(
        self,
        url: str,
        processor: Processor,
        *,
        model_name: str | None = None,
        timeout_s: float = 600.0,
        wait_s: float = 240.0,
        progress: bool = True,
        concurrency: int = 64,
        transport: Transport | None = None,
        piece_bytes: int = 1 << 30,
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("concurrency", concurrency), ("piece_bytes", piece_bytes)):
            if value <= 0:
                raise ValueError(f"{name} of the server engine must be positive, got {value}")
        self.processor, self.model_name, self.progress = processor, model_name, progress
        self.timeout_s, self.wait_s = timeout_s, wait_s
        self.concurrency = concurrency
        self._http = Http(url, timeout_s)
        self._weights = WeightSync(self._http, transport, piece_bytes)
        self._config: Mapping[str, Any] | None = None
        self._spoiled: str | None = None

    # --- the server --------------------------------------------------------------------------------------------------

    def command(self) -> str:
        """The command line that starts a server this engine can use."""
        backbone = getattr(self.processor, "backbone", None)
        model = self.model_name or getattr(backbone, "path", None) or "MODEL"
        return (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {model} --port {self._http.port or 8000} --logprobs-mode "
            """processed_logprobs --weight-transfer-config '{"backend": "nccl"}' --enable-scale-out"""
        )

    def connect(self) -> None:
        """Waits for the server, and checks that it can do what is asked of it. `generate` and `sync` call this.

        Raises:
            ServerError: no server within `wait_s`; another model than `model_name`; no development routes; another
                `--logprobs-mode` than `processed_logprobs`.
        """
        if self._config is not None:
            return
        self._await_health()
        answer = self._http.get("/v1/models")
        names = [field(model, "id", str, "/v1/models") for model in field(answer, "data", list, "/v1/models")]
        if not names or (self.model_name is not None and self.model_name not in names):
            raise ServerError(f"{self._http.url} serves {', '.join(names) or 'nothing'}, not {self.model_name}")
        try:
            answer = self._http.get("/server_info?config_format=json")
        except ServerError as error:
            if error.status != 404:
                raise
            raise ServerError(
                f"{self._http.url} has no /server_info, one of the development routes: restart it as `{self.command()}`"
            ) from error
        config = field(answer, "vllm_config", dict, "/server_info")
        model_config = config.get("model_config")
        mode = model_config.get("logprobs_mode") if isinstance(model_config, dict) else None
        if mode is None:
            warnings.warn(f"{self._http.url} does not say its logprobs mode: it must be processed_logprobs")
        elif mode != "processed_logprobs":
            raise ServerError(
                f"{self._http.url} runs with --logprobs-mode {mode}, whose numbers are not those of its draws: restart "
                f"it as `{self.command()}`"
            )
        self.model_name = self.model_name or names[0]
        self._config = config

    def _await_health(self) -> None:
        end = time.monotonic() + self.wait_s
        while True:
            try:
                self._http.get("/health", tries=1)
                return
            except ServerError as error:
                if time.monotonic() + PAUSES[-1] > end:
                    raise Unreachable(
                        f"no vLLM server at {self._http.url} after {self.wait_s:g} s ({error}): start it as "
                        f"`{self.command()}` (before vLLM 0.30 without --enable-scale-out), or mend the url"
                    ) from error
            time.sleep(PAUSES[-1])

    # --- generation --------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Row], *, n: int = 1, sampling: Sampling, keys: tuple[int, int]
    ) -> list[list[Completion]]:
        """See `Engine.generate`.

        Raises:
            ValueError: n below 1, an empty prompt, a temperature vLLM would change, an image without its picture, or
                one whose placeholders do not stand together.
            ServerError: no server, a refusal, an answer that is not what was asked for, or a `sync` that failed before.
        """
        if n < 1:
            raise ValueError(f"n completions per prompt must be at least 1, got {n}")
        if 0 < sampling.temperature < _COLDEST:
            raise ValueError(
                f"temperature is {sampling.temperature:g}, which vLLM would raise to {_COLDEST}: set 0 (greedy) or more"
            )
        for row in prompts:
            _check(row, self.processor.image_token_id)
        if self._spoiled:
            raise ServerError(self._spoiled)
        if not prompts:
            return []
        self.connect()
        draws = 1 if sampling.greedy else n  # greedy draws of one prompt are one and the same, and vLLM refuses them
        found: dict[int, list[Completion]] = {}
        pool = ThreadPoolExecutor(max_workers=min(self.concurrency, len(prompts)))
        try:
            asked = {pool.submit(self._generate, row, draws, sampling, keys): p for p, row in enumerate(prompts)}
            with self._bar(len(prompts) * n) as bar:
                for answer in as_completed(asked):
                    found[asked[answer]] = answer.result()
                    bar.update(n)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error, do not wait for the rest
        return [[found[p][d % draws] for d in range(n)] for p in range(len(prompts))]

    def _generate(self, row: Row, n: int, sampling: Sampling, keys: tuple[int, int]) -> list[Completion]:
        """All n completions of one prompt in one request, so that its pictures travel once."""
        settings = {
            "n": n,
            "repetition_penalty": sampling.repetition_penalty,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": sampling.max_new_tokens,
            "logprobs": 0,  # of the drawn token alone
            "seed": draw_key(*keys, row.id, 0) & _SEEDS,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(self.processor.eos_ids),
            "logit_bias": {str(id): _BAN for id in sorted(self.processor.banned_ids)},
        }
        ids = row.input_ids.tolist()
        if row.images:
            route = "/inference/v1/generate"
            body = {
                "request_id": f"lightning-vlm-{uuid.uuid4().hex}",
                "model": self.model_name,
                "token_ids": ids,
                "features": self._features(row),
                "sampling_params": {**settings, "output_kind": _FINAL_ONLY},
            }
        else:
            route = "/v1/completions"
            asked = {"return_token_ids": True, "return_tokens_as_token_ids": True}
            body = {"model": self.model_name, "prompt": [ids], **asked, **settings}
        answer = self._post(route, body)
        choices = sorted(field(answer, "choices", list, route), key=lambda choice: field(choice, "index", int, route))
        if [choice["index"] for choice in choices] != list(range(n)):
            raise ServerError(f"{route} gave {len(choices)} completions of {row.id!r} where {n} were asked for")
        if not row.images and any(field(choice, "prompt_token_ids", list, route) != ids for choice in choices):
            raise ServerError(f"{route} continued another prompt than that of {row.id!r}")
        return [self._completion(row, choice, sampling, route) for choice in choices]

    def _features(self, row: Row) -> dict[str, Any]:
        """The server's tensors of a row's pictures, pointed at the row's own placeholders."""
        route = "/v1/chat/completions/render"
        parts = [{"type": "image_url", "image_url": {"url": _data_url(source)}} for source in row.info[PICTURES]]
        messages = [{"role": "user", "content": parts}]
        try:
            answer = self._post(route, {"model": self.model_name, "messages": messages, "max_tokens": 1})
        except ServerError as error:
            if error.status != 404:
                raise
            raise ServerError(
                f"{self._http.url} has no {route}, which rows with images need: restart it as `{self.command()}`"
            ) from error
        features = field(answer, "features", dict, route)
        places = field(field(features, "mm_placeholders", dict, route), "image", list, route)
        if len(places) != len(row.images):
            raise ServerError(f"{route} made {len(places)} images of the {len(row.images)} of {row.id!r}")
        for k, (place, image) in enumerate(zip(places, row.images, strict=True)):
            # Where other ids stand among the placeholders, a mask says which are the image's.
            inside = place.get("is_embed") if isinstance(place, dict) else None
            tokens = sum(inside) if inside else field(place, "length", int, route)
            if tokens != image.tokens:
                raise ServerError(
                    f"the server makes {tokens} tokens of image {k} of {row.id!r}, this processor {image.tokens}: give "
                    "both the same image settings (--mm-processor-kwargs at the server)"
                )
        own = _placeholders(row, self.processor.image_token_id)
        return {**features, "mm_placeholders": {**features["mm_placeholders"], "image": own}}

    def _completion(self, row: Row, choice: Mapping[str, Any], sampling: Sampling, route: str) -> Completion:
        """One completion, after everything that can be checked about it has been."""
        ids, reason = field(choice, "token_ids", list, route), field(choice, "finish_reason", str, route)
        where = f"{route} for {row.id!r}"
        if not ids or any(type(id) is not int for id in ids):
            raise ServerError(f"{where}: token_ids are {str(ids)[:80]}, not ids")
        if banned := self.processor.banned_ids.intersection(ids):
            raise ServerError(f"{where}: the completion has banned ids {sorted(banned)}: is logit_bias ignored?")
        logprobs = logprobs_of(field(choice, "logprobs", dict, route), ids, where)
        ended = ids[-1] in self.processor.eos_ids
        if reason not in ("stop", "length") or len(ids) > sampling.max_new_tokens:
            raise ServerError(f"{where}: {len(ids)} ids that end by {reason!r}: neither a whole nor a cut completion")
        if reason == "length" and len(ids) < sampling.max_new_tokens:
            raise ServerError(
                f"{where}: cut at {len(ids)} of {sampling.max_new_tokens} tokens: raise --max-model-len at the server"
            )
        if reason == "stop" and not ended and not sampling.stop:
            raise ServerError(
                f"{where}: ended at id {ids[-1]}, which ends no turn here ({sorted(self.processor.eos_ids)}): does the "
                "server have the same model directory?"
            )
        text = self.processor.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        return Completion(
            ids=ids,
            text=text,
            finished=reason == "stop",
            logprobs=logprobs,
            sampling_logprobs=list(logprobs),
            entropies=[],
        )

    def _post(self, route: str, body: Mapping[str, Any]) -> Any:
        """A request that changes nothing at the server."""
        try:
            return self._http.post(route, body, repeat=True)
        except Unreachable as error:
            raise Unreachable(f"{error}: is the server still up? It was started as `{self.command()}`") from error

    def _bar(self, total: int) -> Any:
        from tqdm import tqdm

        other = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        hidden = True if other or not self.progress else None  # None: shown on a terminal only
        return tqdm(total=total, desc="generating", unit="seq", leave=False, delay=5, disable=hidden)

    # --- weights -----------------------------------------------------------------------------------------------------

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Sends weights to the server and makes it forget what it computed with the old ones.

        One process calls this, while no process generates. Tensors are taken from the iterable once and in order, and
        at most `piece_bytes` of them and one more are held.

        Args:
            named_parameters: names as in the state dict of the plain transformers model, LoRA merged, whole tensors.

        Raises:
            ValueError: nothing to send, a name twice, or a sharded tensor.
            RuntimeError: vLLM or CUDA is missing here (with the default transport).
            ServerError: no server, one without a weight transfer engine, or a refusal. If the update had begun, the
                server's weights are undefined and `generate` refuses from then on.
        """
        if self._spoiled:
            raise ServerError(self._spoiled)
        named = iter(named_parameters)
        first = next(named, None)
        if first is None:
            raise ValueError("there are no weights to send: named_parameters is empty")
        self.connect()
        if self._config.get("weight_transfer_config") is None:
            raise ServerError(f"{self._http.url} has no weight transfer engine: restart it as `{self.command()}`")
        self._weights.join()
        named = chain([first], named)
        del first  # held by nobody but the iterator, which forgets it
        try:
            self._weights.send(named)
        except BaseException as error:
            if self._weights.updating:
                self._spoiled = (
                    f"a weight update of {self._http.url} failed ({error}), so its weights are undefined: restart the "
                    "server and this run"
                )
            raise

    def close(self) -> None:
        """Leaves the group that carries the weights."""
        self._weights.close()


def _check(row: Row, image_id: int) -> None:
    """Refuses, before anything is sent, a prompt that the server could not continue."""
    if len(row) == 0:
        raise ValueError(f"prompt {row.id!r} is empty: nothing to continue")
    if row.images and PICTURES not in row.info:
        raise ValueError(
            f"row {row.id!r} shows {len(row.images)} images and has no info[{PICTURES!r}]: a vLLM server processes the "
            "pictures themselves, so put the sample's images there when it is encoded"
        )
    if row.images and len(row.info[PICTURES]) != len(row.images):
        raise ValueError(f"row {row.id!r} has {len(row.info[PICTURES])} pictures for {len(row.images)} images")
    _placeholders(row, image_id)


def _placeholders(row: Row, image_id: int) -> list[dict[str, int]]:
    """Where each image's placeholders stand in the row.

    Raises:
        ValueError: one image's placeholders are not in one run, as vLLM needs them, or their number is wrong.
    """
    places = (row.input_ids == image_id).nonzero()[:, 0].tolist()
    if len(places) != sum(image.tokens for image in row.images):
        raise ValueError(f"row {row.id!r} has {len(places)} image placeholders: is an image cut off?")
    found, start = [], 0
    for k, image in enumerate(row.images):
        run = places[start : start + image.tokens]
        if run[-1] - run[0] != image.tokens - 1:
            raise ValueError(f"row {row.id!r}: image {k} is not one run of placeholders, which a vLLM server needs")
        found.append({"offset": run[0], "length": image.tokens})
        start += image.tokens
    return found


def _data_url(source: Any) -> str:
    """The picture as the encoder sees it, upright RGB, as a PNG in a data URL."""
    buffer = io.BytesIO()
    load_image(source).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
