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

Format = Literal["timm", "transformers", "hub", "onnx", "pt2"]
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
    """timm: timm.create_model; transformers: IJepaModel; hub: a folder with a model card for
    SparseJEPAEncoder.from_pretrained; onnx: onnxruntime; pt2: torch.export."""
    out: str = ""
    """Folder (timm, transformers, hub) or file (.onnx, .pt2) to write; hub:OWNER/NAME uploads
    what --to hub writes."""
    groups: Path | None = None
    """Folder with the groups.safetensors to take, such as that of explain; the run's own if not
    given."""
    public: FlagCreatePairsOff[bool] = False
    """Let everybody see a repository that hub:OWNER/NAME makes; it is private otherwise."""
    no_page: FlagCreatePairsOff[bool] = False
    """Leave out the page of explain (report.html), which --to hub takes along: it shows images and
    the names of folders."""


def export(args: Export, console: Console) -> dict[str, Any]:
    """Export, and print the lines of Python that use the result."""
    if not args.run:
        raise UserError("which encoder? Name a run directory or timm:NAME after the verb")
    if not args.to:
        raise UserError("--to is needed: timm, transformers, hub, onnx or pt2")
    if args.to not in FORMATS:
        raise UserError(
            f"--to {args.to}: not one of {', '.join(FORMATS)}{nearest(args.to, FORMATS)}"
        )
    if not args.out:
        raise UserError("--out is needed: the folder or file to write")
    uploads = args.out.startswith("hub:")
    if uploads and args.to != "hub":
        raise UserError(f"--out {args.out}: only --to hub uploads; name a folder or file")
    if args.public and not uploads:
        raise UserError("--public: only for --out hub:OWNER/NAME")
    if args.no_page and args.to != "hub":
        raise UserError("--no-page: only for --to hub; no other format takes the page along")
    from sparsejepa.interop import load
    from sparsejepa.interop.card import PAGE
    from sparsejepa.interop.export import check_out, open_export, write_export
    from sparsejepa.interop.publish import publish

    if not uploads:
        check_out(Path(args.out), args.to)
    module = open_export(args.run, load(args.run), args.groups)
    run_dir = Path(args.run) if Path(args.run).is_dir() else None
    about: dict[str, Any] = {"run_dir": run_dir, "page": not args.no_page}
    if uploads:
        found = publish(module, args.out, public=args.public, **about)
    else:
        found = write_export(module, args.to, Path(args.out), **about)
    facts = {
        "written": args.out,
        "files": ", ".join(found.files),
        "groups": f"{len(module.groups.W)} of kind {module.kind}" if module.groups else "none",
        "largest difference": (
            f"not checked: {args.to} is not installed"
            if found.difference is None
            else f"{found.difference:.1e}"
        ),
    }
    if module.encoder.license:
        facts["licence of the weights"] = module.encoder.license
    show_facts(console, facts, f"{args.run}: exported to {args.to}")
    if PAGE in found.files:
        console.print(
            f"{PAGE} goes along: it shows images and folder names; --no-page leaves it out",
            highlight=False,
            markup=False,
        )
    if found.left_out:
        console.print(found.left_out, highlight=False, markup=False)
    console.print(f"\n{found.use}", highlight=False, markup=False, soft_wrap=True)
    return {
        "out": args.out,
        "to": args.to,
        "files": found.files,
        "difference": found.difference,
        "groups": module.kind,
        "left_out": found.left_out,
        "use": found.use,
    }
