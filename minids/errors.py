"""The exceptions that the command line turns into one line and an exit code."""

import errno

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of an OSError: no room to write


class InputError(ValueError):
    """Bad input: what came, where, and what would be right, in one sentence. Exit code 2."""


def require_seed(name: str, seed: int) -> None:
    if not 0 <= seed < 1 << 63:
        raise InputError(f"{name}: got {seed}, wanted a whole number from 0 to below 2^63")


class Interrupted(BaseException):
    """SIGINT or SIGTERM ended a command; the text says what was saved. Exit code 130. As KeyboardInterrupt, it is no
    Exception, which libraries take for a fault of their own (tqdm where it starts its thread)."""
