"""Tokenizer, image placeholder and chat template of a language model, bound to the VLM it becomes part of."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_vlm.compose.language import EMBEDDING, Language, generation_config
from lightning_vlm.compose.shells import copied
from lightning_vlm.compose.template import own_template, unwrap, wrap, writes_images
from lightning_vlm.compose.weights import Piece
from lightning_vlm.models.processor import read_json

# Names a tokenizer may have for each role, the form's own first; the first of them is added where there is none.
_IMAGE = ("<image>", "<IMG_CONTEXT>", "<|image_pad|>")
_ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "llava": {"image_token": _IMAGE},
    "internvl": {
        "context_image_token": ("<IMG_CONTEXT>", "<image>", "<|image_pad|>"),
        "start_image_token": ("<img>", "<|vision_start|>"),
        "end_image_token": ("</img>", "<|vision_end|>"),
        "video_token": ("<video>", "<|video_pad|>"),
    },
    "qwen2_5_vl": {
        "image_token": ("<|image_pad|>",),
        "video_token": ("<|video_pad|>",),
        "vision_bos_token": ("<|vision_start|>",),
        "vision_eos_token": ("<|vision_end|>",),
    },
}
_PROBES = ("The picture shows 12 red circles.", "  two  spaces\n\nx² + α = ½ 数", "<think>\nno\n</think>")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>")


@dataclass
class Text:
    """A bound tokenizer.

    Attributes:
        tokenizer: with the form's special tokens, an EOS and a padding token.
        template: chat template that writes the placeholder for image parts.
        roles: {role: token} of the form.
        added: tokens that were not in the vocabulary.
        wrapped: the language model's own template is inside ours.
        rows: embedding rows that the ids need.
    """

    tokenizer: Any
    template: str
    roles: dict[str, str]
    added: list[str]
    wrapped: bool

    @property
    def image(self) -> str:
        """What the template writes for an image: the token that features replace."""
        return self.roles.get("image_token") or self.roles["context_image_token"]

    def id(self, role: str) -> int:
        """The id of a role's token."""
        return self.tokenizer.convert_tokens_to_ids(self.roles[role])

    @property
    def rows(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def save(self, out: Path) -> None:
        """Write tokenizer and template files."""
        self.tokenizer.chat_template = None  # kept once, beside the processor
        self.tokenizer.save_pretrained(out)
        (out / "chat_template.jinja").write_text(self.template, encoding="utf-8")


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a directory, as its tokenizer.json has it.

    AutoTokenizer cuts text Qwen's own way for every directory of model_type qwen2, whatever tokenizer.json says.

    Raises:
        ValueError: none there, or one that needs remote code.
    """
    if not any((directory / file).is_file() for file in _VOCABULARIES):
        raise ValueError(
            f"{directory} has no tokenizer ({', '.join(_VOCABULARIES)}): copy tokenizer.json and "
            "tokenizer_config.json of "
            "the language model"
        )
    cls = PreTrainedTokenizerFast if (directory / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return cls.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory} has no tokenizer that can be loaded ({str(error).strip().splitlines()[0]}): copy "
            "tokenizer.json "
            "and tokenizer_config.json of the language model"
        ) from error


def cuts_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids, on a few texts."""
    return all(
        one(text, add_special_tokens=False).input_ids == other(text, add_special_tokens=False).input_ids
        for text in _PROBES
    )


def template_of(directory: Path, tokenizer: Any) -> str:
    """A directory's chat template.

    Raises:
        ValueError: it has none.
    """
    template = own_template(tokenizer) or read_json(directory / "chat_template.json").get("chat_template")
    if not template:
        raise ValueError(
            f"{directory} has no chat template, as base models have none: give one with --chat_template FILE (jinja; "
            "a language model's own will do)"
        )
    return template


def bind(language: Language, form: str, *, chat_template: str | Path | None = None) -> Text:
    """Tokenizer and template of `language` for a VLM of `form`.

    Args:
        language: the LLM.
        form: `llava`, `internvl` or `qwen2_5_vl`.
        chat_template: jinja file in place of the LLM's own template; it may write the placeholder itself.

    Raises:
        ValueError: no tokenizer, template or EOS, ids without embedding, special tokens of the template that are none.
    """
    where = language.path
    tokenizer = load_tokenizer(where)
    if chat_template is not None:
        file = Path(chat_template).expanduser()
        if not file.is_file():
            raise ValueError(f"--chat_template {str(chat_template)!r}: no such file")
        template = file.read_text(encoding="utf-8")
    else:
        template = template_of(where, tokenizer)
    largest = max(tokenizer.get_vocab().values()) + 1
    if largest > language.rows:
        raise ValueError(
            f"the tokenizer of {where} has {largest} ids, the model embeds {language.rows}: put the tokenizer that "
            "belongs "
            "to the model into its directory"
        )
    _bind_ends(tokenizer, where, language)
    known = dict(tokenizer.get_vocab())
    roles = {role: _choose(tokenizer, role, names) for role, names in _ROLES[form].items()}
    tokenizer = _with_roles(tokenizer, roles)
    added = [token for token in roles.values() if token not in known]
    for token in added:
        if tokenizer.convert_tokens_to_ids(token) in known.values():
            raise ValueError(f"the tokenizer of {where} has gaps in its ids: adding {token!r} would take another's id")
    if not cuts_alike(tokenizer, load_tokenizer(where)):
        raise AssertionError("adding special tokens changed how text is cut")
    image = roles.get("image_token") or roles["context_image_token"]
    template = unwrap(template)
    wrapped = not writes_images(tokenizer, template, image)
    if wrapped:
        start, end = ("<|vision_start|>", "<|vision_end|>") if form == "qwen2_5_vl" else ("", "\n")
        template = wrap(template, start + image + end)
    text = Text(tokenizer, template, roles, added, wrapped)
    _check_control_tokens(text, where)
    return text


def _choose(tokenizer: Any, role: str, names: tuple[str, ...]) -> str:
    """The token of a role: one the tokenizer names itself, one it knows, or the form's own."""
    own = getattr(tokenizer, role, None)
    if isinstance(own, str) and own in tokenizer.get_vocab() and own in names:
        return own
    return next((name for name in names if name in tokenizer.get_vocab()), names[0])


def _with_roles(tokenizer: Any, roles: dict[str, str]) -> Any:
    """The tokenizer with every role's token a special one that it can be asked for by the role's name."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        given = read_json(Path(folder) / "tokenizer_config.json").get("extra_special_tokens")
        given = given if isinstance(given, dict) else {}
        return PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens={**given, **roles})


def _bind_ends(tokenizer: Any, where: Path, language: Language) -> None:
    """An EOS is asked for; padding is the tokenizer's, else the configuration's, else the EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {where} has no eos_token, without which no text ends: set it in "
            "tokenizer_config.json (the "
            "token that ends an assistant's turn)"
        )
    if tokenizer.pad_token_id is None:
        ids = (generation_config(where).pad_token_id, getattr(language.config, "pad_token_id", None))
        pad = next((id for id in ids if isinstance(id, int) and 0 <= id < len(tokenizer)), tokenizer.eos_token_id)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def _check_control_tokens(text: Text, where: Path) -> None:
    """Refuses a template whose control tokens the tokenizer would cut into pieces."""
    question = {"role": "user", "content": "a question"}
    talk = [question, {"role": "assistant", "content": "an answer"}, question]
    written = text.tokenizer.apply_chat_template(
        talk, chat_template=text.template, tokenize=False, add_generation_prompt=True
    )
    vocabulary = text.tokenizer.get_vocab()
    if missing := sorted({token for token in _CONTROL.findall(written) if token not in vocabulary}):
        raise ValueError(
            f"the chat template writes {', '.join(missing[:3])}, special tokens that the tokenizer of {where} does "
            "not have: "
            "take the tokenizer they belong to, or another --chat_template"
        )


def extended(language: Language, rows: int) -> Language:
    """The language model with at least `rows` embedding rows, head included.

    Rows that are there stay as they are, free padding rows among them; new rows are the mean of all others, as
    transformers' own resizing centres them (ours: without its random part).
    """
    if rows <= language.rows:
        return language
    more = rows - language.rows
    pieces = {**language.pieces, EMBEDDING: _with_rows(language.pieces[EMBEDDING], more)}
    head = _with_rows(language.head, more) if language.head else None
    config = copied(language.config)
    config.vocab_size = rows
    return Language(language.path, config, pieces, head)


def _with_rows(piece: Piece, more: int) -> Piece:
    return Piece((piece.shape[0] + more, *piece.shape[1:]), piece.dtype, _append_mean(piece.read, more))


def _append_mean(read: Callable[[], Tensor], more: int) -> Callable[[], Tensor]:
    def appended() -> Tensor:
        rows = read()
        mean = torch.zeros(rows.shape[1], dtype=torch.float64)
        for block in rows.split(4096):  # a wide copy of all rows would be twice their size
            mean += block.double().sum(0)
        mean = (mean / len(rows)).to(rows.dtype)
        return torch.cat([rows, mean.expand(more, -1)])

    return appended
