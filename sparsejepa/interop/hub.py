"""Models on the hub: fetched into its client's cache, or one line that says why not.

Nothing is run of what a repository holds: configuration, weights and the model card are read.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import re
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sparsejepa.errors import UserError

TIMEOUT = 10
"""Seconds to wait for the hub's answer."""
INDEX = "model.safetensors.index.json"
_ABOUT = ("config.json", "preprocessor_config.json", "README.md")
# Files of weights, the better choice first; of each line all that are there are taken.
_WEIGHTS = (
    ("encoder.safetensors", "groups.safetensors"),
    ("model.safetensors",),
    (INDEX, "model-*.safetensors"),
    ("pytorch_model.bin",),
)


def fetch(ref: str) -> Path:
    """Return the folder of ``hub:OWNER/NAME[@REVISION]`` in the hub's cache; fetch it if need be.

    What lies in the cache is not asked for again. Raises UserError, one line, for a name that does
    not exist, one that needs a login, a hub out of reach, and a repository without an encoder.
    """
    name = ref.removeprefix("hub:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise UserError(f"{ref}: not of the form hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    repo, _, revision = name.partition("@")
    found = _in_cache(repo, revision or None)
    if found is not None:
        return found
    if not reachable():
        raise UserError(
            f"{ref}: not in the hub's cache, and the hub cannot be reached; connect to the "
            "internet once, or copy the cache folder (HF_HUB_CACHE) from a machine that has it"
        )
    import huggingface_hub as client

    try:
        info = client.HfApi().model_info(repo, revision=revision or None, timeout=TIMEOUT)
        files = choose_files([file.rfilename for file in info.siblings or ()])
        if files is not None:
            folder = client.snapshot_download(
                repo, revision=revision or None, allow_patterns=files, etag_timeout=TIMEOUT
            )
            return Path(folder)
    except Exception as error:  # whatever hub client and network raise
        raise UserError(f"{ref}: {_reason(error)}") from None
    raise UserError(
        f"{ref}: holds no encoder that is known here: config.json and encoder.safetensors, "
        "model.safetensors or pytorch_model.bin"
    )


def choose_files(names: Sequence[str]) -> list[str] | None:
    """Return the files of a repository that an encoder needs, None if there is none in it."""
    if "config.json" not in names:
        return None
    for line in _WEIGHTS:
        if line[0] in names:
            weights = [name for name in names for like in line if fnmatch.fnmatchcase(name, like)]
            return [*(name for name in _ABOUT if name in names), *weights]
    return None


def weights_files(folder: Path) -> list[Path]:
    """Return the files of weights of a folder in transformers' or timm's format.

    Raises UserError if there is none, or one that its index names is not there.
    """
    for name in ("model.safetensors", INDEX, "pytorch_model.bin"):
        path = folder / name
        if not path.is_file():
            continue
        if name != INDEX:
            return [path]
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            names = sorted(shard for shard in shards if Path(shard).name == shard)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: damaged; fetch it again") from None
        gone = [shard for shard in names if not (folder / shard).is_file()]
        if gone or not names:
            raise UserError(f"{folder}: {', '.join(gone) or 'weights'} missing; fetch it again")
        return [folder / shard for shard in names]
    raise UserError(f"{folder}: no weights beside config.json; fetch model.safetensors as well")


def license_of(folder: Path) -> str | None:
    """Return the licence that a model card states in its first lines."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        found = head and re.search(r"^license:\s*['\"]?([\w.-]+)", head[1], re.MULTILINE)
        return found[1] if found else None
    return None


def _in_cache(repo: str, revision: str | None) -> Path | None:
    """Return a repository's folder in the cache if all that is needed lies there."""
    import huggingface_hub as client

    with contextlib.suppress(OSError, ValueError, UserError):  # not there, or not whole
        folder = Path(client.snapshot_download(repo, revision=revision, local_files_only=True))
        files = choose_files([path.name for path in folder.iterdir()])
        if files is not None and ("encoder.safetensors" in files or weights_files(folder)):
            return folder
    return None


def _reason(error: Exception) -> str:
    """Return in one line what the hub's client could not do, and what helps."""
    from huggingface_hub import errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"needs a login: accept the terms on its page on the hub, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such model, or it is private; check the name, or {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has the model, but no such revision; leave out @REVISION"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses (status {status}); {login}"
    lines = str(error).strip().splitlines() or [""]
    return f"not fetched, or damaged on the way ({type(error).__name__}: {lines[0]}); try again"


def cached_weights(about: Any) -> str | None:
    """Return the weights' file if the hub's cache has it, so that no network is needed."""
    from huggingface_hub import try_to_load_from_cache

    if not about.hf_hub_id or about.custom_load == "hf":
        return None
    repo, _, revision = about.hf_hub_id.partition("@")
    wanted = about.hf_hub_filename
    for file in (wanted,) if wanted else ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repo, file, revision=revision or None)
        if isinstance(found, str):
            return found
    return None


def reachable(timeout: float = 5.0) -> bool:
    """Return whether the hub answers; asked first because its client retries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if set(urllib.request.getproxies()) - {"no"}:
        return True  # the proxy knows, we cannot
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout):
            return True
    except OSError as error:
        logging.getLogger(__name__).debug("hub not reachable: %s", error)
        return False
