"""The verb completion: a script that lets bash, zsh or fish complete verbs, flags and their values.

Made from the verbs' dataclasses, so it knows every flag there is. It is plain shell: pressing Tab
starts no Python. Where it knows nothing (a run, a folder) the shell offers files as it always does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from sparsejepa.config import PRESETS
from sparsejepa.errors import flag
from sparsejepa.verbs.base import Verb

if TYPE_CHECKING:
    from rich.console import Console

Words = dict[str, tuple[str, ...]]
_POSITIONAL = get_args(Positional[int])[1]


@dataclass(frozen=True)
class Completion(Verb):
    """Print the script that completes verbs, flags and values on Tab in bash, zsh or fish.

    Put source <(sparsejepa completion bash) into ~/.bashrc, the same with zsh into ~/.zshrc, and
    sparsejepa completion fish | source into ~/.config/fish/config.fish.
    """

    shell: Positional[Literal["bash", "zsh", "fish"]] = "bash"
    """The shell to write it for."""


def completion(args: Completion, console: Console) -> dict[str, Any]:
    """Print the script for a shell."""
    from sparsejepa.verbs import VERBS

    known = {name: completions(verb) for name, (verb, _) in VERBS.items()}
    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](known)
    if not args.json:
        print(script)
    return {"shell": args.shell, "script": script}


def completions(verb: type) -> Words:
    """Return every flag of a verb, its sections' included, with the values that it may have.

    The values are empty where anything goes; "" stands for what follows no flag.
    """
    found: Words = {"": ()}
    for name, hint in get_type_hints(verb, include_extras=True).items():
        if name not in {field.name for field in dataclasses.fields(verb)}:
            continue
        bare, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if dataclasses.is_dataclass(bare):
            found |= {key: value for key, value in completions(bare).items() if key}  # type: ignore
        elif _POSITIONAL in marks:
            found[""] += _choices(bare)
        else:
            found[flag(name)] = tuple(PRESETS) if name == "preset" else _choices(bare)
            if hint is bool:
                found[flag("no_" + name)] = ()
    return found


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the words that a type admits, if it names them."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(word for part in get_args(hint) for word in _choices(part))


def _bash(known: dict[str, Words]) -> str:
    flags = [f"      {verb}) words='{_join(words)}' ;;" for verb, words in known.items()]
    values = [
        f"      '{verb} {name}') words='{' '.join(choices)}' ;;"
        for verb, words in known.items()
        for name, choices in words.items()
        if choices
    ]
    return "\n".join(
        [
            "_sparsejepa() {",
            "  local cur=${COMP_WORDS[COMP_CWORD]} verb=${COMP_WORDS[1]} last= words= i",
            "  for ((i = 2; i < COMP_CWORD; i++)); do",
            "    [[ ${COMP_WORDS[i]} == -* ]] && last=${COMP_WORDS[i]}",
            "  done",
            "  if ((COMP_CWORD == 1)); then",
            f"    words='{' '.join(known)}'",
            "  elif [[ $cur == -* ]]; then",
            "    case $verb in",
            *flags,
            "    esac",
            "  else",
            '    case "$verb $last" in',
            *values,
            "    esac",
            "  fi",
            '  COMPREPLY=($(compgen -W "$words" -- "$cur"))',
            "}",
            "complete -o default -F _sparsejepa sparsejepa",
        ]
    )


def _zsh(known: dict[str, Words]) -> str:
    # zsh understands bash's own way once it is told to.
    start = (
        "autoload -Uz compinit bashcompinit\n(( $+functions[compdef] )) || compinit\nbashcompinit"
    )
    return f"{start}\n{_bash(known)}"


def _fish(known: dict[str, Words]) -> str:
    lines = [f"complete -c sparsejepa -n __fish_use_subcommand -f -a '{' '.join(known)}'"]
    for verb, words in known.items():
        here = f"complete -c sparsejepa -n '__fish_seen_subcommand_from {verb}'"
        for name, choices in words.items():
            named = f" -l {name.removeprefix('--')}" if name else ""
            values = f" -f -a '{' '.join(choices)}'" if choices else ""
            lines += [f"{here}{named}{' -r' * bool(name and choices)}{values}"] * bool(
                named + values
            )
    return "\n".join(lines)


def _join(words: Words) -> str:
    return " ".join(name for name in [*words, "--help"] if name)
