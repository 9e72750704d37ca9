"""What the tests of the server engine share."""

from __future__ import annotations

import functools

from PIL import Image

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.models.batch import Row
from lightning_vlm.models.processor import Processor, load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rollouts import Sampling
from lightning_vlm.rollouts.server import ServerEngine

from .runs.vllm_server import WAIT_S, VLLMServer, Wire

KEYS = (3, 7)
SAMPLED = Sampling(max_new_tokens=40, temperature=0.8)
COMPLETIONS, GENERATE, RENDER = "/v1/completions", "/inference/v1/generate", "/v1/chat/completions/render"
UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]


@functools.cache
def embedded() -> Processor:
    return load_processor(Backbone(path="embedded:qwen2_5_vl-tiny"))


class WireTransport:
    """The trainer's side of the test server's wire."""

    def __init__(self, wire: Wire, *, packed_in: str = "update") -> None:
        self.wire, self.closed = wire, False
        packed = {"packed": True}
        self.init_extra, self.update_extra = (packed, {}) if packed_in == "init" else ({}, packed)

    def address(self):
        return "127.0.0.1", 51216

    def join(self, init_info):
        self.wire.rendezvous.wait(WAIT_S)

    def send(self, tensors):
        for _, tensor in tensors:
            self.wire.tensors.put(tensor.clone())

    def close(self):
        self.closed = True


def engine(server: VLLMServer, **settings) -> ServerEngine:
    return ServerEngine(server.url, server.processor, **{"wait_s": 0.0, "timeout_s": 20.0, **settings})


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (shade, 255 - shade, 17))


def row(id: str, question: str = "what is there", shades: tuple[int, ...] = ()) -> Row:
    parts = [image() for _ in shades] + [text(question)]
    pictures = [picture(shade) for shade in shades]
    sample = Sample(id, [message("user", *parts)], pictures, info={"pictures": pictures})
    return Encoder(embedded()).encode_prompt(sample)


def rows() -> list[Row]:
    """No picture, one, three (one of them shared)."""
    return [row("a"), row("b", shades=(40,)), row("c", shades=(200, 40, 90))]
