"""`fit`, `validate`, `test`, `predict`: their command line. Reads and merges the configuration; `app` runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_vlm.config.files import REPOSITORY_CONFIGS, TOP_LEVEL, load, parse_yaml
from lightning_vlm.config.tree import Config, nearest_only

OPTIONS = {
    "fit": {"resume": "[CKPT]   go on from the last checkpoint in --run_dir, or from CKPT"},
    "validate": {"ckpt": "FILE       weights of this checkpoint (default: the backbone's own)"},
    "test": {"ckpt": "FILE       weights of this checkpoint (default: the backbone's own)"},
    "predict": {
        "ckpt": "FILE       weights of this checkpoint (default: the backbone's own)",
        "out": "FILE        the JSONL to write (default: run_dir/predictions.jsonl)",
    },
}
HELP_KEYS = ("model", "data", "trainer", "backbone", "callbacks", "logger")


@dataclass
class Invocation:
    """What the command line said.

    Attributes:
        files: of `-c/--config`, in order.
        overrides: (dotted key, value) in order.
        options: the command's own options, without dashes.
        describe: (`model`, "SFT") for `--model.help SFT`.
        show: whether `--print_config` or `--help` was given, by name.
    """

    files: list[str] = field(default_factory=list)
    overrides: list[tuple[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    describe: tuple[str, str] | None = None
    show: str = ""


def parse_argv(command: str, argv: list[str]) -> Invocation:
    """Read the arguments of a stage command.

    Raises:
        ValueError: an option without its value, or an unknown one, with the nearest name.
    """
    found = Invocation()
    rest = list(argv)

    def value_of(flag: str, inline: str | None, required: bool = True) -> str | None:
        if inline is not None:
            return inline
        if rest and not _is_flag(rest[0]):
            return rest.pop(0)
        if required:
            raise ValueError(f"{flag} needs a value")
        return None

    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            found.show = "help"
            continue
        flag, equals, text = word.partition("=")
        inline = text if equals else None
        if not _is_flag(word):
            raise ValueError(f"unexpected argument '{word}'; a configuration file is given as -c {word}")
        name = flag.lstrip("-")
        if flag in ("-c", "--config"):
            found.files.append(value_of(flag, inline))
        elif name == "print_config":
            found.show = "config"
        elif name in OPTIONS[command]:
            found.options[name] = value_of(flag, inline, required=name != "resume")
        elif name.endswith(".help") and name[: -len(".help")] in HELP_KEYS:
            found.describe = (name[: -len(".help")], value_of(flag, inline, required=False) or "")
        elif name.split(".")[0].rstrip("+-") in TOP_LEVEL and not name.startswith("include"):
            found.overrides.append((name, parse_value(value_of(flag, inline))))
        else:
            known = ["config", "help", "print_config", *OPTIONS[command], *TOP_LEVEL]
            raise ValueError(f"unknown option {flag}{nearest_only(name.split('.')[0], known)}")
    return found


def _is_flag(word: str) -> bool:
    return word.startswith("--") or word in ("-c", "-h") or word.startswith("-c=")


def parse_value(text: str) -> Any:
    """A command line value as YAML; text that is not YAML is text (a question with a colon, a pattern)."""
    try:
        return parse_yaml(text, "command line")[0]
    except ValueError:
        return text


def usage(command: str) -> str:
    """The text of `lightning-vlm COMMAND --help`."""
    lines = [f"usage: lightning-vlm {command} -c FILE [-c FILE ...] [--key value ...]", "", "options:"]
    lines += ["  -c, --config FILE     a path, or a name in configs/ such as experiment/world-sft; later files win"]
    lines += ["  --key value           any key of the configuration, dotted: --trainer.max_steps 50, --model.lr 1e-4"]
    lines += [
        "                        (model.init_args.lr), --model SFT (its class), --callbacks.EntropyMonitor.every 10"
    ]
    lines += [f"  --{name} {text}" for name, text in OPTIONS[command].items()]
    lines += ["  --print_config        print the merged, resolved configuration and stop"]
    lines += ["  --model.help [NAME]   arguments of a class; also --data.help, --callbacks.help, --logger.help,"]
    lines += ["                        --trainer.help, --backbone.help", "", "keys:"]
    lines += [f"  {name:<16}{text}" for name, text in TOP_LEVEL.items()]
    names = sorted(str(p.relative_to(REPOSITORY_CONFIGS).with_suffix("")) for p in REPOSITORY_CONFIGS.rglob("*.yaml"))
    experiments = [n for n in names if n.startswith("experiment")]
    if experiments:
        lines += ["", "configurations: " + ", ".join(experiments)]
    return "\n".join(lines)


def main(command: str, argv: list[str]) -> int:
    """Run `command`; see `usage`."""
    call = parse_argv(command, argv)
    if call.show == "help":
        print(usage(command))
        return 0
    config = load_config(call)
    if call.describe:
        from lightning_vlm.cli.describe import describe

        print(describe(*call.describe, config))
        return 0
    if call.show == "config":
        import yaml

        print(yaml.safe_dump(config.tree, sort_keys=False, allow_unicode=True), end="")
        return 0
    if not config.files and not call.overrides:
        raise ValueError(f"nothing to {command}: give a configuration, for example -c experiment/world-sft")
    from lightning_vlm.cli.app import run

    return run(command, config, call.options)


def load_config(call: Invocation) -> Config:
    """The configuration of an invocation; a run that is resumed without files takes the one its folder holds."""
    files = list(call.files)
    run_dir = dict(call.overrides).get("run_dir")
    if not files and "resume" in call.options and run_dir:
        saved = Path(str(run_dir)) / "config.yaml"
        if saved.is_file():
            files = [str(saved)]
    return load(files, call.overrides)
