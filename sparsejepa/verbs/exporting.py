"""The verb that hands an encoder to other programs: export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from tyro.conf import FlagCreatePairsOff, Positional
from tyro.constructors import PrimitiveConstructorSpec

from sparsejepa.errors import UserError, nearest
from sparsejepa.terminal import show_facts
from sparsejepa.verbs.base import Verb

if TYPE_CHECKING:
    from rich.console import Console

Format = Literal["timm", "transformers", "hub", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)
# A word as it is: tyro's own complaint of another one lists None as well, and in any order.
_ANY_WORD = PrimitiveConstructorSpec(
    nargs=1,
    metavar=f"{{{','.join(FORMATS)}}}",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class Export(Verb):
    """Write an encoder and its groups for another program, and check what was written there."""

    run: Positional[str | None] = None
    """Run directory, timm:NAME, hub:OWNER/NAME, a folder or a file of weights."""
    to: Annotated[Format | None, _ANY_WORD] = None
    """timm: timm.create_model; transformers: IJepaModel; hub: sparsejepa.load; onnx:
    onnxruntime."""
    out: str = ""
    """Folder to write; with --to hub, hub:OWNER/NAME uploads it."""
    groups: Path | None = None
    """Folder with the groups.safetensors to take, such as that of explain; the run's own if not
    given."""
    public: FlagCreatePairsOff[bool] = False
    """Let everybody see a repository that hub:OWNER/NAME makes; it is private otherwise."""


def export(args: Export, console: Console) -> dict[str, Any]:
    """Export, and print the lines of Python that use the result."""
    if not args.run:
        raise UserError("which encoder? Name a run directory or timm:NAME after the verb")
    if not args.to:
        raise UserError(f"--to is needed: {', '.join(FORMATS)}")
    if args.to not in FORMATS:
        raise UserError(
            f"--to {args.to}: not one of {', '.join(FORMATS)}{nearest(args.to, FORMATS)}"
        )
    if not args.out:
        raise UserError("--out is needed: the folder to write")
    uploads = args.out.startswith("hub:")
    if uploads and args.to != "hub":
        raise UserError(f"--out {args.out}: only --to hub uploads; name a folder")
    if args.public and not uploads:
        raise UserError("--public: only for --out hub:OWNER/NAME")
    from sparsejepa.encoders import export as exports
    from sparsejepa.encoders.load import load

    if not uploads:
        exports.check_out(Path(args.out))
    source = exports.Export(args.run, load(args.run), args.groups)
    if uploads:
        found = exports.publish(source, args.out, public=args.public)
    else:
        found = exports.write_export(source, args.to, Path(args.out))
    groups = source.groups
    facts = {
        "written": args.out,
        "files": ", ".join(found.files),
        "groups": "none" if groups is None else f"{len(groups.W)} of kind {groups.kind}",
        "largest difference": f"{found.difference:.1e}",
    }
    if source.encoder.license:
        facts["licence of the weights"] = source.encoder.license
    show_facts(console, facts, f"{args.run}: exported to {args.to}")
    console.print(f"\n{found.use}", highlight=False, markup=False, soft_wrap=True)
    return {
        "out": args.out,
        "to": args.to,
        "files": found.files,
        "difference": found.difference,
        "groups": None if groups is None else groups.kind,
        "use": found.use,
    }
