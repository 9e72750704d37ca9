"""`lightning-vlm export CKPT --out DIR [--adapter]`."""

from __future__ import annotations

from pathlib import Path

from lightning_vlm.cli.arguments import Parser


def main(command: str, argv: list[str]) -> int:
    """Turn a checkpoint into a Hugging Face model directory."""
    parser = Parser(command, description="Checkpoint to Hugging Face model directory (LoRA merged).")
    parser.add_argument("checkpoint", help="run_dir/checkpoints/NAME.ckpt, a file or a distributed checkpoint's folder")
    parser.add_argument("--out", required=True, help="directory to make; must not be there")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as trained)"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write only what was trained, LoRA or projector; see backbone.adapter",
    )
    args = parser.parse_args(argv)
    if not Path(args.checkpoint).exists():  # said before torch is imported
        raise FileNotFoundError(f"no checkpoint '{args.checkpoint}'; a run keeps its own in run_dir/checkpoints")
    if Path(args.out).exists():
        raise ValueError(f"--out {args.out} is there already: choose another directory, or remove it")

    import torch

    from lightning_vlm.export import export_adapter, export_checkpoint

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    if args.adapter:
        print(f"adapter: {export_adapter(args.checkpoint, args.out, dtype=dtype)}")
    else:
        print(f"model: {export_checkpoint(args.checkpoint, args.out, dtype=dtype)}")
    return 0
