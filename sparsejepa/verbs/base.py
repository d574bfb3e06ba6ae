"""What the verbs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tyro.conf import FlagCreatePairsOff

from sparsejepa.config import Config
from sparsejepa.errors import UserError, flag

DATA = "a name (sparsejepa data list), hub:OWNER/NAME, a folder of images or tar shards"


@dataclass(frozen=True)
class Verb:
    """What every verb understands."""

    resumes: ClassVar[tuple[str, ...] | None] = None
    """Words to add to an interrupted command so that it goes on; None if it starts anew."""

    json: FlagCreatePairsOff[bool] = False
    """End standard output with one JSON object of everything found."""


def split_names(names: str) -> list[str]:
    """Return the names between commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def image_size(numbers: tuple[int, ...]) -> tuple[int, int] | None:
    """Return height and width from what --img-size was given."""
    Config().replace(img_size=numbers).check()
    return (numbers[0], numbers[-1]) if numbers else None


def check_counts(verb: Verb, *names: str) -> None:
    """Raise UserError unless the fields `names` are at least 1 or not given."""
    for name in names:
        value = getattr(verb, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} {value}: must be at least 1")
