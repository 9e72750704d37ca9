"""Loading a backbone, with every way it can fail said in one line."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from .attention import use_attention
from .families import family_of
from .spec import Backbone


def load_model(backbone: Backbone) -> PreTrainedModel:
    """The backbone's model on the CPU, in train mode, attention set.

    Raises:
        ValueError: missing path, unknown hub id (or none reachable), an architecture without images or outside the
            family table, weights that do not fill the model, flash-attn absent.
    """
    dtype = getattr(torch, backbone.dtype)
    if backbone.embedded is not None:
        from .embedded import build_model

        if backbone.quantize is not None:
            raise ValueError(f"backbone.quantize has no effect on {backbone.path}, which is not loaded: leave it out")
        model = build_model(backbone.embedded, seed=backbone.seed, dtype=dtype)
    else:
        model = _pretrained(backbone, dtype)
    use_attention(model, family_of(model), backbone.attention)
    if dtype == torch.float64:
        keep_float64(model)
    return model.train()


def _pretrained(backbone: Backbone, dtype: torch.dtype) -> PreTrainedModel:
    check_path(backbone.path)
    remote = {"trust_remote_code": backbone.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(backbone.path, **remote)
    except (OSError, ValueError) as error:
        what = "is no directory here and not to be had from the hub"
        if Path(backbone.path).expanduser().is_dir():
            what = "has a config.json that cannot be used"
        raise ValueError(f"backbone.path {backbone.path!r} {what}: {_first_line(error)}") from error
    family_of(config)
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            backbone.path,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            **_quantization(backbone, config),
            **remote,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"backbone.path {backbone.path!r} has no weights that can be loaded: {_first_line(error)}"
        ) from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[kind]):
            raise ValueError(
                f"weights of {backbone.path!r} do not fill the model: {len(names)} {kind.replace('_', ' ')} "
                f"({', '.join(names[:3])}); is config.json another model's?"
            )
    return model


def _quantization(backbone: Backbone, config: PretrainedConfig) -> dict[str, Any]:
    """How transformers quantises the linear layers of the language model, and no others."""
    if backbone.quantize is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ValueError("backbone.quantize needs bitsandbytes: pip install 'lightning-vlm[quantize]'")
    family = family_of(config)
    with torch.device("meta"):
        shell = AutoModelForImageTextToText.from_config(config)
    inside = tuple(f"{path}." for path in family.language)
    linear = [name for name, module in shell.named_modules() if isinstance(module, nn.Linear)]
    bits = {"load_in_8bit": True} if backbone.quantize == "8bit" else {"load_in_4bit": True}
    if backbone.quantize == "4bit":
        bits |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": getattr(torch, backbone.dtype)}
    apart = [name for name in linear if not name.startswith(inside)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "quantization_config": BitsAndBytesConfig(**bits, llm_int8_skip_modules=apart),
        "device_map": {"": device},
    }


def check_path(path: str) -> None:
    """Refuses a local path that is not a model directory; a hub id passes.

    Raises:
        ValueError: says what is missing.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise ValueError(f"backbone.path {path!r} is no model directory: it has no config.json")
    elif place.exists():
        raise ValueError(f"backbone.path {path!r} is a file: give the model directory it is in")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(
            f"backbone.path {path!r} does not exist: give a model directory, a hub id (owner/name) or embedded:NAME"
        )


def check_vocabulary(model: PreTrainedModel, processor: Any) -> None:
    """Refuses a tokenizer that is not the model's. More embedding rows than tokens are padding, and fine.

    Args:
        model: the model.
        processor: has `vocab_size` (one more than the largest id) and `image_token_id`.

    Raises:
        ValueError: ids without an embedding, or two opinions on the image placeholder.
    """
    rows, where = model.get_input_embeddings().weight.shape[0], model.name_or_path or type(model).__name__
    if processor.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {processor.vocab_size} ids, the model {where} embeds {rows}: put the tokenizer that "
            "belongs to the model into its directory"
        )
    if processor.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"the processor's image placeholder is id {processor.image_token_id}, that of the model {where} "
            f"{model.config.image_token_id}: put the processor that belongs to the model into its directory"
        )


def keep_float64(model: PreTrainedModel) -> None:
    """Computes in float64 what the architectures compute in float32 whatever the dtype.

    Norms and rotary embeddings are cast to float32, an upcast for bfloat16 but a loss for float64, in which we compare
    gradients to 1e-9. Values in other dtypes are untouched.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)
        namespace = sys.modules[type(module).__module__]
        if hasattr(namespace, "apply_rotary_pos_emb_vision"):
            namespace.apply_rotary_pos_emb_vision = _rotate_patches


def _rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (wide * scale).to(hidden_states.dtype)


def _rotate_patches(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """2-D rotary embedding of patches, [S, H, d] each with [S, d] angles, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)

    def rotate(x: Tensor) -> Tensor:
        x = x.to(wide)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    return rotate(q).to(q.dtype), rotate(k).to(k.dtype)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
