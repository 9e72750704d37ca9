"""Weights on their way to a vLLM server, and proof that the test server speaks what TRL's own client speaks."""

from __future__ import annotations

import copy
import json
import threading
import urllib.error
import urllib.request
import weakref
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from lightning_vlm.models.batch import Row
from lightning_vlm.rollouts import server_http as http
from lightning_vlm.rollouts import server_weights as weights
from lightning_vlm.rollouts.server_http import ServerError, Unreachable

from .runs.vllm_server import VLLMServer
from .server_kit import (
    COMPLETIONS,
    GENERATE,
    KEYS,
    RENDER,
    SAMPLED,
    UPDATE,
    WireTransport,
    embedded,
    engine,
    rows,
)  # fmt: skip


@pytest.fixture
def processor():
    return embedded()


@pytest.fixture
def prompts() -> list[Row]:
    return rows()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    for module in (http, weights):
        monkeypatch.setattr(module, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture
def server(processor):
    with VLLMServer(processor) as running:
        yield running


def named_tensors() -> list[tuple[str, torch.Tensor]]:
    noise = torch.Generator().manual_seed(0)
    return [
        ("model.embed_tokens.weight", torch.randn(8, 4, generator=noise).bfloat16()),
        ("model.visual.proj.bias", torch.randn(4, generator=noise)),
        ("lm_head.weight", torch.randn(8, 4, generator=noise).half()),
    ]


@pytest.mark.parametrize("packed_in", ["update", "init"])
def test_sync_announces_sends_finishes_and_resets(processor, prompts, packed_in):
    with VLLMServer(processor, packed_in=packed_in) as server:
        transport = WireTransport(server.wire, packed_in=packed_in)
        ask = engine(server, transport=transport)
        before = ask.generate(prompts, sampling=SAMPLED, keys=KEYS)
        del server.calls[:]
        ask.sync(iter(named_tensors()))
        assert server.routes() == ["/get_world_size", "/init_weight_transfer_engine", *UPDATE]
        init = {"master_address": "127.0.0.1", "master_port": 51216, "rank_offset": 1, "world_size": 3}
        info = {
            "names": ["model.embed_tokens.weight", "model.visual.proj.bias", "lm_head.weight"],
            "dtype_names": ["bfloat16", "float32", "float16"],
            "shapes": [[8, 4], [4], [8, 4]],
        }
        (init if packed_in == "init" else info)["packed"] = True
        assert server.bodies("/init_weight_transfer_engine") == [{"init_info": init}]
        assert server.bodies("/update_weights") == [{"update_info": info}]
        assert [body for route, body in server.calls if route in UPDATE and route != UPDATE[1]] == [{}, {}, None]
        assert all(torch.equal(server.weights[name], tensor) for name, tensor in named_tensors())
        del server.calls[:]
        after = ask.generate(prompts, sampling=SAMPLED, keys=KEYS)
        assert all(c[0].ids != d[0].ids for c, d in zip(before, after, strict=True))
        del server.calls[:]
        ask.sync(named_tensors())
        assert server.routes() == UPDATE  # the group stands
        ask.close()
        assert transport.closed


def test_weights_are_taken_and_held_in_pieces(server):
    """Four tensors of 1000 bytes, pieces of 2000: never more than one piece and the next tensor are alive."""
    alive: list[weakref.ref] = []
    most = 0

    def gathered():
        nonlocal most
        for k in range(4):
            tensor = torch.full((250,), float(k))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"w{k}", tensor
            del tensor

    engine(server, transport=WireTransport(server.wire), piece_bytes=2000).sync(gathered())
    assert server.updates == [["w0", "w1"], ["w2", "w3"]]
    assert server.routes()[-5:] == [UPDATE[0], UPDATE[1], UPDATE[1], UPDATE[2], UPDATE[3]]
    assert [float(server.weights[f"w{k}"][0]) for k in range(4)] == [0.0, 1.0, 2.0, 3.0]
    assert most == 3


def test_no_generation_in_the_middle_of_an_update(server, prompts):
    ask = engine(server)
    failed = []

    def gathered():
        yield "a", torch.zeros(2)
        yield "b", torch.zeros(2)  # taken before the first piece goes, the next one after it
        with pytest.raises(ServerError, match=r"HTTP 409: .*generation while the weights are updat"):
            ask.generate(prompts[:1], sampling=SAMPLED, keys=KEYS)
        failed.append(True)
        yield "c", torch.zeros(2)

    engine(server, transport=WireTransport(server.wire), piece_bytes=1).sync(gathered())
    assert failed and server.updates == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("route", [*UPDATE, "/init_weight_transfer_engine", "/get_world_size"])
def test_a_refused_sync_spoils_what_it_has_touched(server, prompts, route):
    ask = engine(server, transport=WireTransport(server.wire))
    server.answers[route] = lambda status, answer: (500, b"no")
    with pytest.raises(ServerError, match="HTTP 500: no"):
        ask.sync(named_tensors())
    assert server.routes().count(route) == 1
    server.answers.clear()
    if route in UPDATE:
        for use in (lambda: ask.generate(prompts, sampling=SAMPLED, keys=KEYS), lambda: ask.sync(named_tensors())):
            with pytest.raises(ServerError, match="its weights are undefined: restart the server"):
                use()
    else:
        ask.generate(prompts, sampling=SAMPLED, keys=KEYS)


def test_weight_requests_are_not_repeated_on_a_broken_connection(server):
    server.drops = {"/start_weight_update": 1}
    with pytest.raises(Unreachable, match="RemoteDisconnected"):
        engine(server, transport=WireTransport(server.wire)).sync(named_tensors())


def test_a_transport_that_hangs_does_not_hide_the_servers_refusal(server):
    transport = WireTransport(server.wire)
    transport.join = lambda info: threading.Event().wait()
    server._move({}, "alone", "ready")  # somebody else has joined: the server refuses at once
    with pytest.raises(ServerError, match=r"HTTP 409: .*the weight transfer engine runs already"):
        engine(server, transport=transport).sync(named_tensors())


def test_a_transport_that_fails(server):
    transport = WireTransport(server.wire)
    transport.send = lambda tensors: 1 / 0
    ask = engine(server, transport=transport)
    with pytest.raises(ZeroDivisionError):
        ask.sync(named_tensors())
    with pytest.raises(ServerError, match="division by zero"):
        ask.sync(named_tensors())


def test_a_transfer_that_neither_ends_nor_fails():
    with pytest.raises(ServerError, match=r"not over within 0\.1 s"):
        weights.together(lambda: None, lambda: threading.Event().wait(), 0.1)


def test_a_prefix_cache_that_is_held_is_asked_again(server):
    held = iter([False, False])
    server.answers["/reset_prefix_cache"] = lambda status, answer: (status, {"success": next(held, True)})
    engine(server, transport=WireTransport(server.wire)).sync(named_tensors())
    assert server.routes()[-3:] == ["/reset_prefix_cache"] * 3


def test_weights_that_cannot_be_sent(server, processor):
    ask = engine(server, transport=WireTransport(server.wire))
    with pytest.raises(ValueError, match="named_parameters is empty"):
        ask.sync([])
    with pytest.raises(ValueError, match="the name 'a' twice"):
        ask.sync([("a", torch.zeros(1)), ("a", torch.zeros(1))])
    with pytest.raises(ValueError, match="'b' is sharded"):
        ask.sync([("b", SimpleNamespace(full_tensor=None))])
    assert not set(UPDATE) & set(server.routes())  # nothing was begun, so nothing is spoiled
    ask.sync(named_tensors())


def test_a_server_without_a_weight_transfer_engine(processor):
    server = VLLMServer(processor, weight_transfer=False)
    with server, pytest.raises(ServerError, match=r"no weight transfer engine: restart .*--weight-transfer-config"):
        engine(server, transport=WireTransport(server.wire)).sync(named_tensors())


def test_the_real_transport_says_what_it_lacks(server):
    if find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    with pytest.raises(RuntimeError, match="vllm is not installed here: pip install the server's version"):
        engine(server).sync(named_tensors())
    assert not set(UPDATE) & set(server.routes())


# --- the contract -----------------------------------------------------------------------------------------------------


def trl_client(monkeypatch, server: VLLMServer, *, stateful: bool):
    """TRL's client as it is with vLLM before 0.28 or since; what it calls of NCCL is put on the test server's wire."""
    pytest.importorskip("requests")
    client = pytest.importorskip("trl.generation.vllm_client")
    wire = WireTransport(server.wire)
    names = {
        "is_vllm_available": lambda *args, **kwargs: True,
        "get_ip": lambda: "127.0.0.1",
        "_HAS_STATEFUL_TRAINER_ENGINE": stateful,
        "_HAS_RESET_PREFIX_CACHE_SUCCESS": stateful,
        "open_trainer_endpoint": wire.join,
        "packed_nccl_broadcast_producer": lambda iterator, **rest: wire.send(iterator),
        "NCCLWeightTransferEngine": SimpleNamespace(
            trainer_init=wire.join, trainer_send_weights=lambda iterator, trainer_args: wire.send(iterator)
        ),
        "NCCLTrainerSendWeightsArgs": SimpleNamespace,
        "atexit": SimpleNamespace(register=lambda close: None),
    }
    for name, value in names.items():
        monkeypatch.setattr(client, name, value, raising=False)
    return client.VLLMClient(base_url=server.url)


def sent_for(server: VLLMServer, prompt: Row) -> dict:
    """The last request for a prompt, without what names the request."""
    ids = prompt.input_ids.tolist()
    bodies = [body for body in server.bodies(GENERATE) if body["token_ids"] == ids]
    bodies += [body for body in server.bodies(COMPLETIONS) if body["prompt"] == [ids]]
    return {name: value for name, value in bodies[-1].items() if name != "request_id"}


@pytest.mark.parametrize("stateful", [False, True], ids=["before 0.28", "since 0.28"])
def test_trls_client_gets_from_the_test_server_what_ours_gets(processor, prompts, monkeypatch, stateful):
    """The same routes, the same keys in the same types, the same completions and log-probs, the same weights."""
    generation = pytest.importorskip("trl.generation.vllm_generation").VLLMGeneration
    packed_in = "init" if stateful else "update"
    with VLLMServer(processor, packed_in=packed_in) as server, VLLMServer(processor, packed_in=packed_in) as theirs:
        ask = engine(server, transport=WireTransport(server.wire, packed_in=packed_in))
        client = trl_client(monkeypatch, theirs, stateful=stateful)
        for synced in (False, True):
            if synced:
                ask.sync(named_tensors())
                client.init_communicator(device="cuda")
                metadata = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in named_tensors()]
                client.update_named_params(metadata, iter(named_tensors()))
                client.reset_prefix_cache()
                for route in ("/init_weight_transfer_engine", *UPDATE):
                    assert server.bodies(route) == theirs.bodies(route)
                assert theirs.routes()[-4:] == server.routes()[-4:] == UPDATE
            found = ask.generate(prompts, n=2, sampling=SAMPLED, keys=KEYS)
            for prompt, completions in zip(prompts, found, strict=True):
                ids = prompt.input_ids.tolist()
                ours = sent_for(server, prompt)
                settings = ours.get("sampling_params", ours)
                extra = {name: settings[name] for name in ("seed", "stop", "stop_token_ids", "logit_bias")}
                features = None
                if prompt.images:
                    placing = SimpleNamespace(processing_class=processor)
                    (made,) = client.image_features([prompt.info["pictures"]])
                    features = [generation._place_features(placing, made, ids)]
                answer = client.generate([ids], features, n=2, temperature=0.8, max_tokens=40, generation_kwargs=extra)
                assert sent_for(theirs, prompt) == ours
                assert answer["completion_ids"] == [c.ids for c in completions]
                logprobs = [[values[0] for values in draw] for draw in answer["logprobs"]]
                assert logprobs == [c.sampling_logprobs for c in completions]
        renders = [sorted(map(json.dumps, one.bodies(RENDER))) for one in (server, theirs)]
        assert renders[0] == renders[1] and len(renders[0]) == 4


def ask_raw(server: VLLMServer, route: str, body: dict | None) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + route, data, {"Content-Type": "application/json"}, method="POST")
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


DROPPED = object()


@pytest.mark.parametrize(
    ("route", "path", "value"),
    [
        (COMPLETIONS, "model", "another"),
        (COMPLETIONS, "prompt", "a text"),
        (COMPLETIONS, "prompt", [[]]),
        (COMPLETIONS, "return_token_ids", DROPPED),
        (COMPLETIONS, "unknown", 1),
        (COMPLETIONS, "seed", 2**63),
        (COMPLETIONS, "seed", 1.0),
        (COMPLETIONS, "top_k", -1),
        (COMPLETIONS, "n", 0),
        (COMPLETIONS, "temperature", 2.5),
        (COMPLETIONS, "stop", [""]),
        (COMPLETIONS, "logit_bias", {"a": 1}),
        (COMPLETIONS, "logit_bias", {"1": -101}),
        (GENERATE, "features.mm_hashes.image.0", "unknown"),
        (GENERATE, "features.kwargs_data.image.0", None),
        (GENERATE, "features.mm_placeholders.image.0.offset", 4),
        (GENERATE, "features.mm_placeholders.image.0.length", 15),
        (GENERATE, "features.more", {}),
        (GENERATE, "sampling_params.output_kind", DROPPED),
        (GENERATE, "sampling_params.logprobs", True),
        (GENERATE, "prompt", [[1]]),
        (GENERATE, "request_id", DROPPED),
        (RENDER, "max_tokens", 2),
        (RENDER, "messages.0.role", "system"),
        (RENDER, "messages.0.content.0.image_url.url", "http://elsewhere/picture.png"),
    ],
)
def test_the_test_server_refuses_whatever_differs_from_the_contract(server, prompts, route, path, value):
    engine(server).generate(prompts[:2], n=2, sampling=SAMPLED, keys=KEYS)
    body = copy.deepcopy(server.bodies(route)[0])
    if route == GENERATE:
        body["request_id"] = "new"
    assert ask_raw(server, route, body) == 200
    if route == GENERATE:
        assert ask_raw(server, route, body) == 400  # ids of requests are used once
        body["request_id"] = "newer"
    *way, last = (int(step) if step.isdecimal() else step for step in path.split("."))
    place = body
    for step in way:
        place = place[step]
    if value is DROPPED:
        del place[last]
    else:
        place[last] = value
    assert ask_raw(server, route, body) == 400


def test_the_test_server_refuses_weight_routes_out_of_order_and_unknown_routes(server):
    assert ask_raw(server, "/v1/embeddings", {}) == 404
    info = {"update_info": {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]], "packed": True}}
    bodies = dict(zip(UPDATE, ({}, info, {}, None), strict=True))
    assert [ask_raw(server, route, bodies[route]) for route in UPDATE] == [409] * 4
    server._move({}, "alone", "ready")
    assert [ask_raw(server, route, bodies[route]) for route in UPDATE[1:3]] == [409] * 2
    assert ask_raw(server, UPDATE[0], {"more": 1}) == 400
    assert ask_raw(server, UPDATE[0], {}) == 200
    assert [ask_raw(server, route, bodies[route]) for route in (UPDATE[0], *UPDATE[2:])] == [409] * 3
    server.wire.tensors.put(torch.zeros(2))
    assert ask_raw(server, UPDATE[1], info) == 500  # came in another shape than was announced
