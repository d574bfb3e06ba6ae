"""Which groups an encoder's activations are of: its own, or some that were fitted to it."""

from __future__ import annotations

from pathlib import Path

from sparsejepa.errors import UserError
from sparsejepa.interop import Encoder, folder_of
from sparsejepa.interop.module import GroupActivations, load_activations
from sparsejepa.interop.runs import GROUPS, groups_folder


def find_groups(ref: str, wanted: str, encoder: Encoder) -> GroupActivations | None:
    """Return the activations of groups for the tokens of an encoder, on its device.

    Args:
        ref: what the encoder was loaded from.
        wanted: auto, the encoder's own or None if it has none; none; or a folder with groups, or
            one that ``explain`` wrote its fitted groups to.

    Raises UserError for a folder without groups, or with those of another encoder.
    """
    if wanted == "none":
        return None
    if wanted == "auto":
        folder = folder_of(ref)
    else:
        folder = groups_folder(Path(wanted))
        if not (folder / GROUPS).exists():
            raise UserError(
                f"--groups {wanted}: no {GROUPS} there; name a folder that has one (sparsejepa "
                "explain writes it for an encoder without groups), auto or none"
            )
    found = None if folder is None else load_activations(folder, encoder.grid_size)
    if found is None:
        return None
    if found.W.shape[2] != encoder.embed_dim:
        raise UserError(
            f"{folder}: groups of {found.W.shape[2]} latents, and {ref} has "
            f"{encoder.embed_dim}; name those of this encoder with --groups"
        )
    return found.to(encoder.device)
