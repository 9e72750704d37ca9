"""Chat templates of language models, made to take messages with images."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

# Turns every list of parts into one string, then leaves the messages to the template that follows, which may be any:
# R1's cuts an assistant's text at </think>, others refuse what is no string.
_START = "{#- images to placeholders -#}"
_END = "{#- the language model's own template -#}"
_PROLOGUE = (
    _START + "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or not message['content'] -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set text = namespace(all='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set text.all = text.all + PLACEHOLDER -%}"
    "{%- elif part['type'] == 'text' -%}{%- set text.all = text.all + part['text'] -%}"
    "{%- else -%}{{- raise_exception('this model takes image and text parts, not ' + part['type']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text.all)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}" + _END + "{{- '' }}"
)
_WRAPPED = re.compile(re.escape(_START) + ".*?" + re.escape(_END + "{{- '' }}"), re.DOTALL)


def wrap(template: str, placeholder: str) -> str:
    """`template` behind a prologue that writes `placeholder` for each image; a text-only chat renders as before.

    Args:
        template: a language model's own, whose messages have strings as contents.
        placeholder: text for one image, line breaks included.
    """
    quoted = "'" + placeholder.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    # A block at the start of a line loses the blanks before it; after the prologue it starts none.
    own = re.sub(r"\A[ \t]+(?=\{[%#])", "", unwrap(template))
    return _PROLOGUE.replace("PLACEHOLDER", quoted) + own


def unwrap(template: str) -> str:
    """The language model's own template, exactly as `wrap` was given it (blanks before a first block aside)."""
    return _WRAPPED.sub("", template, count=1) if template.startswith(_START) else template


def writes_images(tokenizer: Any, template: str, placeholder: str) -> bool:
    """Whether a template writes `placeholder` once for an image part by itself.

    Args:
        tokenizer: renders it.
        template: jinja text.
        placeholder: the token of one image.
    """
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a question"}]}
    try:
        text = tokenizer.apply_chat_template([question], chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError):
        return False  # made for strings
    return text.count(placeholder) == 1 and text.count("a question") == 1 and "'type'" not in text


def own_template(tokenizer: Any) -> str | None:
    """The chat template a tokenizer came with, the default one of several; None where it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None
