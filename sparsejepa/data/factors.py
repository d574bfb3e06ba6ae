"""Columns of a table as targets, for whoever asks for them by name.

Without being asked the readers take only what is plainly a label. A factor of variation may also be
a number (a position, an angle) or one entry of a list, and then has to become a few categories.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sparsejepa.data.sources import MAX_CATEGORIES, index_target
from sparsejepa.data.store import Target
from sparsejepa.errors import UserError, nearest

MAX_LEVELS = 50
"""A column of numbers with more distinct values than this is cut into bins."""

BINS = 20
"""As in the measures of disentanglement (Locatello et al. 2019)."""


def chosen(factors: Sequence[str], columns: Sequence[str], origin: str) -> list[str]:
    """Return the columns that the factors name, in the order asked for.

    A factor that is no column stands for its numbered ones: pose for pose_0, pose_1 and so on.
    Raises UserError if it has none of those either.
    """
    found: dict[str, None] = {}
    for factor in factors:
        numbered = re.compile(re.escape(factor) + r"_\d+")
        names = [factor] if factor in columns else list(filter(numbered.fullmatch, columns))
        if not names:
            raise UserError(
                f"{origin}: no factor '{factor}'{nearest(factor, columns)}; "
                f"there are {', '.join(columns) or 'none'}"
            )
        found |= dict.fromkeys(names)
    return list(found)


def factor_target(
    name: str,
    values: Sequence[Any],
    train: np.ndarray,
    origin: str,
    classes: tuple[str, ...] = (),
) -> Target:
    """Make a target of a column [N] of numbers, truth values or text.

    Numbers are ordered as numbers, text as text. More than `MAX_LEVELS` different numbers are cut
    into `BINS` bins of equal count, and the target's note says so; the cuts are quantiles of the
    training rows, `train` [N] bool. Where the data names its `classes`, `values` are indices.

    Raises UserError: missing values, NaN, one value only, or text that never repeats.
    """
    where = f"{origin}: factor '{name}'"
    if classes:
        index = np.array([-1 if v is None else v for v in values], np.int64)
        _refuse_missing(int(((index < 0) | (index >= len(classes))).sum()), len(index), where)
        _refuse_constant([classes[i] for i in np.unique(index)], where)
        return Target(index, classes)
    texts = ["" if value is None else str(value).strip() for value in values]
    distinct = sorted(set(texts))
    numbers = {text: number for text in distinct if (number := _number(text)) is not None}
    numeric = len(numbers) == len([text for text in distinct if text])
    unknown = {t for t in distinct if not t or (numeric and not math.isfinite(numbers[t]))}
    _refuse_missing(sum(text in unknown for text in texts), len(texts), where)
    if numeric:  # 0.0 and -0.0, 1 and 1.0 are one value each
        same = {numbers[text]: text for text in distinct}
        texts, distinct = [same[numbers[text]] for text in texts], [same[n] for n in sorted(same)]
    _refuse_constant(distinct, where)
    if numeric and len(distinct) > MAX_LEVELS:
        return _binned(np.array([numbers[text] for text in texts]), train, where)
    if len(distinct) > MAX_CATEGORIES or (not numeric and len(distinct) == len(texts)):
        raise UserError(
            f"{where} has {len(distinct)} different texts in {len(texts)} rows, too many to be "
            "categories; leave it out"
        )
    return index_target(texts, distinct)


def may_be_factor(kind: Any) -> bool:
    """Whether a column of this arrow type can be a factor: plain values, or lists of them."""
    kind = str(getattr(kind, "value_type", kind))
    return bool(re.fullmatch(r"u?int\d+|halffloat|float|double|bool|(large_)?string", kind))


def arrow_columns(table: Any) -> dict[str, list[Any]]:
    """Return the columns of a pyarrow table that can be factors, as lists of values.

    Those are numbers, truth values and text; a list column, if all lists have one length, becomes a
    column per entry: pose_0, pose_1 and so on.
    """
    import pyarrow as pa
    from pyarrow.compute import call_function

    columns: dict[str, list[Any]] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not may_be_factor(column.type):
            continue
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not hasattr(column.type, "value_type"):
            columns[name] = _values(column)
        else:
            lengths = call_function("list_value_length", [column]).unique().to_pylist()
            if len(lengths) == 1 and lengths[0]:
                entries = _values(call_function("list_flatten", [column]))
                width = lengths[0]
                columns |= {f"{name}_{i}": entries[i::width] for i in range(width)}
    return columns


def _values(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_floating(column.type):  # NumPy's float32 writes 0.6 where Python's float cannot
        return [None if np.isnan(value) else value for value in column.to_numpy()]
    return column.to_pylist()


def _binned(values: np.ndarray, train: np.ndarray, where: str) -> Target:
    """Cut values [N] at the training rows' quantiles; no bin is empty there."""
    known = values[train] if train.any() else values
    cuts = np.unique(np.quantile(known, np.arange(1, BINS) / BINS, method="higher"))
    cuts = cuts[cuts > known.min()]
    if not len(cuts):
        raise UserError(f"{where} has one value in nearly all rows ({known.min():g}); leave it out")
    bounds = [f"{bound:.6g}" for bound in (values.min(), *cuts, values.max())]
    names = tuple(f"{low} to {high}" for low, high in pairwise(bounds))
    note = f"{len(np.unique(values))} different numbers, cut into {len(names)} bins of equal count"
    return Target(np.searchsorted(cuts, values, side="right").astype(np.int64), names, note)


def _refuse_missing(missing: int, total: int, where: str) -> None:
    if missing:
        raise UserError(
            f"{where} has no value in {missing} of {total} rows; fill them in, or leave it out"
        )


def _refuse_constant(distinct: list[str], where: str) -> None:
    if len(distinct) < 2:
        raise UserError(f"{where} has one value only ({''.join(distinct)}); leave it out")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
