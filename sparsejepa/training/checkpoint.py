"""A run on disk: its settings, and its state in `run/checkpoints/step-000001200/`.

A checkpoint holds every parameter and buffer and the optimiser's state, in safetensors files that
torch.distributed.checkpoint writes, one per process, and last of all `manifest.json`: step,
progress, and checksum of every file. Tensors are kept by name and as pieces of the whole, so
another number of processes, sharded or not, reads them. A save goes to a hidden folder, is synced
and renamed, so a kill or a full disk at any moment leaves the previous checkpoints whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import sparsejepa
from sparsejepa import __version__
from sparsejepa.config import Config, load_toml
from sparsejepa.distributed import World, everywhere, on_main
from sparsejepa.errors import UserError, flag
from sparsejepa.files import LOCK, partial_files, read_json, sync, sync_folder, write_text

FORMAT = 2
"""Of a checkpoint's folder."""
_FROM_START = {"encoder", "patch_size"}
"""Settings that the encoder of ``--init`` decides, whatever the flags say."""

# Settings that may differ between a run and its resumption: they change no weight, rounding aside.
_FREE_ON_RESUME = {
    "data_root", "device", "threads", "compile", "checkpoint_every", "preset",
    "workers", "parallel", "checkpoint_activations", "log",
}  # fmt: skip
_MANIFEST = "manifest.json"
_MEANS = ("exp_avg", "exp_avg_sq")  # AdamW's


def read_config(run_dir: Path) -> Config:
    """Return the settings of a run. Raises UserError if `run_dir` is not one."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    if not (run_dir / "config.toml").exists():
        raise UserError(f"{run_dir}: not a run directory (it has no config.toml)")
    return Config.from_dict(load_toml(run_dir / "config.toml"), str(run_dir / "config.toml"))


def open_run(run_dir: Path, config: Config, resume: bool) -> dict[str, Any] | None:
    """Check the run directory against the settings; return the summary if the run is finished."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--out {run_dir} is a file; name a folder")
    if not (run_dir / "config.toml").exists():
        own = {run_dir / LOCK, *partial_files(run_dir)}
        if run_dir.is_dir() and set(run_dir.iterdir()) - own:
            raise UserError(f"--out {run_dir} holds other files and no run; name a new folder")
        return None
    if not resume:
        raise UserError(
            f"--out {run_dir} already holds a run; continue it with --resume or name a new folder"
        )
    begun = train_version(run_dir)
    if begun not in (None, sparsejepa.TRAIN_VERSION):
        raise UserError(
            f"{run_dir}: the run there computes train version {begun}, this release "
            f"{sparsejepa.TRAIN_VERSION}; name a new folder with --out, or finish it with the "
            "release that began it"
        )
    stored = read_config(run_dir).flat()
    free = _FREE_ON_RESUME | (_FROM_START if config.model.init else set())
    for name, value in config.flat().items():
        if name not in free and stored[name] != value:
            raise UserError(
                f"{flag(name)} {value}: the run in {run_dir} has {stored[name]}; resume with the "
                "same settings or name a new folder with --out"
            )
    path = run_dir / "summary.json"
    return read_json(path) if path.exists() else None


def train_version(run_dir: Path) -> int | None:
    """Return the `TRAIN_VERSION` that a run has computed with so far, None before any checkpoint.

    What does not say so, a finished run's summary or the newest checkpoint, is of version 1.
    """
    newest = reversed(_steps(run_dir / "checkpoints"))
    for path in (run_dir / "summary.json", *(step / _MANIFEST for step in newest)):
        # What is damaged is named when it is read in full.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            about = json.loads(path.read_bytes())
            return about.get("progress", about).get("train_version", 1)
    return None


class _Broken(Exception):
    """Why a checkpoint cannot be used."""


class Checkpoints:
    """The checkpoints of a run, of which the newest `keep` stay.

    One job at a time may use them (see `files.run_lock`), and all its processes must see the
    folder. Methods are collective: every process of `world` calls them, and if one of them fails,
    all raise the same error. `say` gets one line for each broken checkpoint that is passed over.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int = 2,
        world: World = World(),  # noqa: B008  (it is frozen)
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self._keep, self._world, self._say = keep, world, say

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
    ) -> None:
        """Write a checkpoint named after ``progress["step"]``, then remove all but the newest.

        `model` is the bare one; its parameters may be sharded (DTensor). `progress` is what JSON
        can hold. Raises UserError when the disk is full, read-only or the like: what was there
        before is untouched.
        """
        # Slow to import: not before it is used.
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        world, final = self._world, self.folder / f"step-{progress['step']:09d}"
        beside = final.with_name(f".{final.name}.tmp")
        tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
        for name, parameter in _optimized(model, optimizer).items():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{key}": t for key, t in state.items()}
        earlier = on_main(world, self._clean)
        try:
            on_main(world, lambda: beside.mkdir(parents=True))
            writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
            self._call(save, tensors, storage_writer=writer)
            written = everywhere(world, lambda: self._written(beside))
            files = {name: entry for part in written for name, entry in part.items()}
            on_main(world, lambda: self._publish(beside, final, files, progress))
        except BaseException as error:
            if world.main:
                shutil.rmtree(beside, ignore_errors=True)
            if not isinstance(error, OSError | SafetensorError):
                raise
            last = f"the last good one is {earlier[-1].name}" if earlier else "there is no other"
            raise UserError(
                f"{self.folder}: the checkpoint of step {progress['step']} could not be written "
                f"({_one_line(error)}), {last}; make room there or make it writable, then go on "
                "with --resume"
            ) from None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint in place; return its progress, None if there is none.

        What killed saves left is removed. Raises UserError if there are checkpoints but none that
        is whole, of this version's format and of this model.
        """
        world = self._world
        steps = on_main(world, self._clean)
        reason = ""
        for path in reversed(steps):
            try:
                progress = on_main(world, lambda path=path: _examine(path))
                self._load(path, model, optimizer)
                return progress
            except (_Broken, OSError, SafetensorError) as error:
                reason = f"{path} cannot be resumed from ({_one_line(error)})"
                if world.main:
                    self._say(f"{reason}; trying the one before it")
        if reason:
            raise UserError(f"{reason}; bring back a copy or name a new folder with --out")
        return None

    def _clean(self) -> list[Path]:
        """Remove what killed saves left; return the checkpoints, oldest first."""
        for path in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        return _steps(self.folder)

    def _written(self, beside: Path) -> dict[str, dict[str, Any]]:
        """Sync the files that this process wrote; return size and checksum of each."""
        # The engine numbers shards from 1; torch 2.11 syncs them before it has flushed them.
        mine = beside.glob(f"shard-{self._world.rank + 1:05d}-*")
        return {path.name: {"size": sync(path), "blake2b": _digest(path)} for path in mine}

    def _publish(
        self, beside: Path, final: Path, files: dict[str, Any], progress: dict[str, Any]
    ) -> None:
        """Give the checkpoint its name; remove all but the newest."""
        for name, entry in files.items():
            if not (beside / name).exists() or (beside / name).stat().st_size != entry["size"]:
                raise UserError(
                    f"{beside / name}: another process wrote it and this one does not see it; put "
                    "--out on a file system that all machines share"
                )
        about = {"format": FORMAT, "sparsejepa": __version__, "torch": torch.__version__}
        about |= {"processes": self._world.size, "progress": progress, "files": files}
        write_text(beside / _MANIFEST, json.dumps(about))
        if final.exists():  # a broken one that this run went past
            shutil.rmtree(final)
        beside.rename(final)
        sync_folder(self.folder)
        steps = _steps(self.folder)
        last = steps.index(final) + 1  # what is after it was broken when this run was resumed
        for path in {*steps} - {*steps[max(0, last - self._keep) : last]}:
            shutil.rmtree(path, ignore_errors=True)  # the next save tries again

    def _load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = HuggingFaceStorageReader(str(path))
        tensors, state = _room(reader, model, optimizer)
        self._call(load, tensors, storage_reader=reader)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _call(self, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Call torch.distributed.checkpoint; what went wrong is raised itself, not wrapped."""
        from torch.distributed.checkpoint.api import CheckpointException

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only
            try:
                call(*args, **options, no_dist=self._world.size == 1)
            except CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from None


def _examine(path: Path) -> dict[str, Any]:
    """Return the progress of a checkpoint.

    Raises _Broken unless every file is as it was written.
    """
    try:
        about = json.loads((path / _MANIFEST).read_bytes())
        files, progress = about["files"].items(), about["progress"]
        whole = about["format"] == FORMAT
        whole = whole and all(_digest(path / name) == entry["blake2b"] for name, entry in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        whole, progress = False, {}
    if not whole:
        raise _Broken("it is damaged, incomplete or of another format")
    return progress


def _room(
    reader: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Return the tensors to be filled from a checkpoint, and those among them of the optimiser.

    Those of the model are its own, by name; the optimiser's are new, by parameter number and key.
    Raises _Broken if names, shapes or types differ.
    """
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    state: dict[int, dict[str, Tensor]] = {}
    for number, (owner, parameter) in enumerate(_optimized(model, optimizer).items()):
        if f"optimizer.{owner}.step" in stored:  # not of a parameter that has never had a gradient
            means = {key: torch.empty_like(parameter.detach()) for key in _MEANS}
            state[number] = {"step": torch.zeros(()), **means}
            tensors |= {f"optimizer.{owner}.{key}": t for key, t in state[number].items()}
    for name in sorted(stored.keys() | tensors.keys()):
        kept, own = stored.get(name), tensors.get(name)
        there = kept and f"{list(kept.size)} {kept.properties.dtype}"
        here = None if own is None else f"{list(own.shape)} {own.dtype}"
        if there != here:
            raise _Broken(f"it does not fit this model: {name} is {there}, here {here}")
    return tensors, state


def _optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the optimiser's parameters by name, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: p for group in optimizer.param_groups for p in group["params"]}


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]
