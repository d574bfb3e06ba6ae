"""When a run has failed: a term of its loss is not finite, or has exploded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_FACTOR = 1000.0
_SUMS = {"loss", "total", "grad_norm"}
"""Only not finite is a failure here: weights scale the total, single batches the gradient."""


class Guard:
    """Watches the terms of the loss, named in the order in which they come.

    A term has exploded when it is more than 1,000 times as large as 1 and as in any row of metrics
    so far; the first row has nothing to be compared with. Terms are of order 1, and some begin near
    0, so that a rise by a factor of 10,000 may be ordinary. In 378 ordinary runs no term came to
    more than 3 times that measure, in runs that survived a learning rate 1,000 times too high to
    18; runs that blew up reached 4,000 to 20,000 some steps before the first value was not finite.

    What it knows comes from the rows of metrics.jsonl alone (`observe`), so a resumed run goes by
    the same rule as one that never stopped.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # A sum is never finite when a term is not, and the term is the cause.
        self._order = sorted(range(len(names)), key=lambda i: names[i] in _SUMS)
        self._names = list(names)
        self._largest: dict[str, float] = {}

    def observe(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics, also one of an earlier part of the run, into the comparison."""
        for name in set(self._names) - _SUMS:
            if row.get(name) is not None:
                self._largest[name] = max(self._largest.get(name, 1.0), abs(row[name]))

    def check(self, step: int, values: Sequence[float]) -> str | None:
        """Return what is wrong with the values of a step: term, kind and step; None if nothing."""
        for i in self._order:
            if not math.isfinite(values[i]):
                return f"'{self._names[i]}' is not finite at step {step}"
        for i in self._order:
            largest = self._largest.get(self._names[i], math.inf)
            if abs(values[i]) > _FACTOR * largest:
                return (
                    f"'{self._names[i]}' exploded at step {step} "
                    f"({values[i]:.3g}, {largest:.3g} at most before)"
                )
        return None
