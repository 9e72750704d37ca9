"""The one attention function: each attention layer of each model calls `attend`, which hands on to the chosen backend.

Whatever changes how rows attend (packed rows, a prefix shared by several rows) has this one place to go. transformers
finds the function by name in the attention config; the names never reach a saved config.json.

Shape suffixes: B rows, H heads, T tokens, S patches of all images in one row, L window length, d head width.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from .families import Family
from .spec import Attention

_PREFIX = "lightning_vlm_"
# transformers hands over all windows at once, with their cumulative lengths, when the name contains "flash"; otherwise
# it loops over the windows in Python.
_ROWS = f"{_PREFIX}sdpa_flash_rows"


def use_attention(model: PreTrainedModel, family: Family, backend: Attention) -> None:
    """Makes every attention layer of `model` call `attend` with `backend`.

    Raises:
        ValueError: `flash_attention_2` where flash-attn is not installed.
    """
    if backend == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ValueError(
            "backbone.attention is 'flash_attention_2' but flash-attn is not installed: "
            "pip install 'lightning-vlm[gpu]', or set backbone.attention to 'sdpa'"
        )
    _set(model, _PREFIX + backend)
    if backend == "sdpa" and family.patch_rows:
        for path in family.vision:
            _set(model.get_submodule(path), _ROWS)


def _set(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            config._attn_implementation = name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: Attention,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer.

    Args:
        module: the attention layer.
        query: [B, H, T, d].
        key: [B, H_kv, T_kv, d].
        value: [B, H_kv, T_kv, d].
        attention_mask: what the backend's mask function made; None where nothing is masked, or by causality alone.
        backend: who computes it.
        cu_seq_lens_q: [windows + 1] borders of windows in a row of patches, which attend within themselves only.
        **kwargs: the layer's own (scaling, dropout, is_causal, ...).

    Returns:
        ([B, T, H, d], attention weights where the backend has them).
    """
    if backend == "eager":
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            barred = query.new_full((), torch.finfo(query.dtype).min)
            attention_mask = torch.where(attention_mask, query.new_zeros(()), barred)
        return _eager_of(module)(module, query, key, value, attention_mask, **kwargs)
    if backend == "flash_attention_2":
        return _flash(module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **kwargs), None
    if cu_seq_lens_q is not None:
        return _windows(module, query, key, value, cu_seq_lens_q, **kwargs), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def prompt_mask(segments_BT: Tensor) -> Tensor:
    """[B, 1, T, T] bool, who may attend to whom where continuations share a prompt.

    Args:
        segments_BT: [B, T] 0 on the prompt, k on its k-th continuation, −1 on padding.
    """
    key_B1T, query_BT1 = segments_BT[:, None, :], segments_BT[:, :, None]
    seen_BTT = ((key_B1T == 0) | (key_B1T == query_BT1)) & (key_B1T >= 0)
    # Padding looks at the prompt, so that no query is without a key; what it sees is never read.
    return seen_BTT.tril()[:, None]


def shares_prompts(backend: Attention) -> bool:
    """Whether the backend can attend by `prompt_mask`; flash-attn knows causal rows only."""
    return backend != "flash_attention_2"


def _eager_of(module: nn.Module) -> Any:
    """The eager function that stands beside the layer's class."""
    for cls in type(module).__mro__:
        if function := getattr(sys.modules[cls.__module__], "eager_attention_forward", None):
            return function
    raise ValueError(f"{type(module).__name__} has no eager attention: set backbone.attention to 'sdpa'")


def _windows(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, borders: Tensor, **kwargs: Any) -> Tensor:
    """One batched call per window length; [1, H, S, d] each → [1, S, H, d]."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _FLASH_ONLY}
    starts, lengths = borders[:-1], borders.diff()
    outputs, order = [], []
    for length in lengths.unique().tolist():
        index_WL = starts[lengths == length][:, None] + torch.arange(length, device=borders.device)
        # [H, S, d] → [windows, H, L, d]
        q, k, v = (x[0][:, index_WL].transpose(0, 1) for x in (query, key, value))
        outputs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0].flatten(0, 1))
        order.append(index_WL.flatten())
    return torch.cat(outputs)[torch.cat(order).argsort()][None]


_FLASH_ONLY = ("cu_seq_lens_k", "max_length_q", "max_length_k")


def _flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """flash-attn through transformers' unpadding; half precision only, so float32 under autocast is cast."""
    device = query.device.type
    cast = query.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=module.is_causal if is_causal is None else is_causal,
        softmax_scale=scaling,
        target_dtype=torch.get_autocast_dtype(device) if cast else None,
        attn_implementation="flash_attention_2",
        **kwargs,
    )


for _backend, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask), ("flash_attention_2", flash_attention_mask)):
    AttentionInterface.register(_PREFIX + _backend, partial(attend, backend=_backend))
    AttentionMaskInterface.register(_PREFIX + _backend, _mask)
AttentionInterface.register(_ROWS, partial(attend, backend="sdpa"))
