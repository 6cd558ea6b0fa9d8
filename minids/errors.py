"""The exceptions that the command line turns into one line and an exit code."""

import errno

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of an OSError: no room to write


class InputError(ValueError):
    """Bad input: what came, where, and what would be right, in one sentence. Exit code 2."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM ended a command; the text says what was saved. Exit code 130. As KeyboardInterrupt, it is no
    Exception, which libraries take for a fault of their own (tqdm where it starts its thread)."""
