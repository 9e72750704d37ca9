"""The engine that asks a vLLM server, against a local server that refuses whatever is not the contract."""

from __future__ import annotations

import base64
import io
import threading

import pytest
import torch
from PIL import Image

from lightning_vlm.models.batch import ImageInput, Row
from lightning_vlm.rollouts import Sampling
from lightning_vlm.rollouts import server as server_module
from lightning_vlm.rollouts import server_http as http
from lightning_vlm.rollouts.sampling import draw_key
from lightning_vlm.rollouts.server import ServerEngine
from lightning_vlm.rollouts.server_http import ServerError, Unreachable

from .conftest import free_port
from .runs.vllm_server import VLLMServer
from .server_kit import COMPLETIONS, GENERATE, KEYS, RENDER, SAMPLED, embedded, engine, picture, row, rows


@pytest.fixture
def processor():
    return embedded()


@pytest.fixture
def prompts() -> list[Row]:
    return rows()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    for module in (http, server_module):
        monkeypatch.setattr(module, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture
def server(processor):
    with VLLMServer(processor) as running:
        yield running


def settings_of(body: dict) -> dict:
    return body.get("sampling_params", body)


# --- generation ------------------------------------------------------------------------------------------------------


def test_completions_are_what_the_server_drew_for_these_ids_pictures_and_seeds(server, prompts):
    found = engine(server).generate(prompts, n=3, sampling=SAMPLED, keys=KEYS)
    eos, banned = server.processor.eos_ids, server.processor.banned_ids
    for prompt, completions in zip(prompts, found, strict=True):
        hashes = [shown.key for shown in prompt.images]
        seed = draw_key(*KEYS, prompt.id, 0) & (2**62 - 1)
        asked = {"temperature": 0.8, "max_tokens": 40, "stop_token_ids": list(eos)}
        asked["logit_bias"] = {str(id): -100 for id in banned}
        for index, completion in enumerate(completions):
            ids, logprobs, reason, _ = server.draw(prompt.input_ids.tolist(), hashes, seed + index, asked)
            assert (completion.ids, completion.sampling_logprobs) == (ids, logprobs)
            assert completion.finished == (reason == "stop") == (ids[-1] in eos)
            assert completion.logprobs == logprobs and completion.logprobs is not completion.sampling_logprobs
            assert completion.entropies == []
            kept = ids[:-1] if ids[-1] in eos else ids
            assert completion.text == server.processor.tokenizer.decode(kept, skip_special_tokens=True)
    assert server.routes().count(COMPLETIONS) == 1 and server.routes().count(RENDER) == 2
    assert server.routes().count(GENERATE) == 2  # n completions travel in one request


def test_both_finish_reasons_occur_and_mean_what_they_say(server, processor):
    (found,) = engine(server).generate([row("a")], n=40, sampling=SAMPLED, keys=KEYS)
    whole = [c for c in found if c.finished]
    assert 0 < len(whole) < 40
    assert all(c.ids[-1] in processor.eos_ids and not processor.eos_ids & set(c.ids[:-1]) for c in whole)
    assert all(len(c.ids) == 40 for c in found if not c.finished)


def test_draws_are_keyed_by_seed_step_row_and_index_alone(server, prompts):
    ask = engine(server, concurrency=2)
    first = ask.generate(prompts, n=4, sampling=SAMPLED, keys=KEYS)
    assert len(set(server.seeds)) == 12 and -1 not in server.seeds
    assert all(0 <= seed < 2**62 + 4 for seed in server.seeds)
    assert ask.generate(prompts[::-1], n=4, sampling=SAMPLED, keys=KEYS) == first[::-1]
    assert ask.generate(prompts, n=2, sampling=SAMPLED, keys=KEYS) == [completions[:2] for completions in first]
    assert len({tuple(c.ids) for completions in first for c in completions}) == 12
    for keys in ((3, 8), (4, 7)):
        other = ask.generate(prompts, n=4, sampling=SAMPLED, keys=keys)
        assert all(c.ids != d.ids for cs, ds in zip(first, other, strict=True) for c, d in zip(cs, ds, strict=True))


def test_greedy_is_asked_for_once_and_given_n_times(server, prompts):
    found = engine(server).generate(prompts, n=3, sampling=Sampling(max_new_tokens=5), keys=KEYS)
    assert all(len(completions) == 3 and completions.count(completions[0]) == 3 for completions in found)
    assert all(settings_of(body)["n"] == 1 for body in server.bodies(COMPLETIONS) + server.bodies(GENERATE))


def test_every_sampling_setting_arrives(server, prompts):
    sampling = Sampling(
        max_new_tokens=6, temperature=0.7, top_p=0.9, top_k=11, min_p=0.05, repetition_penalty=1.2, stop=["red"]
    )
    engine(server).generate(prompts, n=2, sampling=sampling, keys=KEYS)
    expected = {
        "n": 2, "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 11, "min_p": 0.05, "logprobs": 0,
        "repetition_penalty": 1.2, "stop": ["red"], "stop_token_ids": [3],
        "logit_bias": {"4": -100.0, "5": -100.0, "6": -100.0, "7": -100.0, "8": -100.0},
    }  # fmt: skip
    for body in server.bodies(COMPLETIONS) + server.bodies(GENERATE):
        settings = settings_of(body)
        assert {name: settings[name] for name in expected} == expected


def test_stop_texts_end_a_completion_and_stay_in_it(server, processor):
    sampling = Sampling(max_new_tokens=200, temperature=1.0, stop=["green"])
    (found,) = engine(server).generate([row("a")], n=20, sampling=sampling, keys=KEYS)
    stopped = [c for c in found if c.ids[-1] not in processor.eos_ids]
    assert stopped and all(c.finished and c.text.endswith("green") and c.text.count("green") == 1 for c in stopped)


def test_pictures_travel_as_png_once_per_prompt_and_features_come_back_at_the_rows_own_places(server, processor):
    shown = row("a", shades=(200, 40))
    engine(server).generate([shown], n=8, sampling=SAMPLED, keys=KEYS)
    (body,) = server.bodies(RENDER)
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"]]
    sent = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert [one.getpixel((5, 5)) for one in sent] == [(200, 55, 17), (40, 215, 17)]
    ids = shown.input_ids.tolist()
    start = ids.index(processor.image_token_id)
    (body,) = server.bodies(GENERATE)
    assert body["features"]["mm_placeholders"]["image"] == [
        {"offset": start, "length": 16},
        {"offset": start + 18, "length": 16},  # vision end and vision start between them
    ]


def test_images_that_touch_are_told_apart(server, processor):
    """LLaVA's template may put two images side by side: one run of placeholders, two pictures."""
    pictures = [picture(1), picture(2)]
    made = [processor.image(one)[0] for one in pictures]
    ids = torch.tensor([9, *[processor.image_token_id] * 32, 10])
    touching = Row("t", ids, torch.zeros(34, dtype=torch.bool), images=made, info={"pictures": pictures})
    engine(server).generate([touching], sampling=SAMPLED, keys=KEYS)
    (body,) = server.bodies(GENERATE)
    assert [place["offset"] for place in body["features"]["mm_placeholders"]["image"]] == [1, 17]


def test_no_prompts_ask_nothing(server):
    assert engine(server).generate([], sampling=SAMPLED, keys=KEYS) == []
    assert server.calls == []


# --- what is refused before anything is sent -------------------------------------------------------------------------


def test_images_need_their_pictures(server, processor):
    shown = row("a", shades=(40, 50))
    for pictures, why in (
        (None, r"'a' shows 2 images and has no info\['pictures'\]"),
        ([picture(40)], "1 pictures for 2"),
    ):
        shown.info["pictures"] = pictures
        if pictures is None:
            del shown.info["pictures"]
        with pytest.raises(ValueError, match=why):
            engine(server).generate([shown], sampling=SAMPLED, keys=KEYS)
    assert server.calls == []


@pytest.mark.parametrize(
    ("ids", "why"), [([], "is empty"), ([6, 6, 6], "3 image placeholders"), ([6, 6, 9, 6, 6], "not one run")]
)
def test_prompts_that_cannot_be_continued(server, ids, why):
    images = [ImageInput("k", {}, 4)]
    bad = Row("a", torch.tensor(ids, dtype=torch.long), torch.zeros(len(ids), dtype=torch.bool), images=images)
    bad.info["pictures"] = [picture(1)]
    with pytest.raises(ValueError, match=why):
        engine(server).generate([bad], sampling=SAMPLED, keys=KEYS)
    assert server.calls == []


def test_bad_numbers(server, prompts):
    with pytest.raises(ValueError, match=r"at least 1, got 0"):
        engine(server).generate(prompts, n=0, sampling=SAMPLED, keys=KEYS)
    with pytest.raises(ValueError, match=r"0\.005, which vLLM would raise to 0\.01"):
        engine(server).generate(prompts, sampling=Sampling(temperature=0.005), keys=KEYS)
    with pytest.raises(ValueError, match=r"concurrency .* must be positive, got 0"):
        engine(server, concurrency=0)
    with pytest.raises(ValueError, match="give it as http://host:port"):
        ServerEngine("localhost:8000", server.processor)


# --- servers that are down, wrong or broken --------------------------------------------------------------------------


def test_no_server_names_the_url_and_the_command(processor, prompts):
    port = free_port()
    with pytest.raises(Unreachable) as caught:
        ServerEngine(f"http://127.0.0.1:{port}", processor, wait_s=0).generate(prompts, sampling=SAMPLED, keys=KEYS)
    line = str(caught.value)
    command = (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve embedded:qwen2_5_vl-tiny --port {port} --logprobs-mode processed_logprobs "
        """--weight-transfer-config '{"backend": "nccl"}' --enable-scale-out"""
    )
    assert f"http://127.0.0.1:{port}" in line and command in line and "\n" not in line


def test_a_server_that_goes_away_later(server, prompts):
    ask = engine(server)
    ask.connect()
    server.__exit__()
    with pytest.raises(Unreachable, match="is the server still up"):
        ask.generate(prompts, sampling=SAMPLED, keys=KEYS)


def test_the_server_is_waited_for(processor):
    with VLLMServer(processor) as server:
        starting = iter([503, 503])
        server.answers["/health"] = lambda status, answer: (next(starting, status), answer)
        engine(server, wait_s=10.0).connect()
        assert server.routes() == ["/health"] * 3 + ["/v1/models", "/server_info"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode raw_logprobs.*restart it as `VLLM_SERVER_DEV_MODE=1"),
        ({"development": False}, "no /server_info.*VLLM_SERVER_DEV_MODE=1"),
        ({"scale_out": False}, "no /v1/chat/completions/render.*--enable-scale-out"),
    ],
)
def test_servers_started_without_what_is_needed(processor, prompts, settings, why):
    with VLLMServer(processor, **settings) as server, pytest.raises(ServerError, match=why):
        engine(server).generate(prompts, sampling=SAMPLED, keys=KEYS)


def test_text_needs_no_render_route_and_an_unknown_logprobs_mode_is_warned_of(processor):
    server = VLLMServer(processor, scale_out=False, logprobs_mode=None)
    with server, pytest.warns(UserWarning, match="must be processed_logprobs"):
        engine(server).generate([row("a")], sampling=SAMPLED, keys=KEYS)


def test_another_model(server, prompts):
    with pytest.raises(ServerError, match="serves served-model, not mine"):
        engine(server, model_name="mine").generate(prompts, sampling=SAMPLED, keys=KEYS)


def test_http_errors_show_their_body_and_are_not_repeated(server, prompts):
    server.answers[GENERATE] = lambda status, answer: (500, b"EngineCore encountered an issue")
    with pytest.raises(ServerError, match=r"HTTP 500: EngineCore encountered an issue") as caught:
        engine(server).generate(prompts[1:2], sampling=SAMPLED, keys=KEYS)
    assert caught.value.status == 500 and server.routes().count(GENERATE) == 1


def test_broken_connections_are_tried_again_where_that_is_safe(server, prompts):
    server.drops = {"/v1/models": 1, COMPLETIONS: 3}
    expected = engine(server).generate(prompts[:1], sampling=SAMPLED, keys=KEYS)
    assert engine(server).generate(prompts[:1], sampling=SAMPLED, keys=KEYS) == expected
    server.drops = {COMPLETIONS: 4}
    with pytest.raises(Unreachable, match="RemoteDisconnected"):
        engine(server).generate(prompts[:1], sampling=SAMPLED, keys=KEYS)


def test_timeouts_are_not_repeated(server, prompts):
    over = threading.Event()

    def slow(status, answer):
        over.wait(5)
        return status, answer

    server.answers[COMPLETIONS] = slow
    with pytest.raises(ServerError, match=r"no answer within 0\.3 s"):
        engine(server, timeout_s=0.3).generate(prompts[:1], sampling=SAMPLED, keys=KEYS)
    over.set()
    assert server.routes().count(COMPLETIONS) == 1


def edited(change):
    """What edits the first completion of a right answer."""

    def edit(status, answer):
        change(answer["choices"][0])
        return status, answer

    return edit


def put(name, value):
    return edited(lambda choice: choice.__setitem__(name, value))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda status, answer: (200, b"<html>"), "the answer is no JSON: '<html>'"),
        (lambda status, answer: (200, []), "no 'choices' in"),
        (lambda status, answer: (200, {"choices": answer["choices"][:1]}), "gave 1 completions of 'a' where 2"),
        (put("index", 1), "gave 2 completions of 'a' where 2"),
        (put("token_ids", []), r"token_ids are \[\], not ids"),
        (put("token_ids", None), "'token_ids' is None, not list"),
        (edited(lambda choice: choice["token_ids"].__setitem__(0, 6)), r"banned ids \[6\]"),
        (edited(lambda choice: choice["token_ids"].__setitem__(0, 20)), "log-probs of .* but the ids are"),
        (put("logprobs", None), "'logprobs' is None, not dict"),
        (edited(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None)), "None is no log-prob"),
        (edited(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, float("nan"))), "nan is no log-prob"),
        (put("prompt_token_ids", [1, 2]), "continued another prompt"),
        (put("finish_reason", "abort"), "5 ids that end by 'abort'"),
        (put("finish_reason", "stop"), r"which ends no turn here \(\[3\]\)"),
    ],
)
def test_answers_that_are_not_what_was_asked_for(server, processor, answer, why):
    server.answers[COMPLETIONS] = answer
    sampling = Sampling(max_new_tokens=5, temperature=1.0)
    with pytest.raises(ServerError, match=why):
        engine(server).generate([row("a")], n=2, sampling=sampling, keys=KEYS)


def test_a_completion_that_the_server_cut_short(server, processor):
    def cut(choice):
        del choice["token_ids"][3:], choice["logprobs"]["content"][3:]

    server.answers[GENERATE] = edited(cut)
    with pytest.raises(ServerError, match=r"cut at 3 of 5 tokens: raise --max-model-len"):
        sampling = Sampling(max_new_tokens=5, temperature=1.0)
        engine(server).generate([row("a", shades=(40,))], sampling=sampling, keys=KEYS)


def test_the_server_must_see_pictures_as_the_processor_does(server, prompts):
    def larger(status, answer):
        answer["features"]["mm_placeholders"]["image"][0]["length"] = 20
        return status, answer

    server.answers[RENDER] = larger
    with pytest.raises(ServerError, match=r"makes 20 tokens of image 0 of 'b', this processor 16.*mm-processor-kwargs"):
        engine(server).generate(prompts[1:2], sampling=SAMPLED, keys=KEYS)


def test_without_the_ban_the_server_would_draw_banned_ids(server, prompts, monkeypatch):
    ask = engine(server)
    found = ask.generate(prompts, n=20, sampling=SAMPLED, keys=KEYS)
    banned = server.processor.banned_ids
    assert not any(banned & set(c.ids) for completions in found for c in completions)
    monkeypatch.setattr("lightning_vlm.rollouts.server._BAN", 0.0)
    with pytest.raises(ServerError, match="banned ids"):
        ask.generate(prompts, n=20, sampling=SAMPLED, keys=KEYS)
