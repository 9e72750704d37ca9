"""A model directory that writes, judges, rewrites, or says how likely a text is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import check_vocabulary, load_model
from lightning_vlm.models.policy import Policy, evaluating
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.rollouts import Completion, PolicyEngine, Sampling


class Model:
    """A vision-language model that is only run.

    Args:
        path: model directory, hub id or embedded:NAME.
        dtype: of its weights in memory.
        batch_size: sequences generated together.
        device: None takes a GPU where there is one.

    Raises:
        ValueError: what `load_model` and `load_processor` raise.
    """

    def __init__(
        self, path: str, *, dtype: str = "float32", batch_size: int = 64, device: str | torch.device | None = None
    ) -> None:
        backbone = Backbone(path=path, dtype=dtype)
        self.path = path
        self.processor = load_processor(backbone)
        model = load_model(backbone)
        check_vocabulary(model, self.processor)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
        self.policy = Policy(model, family_of(model))
        self.encoder = Encoder(self.processor, max_length=1 << 20)
        self.engine = PolicyEngine(self.policy, self.processor, batch_size=batch_size)

    def write(
        self,
        samples: Sequence[Sample],
        *,
        sampling: Sampling,
        keys: tuple[int, int],
        n: int = 1,
        penalties: Sequence[float] | None = None,
    ) -> list[list[Completion]]:
        """n completions of each sample's prompt.

        Args:
            samples: prompts. sampling, keys, n, penalties: as `PolicyEngine.generate`.

        Raises:
            BadSample: a prompt that cannot be encoded.
        """
        rows = [self.encoder.encode_prompt(sample) for sample in samples]
        return self.engine.generate(rows, n=n, sampling=sampling, keys=keys, penalties=penalties)

    def answer(self, sample: Sample, question: str, *, sampling: Sampling, seed: int) -> str:
        """What the model says to one question about a sample's pictures, asked without the sample's own prompt."""
        asked = [*(image() for _ in sample.images), text(question)]
        prompt = Sample(sample.id, [message("user", *asked)], images=list(sample.images))
        return self.write([prompt], sampling=sampling, keys=(seed, 0))[0][0].text

    def logprobs(self, rows: Sequence[Row]) -> list[float]:
        """Mean log-prob of each row's scored tokens, nats per token."""
        device = next(self.policy.parameters()).device
        batch = collate(list(rows), self.policy.family, self.processor.pad_id).to(device)
        with torch.no_grad(), evaluating(self.policy):
            scores = self.policy.score(batch)
        sums = scores.per_row(scores.logprobs.double(), len(rows)).tolist()
        return [total / row.scored for total, row in zip(sums, rows, strict=True)]

    def tokens(self, content: str) -> int:
        """Length of an answer in this model's tokens, the one that ends the turn included."""
        return len(self.processor.tokenizer(content, add_special_tokens=False).input_ids) + 1
