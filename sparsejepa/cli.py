"""The command `sparsejepa`: from words to a verb's dataclass, and from errors to one line.

The verbs are in `sparsejepa.verbs`. Nothing heavy is imported here: each verb imports its own
machinery when it runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, Union, get_type_hints

import tyro

from sparsejepa import __version__
from sparsejepa.config import Config, load_toml, present_settings, preset, removed_setting
from sparsejepa.distributed import World, joined, speaks_for
from sparsejepa.environment import resolve_device
from sparsejepa.errors import Interrupted, UserError, flag, nearest
from sparsejepa.verbs import VERBS, Pretrain, Settings, Sweep

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "sparsejepa"
_ABOUT = "Self-supervised image pretraining with a group-sparse map from latents to groups."
_TOGETHER = ("pretrain", "probe", "embed")
"""The verbs that several processes work on together."""
_STYLE = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)
# Reasons of the system that are the user's to mend, as against a file that this program lost.
_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.EFBIG, errno.EIO,
}  # fmt: skip


# Control characters but tab and newline, separators of lines, changes of direction, and halves of
# characters, as names of files that are not text have.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: what is not is written as an escape."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def open_console(stream: TextIO, **options: Any) -> Console:
    """Return a console for people: no markup, and every text of the data made `printable`.

    `options` are rich's, such as width and quiet.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return PlainConsole(file=stream, highlight=False, markup=False, emoji=False, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done; 2: a mistake that one line on standard error names; 130: Ctrl-C; 143: SIGTERM, where
    it saves; 141: the reader of standard output went away. Of several processes the main one speaks
    for all.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    world = World()
    # A warning is a line for the user, not a place in this code.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    try:
        world = World.from_environment()
        _run(words, world)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        status = 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
        if not world.main:
            return _leave(status)
        again = _continuation(words, world)
        said = f"interrupted; continue with: {again}" if again else "interrupted"
        return _fail(said, status, kind="")
    except BrokenPipeError:
        # What is still buffered has no reader; without this, Python complains at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        speaker = speaks_for(world, error)
        if speaker is None:
            return _leave(2)
        line = _explain(error, words, world)
        if line is None:
            raise
        return _fail(speaker + line, 2)
    return 0


def parse(words: Sequence[str]) -> Any:
    """Return the verb's dataclass that `words` describe, e.g. ``verbs.Pretrain``.

    Prints help and raises SystemExit(0) for --help, and a shell's completions for
    --tyro-print-completion. Raises UserError for unknown verbs, flags and values.
    """
    if not words or words[0] in ("-h", "--help", "--tyro-print-completion"):
        listed = [
            Annotated[
                verb, tyro.conf.subcommand(name, description=(verb.__doc__ or "").split("\n")[0])
            ]
            for name, verb in VERBS.items()
        ]
        args = list(words) or ["--help"]
        style = _STYLE if args[0] == "--tyro-print-completion" else ()
        tyro.cli(Union[tuple(listed)], prog=PROGRAM, description=_ABOUT, args=args, config=style)  # type: ignore  # noqa: UP007
    name, rest = words[0], list(words[1:])
    if name not in VERBS:
        known = ", ".join(VERBS)
        if name.startswith("-"):
            raise UserError(f"'{name}' before a verb; the verb comes first: {known}")
        raise UserError(f"unknown verb '{name}'{nearest(name, VERBS)}; there are {known}")
    verb, see = VERBS[name], f"see {PROGRAM} {name} --help"
    options = {"default": _origin(verb, rest)} if issubclass(verb, Settings) else {}
    parsed, unknown = _read(verb, rest, prog=f"{PROGRAM} {name}", **options)
    if unknown:
        given = next((word for word in unknown if word.startswith("--")), unknown[0])
        word = given.partition("=")[0].replace("_", "-")
        if gone := removed_setting(word.removeprefix("--").replace("-", "_")):
            raise UserError(gone)
        if word.startswith("--"):
            raise UserError(f"unknown flag '{word}'{nearest(word, _flags(verb))}; {see}")
        raise UserError(f"unexpected argument '{given}'; {see}")
    if verb is Pretrain and {"--lam", "--density"} <= {word.partition("=")[0] for word in rest}:
        raise UserError("--lam beside --density, which steers it: leave one of them out")
    return parsed


def _run(words: list[str], world: World) -> None:
    if words == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return
    args, verb = parse(words), words[0]
    if world.size > 1 and verb not in _TOGETHER:
        raise UserError(
            f"{verb} is for one process and {world.size} were started; start it without "
            f"torchrun or srun (several work together on {', '.join(_TOGETHER)})"
        )
    # With --json standard output belongs to the object; people read standard error then.
    stream = sys.stderr if args.json else sys.stdout
    piped = not stream.isatty() and "COLUMNS" not in os.environ
    console = open_console(stream, width=120 if piped else None, quiet=not world.main)
    with contextlib.ExitStack() as stack:
        if world.size > 1 and verb != "pretrain":  # which connects the processes by itself
            stack.enter_context(joined(world, world.place(resolve_device(args.device))))
        found = args(console)
    if args.json and world.main:
        print(json.dumps(_plain(found), allow_nan=False))


def _leave(status: int) -> int:
    """Return `status` after the main process had time to say why: its launcher ends all at once."""
    time.sleep(1)
    return status


def _continuation(words: list[str], world: World) -> str | None:
    """Return what goes on where this command stopped, if anything does."""
    resumes = VERBS[words[0]].resumes if words and words[0] in VERBS else None
    if resumes is None:
        return None
    more = [word for word in resumes if word not in words]
    if world.size > 1:  # the launcher's own words are not among these
        return " ".join(["the same command again", *(["with", *more] if more else [])])
    return shlex.join([PROGRAM, *words, *more])


def _explain(error: Exception, words: list[str], world: World) -> str | None:
    """Return the line for an error that is the user's to mend, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    file = getattr(error, "filename", None)
    if "No space left on device" in str(error):  # not every library raises OSError for it
        where = f"{file}: " if file else ""
        again = _continuation(words, world) or "the same command again"
        return f"{where}no space left on device; free some, then run {again}"
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return f"{file or 'file system'}: {error.strerror}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; use a smaller --batch-size, --encoder or --img-size"
    return None


def _fail(line: str, status: int, kind: str = "error: ") -> int:
    with contextlib.suppress(BrokenPipeError):
        said = printable(" ".join(line.split()))
        print(f"{PROGRAM}: {kind}{said}", file=sys.stderr, flush=True)
    return status


@dataclasses.dataclass(frozen=True)
class _Origin:
    """The flags that decide where the values of all others come from."""

    preset: str | None = None
    config: Path | None = None
    out: Path | None = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False


def _origin(verb: type[Settings], words: Sequence[str]) -> Settings:
    """Return the defaults: those of a preset, and over them what a settings file says.

    The file is --config, or that of the run in --out with --resume.
    """
    first, _ = _read(_Origin, words, add_help=False)
    stored = first.out / "config.toml" if first.resume and first.out else None
    file = stored if stored and stored.exists() else first.config
    if not file:
        return verb.of(preset(first.preset or "best"))
    try:
        given = present_settings(load_toml(file))
        name = first.preset or str(given.get("preset", "best"))
        config = (Config() if file == stored else preset(name)).replace(**given)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    arms = {x for x in ("lam", "density") if x in given and verb is Sweep}
    found = verb.of(config, config.data if "data" in given else None)
    return dataclasses.replace(found, **{name: (config.flat()[name],) for name in arms})


def _read(verb: type, words: Sequence[str], **options: Any) -> tuple[Any, list[str]]:
    """Parse words; returns the dataclass and what was left over.

    tyro frames a complaint about a value in a box; its first part becomes a UserError.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(verb, args=words, return_unknown_args=True, config=_STYLE, **options)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr.getvalue())
    lines = [line.strip(" │╭╮╰╯").rstrip("─-") for line in plain.splitlines()[1:]]
    said = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines)))
    raise UserError(said.removeprefix("Error parsing "))


def _flags(verb: type) -> list[str]:
    """Return every flag of a verb, its sections' included."""
    found = []
    for name, hint in get_type_hints(verb).items():
        if dataclasses.is_dataclass(hint):
            found += _flags(hint)  # type: ignore[arg-type]
        elif name in {f.name for f in dataclasses.fields(verb)}:
            found += [flag(name)]
    return found


def _plain(value: Any) -> Any:
    """Return `value` as strict JSON can hold it: paths as text, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
