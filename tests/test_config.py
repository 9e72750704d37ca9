"""Merging, overriding and resolving configurations: known answers, and errors that name key, place and cure."""

import pytest

from lightning_vlm.config.files import load, parse_yaml
from lightning_vlm.config.tree import Config


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the working directory of the test; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_


def refused(match: str, *args, error=ValueError):
    with pytest.raises(error) as found:
        load(*args)
    text = str(found.value)
    assert "\n" not in text
    for part in match.split(" & "):
        assert part in text, text


def test_later_files_win_and_mappings_merge(write):
    a = write("a.yaml", "trainer: {max_steps: 5, devices: 1}\nvars: {names: [1, 2]}\n")
    b = write("b.yaml", "trainer: {max_steps: 9}\nvars: {names: [3]}\n")
    tree = load([a, b]).tree
    assert tree["trainer"] == {"max_steps": 9, "devices": 1}
    assert tree["vars"]["names"] == [3]  # lists are replaced


def test_plus_appends_and_minus_removes(write):
    a = write("a.yaml", "vars: {names: [1, 2], old: 1}\n")
    b = write("b.yaml", "vars: {names+: [3], old-: }\n")
    assert load([a, b]).tree["vars"] == {"names": [1, 2, 3]}
    assert load([b.replace("b", "a"), write("c.yaml", "vars: {new+: [1]}\n")]).tree["vars"]["new"] == [1]
    refused("vars.old+ & append & c.yaml:1", [a, write("c.yaml", "vars: {old+: [3]}\n")])
    refused("nothing to remove & 'old' & c.yaml:1", [a, write("c.yaml", "vars: {odl-: }\n")])


def test_include_is_relative_and_comes_first(write):
    write("sub/base.yaml", "trainer: {max_steps: 1, devices: 1}\n")
    write("sub/mid.yaml", "include: [base.yaml]\ntrainer: {max_steps: 2}\n")
    top = write("top.yaml", "include: [sub/mid.yaml]\ntrainer: {devices: 2}\n")
    assert load([top]).tree["trainer"] == {"max_steps": 2, "devices": 2}


def test_a_fragment_reached_twice_does_not_undo_what_came_between(write):
    write("base.yaml", "trainer: {max_steps: 1}\n")
    a = write("a.yaml", "include: [base.yaml]\ntrainer: {max_steps: 2}\n")
    b = write("b.yaml", "include: [base.yaml]\ntrainer: {devices: 1}\n")
    assert load([a, b]).tree["trainer"] == {"max_steps": 2, "devices": 1}
    assert load([a, "base.yaml"]).tree["trainer"] == {"max_steps": 1}  # named outright, it is merged where it stands


def test_include_cycles_and_missing_files_are_refused(write):
    write("a.yaml", "include: [b.yaml]\n")
    write("b.yaml", "include: [a.yaml]\n")
    refused("a.yaml -> b.yaml -> a.yaml", ["a.yaml"])
    refused(
        "c.yaml & no configuration file 'nope.yaml'",
        [write("c.yaml", "include: [nope.yaml]\n")],
        error=FileNotFoundError,
    )


def test_short_names_look_into_configs_and_suggest(write):
    write("configs/experiment/world-sft.yaml", "seed_everything: 7\n")
    assert load(["experiment/world-sft"]).tree == {"seed_everything": 7}
    refused("did you mean 'experiment/world-sft'?", ["experiment/wrld-sft"], error=FileNotFoundError)


def test_references_reach_across_files_and_overrides(write):
    a = write("a.yaml", "vars: {dim: 4, half: 1}\nbackbone: {path: '${vars.where}/m'}\n")
    b = write("b.yaml", "vars: {where: /models}\nmodel: {class_path: SFT, init_args: {lr: '${vars.dim}'}}\n")
    tree = load([a, b], [("vars.dim", 8)]).tree
    assert tree["backbone"]["path"] == "/models/m"
    assert tree["model"]["init_args"]["lr"] == 8  # a number stays a number
    refused(
        "backbone.path & '${vars.wher}' & 'vars.wher' & did you mean 'vars.where'? & c.yaml:1",
        [a, b, write("c.yaml", "backbone: {path: '${vars.wher}'}\n")],
    )
    refused("environment variable LVLM_NOWHERE is not set", [write("c.yaml", "vars: {a: '${oc.env:LVLM_NOWHERE}'}\n")])
    refused("must be set & c.yaml:1", [write("c.yaml", "backbone: {path: '???'}\n")])


def test_references_in_a_circle_are_refused(write):
    refused("vars.a & a.yaml:1", [write("a.yaml", "vars: {a: '${vars.b}', b: '${vars.a}'}\n")])


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        (("model.lr", 1e-3), ("model", "init_args", "lr"), 1e-3),
        (("model", "DPO"), ("model", "class_path"), "DPO"),
        (("model.init_args.lr", 2.0), ("model", "init_args", "lr"), 2.0),
        (("model.parts.vision.freeze", True), ("model", "init_args", "parts", "vision", "freeze"), True),
        (("data.batch_size", 8), ("data", "init_args", "batch_size"), 8),
        (("data.train.0.weight", 3), ("data", "init_args", "train", "0", "weight"), 3),
        (("callbacks.EntropyMonitor.every", 10), ("callbacks", "EntropyMonitor", "every"), 10),
        (("callbacks.my.Watch.every", 10), ("callbacks", "my.Watch", "every"), 10),
        (("callbacks.Checkpoint", None), ("callbacks", "Checkpoint"), None),
        (("backbone.path", "x"), ("backbone", "path"), "x"),
    ],
)
def test_overrides(write, override, path, value):
    name = write(
        "a.yaml",
        "model: {class_path: SFT, init_args: {lr: 1.0}}\n"
        "data: {class_path: D, init_args: {train: [{kind: world, weight: 1}]}}\n"
        "callbacks: {my.Watch: {every: 1}, Checkpoint: {every: 5}}\n",
    )
    config = load([name], [override])
    assert config.at(path) == value
    assert config.origin(path) == "command line"
    assert config.at(("model", "class_path")) in ("SFT", "DPO")


def test_override_of_a_list_position_that_is_not_there(write):
    name = write("a.yaml", "data: {class_path: D, init_args: {train: [{kind: world}]}}\n")
    refused("data.init_args.train is a list of 1", [name], [("data.train.3.kind", "x")])


def test_origins_name_file_and_line(write):
    a = write("a.yaml", "trainer:\n  max_steps: 5\n  devices: 1\n")
    config = load([a, write("b.yaml", "\n\ntrainer: {max_steps: 6}\n")])
    assert config.origin(("trainer", "max_steps")) == "b.yaml:3"
    assert config.origin(("trainer", "devices")) == "a.yaml:3"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("trainer: {}\ntrainer: {}\n", "a.yaml:2 & 'trainer' is given twice & line 1"),
        ("model:\n  class_path: A\n  init_args: {lr: 1, lr: 2}\n", "a.yaml:3 & 'lr' is given twice"),
        ("trianer: {max_steps: 1}\n", "trianer & did you mean 'trainer'? & a.yaml:1"),
        ("model: {class_path: SFT, lr: 1}\n", "model.lr & go under model.init_args & a.yaml:1"),
        ("model: {clas_path: SFT}\n", "did you mean 'class_path'?"),
        ("model: SFT\n", "model: expected a mapping, got 'SFT'"),
        ("- 1\n", "a configuration is a mapping, got a list"),
        ("a: [1\n", "a.yaml:2: not valid YAML"),
        ("include: base.yaml\n", "include takes a list"),
        ("trainer: {accumulate_grad_batches: 2}\n", "trainer.accumulate_grad_batches & micro_batch_tokens & a.yaml:1"),
        ("trainer: {gradient_clip_val: 1}\n", "model.init_args.clip_norm"),
        ("trainer: {callbacks: []}\n", "top-level `callbacks:`"),
        ("trainer: {logger: true}\n", "top-level `logger:`"),
        ("trainer: {val_check_interval: 5}\n", "`every`"),
        ("trainer: {default_root_dir: x}\n", "run_dir"),
    ],
)
def test_refused_files(write, text, match):
    refused(match, [write("a.yaml", text)])


def test_yaml_numbers_and_dates():
    value, _ = parse_yaml("{a: 1e-3, b: 1E5, c: -2.5e-4, d: 2024-01-02, e: 10, f: 1_0}", "x")
    assert value == {"a": 1e-3, "b": 1e5, "c": -2.5e-4, "d": "2024-01-02", "e": 10, "f": 10}
    anchored, _ = parse_yaml("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\n", "x")
    assert anchored["b"] == {"k": 3, "l": 2}


def test_what_a_changed_class_inherits_is_known(write):
    a = write("a.yaml", "model:\n  class_path: A\n  init_args:\n    lr: 1\n    beta: 2\n    gamma: 3\n    tau: 4\n")
    b = write("b.yaml", "model: {class_path: B, init_args: {lr: 5, tau-: }}\n")
    config = load([a, b], [("model.gamma", 9)])
    swap = config.swaps[("model",)]
    assert (swap.old, swap.new) == ("A", "B")
    assert config.leaked(swap) == {"beta": "a.yaml:5"}  # lr and gamma were set again, tau was removed


def test_the_same_class_written_twice_is_no_change():
    config = Config()
    config.merge({"model": {"class_path": "SFT", "init_args": {"lr": 1}}}, {})
    config.merge({"model": {"class_path": "lightning_vlm.algorithms.SFT"}}, {})
    assert not config.swaps
