"""Write a tiny model directory with random weights: `python -m tools.make_tiny --family qwen2_5_vl --out DIR`."""

from __future__ import annotations

import argparse
import inspect
import re

from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny


def main(argv: list[str] | None = None) -> None:
    """Command line of `make_tiny`: its keyword arguments, with their own defaults and descriptions."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_tiny", description=__doc__)
    parser.add_argument("--family", required=True, choices=TINY_FAMILIES, help="architecture")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--tokenizer", help="directory of a real tokenizer (and chat template) to use")
    # The descriptions are the docstring's own, so that they stand in one place.
    described = dict(re.findall(r"^ {4}(\w+): ((?:.|\n {8})+)", inspect.getdoc(make_tiny) or "", re.M))
    for name, parameter in inspect.signature(make_tiny).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name == "tokenizer_dir":
            continue
        text = f"{' '.join(described[name].split())} (default: {parameter.default})"
        flag = "--" + name.replace("_", "-")
        if isinstance(parameter.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = type(parameter.default) if parameter.default is not None else int
            parser.add_argument(flag, type=kind, default=parameter.default, help=text)
    values = vars(parser.parse_args(argv))
    try:
        out = make_tiny(values.pop("family"), values.pop("out"), tokenizer_dir=values.pop("tokenizer"), **values)
    except ValueError as error:
        parser.error(str(error))
    print(out)


if __name__ == "__main__":
    main()
