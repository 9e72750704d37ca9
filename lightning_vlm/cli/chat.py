"""`lightning-vlm chat DIR --image FILE`: ask a model about images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_vlm.cli.arguments import Parser


def main(command: str, argv: list[str]) -> int:
    """Answer one prompt, or every line typed; the conversation is kept until an empty line."""
    parser = Parser(command, description="Talk to a model about images; an empty line ends.")
    parser.add_argument("model", help="model directory, hub id or embedded:NAME")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="shown before the first question")
    parser.add_argument("--prompt", help="ask this one question instead of a conversation")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws at temperature > 0 (default 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights in memory")
    args = parser.parse_args(argv)
    for file in args.image:
        if not Path(file).is_file():
            raise FileNotFoundError(f"no image '{file}'")

    chat = Chat(args)
    if args.prompt is not None:
        print(chat.ask(args.prompt))
        return 0
    while question := _read("> "):
        print(chat.ask(question))
    return 0


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


class Chat:
    """A conversation with a model.

    Args:
        args: the parsed command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from lightning_vlm.data.encode import Encoder
        from lightning_vlm.data.images import load_image
        from lightning_vlm.models.families import family_of
        from lightning_vlm.models.load import load_model
        from lightning_vlm.models.policy import Policy
        from lightning_vlm.models.processor import load_processor
        from lightning_vlm.models.spec import Backbone
        from lightning_vlm.rollouts.engine import PolicyEngine
        from lightning_vlm.rollouts.sampling import Sampling

        backbone = Backbone(path=args.model, dtype=args.dtype)
        processor = load_processor(backbone)
        model = load_model(backbone).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.encoder = Encoder(processor, max_length=1 << 20)
        self.engine = PolicyEngine(Policy(model, family_of(model)), processor)
        self.sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
        self.images = [load_image(file) for file in args.image]
        self.seed = args.seed
        self.messages: list[dict[str, Any]] = []

    def ask(self, question: str) -> str:
        """The model's answer; question and answer become part of the conversation."""
        from lightning_vlm.data.schema import Sample, image, message, text

        pictures = [image() for _ in self.images] if not self.messages else []
        self.messages.append(message("user", *pictures, text(question)))
        prompt = self.encoder.encode_prompt(Sample("chat", list(self.messages), images=self.images))
        turn = len(self.messages)
        answer = self.engine.generate([prompt], n=1, sampling=self.sampling, keys=(self.seed, turn))[0][0].text
        self.messages.append(message("assistant", text(answer)))
        return answer
