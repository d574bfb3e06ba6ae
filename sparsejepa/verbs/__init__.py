"""The verbs of the command line: each a dataclass (its flags and help) and a function.

A function takes the parsed dataclass and the console for people, and returns what ``--json``
prints. It imports what it needs when it runs; nothing heavy is imported with this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsejepa.verbs import (
    completing,
    embedding,
    explaining,
    exporting,
    looking,
    training,
)
from sparsejepa.verbs.base import Verb

VERBS: dict[str, tuple[type[Verb], Callable[[Any, Any], dict[str, Any]]]] = {
    "demo": (training.Demo, training.demo),
    "pretrain": (training.Pretrain, training.pretrain),
    "probe": (looking.Probe, looking.probe),
    "sweep": (training.Sweep, training.sweep),
    "explain": (explaining.Explain, explaining.explain),
    "compare": (explaining.Compare, explaining.compare),
    "masks": (looking.Masks, looking.masks),
    "data": (looking.Data, looking.data),
    "embed": (embedding.Embed, embedding.embed),
    "export": (exporting.Export, exporting.export),
    "info": (looking.Info, looking.info),
    "completion": (completing.Completion, completing.completion),
}
