"""The console script `lightning-vlm`: finds the command and turns users' errors into one line.

Nothing heavy is imported before a command needs it: help, version, and errors in the command line or in the
configuration's files answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

from lightning_vlm._version import __version__
from lightning_vlm.config.tree import nearest

COMMANDS = {
    "fit": ("lightning_vlm.cli.stage", "train: -c FILE [--key value ...] [--run_dir DIR] [--resume]"),
    "validate": ("lightning_vlm.cli.stage", "evaluate on the validation benchmarks: -c FILE [--ckpt FILE]"),
    "test": ("lightning_vlm.cli.stage", "evaluate on the test benchmarks: -c FILE [--ckpt FILE]"),
    "predict": ("lightning_vlm.cli.stage", "write the model's answers as JSONL: -c FILE [--ckpt FILE] [--out FILE]"),
    "export": ("lightning_vlm.cli.export", "checkpoint to Hugging Face model directory, or --adapter: CKPT --out DIR"),
    "chat": ("lightning_vlm.cli.chat", "talk to a model about an image: DIR --image FILE [--prompt TEXT]"),
    "score": (
        "lightning_vlm.cli.score",
        "score answers made elsewhere, with intervals: BENCHMARK FILE ...",
    ),
    "compare": ("lightning_vlm.cli.compare", "compare runs by per-example files, with paired statistics: A B ..."),
    "pairs": (
        "lightning_vlm.cli.pairs",
        "write preference pairs from answers, edited captions or given negatives: --data DATA --out FILE",
    ),
    "compose": (
        "lightning_vlm.cli.compose",
        "build a VLM from a vision tower and a language model: --vision DIR --language DIR --out DIR",
    ),
    "swap-language": (
        "lightning_vlm.cli.compose",
        "put another language model behind a VLM's projector: DIR --language DIR",
    ),
    "take-encoder": ("lightning_vlm.cli.compose", "a VLM's vision tower as a model directory: DIR --out DIR"),
    "take-language": ("lightning_vlm.cli.compose", "a VLM's language model as a model directory: DIR --out DIR"),
    "put-encoder": ("lightning_vlm.cli.compose", "put another vision tower into a VLM: DIR --encoder DIR --out DIR"),
    "distill": (
        "lightning_vlm.cli.distill",
        "a model's own chains of thought, judged, as long as questions need: --data DATA --model DIR --out FILE",
    ),
    "select": ("lightning_vlm.cli.select", "samples by score and by what a model got wrong: --scored FILE --out FILE"),
    "probe": (
        "lightning_vlm.cli.probe",
        "what a vision tower knows: DIR --probe linear|segmentation|gradients|alignment|updates",
    ),
    "influence": (
        "lightning_vlm.cli.influence",
        "what a step on one sample does to other texts, for small models: DIR --train FILE --probe FILE",
    ),
    "study": (
        "lightning_vlm.cli.study",
        "stages, arms and seeds as one resumable object, with a report: run|status|report|check|clean FILE",
    ),
    "overlap": (
        "lightning_vlm.cli.overlap",
        "what of a benchmark is in the training data, by picture and text: TRAIN BENCHMARK",
    ),
}
PACKAGES = tuple(str(Path(__file__).resolve().parents[2] / name) + os.sep for name in ("lightning_vlm", "callbacks"))


def usage() -> str:
    """The text of `lightning-vlm --help`."""
    lines = ["usage: lightning-vlm COMMAND ...", "", "Post-training of vision-language models.", "", "commands:"]
    lines += [f"  {name:<15}{text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "options:", "  --help      this text; `lightning-vlm COMMAND --help` for one command"]
    lines += ["  --version   the version", "  --traceback show where an error was raised (also LVLM_TRACEBACK=1)"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, 2 for an error the user can mend (one line on stderr), 130 when interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    show = "--traceback" in args or os.environ.get("LVLM_TRACEBACK", "") not in ("", "0")
    args = [a for a in args if a != "--traceback"]
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as err:
        if show or not is_user_error(err):
            raise
        print(f"error: {one_line(err)}", file=sys.stderr)
        return 2


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"lightning-vlm {__version__}")
        return 0
    name = args[0]
    if name not in COMMANDS:
        raise ValueError(f"unknown command '{name}'{nearest(name, COMMANDS)}")
    module = importlib.import_module(COMMANDS[name][0])
    return module.main(name, args[1:])


def is_user_error(err: Exception) -> bool:
    """Whether the error says what the user can mend; anything else is a bug and keeps its traceback."""
    named = {c.__name__ for c in type(err).__mro__} & {"MisconfigurationException", "MlflowException"}
    return isinstance(err, ValueError | OSError) or bool(named)


def one_line(err: Exception) -> str:
    """The error's text in one line, with where it was raised if that was in another library."""
    err = own_cause(err)
    text = str(err)
    if "in DataLoader worker process" in text:  # a traceback as text; its last line is the error
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split()) or type(err).__name__
    if isinstance(err, OSError) and err.strerror and err.filename is not None:
        text = f"{err.strerror}: {err.filename}"
    if not _is_own(err):
        last = traceback.extract_tb(err.__traceback__)[-1]
        text += f" (from {Path(last.filename).name}:{last.lineno}; --traceback shows the way there)"
    return text


def own_cause(err: BaseException) -> BaseException:
    """The error this package raised where another library wrapped it in a longer one; else the error itself."""
    cause: BaseException | None = err
    while cause is not None and not _is_own(cause):
        cause = cause.__cause__
    return cause or err


def _is_own(err: BaseException) -> bool:
    """Whether this package, or the user's own code in the working directory, raised it."""
    frames = traceback.extract_tb(err.__traceback__)
    if not frames:
        return True
    file = frames[-1].filename
    users = file.startswith(os.getcwd() + os.sep) and "site-packages" not in file
    return users or file.startswith(PACKAGES)


if __name__ == "__main__":
    sys.exit(main())
