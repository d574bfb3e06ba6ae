"""Files of results: what counts as a line, and what is named as broken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparsejepa import results
from sparsejepa.errors import UserError
from sparsejepa.results import append_row, read_checked, read_results, read_rows, versions

ROW = {"key": "a", "arm": "dense", "seed": 0, "probes": [{"accuracy": 0.25}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"key": "a", "arm', "no JSON object (cut short?)"),
        ("42", "no JSON object"),
        ("[1, 2]", "no JSON object"),
        (json.dumps(ROW | {"probes": [{"accuracy": 13.7}]}), "accuracy 13.7 is no share"),
        (json.dumps(ROW | {"probes": [{"accuracy": "0.15"}]}), "accuracy 0.15 is no share"),
        (json.dumps(ROW | {"probes": [{}]}), "accuracy None is no share"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, ROW)
    assert read_checked(path) == [ROW]
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=f"{re.escape(str(path))}, line 2: {re.escape(message)}"):
        read_checked(path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not a text file"):
        read_checked(path)


def test_a_line_after_a_torn_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"')
    append_row(path, ROW)
    assert read_rows(path) == [ROW]


def test_a_torn_line_is_said_by_file_and_number(tmp_path: Path) -> None:
    path, said = tmp_path / "rows.jsonl", list[str]()
    path.write_text('{"key": "a"')
    append_row(path, ROW)
    assert read_results(path, said.append) == [ROW]
    assert said == [f"{path}, line 1: cut short and passed over; its run is done again"]


def test_the_lines_at_hand_have_the_fields_that_are_documented() -> None:
    known = {*results.ROW, *results.DONE, *results.RARE}
    count = 0
    for path in (Path(__file__).parents[1] / "results").glob("*.jsonl"):
        for row in read_rows(path):
            if "arm" in row:
                assert set(row) <= known, f"{path}: {sorted(set(row) - known)}"
                assert set(row) >= {"arm", "seed", "data", "probes", "settings", "environment"}
                assert all(number >= 1 for number in versions(row))
                count += 1
    assert count
