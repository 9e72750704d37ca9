"""Writes a model directory in Hugging Face format: weights, configuration, processor, provenance."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

from lightning_vlm.export.provenance import PROVENANCE_FILE, file_hash, weights_hash
from lightning_vlm.models.adapters import ADAPTER_FILE, save_adapter, trained_tensors

if TYPE_CHECKING:
    from lightning_vlm.models.parts import PartPolicy
    from lightning_vlm.models.policy import Policy

_LORA_A = re.compile(r"(?P<module>.+)\.lora_A\.(?P<adapter>[^.]+)\.weight")


def full_state_dict(model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's weights under their Hugging Face names, whole, on the CPU, LoRA merged; the model stays as it is.

    Sharded weights are gathered, so every rank must call this. Tied weights stay one tensor.

    Args:
        model: possibly sharded, possibly with LoRA layers in place.
        dtype: of floating weights; as they are by default.
    """
    gathered: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            gathered[id(tensor)] = whole.detach().cpu()
        state[name] = gathered[id(tensor)]
    state = _merge_lora(model, state)
    if dtype is None:
        return state
    cast = {id(t): t.to(dtype) if t.is_floating_point() else t for t in state.values()}
    return {name: cast[id(t)] for name, t in state.items()}


def _merge_lora(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + scaling · B A for every adapted matrix, computed in float32 at least; plain names."""
    merged = {n.replace(".base_layer.", "."): t for n, t in state.items() if ".lora_" not in n}
    for name in [n for n in state if ".lora_" in n]:
        found = _LORA_A.fullmatch(name)
        if found is None:
            if ".lora_B." not in name:
                raise ValueError(f"cannot merge '{name}': only LoRA on linear layers is known")
            continue
        module, adapter = found["module"], found["adapter"]
        base = merged[f"{module}.weight"]
        wide = torch.promote_types(base.dtype, torch.float32)
        low, high = state[name].to(wide), state[f"{module}.lora_B.{adapter}.weight"].to(wide)
        scale = model.get_submodule(module).scaling[adapter]
        merged[f"{module}.weight"] = (base.to(wide) + scale * (high @ low)).to(base.dtype)
    return merged


def save_model_directory(
    policy: Policy,
    processor: Any,
    out_dir: str | Path,
    provenance: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the policy's model so that `AutoModelForImageTextToText.from_pretrained` loads it.

    Everything is written under a temporary name and renamed when complete, so that a directory of this name is always
    whole; one that is there already is replaced. Every rank must call this; rank 0 writes.

    Args:
        policy: its `model` is saved; unchanged by this.
        processor: saved beside it (`Processor.save`).
        out_dir: the directory to make.
        provenance: of `make_provenance`; `hash` is added.
        dtype: of the written weights; as trained by default.

    Returns:
        `out_dir`.

    Raises:
        OSError: the disk is full or the place not writable; nothing is left behind, an older directory survives.
    """
    out = Path(out_dir)
    model = policy.model
    state = full_state_dict(model, dtype)
    if not _first_rank():
        return out
    with whole_directory(out) as temporary:
        with _no_progress_bar():
            _shell(model, state).save_pretrained(temporary, state_dict=state)
        _write_generation_config(model, processor, temporary)
        processor.save(temporary)
        facts = {**provenance, "hash": weights_hash(temporary)}
        (temporary / PROVENANCE_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    return out


def save_adapter_directory(
    policy: Policy,
    parts: Mapping[str, PartPolicy],
    out_dir: str | Path,
    provenance: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write only what was trained beside a frozen model, to start from by `backbone.adapter`.

    Every rank must call this; rank 0 writes.

    Args:
        policy: unchanged by this. parts: settings it was trained with.
        out_dir, provenance, dtype: as for `save_model_directory`.

    Returns:
        The adapter's file.

    Raises:
        ValueError: a part other than the projector was trained in full.
        OSError: the disk is full or the place not writable.
    """
    tensors = trained_tensors(policy)
    out = Path(out_dir)
    if _first_rank():
        with whole_directory(out) as temporary:
            file = temporary / ADAPTER_FILE
            save_adapter(file, policy, tensors, parts, dtype=dtype)
            facts = {**provenance, "hash": file_hash([file])}
            (temporary / PROVENANCE_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    return out / ADAPTER_FILE


def _first_rank() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A temporary directory that becomes `out` once all in it is written; otherwise nothing of it is left behind.

    Args:
        out: replaced if it is there.

    Raises:
        OSError: the disk is full or the place not writable.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException as err:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(err, OSError | SafetensorError):
            free = shutil.disk_usage(out.parent).free / 2**30
            raise OSError(
                f"could not write {out}: {err} ({free:.1f} GiB free); free some space and start again; of a run, "
                "`lightning-vlm export` makes it from a checkpoint"
            ) from err
        raise
    replace_directory(temporary, out)


def replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; a directory that is there goes only when the new one stands."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)


def _shell(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A model of the same configuration without weights, adapters or sharding, for transformers to save `state` by."""
    # By way of what is written: run-time choices, such as the attention backend, stay out.
    config = type(model.config).from_dict(model.config.to_dict())
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    with torch.device("meta"):
        shell = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    names = set(shell.state_dict())
    if names != set(state):
        odd = sorted(names ^ set(state))
        raise AssertionError(f"weights and configuration disagree: {odd[:5]}")
    return shell


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar over the files it writes, also where it is not a terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_generation_config(model: PreTrainedModel, processor: Any, directory: Path) -> None:
    """The model's own generation settings, with the end-of-turn and padding ids the model was trained with."""
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = sorted(processor.eos_ids)
    config.pad_token_id = processor.pad_id
    config.save_pretrained(directory)
