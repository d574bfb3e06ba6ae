"""The exported model as a graph that runs without this program: ONNX and torch.export.

Both take pixels float32 [batch, 3, H, W], any number of images of the one size, and give what
`SparseJEPAEncoder` gives, under the same names. Each file is run at several batch sizes before it
gets its name. Mean, standard deviation and size of the images are written into it as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsejepa.errors import UserError
from sparsejepa.interop.images import RULE
from sparsejepa.interop.module import SparseJEPAEncoder

BATCHES = (1, 2, 5, 17)
"""Numbers of images that a file is checked with."""
TOLERANCE = 1e-4
"""Largest difference, as a share of the output's largest value, that a file may have."""
OPSET = 18
"""Of ONNX: what torch's exporter writes without converting; onnxruntime reads it from 1.14 on."""
_INLINE = 1_800_000_000
"""Bytes of weights that go into the .onnx itself, whose format ends at 2 GiB; others lie beside."""
ABOUT = "sparsejepa.json"
"""Name under which a file holds what its pixels must look like."""


def to_onnx(module: SparseJEPAEncoder, path: Path) -> float:
    """Write an ONNX file and return its largest difference in onnxruntime.

    Large weights go into a second file, of the same name and ``.data``. Raises UserError if the
    extra is not installed or the file does not give what the module gives.
    """
    runtime = _onnxruntime()
    pixels = example(module, 2)
    with quiet():
        program: Any = torch.onnx.export(
            module,
            (pixels,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=list(module(pixels)),
            dynamic_shapes={"pixels": {0: "batch"}},
        )
    program.model.metadata_props[ABOUT] = json.dumps(about(module))
    weights = sum(x.nbytes for x in module.state_dict().values())
    with beside(path) as folder:
        program.save(folder / path.name, external_data=weights > _INLINE)

        session = runtime.InferenceSession(
            folder / path.name, providers=["CPUExecutionProvider"]
        )  # read from a path, so that what lies beside it is found

        def run(pixels: Tensor) -> dict[str, Tensor]:
            found = session.run(None, {"pixels": pixels.numpy()})
            names = [output.name for output in session.get_outputs()]
            return {name: torch.as_tensor(x) for name, x in zip(names, found, strict=True)}

        return check(module, run, "onnxruntime", path)


def to_pt2(module: SparseJEPAEncoder, path: Path) -> float:
    """Write a torch.export file and return its largest difference.

    Raises UserError if the file does not give what the module gives.
    """
    pixels = example(module, 2)
    # Strict: the other way takes len(x) of a tensor for a constant.
    with quiet():
        program = torch.export.export(
            module,
            (pixels,),
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            strict=True,
        )
    with beside(path) as folder:
        file = folder / path.name
        torch.export.save(program, file, extra_files={ABOUT: json.dumps(about(module))})
        return check(module, torch.export.load(file).module(), "torch.export", path)


def data_of(path: Path) -> Path:
    """Return where an ONNX file's large weights lie."""
    return path.with_name(f"{path.name}.data")


def about(module: SparseJEPAEncoder) -> dict[str, Any]:
    """Return what the pixels must look like and what the groups are."""
    encoder = module.encoder
    return {
        "name": Path(encoder.name).name,
        "img_size": list(encoder.img_size),
        "grid_size": list(encoder.grid_size),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "preprocessing": RULE,
        "groups": module.kind,
        "license": encoder.license,
    }


def example(module: SparseJEPAEncoder, batch: int) -> Tensor:
    """Return noise in the form of pixels [batch, 3, H, W]."""
    draw = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, *module.encoder.img_size, generator=draw)


@torch.no_grad()
def check(
    module: SparseJEPAEncoder,
    run: Callable[[Tensor], dict[str, Tensor]],
    where: str,
    path: Path,
) -> float:
    """Return the largest absolute difference of `run` from the module, over outputs and batches.

    Raises UserError if one is beyond `TOLERANCE`, also for outputs that are missing.
    """
    worst = 0.0
    for batch in BATCHES:
        pixels = example(module, batch)
        wanted, found = module(pixels), run(pixels)
        for name, ours in wanted.items():
            theirs = found.get(name)
            same = theirs is not None and theirs.shape == ours.shape
            difference = float((theirs - ours).abs().max()) if same else math.inf
            if not difference <= TOLERANCE * float(ours.abs().max()):
                raise UserError(
                    f"{path}: not written, since {where} gives other {name} at {batch} images (by "
                    f"{difference:.1e}); use --to hub, or another version of {where}"
                )
            worst = max(worst, difference)
    return worst


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path`; on success the files in it move to the folder of `path`."""
    folder = new_beside(path)
    try:
        yield folder
        # The named file last: it is what says that all are there.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_beside(path: Path) -> Path:
    """Make and return an empty folder beside `path`, whose parent is made as well."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A folder from elsewhere may hold a link of this name, which writing would follow.
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let nothing be printed, warned of or logged; errors still surface."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--to onnx needs {error.name}, which is not installed: pip install 'sparsejepa[onnx]'"
        ) from None
    return onnxruntime
