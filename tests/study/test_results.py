"""Files of results: what counts as a line, and what is named as broken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparsejepa.errors import UserError
from sparsejepa.study import results
from sparsejepa.study.results import append_row, read_checked, read_results, read_rows, versions

ROW = {"key": "a", "arm": "dense", "seed": 0, "probes": [{"accuracy": 0.25}]}


@pytest.mark.parametrize(
    "line",
    [
        '"key": "a", "arm',
        "42",
        "[1, 2]",
        *(json.dumps(ROW | {"probes": [p]}) for p in ({"accuracy": 13.7}, {"accuracy": "0.1"}, {})),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, ROW)
    assert read_checked(path) == [ROW]
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=f"{re.escape(str(path))}, line 2: no line of results"):
        read_checked(path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not a text file"):
        read_checked(path)


def test_a_torn_line_is_said_by_file_and_number(tmp_path: Path) -> None:
    path, said = tmp_path / "rows.jsonl", list[str]()
    path.write_text('{"key": "a"')
    append_row(path, ROW)
    assert read_results(path, said.append) == [ROW]
    assert said == [f"{path}, line 1: cut short and passed over; its run is done again"]


def test_the_lines_at_hand_have_the_fields_that_are_documented() -> None:
    known = {*results.ROW, *results.DONE, *results.RARE}
    count = 0
    for path in (Path(__file__).parents[2] / "results").glob("*.jsonl"):
        for row in read_rows(path):
            if "arm" in row:
                assert set(row) <= known, f"{path}: {sorted(set(row) - known)}"
                assert set(row) >= {"arm", "seed", "data", "probes", "settings", "environment"}
                assert all(number >= 1 for number in versions(row))
                count += 1
    assert count
