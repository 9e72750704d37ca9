"""JSON over HTTP to a vLLM server, and what is raised where an answer is none."""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

PAUSES = (0.5, 1.0, 2.0)  # seconds before each repetition of a request that did not get through
_SHOWN = 600  # characters of a refused request's answer that an error shows
_ENTRY = (("token", str), ("logprob", float | int))


class ServerError(RuntimeError):
    """The server cannot be reached, refused a request, or answered with something else than the contract says.

    Attributes:
        status: HTTP status of a refusal, None otherwise.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(ServerError):
    """No connection to the server, or one that broke."""


class Http:
    """JSON over HTTP, one connection per request, so that any number of threads may ask at once.

    Args:
        url: `http://host:port`, with a path in front of the routes if need be.
        timeout_s: longest silence of the server in seconds. A timeout is an error and never repeated: the server may
            still be at work on the request.

    Raises:
        ValueError: a url that is not `http(s)://host…`.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"url of the vLLM server is {url!r}: give it as http://host:port")
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.host, self.port, self.path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def get(self, route: str, *, tries: int | None = None) -> Any:
        """Answer of a GET, which may always be repeated.

        Args:
            route: with its query. tries: how often to ask in all; None for one more than `PAUSES`.

        Raises:
            ServerError: see `post`.
        """
        return self._ask("GET", route, None, repeat=True, tries=tries)

    def post(self, route: str, body: Mapping[str, Any] | None = None, *, repeat: bool = False) -> Any:
        """Answer of a POST: JSON, None where it is empty.

        Args:
            route: such as `/v1/completions`.
            body: sent as JSON; None sends nothing.
            repeat: the request changes nothing at the server, so ask again when the connection breaks. A connection
                that is refused has delivered nothing, and is always tried again.

        Raises:
            Unreachable: no connection.
            ServerError: a timeout, any status but 200, or an answer that is no JSON.
        """
        return self._ask("POST", route, None if body is None else json.dumps(body).encode(), repeat=repeat)

    def _ask(self, method: str, route: str, body: bytes | None, *, repeat: bool, tries: int | None = None) -> Any:
        tries = len(PAUSES) + 1 if tries is None else tries
        for left in range(tries - 1, -1, -1):
            try:
                return self._once(method, route, body)
            except (ConnectionError, http.client.RemoteDisconnected) as error:
                if left == 0 or not (repeat or isinstance(error, ConnectionRefusedError)):
                    raise Unreachable(f"{method} {self.url}{route}: {_named(error)}") from error
                time.sleep(PAUSES[len(PAUSES) - left])
            except TimeoutError as error:
                raise ServerError(
                    f"{method} {self.url}{route}: no answer within {self.timeout_s:g} s; raise timeout_s if the server "
                    "is only slow"
                ) from error
            except OSError as error:  # no such host, no route
                raise Unreachable(f"{method} {self.url}{route}: {_named(error)}") from error
            except http.client.HTTPException as error:
                raise ServerError(f"{method} {self.url}{route}: this is no HTTP answer ({_named(error)})") from error
        raise AssertionError("tries is at least 1")

    def _once(self, method: str, route: str, body: bytes | None) -> Any:
        connection = self._kind(self.host, self.port, timeout=self.timeout_s)
        try:
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, self.path + route, body=body, headers=headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        finally:
            connection.close()
        where = f"{method} {self.url}{route}"
        if response.status != 200:
            raise ServerError(f"{where}: HTTP {response.status}: {' '.join(text.split())[:_SHOWN]}", response.status)
        if not text:
            return None
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ServerError(f"{where}: the answer is no JSON: {text[:80]!r}") from error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def field(answer: Any, name: str, kind: Any, route: str) -> Any:
    """Entry `name` of a JSON answer, a `kind`: a class, or several joined by |.

    Raises:
        ServerError: the answer is no object, lacks the entry, or has it in another type than `kind`.
    """
    if not isinstance(answer, dict) or name not in answer:
        raise ServerError(f"{route} gave a malformed answer: no {name!r} in {str(answer)[:200]}")
    value = answer[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ServerError(
            f"{route} gave a malformed answer: {name!r} is {str(value)[:80]}, not {getattr(kind, '__name__', kind)}"
        )
    return value


def logprobs_of(answer: Mapping[str, Any], ids: list[int], where: str) -> list[float]:
    """Log-probs of drawn tokens: per id, nats.

    Args:
        answer: as `/v1/completions` (`tokens`, `token_logprobs`) or as `/inference/v1/generate` gives them (`content`).
        ids: the tokens. where: route and row, for errors.

    Raises:
        ServerError: they are of other tokens, or no finite numbers.
    """
    if "content" in answer:
        entries = field(answer, "content", list, where)
        tokens, values = ([field(entry, name, kind, where) for entry in entries] for name, kind in _ENTRY)
    else:
        tokens, values = field(answer, "tokens", list, where), field(answer, "token_logprobs", list, where)
    if tokens != [f"token_id:{id}" for id in ids] or len(values) != len(ids):
        raise ServerError(f"{where}: log-probs of {str(tokens)[:80]}, but the ids are {str(ids)[:80]}")
    bad = [value for value in values if not isinstance(value, int | float) or not math.isfinite(value)]
    if bad:
        raise ServerError(f"{where}: {bad[0]} is no log-prob")
    return [float(value) for value in values]
