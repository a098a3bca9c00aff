"""Errors that are written for the person who has to act on them.

Everything a user can cause or mend is a `TeasrError`: what was wrong, where, what is accepted and
what to do. The command line prints it as one line without a traceback; a traceback is kept for our
own bugs. The exit code tells a scheduler which of the two kinds it met.
"""

from __future__ import annotations


class TeasrError(Exception):
    """The work could not be done: a gate refused, a server is away, the disk is full (exit 1).

    Args:
        message: what was wrong and where, one sentence.
        hint: what is accepted or what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(TeasrError):
    """The request itself is wrong: an unknown preset, a wrong key, a missing folder (exit 2)."""

    exit_code = 2
