"""Reads training checkpoints without a Trainer and turns them into model directories."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lightning_vlm.export.directory import save_adapter_directory, save_model_directory
from lightning_vlm.export.provenance import make_provenance
from lightning_vlm.models.adapters import check_beside, load_trained
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.parts import PartPolicy, apply_parts
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone

PREFIX = "policy.model."


def check_checkpoint(path: str | Path) -> None:
    """Refuse what is no checkpoint, without reading its tensors.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    if Path(path).is_dir():
        _check_folder(Path(path))
    else:
        read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, from one file or from a distributed checkpoint's folder; tensors on the CPU.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a checkpoint of this package, or one that was cut off.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint '{path}'; a run keeps its own in run_dir/checkpoints")
    content = _read_distributed(path) if path.is_dir() else _read_file(path)
    if "lightning_vlm" not in content:
        raise ValueError(f"'{path}' was not written by this package: it does not say what model it holds")
    return content


def _read_file(path: Path) -> dict[str, Any]:
    broken = f"'{path}' is not a checkpoint, or was cut off while written: take another of its folder"
    if not zipfile.is_zipfile(path):
        raise ValueError(broken)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, UnpicklingError) as err:
        raise ValueError(f"{broken} ({str(err).splitlines()[0]})") from err


def _check_folder(path: Path) -> None:
    if not (path / ".metadata").is_file():
        hint = "a model directory already" if (path / "config.json").is_file() else "not a checkpoint"
        raise ValueError(f"'{path}' is {hint}")


def _read_distributed(path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    _check_folder(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(path, whole)
        content = torch.load(whole, map_location="cpu", weights_only=True)
    meta = path / "meta.pt"  # where Lightning keeps what is not sharded
    return {**torch.load(meta, map_location="cpu", weights_only=True), **content} if meta.is_file() else content


def load_policy(path: str | Path) -> tuple[Any, Any, dict[str, Any]]:
    """The policy a checkpoint holds.

    Returns:
        The policy, its processor, and the checkpoint's `lightning_vlm` facts (`backbone`, `parts`, `step`).

    Raises:
        ValueError: the checkpoint's weights do not fit the model it names.
    """
    content = read_checkpoint(path)
    facts = content["lightning_vlm"]
    backbone = Backbone(**facts["backbone"])
    model = load_model(backbone)
    family = family_of(model)
    apply_parts(model, family, {name: PartPolicy(**policy) for name, policy in facts["parts"].items()})
    weights = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
    try:
        if facts.get("adapter_only"):  # the rest is the backbone's
            load_trained(model, weights, f"'{path}'")
            check_beside(model, facts.get("beside", {}), f"'{path}'")
        else:
            model.load_state_dict(weights, strict=True)
    except RuntimeError as err:
        raise ValueError(f"'{path}' does not fit {backbone.path}, which it was trained from: {err}") from err
    return Policy(model, family), load_processor(backbone), facts


def export_checkpoint(ckpt_path: str | Path, out_dir: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Turn a training checkpoint into a model directory.

    Args:
        ckpt_path: file, or folder of a distributed checkpoint.
        out_dir: directory to make.
        dtype: of the written weights; as trained by default.

    Returns:
        `out_dir`.
    """
    policy, processor, facts = load_policy(ckpt_path)
    return save_model_directory(policy, processor, out_dir, _provenance(ckpt_path, facts), dtype=dtype)


def export_adapter(ckpt_path: str | Path, out_dir: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write only what was trained beside a frozen model, `adapter.safetensors` with its `provenance.json`.

    Args:
        ckpt_path: file, or folder of a distributed checkpoint.
        out_dir: directory to make; start from it by `backbone.adapter`.
        dtype: of the written tensors; as trained by default.

    Returns:
        The adapter's file.

    Raises:
        ValueError: a part other than the projector was trained in full.
    """
    policy, _, facts = load_policy(ckpt_path)
    parts = {part: PartPolicy(**settings) for part, settings in facts["parts"].items()}
    return save_adapter_directory(policy, parts, out_dir, _provenance(ckpt_path, facts), dtype=dtype)


def _provenance(ckpt_path: str | Path, facts: dict[str, Any]) -> dict[str, Any]:
    # run_dir/checkpoints/x.ckpt stands beside run_dir/config.yaml
    config_file = Path(ckpt_path).resolve().parent.parent / "config.yaml"
    adapter = facts["backbone"].get("adapter")
    return make_provenance(
        facts["backbone"]["path"],
        step=facts["step"],
        config_file=config_file,
        checkpoint=str(ckpt_path),
        **({"adapter": adapter} if adapter else {}),
    )
