"""The processes of one job: who this one is, and what they tell each other.

Started by torchrun or SLURM, several processes train one model: each step's images, masks and
draws are those of the global batch, of which every process takes its rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process among those of its job; by default the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes what is written once."""
        return self.rank == 0
