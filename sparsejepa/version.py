"""The version of the package, and those of its numbers, which are raised by hand.

`__version__` names a release. Results of different `TRAIN_VERSION` or `EVAL_VERSION` are never
averaged or paired: raise the one when a change alters what a run computes from the same settings
and seed, the other when it alters what a probe or another measure reads from the same encoder.
tests/test_golden.py fails when that may be so; what only moves code, or adds a setting whose
default is what was done before, raises neither.
"""

from __future__ import annotations

__version__ = "0.1.0"

TRAIN_VERSION = 3
EVAL_VERSION = 1
