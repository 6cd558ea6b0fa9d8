"""The terminal's side of the command line: a parser that explains itself, and output that cannot half fail."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from minids.errors import InputError

PIPE_CLOSED = 141  # exit code when the reader of stdout went away, as the shell's for SIGPIPE


def emit(text: str) -> None:
    """Writes to stdout and flushes. When that fails, what is still buffered must not fail again at interpreter exit."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(PIPE_CLOSED) from None
        raise


def to_json(result: Any) -> str:
    """One line of strict JSON: numbers that are not finite become null, paths become strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return json.dumps(plain(result), ensure_ascii=False, allow_nan=False, default=str)


def nearest(word: str, known: Iterable[str]) -> str:
    """A question for the one of `known` that `word` is like, or like whose last part it is (`--lr`, `--train.lr`)."""
    spelt: dict[str, str] = {}
    for name in known:
        for form in (name, name.rpartition(".")[2]):
            spelt.setdefault(form.lstrip("-"), name)
    near = difflib.get_close_matches(word.lstrip("-"), spelt, n=1, cutoff=0.6)
    return f"; did you mean {spelt[near[0]]!r}?" if near else ""


def canonical(token: str) -> str:
    """`--seq_len=5` as `--seq-len=5`, `--train.batch-size` as `--train.batch_size`; anything else as it is."""
    name, equals, value = token.partition("=")
    if not re.fullmatch(r"--[A-Za-z][\w.-]*", name):
        return token
    name = name[2:].replace("-", "_") if "." in name else name[2:].replace("_", "-")
    return f"--{name}{equals}{value}"


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors that name the nearest flag, and whose flags take - and _ alike."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        emit(self.format_help())

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Looks for unknown names first: a mistyped flag explains a missing one, which argparse would complain of."""
        args = [canonical(token) for token in args]
        flags = [option for action in self._actions for option in action.option_strings]
        commands = self._subparsers_action()
        for place, token in enumerate(args):
            name = token.partition("=")[0]
            if token == "--" or (commands and not token.startswith("-")):
                break
            if re.fullmatch(r"--?[A-Za-z][\w.-]*", name) and name not in flags:
                hint, before = nearest(name, flags), args[place - 1] if place else ""
                if not hint and before in flags:
                    hint = f"; as a value of {before} it is written {before}=..."
                raise InputError(f"unknown flag {name!r}{hint} (see {self.prog} --help)")
        if commands:
            given = next((token for token in args if not token.startswith("-")), None)
            if given is not None and given not in commands.choices:
                hint = nearest(given, commands.choices) or f"; there are: {', '.join(commands.choices)}"
                raise InputError(f"unknown command {given!r}{hint}")
        return super().parse_known_args(args, namespace)

    def _subparsers_action(self) -> Any:
        return next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)
