"""All randomness comes from generators keyed on (seed, step, purpose).

A step's draws depend on nothing that came before it, so a run resumes bit-exactly without saved
generator states, and one part's draws never shift another's.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """Return a 63-bit seed, a fixed function of its three arguments on every machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(
    seed: int, step: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a fresh generator on `device` for one purpose of one step."""
    return torch.Generator(device).manual_seed(derive_seed(seed, step, purpose))
