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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, Union, get_type_hints

import tyro

from sparsejepa import __version__
from sparsejepa.config import Config, load_toml, present_settings, preset, removed_setting
from sparsejepa.distributed import World, joined, speaks_for
from sparsejepa.environment import resolve_device
from sparsejepa.errors import Interrupted, UserError, flag, nearest
from sparsejepa.verbs import VERBS, Settings

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
            Annotated[verb, tyro.conf.subcommand(name, description=_first_line(verb))]
            for name, (verb, _) in VERBS.items()
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
    verb = VERBS[name][0]
    default, written = _origin(verb, rest) if issubclass(verb, Settings) else (verb(), [])
    parsed, unknown = _read(verb, [*written, *rest], prog=f"{PROGRAM} {name}", default=default)
    if unknown:
        given = next((word for word in unknown if word.startswith("--")), unknown[0])
        word = given.partition("=")[0].replace("_", "-")
        gone = removed_setting(word.removeprefix("--").replace("-", "_"))
        if gone:
            raise UserError(gone)
        if word.startswith("--"):
            meant = nearest(word, _flags(verb))
            raise UserError(f"unknown flag '{word}'{meant}; see {PROGRAM} {name} --help")
        raise UserError(f"unexpected argument '{given}'; see {PROGRAM} {name} --help")
    return parsed


def _run(words: list[str], world: World) -> None:
    if words == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return
    args = parse(words)
    if world.size > 1 and words[0] not in _TOGETHER:
        raise UserError(
            f"{words[0]} is for one process and {world.size} were started; start it without "
            f"torchrun or srun (several work together on {', '.join(_TOGETHER)})"
        )
    # With --json standard output belongs to the object; people read standard error then.
    stream = sys.stderr if args.json else sys.stdout
    piped = not stream.isatty() and "COLUMNS" not in os.environ
    width = 120 if piped else None
    console = open_console(stream, width=width, quiet=not world.main)
    with _together(words[0], args, world):
        found = VERBS[words[0]][1](args, console)
    if args.json and world.main:
        print(json.dumps(_plain(found), allow_nan=False))


@contextlib.contextmanager
def _together(name: str, args: Any, world: World) -> Iterator[None]:
    """Connect the processes for the verbs that only read; `pretrain` does so by itself."""
    if world.size == 1 or name not in ("probe", "embed"):
        yield
        return
    with joined(world, world.place(resolve_device(args.device))):
        yield


def _leave(status: int) -> int:
    """Return `status` after the main process had time to say why: its launcher ends all at once."""
    time.sleep(1)
    return status


def _continuation(words: list[str], world: World) -> str | None:
    """Return what goes on where this command stopped, if anything does."""
    resumes = VERBS[words[0]][0].resumes if words and words[0] in VERBS else None
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


def _origin(verb: type[Settings], words: Sequence[str]) -> tuple[Settings, list[str]]:
    """Return the defaults that a preset gives and the flags that a settings file stands for.

    The file is --config, or that of the run in --out with --resume.
    """
    first, _ = _read(_Origin, words, add_help=False)
    stored = first.out / "config.toml" if first.resume and first.out else None
    file = stored if stored and stored.exists() else first.config
    if not file:
        return verb.of(preset(first.preset or "best")), []
    values = load_toml(file)
    config = Config.from_dict(values, str(file))  # complains about names, the next about values
    given = present_settings(values).keys()
    flags = [
        word for name in sorted(given - {"data"}) for word in _as_words(name, config.flat()[name])
    ]
    try:
        parsed, surplus = _read(verb, flags)
        if parsed.data or surplus:
            raise UserError(f"no setting takes {parsed.data or surplus[0]} there")
        base = Config() if file == stored else preset(first.preset or config.preset)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return verb.of(base, str(config.data) if "data" in given else None), flags


def _as_words(name: str, value: Any) -> list[str]:
    """Return the words that give a setting on the command line."""
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    return [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]


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
    lines = [line.strip(" │╭╮╰╯") for line in plain.splitlines()[1:]]
    body = itertools.dropwhile(_is_rule, lines)
    said = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
    raise UserError(said.removeprefix("Error parsing "))


def _is_rule(line: str) -> bool:
    return not line.strip("─-")


def _flags(verb: type) -> list[str]:
    """Return every flag of a verb, its sections' included."""
    found = []
    for name, hint in get_type_hints(verb).items():
        if dataclasses.is_dataclass(hint):
            found += _flags(hint)  # type: ignore[arg-type]
        elif name in {f.name for f in dataclasses.fields(verb)}:
            found += [flag(name)]
    return found


def _first_line(verb: type) -> str:
    return (verb.__doc__ or "").strip().splitlines()[0]


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
