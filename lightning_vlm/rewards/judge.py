"""A reward model: a sequence classifier with one label that reads prompt and completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lightning_vlm.data.schema import Sample
from lightning_vlm.rewards.parts import Scored, Tick
from lightning_vlm.rewards.table import Group, prompt_text, reward_error, text_of


class Judge:
    """A reward model's logit for prompt (its text parts) and completion.

    The text is the tokenizer's chat template of the prompt's messages and the completion as the assistant's; where
    there is no template, prompt and completion one after the other. It is never cut.

    Args:
        name: of the part.
        path: the model's directory.
        batch_size: texts at once; 1 where neither tokenizer nor model has a padding token.
        device: where the model is kept.

    Raises:
        ValueError: no such directory, or not of a classifier with one label and whole weights.
    """

    def __init__(self, name: str, path: str, *, batch_size: int = 16, device: str | torch.device = "cpu") -> None:
        self.name, self.path, self.device = name, path, device
        place = Path(path).expanduser()
        if not (place / "config.json").is_file():
            raise ValueError(f"{path} is no model directory: it has no config.json")
        try:
            config = AutoConfig.from_pretrained(place)
            if config.num_labels != 1:
                raise ValueError(f"{path} has {config.num_labels} labels; a reward model has one")
            self.tokenizer = AutoTokenizer.from_pretrained(place)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                place, config=config, dtype="auto", output_loading_info=True
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
        if missing := sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]]):
            raise ValueError(
                f"weights of {path} do not fill the classifier: {', '.join(missing[:3])}; another model's?"
            )
        self.model = model.to(device).eval().requires_grad_(False)
        text_config = self.model.config.get_text_config()
        if self.tokenizer.pad_token_id is not None and text_config.pad_token_id is None:
            text_config.pad_token_id = self.tokenizer.pad_token_id
        self.batch_size = batch_size if self.tokenizer.pad_token_id is not None else 1
        self.longest = getattr(text_config, "max_position_embeddings", None)

    def text(self, sample: Sample, completion: str) -> str:
        """What the model reads."""
        if self.tokenizer.chat_template is None:
            return f"{prompt_text(sample)}\n{completion}"
        messages = [{"role": message["role"], "content": text_of(message)} for message in sample.prompt()]
        messages.append({"role": "assistant", "content": completion})
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def score(self, groups: Sequence[Group], tick: Tick) -> Scored:
        """See `Part.score`."""
        pairs = [(group.sample, completion.text) for group in groups for completion in group.completions]
        # A template writes special tokens itself.
        special = self.tokenizer.chat_template is None
        texts = [self._text(*pair) for pair in pairs]
        ids = [self.tokenizer(text, add_special_tokens=special).input_ids for text in texts]
        for (sample, completion), tokens in zip(pairs, ids, strict=True):
            if not tokens or (self.longest is not None and len(tokens) > self.longest):
                problem = f"the text has {len(tokens)} tokens; it reads 1 to {self.longest}"
                raise reward_error(self.name, f"path {self.path}", problem, sample, completion)
        values = [math.nan] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda index: -len(ids[index]))  # by length: little padding
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, value in zip(batch, self._logits([ids[index] for index in batch]), strict=True):
                if not math.isfinite(value):
                    raise reward_error(self.name, f"path {self.path}", f"returned {value}", *pairs[index])
                values[index] = value
            tick(len(batch))
        return Scored(values)

    def _text(self, sample: Sample, completion: str) -> str:
        try:
            return self.text(sample, completion)
        except Exception as error:  # a template may refuse roles or their order
            problem = f"chat template: {type(error).__name__}: {error}"
            raise reward_error(self.name, f"path {self.path}", problem, sample, completion) from error

    @torch.no_grad()
    def _logits(self, ids: list[list[int]]) -> list[float]:
        width, pad = max(map(len, ids)), self.tokenizer.pad_token_id or 0
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=self.device)
        return self.model(input_ids=tokens, attention_mask=mask).logits[:, 0].double().tolist()
