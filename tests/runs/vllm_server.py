"""A local server that speaks the part of vLLM's HTTP interface that TRL 1.16's client uses, and refuses anything else.

It has no model: a completion is a hash of prompt, pictures, seed and place. What it does have is the contract: unknown
routes are 404, missing or unknown keys and wrong types 400, weight routes out of order and generation in the middle of
an update 409. Like vLLM, it blocks in the two requests that meet the trainer's transport (`Wire`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

WAIT_S = 5.0  # longest wait for the other side of a transfer
_INT64 = range(-(2**63), 2**63)


class Refused(Exception):
    """What is asked is not the contract."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Wire:
    """What stands for the NCCL group: a rendezvous of two, then tensors in order and without names."""

    def __init__(self) -> None:
        self.rendezvous = threading.Barrier(2)
        self.tensors: queue.Queue[torch.Tensor] = queue.Queue()


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value: Any) -> bool:
    return type(value) is int


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_integer(id) and id >= 0 for id in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


def _bias(value: Any) -> bool:
    return isinstance(value, dict) and all(k.isdecimal() and _number(v) and abs(v) <= 100 for k, v in value.items())


_SAMPLING = {
    "n": lambda v: _integer(v) and v >= 1,
    "repetition_penalty": lambda v: _number(v) and v > 0,
    "temperature": lambda v: _number(v) and 0 <= v <= 2,
    "top_p": lambda v: _number(v) and 0 < v <= 1,
    "top_k": lambda v: _integer(v) and v >= 0,
    "min_p": lambda v: _number(v) and 0 <= v <= 1,
    "max_tokens": lambda v: _integer(v) and v >= 1,
    "logprobs": lambda v: v == 0 and _integer(v),
}
_OPTIONAL = {
    "seed": lambda v: _integer(v) and v in _INT64,
    "stop": _texts,
    "stop_token_ids": lambda v: isinstance(v, list) and all(map(_integer, v)),
    "logit_bias": _bias,
}
_ASKED = {"return_token_ids": lambda v: v is True, "return_tokens_as_token_ids": lambda v: v is True}


def _is(expected: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) is type(expected) and value == expected


def _check(where: str, given: Any, required: dict[str, Callable], optional: dict[str, Callable] | None = None) -> None:
    """Exactly these keys, each passing its check."""
    if not isinstance(given, dict):
        raise Refused(400, f"{where} must be an object")
    known = {**required, **(optional or {})}
    if missing := required.keys() - given.keys():
        raise Refused(400, f"{where} lacks {sorted(missing)}")
    if unknown := given.keys() - known.keys():
        raise Refused(400, f"{where} has unknown keys {sorted(unknown)}")
    for name, value in given.items():
        if not known[name](value):
            raise Refused(400, f"{where}: {name} is {str(value)[:60]}")


class VLLMServer:
    """A context that serves on a free local port.

    Args:
        processor: gives vocabulary, image id, the tokens of a picture, and texts.
        packed_in: where the flag `packed` belongs: `update` before vLLM 0.28, `init` since.
        logprobs_mode: what `/server_info` says. weight_transfer: whether there is a weight transfer engine.
        development: whether there is a `/server_info`. scale_out: whether there is a render route.

    Attributes:
        calls: (route, body) of everything that was asked, accepted or not.
        seeds: the seed of every completion that was drawn, in no order.
        weights: what arrived, by name. updates: names of each update.
        answers: by route, what turns a correct (status, answer) into another; an answer may be bytes.
        drops: by route, how many requests to hang up on before they are looked at.
    """

    model = "served-model"

    def __init__(
        self,
        processor: Any,
        *,
        packed_in: str = "update",
        logprobs_mode: str | None = "processed_logprobs",
        weight_transfer: bool = True,
        development: bool = True,
        scale_out: bool = True,
        workers: int = 2,
    ) -> None:
        self.processor, self.packed_in, self.workers, self.wire = processor, packed_in, workers, Wire()
        self.calls: list[tuple[str, Any]] = []
        self.seeds: list[int | None] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.updates: list[list[str]] = []
        self.answers: dict[str, Callable[[int, Any], tuple[int, Any]]] = {}
        self.drops: dict[str, int] = {}
        self.config = {
            "model_config": {"logprobs_mode": logprobs_mode} if logprobs_mode else {},
            "weight_transfer_config": {"backend": "nccl"} if weight_transfer else None,
        }
        self._state = "alone"  # → ready → updating → updated → stale (prefix cache of old weights) → ready
        self._rendered: dict[str, str] = {}  # by hash
        self._tokens: dict[str, int] = {}
        self._lock = threading.Lock()
        self._routes = {
            "GET /health": lambda body: None,
            "GET /v1/models": lambda body: {"object": "list", "data": [{"id": self.model, "object": "model"}]},
            "GET /get_world_size": lambda body: {"world_size": self.workers},
            "POST /v1/completions": self._completions,
            "POST /inference/v1/generate": self._generate,
            "POST /init_weight_transfer_engine": self._init,
            "POST /start_weight_update": lambda body: self._move(body, "ready", "updating"),
            "POST /update_weights": self._update,
            "POST /finish_weight_update": lambda body: self._move(body, "updated", "stale"),
            "POST /reset_prefix_cache": self._reset,
        }
        if development:
            self._routes["GET /server_info?config_format=json"] = lambda body: {"vllm_config": self.config}
        if scale_out:
            self._routes["POST /v1/chat/completions/render"] = self._render
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._serve(self)

            do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> VLLMServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    def routes(self) -> list[str]:
        """Routes in the order in which they were asked for."""
        return [route for route, _ in self.calls]

    def bodies(self, route: str) -> list[Any]:
        """What was sent to one route."""
        return [body for asked, body in self.calls if asked == route]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        route = handler.path.partition("?")[0]
        with self._lock:
            drop = self.drops.get(route, 0)
            self.drops[route] = drop - 1
        if drop > 0:
            handler.close_connection = True
            return
        try:
            body = json.loads(raw) if raw else None
            self.calls.append((route, body))
            if raw and (handler.command, handler.headers.get("Content-Type")) != ("POST", "application/json"):
                raise Refused(400, "a body belongs to a POST and must be application/json")
            respond = self._routes.get(f"{handler.command} {handler.path}")
            if respond is None:
                raise Refused(404, f"no route {handler.command} {handler.path}")
            status, answer = 200, respond(body)
        except Refused as error:
            status, answer = error.status, {"error": {"message": str(error), "code": error.status}}
        status, answer = self.answers.get(route, lambda *same: same)(status, answer)
        data = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        with suppress(ConnectionError):  # whoever asked may have hung up
            handler.end_headers()
            handler.wfile.write(data)

    # --- generation --------------------------------------------------------------------------------------------------

    def _completions(self, body: Any) -> dict[str, Any]:
        required = {"model": _is(self.model), "prompt": lambda v: isinstance(v, list) and v and all(map(_ids, v))}
        _check("/v1/completions", body, {**required, **_ASKED, **_SAMPLING}, _OPTIONAL)
        choices: list[dict] = []
        for prompt in body["prompt"]:
            for ids, logprobs, reason, stop in self._draw(prompt, [], body):
                tokens = [f"token_id:{id}" for id in ids]
                top = [{token: value} for token, value in zip(tokens, logprobs, strict=True)]
                choices.append({
                    "index": len(choices), "text": self.text(ids), "token_ids": ids, "prompt_token_ids": prompt,
                    "logprobs": {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": []},
                    "finish_reason": reason, "stop_reason": stop, "prompt_logprobs": None,
                })  # fmt: skip
        return {"id": "cmpl-0", "object": "text_completion", "model": self.model, "choices": choices}

    def _generate(self, body: Any) -> dict[str, Any]:
        kinds = {
            "request_id": lambda v: isinstance(v, str) and v,
            "model": _is(self.model),
            "token_ids": _ids,
            "features": lambda v: v is None or isinstance(v, dict),
            "sampling_params": lambda v: isinstance(v, dict),
        }
        _check("/inference/v1/generate", body, kinds)
        settings = body["sampling_params"]
        _check("sampling_params", settings, {**_SAMPLING, "output_kind": _is(2)}, _OPTIONAL)
        if [sent["request_id"] for sent in self.bodies("/inference/v1/generate")].count(body["request_id"]) > 1:
            raise Refused(400, f"request_id {body['request_id']} was used before")
        hashes = [] if body["features"] is None else self._pictures(body["token_ids"], body["features"])
        choices = []
        for ids, logprobs, reason, _ in self._draw(body["token_ids"], hashes, settings):
            entries = [
                {"token": f"token_id:{id}", "logprob": p, "bytes": None, "top_logprobs": []}
                for id, p in zip(ids, logprobs, strict=True)
            ]
            choices.append({
                "index": len(choices), "logprobs": {"content": entries}, "finish_reason": reason, "token_ids": ids,
            })  # fmt: skip
        return {"request_id": body["request_id"], "choices": choices, "prompt_logprobs": None}

    def _render(self, body: Any) -> dict[str, Any]:
        kinds = {"model": _is(self.model), "messages": lambda v: isinstance(v, list) and len(v) == 1}
        _check("render", body, {**kinds, "max_tokens": _is(1)})
        (message,) = body["messages"]
        _check("message", message, {"role": _is("user"), "content": lambda v: isinstance(v, list) and v})
        hashes, places, data, end = [], [], [], 5
        for part in message["content"]:
            _check("part", part, {"type": _is("image_url"), "image_url": lambda v: isinstance(v, dict)})
            _check("image_url", part["image_url"], {"url": lambda v: isinstance(v, str)})
            head, _, encoded = part["image_url"]["url"].partition(",")
            if head != "data:image/png;base64":
                raise Refused(400, f"a picture must be a PNG in a data URL, not {head}")
            picture = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))).convert("RGB")
            made, _ = self.processor.image(picture)
            self._tokens[made.key] = made.tokens
            self._rendered[made.key] = base64.b64encode(picture.tobytes()).decode()
            hashes.append(made.key)
            places.append({"offset": end, "length": made.tokens})
            data.append(self._rendered[made.key])
            end += made.tokens + 2
        features = {
            "mm_hashes": {"image": hashes},
            "mm_placeholders": {"image": places},
            "kwargs_data": {"image": data},
        }
        return {"request_id": "render-0", "token_ids": [1] * end, "features": features, "sampling_params": {}}

    def _pictures(self, ids: list[int], features: Any) -> list[str]:
        """Hashes of the pictures, after checking that each fills a run of placeholders and all are filled."""
        names = ("mm_hashes", "mm_placeholders", "kwargs_data")
        _check("features", features, dict.fromkeys(names, lambda v: isinstance(v, dict) and v.keys() == {"image"}))
        hashes, places, data = (features[name]["image"] for name in names)
        if any(self._rendered.get(key) != sent for key, sent in zip(hashes, data, strict=True)):
            raise Refused(400, "features were not rendered here")
        filled = []
        for key, place in zip(hashes, places, strict=True):
            _check("placeholder", place, {"offset": _integer, "length": _integer})
            if place["length"] != self._tokens[key]:
                raise Refused(400, f"a picture does not have {place['length']} tokens")
            filled += range(place["offset"], place["offset"] + place["length"])
        if filled != [at for at, id in enumerate(ids) if id == self.processor.image_token_id]:
            raise Refused(400, "placeholders do not stand where the image ids are")
        return hashes

    def _draw(self, prompt: list[int], hashes: list[str], settings: dict[str, Any]) -> list[tuple]:
        """(ids, logprobs, finish reason, stop reason) of each completion; child seeds as vLLM makes them."""
        if self._state not in ("alone", "ready"):
            raise Refused(409, f"generation while the weights are {self._state}")
        greedy = settings["temperature"] == 0
        if greedy and settings["n"] > 1:
            raise Refused(400, "n must be 1 when using greedy sampling")
        found = []
        for index in range(settings["n"]):
            seed = None if greedy or "seed" not in settings else settings["seed"] + index
            self.seeds.append(seed)
            found.append(self.draw(prompt, hashes, seed, settings))
        return found

    def draw(self, prompt: list[int], hashes: list[str], seed: int | None, settings: dict[str, Any]) -> tuple:
        """One completion: (ids, logprobs, finish reason, stop reason)."""
        banned = {int(id) for id, bias in settings.get("logit_bias", {}).items() if bias <= -100}
        allowed = [id for id in range(self.processor.vocab_size) if id not in banned]
        version = sorted((name, float(value.double().sum())) for name, value in self.weights.items())
        ids, logprobs = [], []
        for place in range(settings["max_tokens"]):
            text = repr((prompt, hashes, seed, place, version, settings["temperature"]))
            number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
            ids.append(allowed[number % len(allowed)])
            logprobs.append(-(number >> 40) / 2.0**24)
            if ids[-1] in settings.get("stop_token_ids", []):
                return ids, logprobs, "stop", ids[-1]
            if reached := [stop for stop in settings.get("stop", []) if stop in self.text(ids)]:
                return ids, logprobs, "stop", reached[0]
        return ids, logprobs, "length", None

    def text(self, ids: list[int]) -> str:
        """What an output says."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _move(self, body: Any, before: str, after: str) -> dict[str, Any]:
        _check("a weight route", body, {})
        if self._state != before:
            raise Refused(409, f"weights are {self._state}, not {before}")
        self._state = after
        return {"message": after}

    def _init(self, body: Any) -> dict[str, Any]:
        _check("init", body, {"init_info": lambda v: isinstance(v, dict)})
        kinds = {
            "master_address": lambda v: isinstance(v, str) and v,
            "master_port": lambda v: _integer(v) and 0 < v < 65536,
            "rank_offset": _is(1),
            "world_size": _is(self.workers + 1),
        }
        _check("init_info", body["init_info"], {**kinds, **({"packed": _is(True)} if self.packed_in == "init" else {})})
        if self._state != "alone":
            raise Refused(409, "the weight transfer engine runs already")
        try:
            self.wire.rendezvous.wait(WAIT_S)
        except threading.BrokenBarrierError:
            raise Refused(500, "nobody came to the rendezvous") from None
        self._state = "ready"
        return {"message": "Weight transfer initialized"}

    def _update(self, body: Any) -> dict[str, Any]:
        _check("update", body, {"update_info": lambda v: isinstance(v, dict)})
        shapes = lambda v: isinstance(v, list) and all(isinstance(s, list) and all(map(_integer, s)) for s in v)  # noqa: E731
        kinds = {"names": _texts, "dtype_names": _texts, "shapes": shapes}
        info = body["update_info"]
        _check("update_info", info, {**kinds, **({"packed": _is(True)} if self.packed_in == "update" else {})})
        if not len(info["names"]) == len(info["dtype_names"]) == len(info["shapes"]) > 0:
            raise Refused(400, "names, dtype_names and shapes must be of one length")
        if self._state not in ("updating", "updated"):
            raise Refused(409, f"weights are {self._state}: no update has been started")
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            try:
                tensor = self.wire.tensors.get(timeout=WAIT_S)
            except queue.Empty:
                raise Refused(500, f"{name} was announced and did not come") from None
            if tensor.dtype != getattr(torch, dtype) or list(tensor.shape) != shape:
                raise Refused(500, f"{name} was announced as {dtype} {shape}, came as {tensor.dtype} {tensor.shape}")
            self.weights[name] = tensor
        self.updates.append(info["names"])
        self._state = "updated"
        return {"message": "Weights updated"}

    def _reset(self, body: Any) -> dict[str, Any]:
        if body is not None:
            raise Refused(400, "/reset_prefix_cache takes no body")
        if self._state not in ("stale", "ready"):
            raise Refused(409, f"weights are {self._state}")
        self._state = "ready"
        return {"success": True}
