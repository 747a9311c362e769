"""Command-line arguments whose mistakes are refused in one sentence, as every other input is."""

from __future__ import annotations

import argparse
from typing import NoReturn

from conf.schema import Refused


class Parser(argparse.ArgumentParser):
    """Raises Refused where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message}; {self.prog} --help says what there is.")
