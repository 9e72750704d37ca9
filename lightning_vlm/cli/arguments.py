"""The argument parser of commands that take no configuration."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and end like everybody else's."""

    def error(self, message: str) -> NoReturn:
        """Leave the line to the program.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see {self.prog} --help")
