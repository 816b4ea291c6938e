"""What the command line shows instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: one line on stderr and exit code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
