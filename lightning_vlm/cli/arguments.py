"""The argument parser of commands that take no configuration."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and end like everybody else's.

    Args:
        command: the command's name.
        description, epilog: shown by --help as they are written.
        usage: in place of the one argparse makes.
    """

    def __init__(self, command: str, *, description: str, epilog: str | None = None, usage: str | None = None) -> None:
        super().__init__(
            prog=f"lightning-vlm {command}",
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Leave the line to the program.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see {self.prog} --help")
