"""LoRA adapters inside a plain model: injected per layer by peft, merged back for export."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_lora(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in name


def inject_lora(model: nn.Module, ranks: Mapping[str, tuple[int, float]], *, seed: int = 0) -> None:
    """Puts an adapter beside each named linear layer; the model computes what it did before.

    Args:
        model: changed in place. peft freezes everything but the adapters.
        ranks: {layer path: (rank, α)}.
        seed: of the adapters' random halves (the other halves are zero).
    """
    from peft import LoraConfig, inject_adapter_in_model

    exact = {re.escape(name): setting for name, setting in ranks.items()}
    config = LoraConfig(
        target_modules=list(ranks),
        rank_pattern={name: rank for name, (rank, _) in exact.items()},
        alpha_pattern={name: alpha for name, (_, alpha) in exact.items()},
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{path: layer that carries an adapter}."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters learned anything; no gradient may be taken inside."""
    layers = [layer for layer in lora_layers(model).values() if not layer.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters` would also switch off their training
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_lora(model: nn.Module) -> None:
    """Adds the adapters into the weights and takes them out: afterwards names and classes are the plain model's.

    Raises:
        ValueError: a merged weight is not finite.
    """
    for name, layer in lora_layers(model).items():
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of the adapters alone."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_lora(name)}


def load_adapter(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads adapters, or any tensors of the model such as a projector, by their names in it.

    Raises:
        ValueError: a tensor the model has no place for, one of another width, or adapters missing.
    """
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise ValueError(
                f"adapter tensor {name!r} has no place in this model: were the same parts given a lora_rank?"
            )
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"adapter tensor {name!r} is {list(tensor.shape)}, the model's is {list(own[name].shape)}: it was "
                "trained with another rank or for a model of another width"
            )
    lacking = [name for name in own if is_lora(name) and name not in state]
    if lacking and any(is_lora(name) for name in state):
        raise ValueError(f"the adapter lacks {len(lacking)} of the model's tensors, first {lacking[0]!r}")
    model.load_state_dict(state, strict=False)
