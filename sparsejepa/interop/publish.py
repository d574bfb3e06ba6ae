"""Upload of an exported encoder to the hub. The only place that sends anything anywhere."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

from sparsejepa.errors import UserError
from sparsejepa.interop.export import Exported, hub_folder
from sparsejepa.interop.hub import reachable
from sparsejepa.interop.module import MAY_BE_GONE, SparseJEPAEncoder


def publish(
    module: SparseJEPAEncoder,
    ref: str,
    *,
    public: bool = False,
    run_dir: Path | None = None,
    page: bool = True,
) -> Exported:
    """Upload the folder of `hub_folder` to ``hub:OWNER/NAME``; a repository that is new is private.

    Args:
        public: make a new repository one that everybody sees. One that exists stays as it is, and
            keeps its older versions.
        run_dir, page: as for `hub_folder`.

    Raises UserError, one line, for a name of another form, a hub out of reach and a missing login.
    """
    name = ref.removeprefix("hub:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--out {ref}: not of the form hub:OWNER/NAME")
    if not reachable():
        raise UserError(
            f"--out {ref}: the hub cannot be reached; connect to the internet, or write a folder "
            "and upload it later"
        )
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        try:
            api = HfApi()
            # First, because it tells at once whether the name and the login are good.
            repo = api.create_repo(name, private=not public, exist_ok=True).repo_id
            found = hub_folder(module, folder, repo, run_dir, page)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Encoder and groups",
                delete_patterns=MAY_BE_GONE,
            )
        except UserError:
            raise
        except Exception as error:  # whatever hub client and network raise
            raise UserError(f"--out {ref}: not uploaded ({_reason(error)})") from None
    return dataclasses.replace(found, use=found.use.replace(str(folder), repo))


def _reason(error: Exception) -> str:
    """Return in one line why the hub took nothing, and what helps."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or "Token" in type(error).__name__:
        return (
            "it needs a login that may write there: `hf auth login`, or set HF_TOKEN to a token "
            "with write access"
        )
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}; try again"
