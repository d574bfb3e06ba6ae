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


def fetch(
    ref: str, *, local_files_only: bool = False, force_download: bool = False, **options: Any
) -> Path:
    """Return the folder of ``hub:OWNER/NAME[@REVISION]`` in the hub's cache; fetch it if need be.

    The hub is asked for its newest version, the cache is for when it does not answer; a commit,
    which never changes, comes from the cache at once. Raises UserError, one line, for a name that
    does not exist, one that needs a login, a hub out of reach, and a repository without an encoder.

    Args:
        local_files_only: do not ask the hub.
        force_download: do not take what is in the cache.
        options: cache_dir and token, as the hub's client takes them.
    """
    name = ref.removeprefix("hub:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise UserError(f"{ref}: not of the form hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    repo, _, revision = name.partition("@")
    ask = not local_files_only
    anew = ask and force_download
    found = None if anew else _in_cache(repo, revision or None, options.get("cache_dir"))
    fixed = re.fullmatch("[0-9a-f]{40}", revision) is not None
    if found is not None and (fixed or not ask or not reachable()):
        return found
    if found is None and not (ask and reachable()):
        why = "cannot be reached" if ask else "is not to be asked (local_files_only)"
        raise UserError(
            f"{ref}: not in the hub's cache, and the hub {why} (or there is no such name); "
            "connect to the internet once, or copy the cache folder (HF_HUB_CACHE) from a machine "
            "that has it"
        )
    try:
        folder = download(repo, revision or None, force_download=anew, **options)
    except Exception as error:  # whatever hub client and network raise
        if found is not None:
            said = "%s: %s; the copy in the cache is taken"
            logging.getLogger(__name__).warning(said, ref, _reason(error))
            return found
        raise UserError(f"{ref}: {_reason(error)}") from None
    if folder is None:
        raise UserError(
            f"{ref}: holds no encoder that is known here: config.json and encoder.safetensors, "
            "model.safetensors or pytorch_model.bin"
        )
    return folder


def download(repo: str, revision: str | None = None, **options: Any) -> Path | None:
    """Fetch the files that an encoder needs and return their folder, None if there is none in it.

    config.json comes last: where it lies, the rest is whole. `options` are those of
    ``huggingface_hub.snapshot_download``, whose errors it raises.
    """
    import huggingface_hub as client

    about = client.HfApi(token=options.get("token"))
    info = about.model_info(repo, revision=revision, timeout=TIMEOUT)
    files = choose_files([file.rfilename for file in info.siblings or ()])
    if files is None:
        return None
    options["etag_timeout"] = TIMEOUT
    rest = [file for file in files if file != "config.json"]
    # By its commit: a broken download leaves the cache with the version that it had.
    client.snapshot_download(repo, revision=info.sha, allow_patterns=rest, **options)
    last = client.snapshot_download(
        repo, revision=revision, allow_patterns=["config.json"], **options
    )
    # Published anew in between: then the other files are those of the older version.
    return Path(last) if Path(last).name == info.sha else download(repo, revision, **options)


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


def _in_cache(repo: str, revision: str | None, cache_dir: str | Path | None = None) -> Path | None:
    """Return a repository's folder in the cache if all that is needed lies there."""
    import huggingface_hub as client

    with contextlib.suppress(OSError, ValueError, UserError):  # not there, or not whole
        found = client.snapshot_download(
            repo, revision=revision, cache_dir=cache_dir, local_files_only=True
        )
        folder = Path(found)
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
