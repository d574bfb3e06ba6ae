"""What ends a command: an error that is the user's to mend, with a hint at it, or a signal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 2000


class UserError(ValueError):
    """Bad input: one line that names the flag or file at fault and the remedy.

    The command line prints it without a traceback and exits with status 2. It stays one line that
    fits a screen, also where it quotes a file.
    """

    def __init__(self, line: str) -> None:
        line = " ".join(line.splitlines())
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}...")


class SizesDiffer(UserError):
    """Images have several sizes and none was named."""


class TooFewImages(UserError):
    """There are only `count` images to train on, fewer than a batch takes."""

    def __init__(self, line: str, count: int = 0) -> None:
        # With a default it can be pickled: a worker's error is built from its text, then filled in.
        super().__init__(line)
        self.count = count


class Interrupted(KeyboardInterrupt):
    """Signal `number` asked to stop, and all is saved; the exit status is 128 + `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest option, ``""`` if none is close."""
    match = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")
