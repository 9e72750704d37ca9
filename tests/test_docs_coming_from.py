"""docs/coming-from.md: keys of ours and of TRL's exist, with the defaults it gives; every example runs two steps."""

import ast
import dataclasses
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import lightning.pytorch.loggers
import pytest
import yaml
from lightning import Trainer
from PIL import Image

import callbacks
from lightning_vlm.algorithms import DPO, GRPO, OPD, SFT
from lightning_vlm.cli import schema
from lightning_vlm.cli.app import LOGGERS
from lightning_vlm.cli.main import COMMANDS
from lightning_vlm.cli.stage import OPTIONS
from lightning_vlm.config.files import TOP_LEVEL, find_config
from lightning_vlm.config.tree import Config
from lightning_vlm.data.module import VLMData
from lightning_vlm.models.spec import Backbone

from .docs_kit import SMALL, Block, blocks, column, commands, fit, page, reader, spans, tables, write

PAGE = page("coming-from.md")
TABLES = dict(tables(PAGE))
EXAMPLES = {block.file: block for block in blocks(PAGE) if block.file.endswith(".yaml")}
CLASSES = {"Preference learning": DPO, "GRPO": GRPO, "Distillation": OPD}  # whose `model.` keys a table speaks of
WORDS = {True: "on", False: "off", None: "off"}

# --- ours ------------------------------------------------------------------------------------------------------------


def cells_of(heading: str, column_name: str) -> list[str]:
    """The cells of a table's column whose heading begins so."""
    return [cell for row in TABLES[heading] for name, cell in row.items() if name.startswith(column_name)]


def arguments(cls: type) -> dict[str, tuple[object, object]]:
    """name → (type hint, default) of what a class takes; a required argument's default is `empty`."""
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                found[name] = parameter.default
    return {name: (hint, found[name]) for name, hint in schema.signature(cls).hints.items()}


def inside(hint: object, rest: list[str], default: object) -> tuple[object, object]:
    """(hint, default) of what stands at a path below a value of this type."""
    if not rest:
        return hint, default
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [member for member in typing.get_args(hint) if member is not type(None)]
    if typing.get_origin(hint) is dict:
        return inside(typing.get_args(hint)[1], rest[1:], inspect.Parameter.empty)
    if not dataclasses.is_dataclass(hint):
        raise KeyError(f"nothing can stand below {hint}")
    return inside(*arguments(hint)[rest[0]][:1], rest[1:], arguments(hint)[rest[0]][1])


def resolve(key: str, algorithm: type) -> tuple[object, object]:
    """(type hint, default) of one of our dotted keys; KeyError where there is none such."""
    root, *rest = key.split(".")
    if root in ("callbacks", "logger"):
        cls = (
            getattr(callbacks, rest[0]) if root == "callbacks" else getattr(lightning.pytorch.loggers, LOGGERS[rest[0]])
        )
        rest = rest[1:]
    else:
        cls = {"model": algorithm, "data": VLMData, "backbone": Backbone, "trainer": Trainer}.get(root)
    if cls is None or not rest:
        TOP_LEVEL[root]
        return typing.Any, inspect.Parameter.empty
    hint, default = arguments(cls)[rest[0]]
    return inside(hint, rest[1:], default)


def shown(value: object) -> str:
    """A default as the page writes it: `.2`, `1`, `on`, `cosine`, `[.9, .999]`."""
    if isinstance(value, bool) or value is None:
        return WORDS[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]" if len(value) != 1 else shown(value[0])
    return re.sub(r"^0\.", ".", f"{value:g}") if isinstance(value, int | float) else str(getattr(value, "value", value))


def given(cell: str) -> list[tuple[str, str]]:
    """(key, default) pairs: keys in backticks with what stands in brackets behind them, in order."""
    pairs = []
    for match in re.finditer(r"((?:`[^`]+`(?:, )?)+) \(([^()`]+)\)", cell):
        keys, text = spans(match[1]), match[2]
        values = [text] if len(keys) == 1 or "," not in text else text.split(", ")
        pairs += zip(keys[-len(values) :], values, strict=True)
    return pairs


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_of_ours_exists(heading):
    """A key's value, where one stands there, is of its type; files and commands are there, too."""
    algorithm = CLASSES.get(heading, SFT)
    for cell in cells_of(heading, "here"):
        for span in spans(cell):
            if span.startswith("-c "):
                find_config(span.removeprefix("-c "))
            elif span.startswith("--"):
                assert span.removeprefix("--") in OPTIONS["fit"]
            elif span.startswith("lightning-vlm "):
                assert span.split()[1] in COMMANDS
            elif span != "run_dir/model":
                key, _, value = span.partition(": ")
                hint, _ = resolve(key, algorithm)
                if value:
                    schema.check_value(yaml.safe_load(value), hint, tuple(key.split(".")), Config())
        for key, default in given(cell):
            assert shown(resolve(key, algorithm)[1]) == default, key


def test_a_key_that_is_not_there_would_be_noticed():
    for key in (
        "model.lrate",
        "model.parts.vision.frozen",
        "data.train.NAME.kin",
        "callbacks.Checkpoint.each",
        "modle",
    ):
        with pytest.raises(KeyError):
            resolve(key, GRPO)
    assert given("`a` (on), then `b`, `c` (.2, .3) and (`d`)") == [("a", "on"), ("b", ".2"), ("c", ".3")]
    assert [shown(value) for value in (0.2, 1.0, 512, None, [0.9, 0.999])] == [".2", "1", "512", "off", "[.9, .999]"]


# --- TRL's -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def defaults(config: type) -> dict[str, object]:
    """Field → default, of a dataclass."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }


def takes(trl, heading: str) -> tuple[dict[str, object], set[str]]:
    """What TRL's side of a table may name: keys with their defaults, and arguments of the trainer.

    Tables for all algorithms: what all three configurations have, and lengths and packing, which SFT alone has.
    """
    if heading == "Distillation":
        return defaults(importlib.import_module("trl.experimental.gkd").GKDConfig), set()
    name = {"Preference learning": "DPO", "GRPO": "GRPO"}.get(heading, "SFT")
    keys = defaults(getattr(trl, f"{name}Config"))
    if heading not in ("SFT", *CLASSES):
        shared = keys.keys() & defaults(trl.DPOConfig).keys() & defaults(trl.GRPOConfig).keys()
        special = {"max_length", "truncation_mode", "padding_free", "packing"}
        keys = {key: value for key, value in keys.items() if key in shared | special}
        keys |= {"log_completions": trl.GRPOConfig.log_completions}
    arguments = inspect.signature(getattr(trl, f"{name}Trainer").__init__).parameters
    return defaults(trl.ModelConfig) | keys, set(arguments)


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_of_trl_exists(trl, heading):
    """In the configuration of the table's algorithm, or as an argument of its trainer, with the default given."""
    keys, taken = takes(trl, heading)
    for cell in cells_of(heading, "TRL"):
        for span in spans(cell):
            if span.startswith("trl.experimental."):
                importlib.import_module(span)
            elif span == "accelerate launch --num_processes":
                importlib.import_module("accelerate.commands.launch")
            elif span == "trainer.save_model":
                assert hasattr(trl.SFTTrainer, "save_model")
            elif span == "get_soft_overlong_punishment":
                assert hasattr(importlib.import_module("trl.rewards"), span)
            elif not (span.endswith("Trainer") and hasattr(trl, span)):
                assert span in keys or span in taken, span
        for key, default in given(cell):
            assert shown(keys[key]) == default, key


def test_what_the_page_says_of_trls_defaults(trl):
    """LoRA's α, the ratio on the KL, and what `dr_grpo` leaves alone."""
    assert (trl.ModelConfig().lora_r, trl.ModelConfig().lora_alpha) == (16, 32)
    grpo = defaults(trl.GRPOConfig)
    assert grpo["use_bias_correction_kl"] is True and grpo["scale_rewards"] == "group" and grpo["delta"] is None


@pytest.mark.parametrize(
    "block", [block for block in blocks(PAGE) if "trl import" in block.text], ids=lambda b: b.section
)
def test_trls_examples_name_what_it_takes(trl, block: Block):
    names = re.findall(r"\w+", block.text.split("trl import ")[1].splitlines()[0])
    found = 0
    for call in ast.walk(ast.parse(block.text)):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in names:
            known = inspect.signature(getattr(trl, call.func.id).__init__).parameters
            assert [word.arg for word in call.keywords if word.arg not in known] == []
            found += 1
    assert found == 2  # the configuration and the trainer


# --- the examples ----------------------------------------------------------------------------------------------------

QUESTIONS = {"0": "1 + 1 ?", "1": "1 + 2 ?", "2": "2 + 2 ?", "3": "3 + 2 ?"}
ANSWERS = {"0": "2", "1": "3", "2": "4", "3": "5"}
# What the small model and its data need beside `SMALL`: short completions, and the lengths that follow from them.
SHORT = ["--model.rollout.max_new_tokens", "8"]
# It answers nothing right: groups are told apart by lengths, which stop texts of one letter make.
LENGTHS = ["--model.filter_on", "overlong", "--model.rewards.overlong.ramp", "8", "--model.rollout.stop", "[e, a]"]
MORE = {
    "trl-grpo.yaml": SHORT,
    "swift-grpo.yaml": SHORT + LENGTHS,
    "easyr1-grpo.yaml": [*SHORT, "--callbacks.Benchmarks.benchmarks.geometry3k.max_new_tokens", "8"],
}


def rows(*columns: str) -> str:
    """Four questions with a picture, as JSONL with these columns."""
    lines = []
    for id, question in QUESTIONS.items():
        turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": ANSWERS[id]}]
        everything = {
            "messages": turns,
            "prompt": turns[:1],
            "chosen": ANSWERS[id],
            "rejected": "no",
            "rejected_response": "no",
            "answer": ANSWERS[id],
            "solution": ANSWERS[id],
            "query": question,
            "problem": question,
            "images": [f"{id}.png"],
        }
        lines.append(json.dumps({"id": id} | {name: everything[name] for name in (*columns, "images")}))
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The reader's: the page's files, the small settings, and data in the forms that the page speaks of."""
    write(blocks(PAGE), tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    hub = tmp_path / "hiyouga" / "geometry3k"
    hub.mkdir(parents=True)
    for place in (tmp_path, hub):
        for id in QUESTIONS:
            Image.new("RGB", (56, 56), (60 * int(id), 20, 200)).save(place / f"{id}.png")
    for name, columns in {
        "chats.jsonl": ["messages"],
        "held_out.jsonl": ["messages"],
        "pairs.jsonl": ["prompt", "chosen", "rejected"],
        "swift_pairs.jsonl": ["messages", "rejected_response"],
        "questions.jsonl": ["prompt", "answer"],
        "geometry.jsonl": ["query", "solution"],
        "hiyouga/geometry3k/train.jsonl": ["problem", "answer"],
        "hiyouga/geometry3k/test.jsonl": ["problem", "answer"],
    }.items():
        (tmp_path / name).write_text(rows(*columns))
    with reader(tmp_path, monkeypatch):
        yield tmp_path


def test_there_is_an_example_of_each_peer_and_algorithm():
    grpo = {"trl-grpo.yaml", "swift-grpo.yaml", "easyr1-grpo.yaml"}  # EasyR1 has no other
    assert set(EXAMPLES) == {"trl-sft.yaml", "trl-dpo.yaml", "swift-sft.yaml", "swift-dpo.yaml"} | grpo


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_two_steps(folder, name):
    """4 samples a step: the rows, and what must come out of a first step whatever the model is."""
    logged = fit("-c", name, *MORE.get(name, []), "-c", "small.yaml", run_dir="run")
    losses, sizes = column(logged, "train/loss"), column(logged, "train/rows")
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and Path("run/model/config.json").exists()
    if "sft" in name:
        assert sizes == [4, 4]
    elif "dpo" in name:
        assert sizes == [8, 8]
        first = column(logged, "train/preference" if "swift" in name else "train/loss")[0]
        assert first == pytest.approx(math.log(2), abs=1e-6)
    else:
        group = yaml.safe_load(EXAMPLES[name].text)["model"]["init_args"]["group_size"]
        groups = column(logged, "train/groups")[0] if "swift" in name else 4  # it leaves out groups without spread
        assert sizes[0] == group * groups > 0
        assert column(logged, "train/kl")[0] == pytest.approx(0, abs=1e-6)
        assert column(logged, "train/ratio")[0] == pytest.approx(1, abs=1e-5)


def test_swifts_pairs_become_ours(folder):
    (line,) = [line for line in commands(PAGE) if line.startswith("python to_pairs.py")]
    words, _, out = line.partition(" > ")
    done = subprocess.run([sys.executable, *words.split()[1:]], capture_output=True, text=True, check=True)
    assert out == "pairs.jsonl" and [json.loads(made) for made in done.stdout.splitlines()] == [
        json.loads(wanted) for wanted in rows("prompt", "chosen", "rejected").splitlines()
    ]
