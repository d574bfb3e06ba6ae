from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sparsejepa.errors import UserError
from sparsejepa.interop import graphs
from sparsejepa.interop.export import write_export

from .exported import MEAN, STD, assert_same, open_run, pixels_for, write_run

CASES = [("region", "wide"), ("concept", "square"), ("feature", "token")]


def run_onnx(session: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {"pixels": pixels.numpy()})
    return {name: torch.as_tensor(x) for name, x in zip(names, found, strict=True)}


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_ours_to_onnx(tmp_path: Path, kind: str | None, shape: str) -> None:
    module = open_run(write_run(tmp_path / "run", kind, shape))
    found = write_export(module, "onnx", tmp_path / "a.onnx")
    assert found.files == ["a.onnx"] and found.difference is not None and found.difference < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for batch in (1, 3, 17):
        pixels = pixels_for(module, batch)
        assert_same(run_onnx(session, pixels), module(pixels))
    about = json.loads(session.get_modelmeta().custom_metadata_map[graphs.ABOUT])
    assert (about["mean"], about["std"], about["groups"]) == (list(MEAN), list(STD), kind)
    assert about["img_size"] == list(module.encoder.img_size) and about["name"] == "run"
    model = onnx.load(tmp_path / "a.onnx")
    assert [opset.version for opset in model.opset_import if not opset.domain] == [graphs.OPSET]
    names: dict[str, Any] = {}
    exec(found.use, names)
    assert set(names["found"]) == set(module(pixels)) and names["about"] == about
    assert names["found"]["pooled"].shape == (5, 24)
    height, width = module.encoder.img_size
    with pytest.raises(Exception, match=f"Got: {width + 1} Expected: {width}"):
        session.run(None, {"pixels": np.zeros((1, 3, height, width + 1), np.float32)})


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_ours_to_pt2(tmp_path: Path, kind: str | None, shape: str) -> None:
    module = open_run(write_run(tmp_path / "run", kind, shape))
    found = write_export(module, "pt2", tmp_path / "a.pt2")
    assert found.files == ["a.pt2"] and found.difference is not None and found.difference < 1e-5
    extra = {graphs.ABOUT: ""}
    model = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    for batch in (1, 3, 17):
        pixels = pixels_for(module, batch)
        assert_same(model(pixels), module(pixels))
    assert json.loads(extra[graphs.ABOUT])["std"] == list(STD)
    names: dict[str, Any] = {}
    exec(found.use, names)
    assert set(names["found"]) == set(module(pixels))
    with pytest.raises(AssertionError, match="Guard failed"):
        model(torch.zeros(1, 3, 8, 8))


def test_large_weights_lie_beside_the_onnx_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_INLINE", 1000)
    module = open_run(write_run(tmp_path / "run"))
    found = write_export(module, "onnx", tmp_path / "out" / "a.onnx")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == found.files
    assert found.files == ["a.onnx", "a.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "a.onnx")
    pixels = pixels_for(module)
    assert_same(run_onnx(session, pixels), module(pixels))


def test_weights_of_another_onnx_file_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.onnx.data").write_text("mine")
    with pytest.raises(UserError, match=r"a.onnx.data: exists already"):
        write_export(open_run(write_run(tmp_path / "run")), "onnx", tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx.data").read_text() == "mine"


def test_quiet_leaves_logging_as_it_was() -> None:
    before = logging.root.manager.disable
    try:
        for level in (logging.NOTSET, logging.INFO, logging.ERROR):
            logging.disable(level)
            with graphs.quiet():
                assert logging.root.manager.disable == max(level, logging.WARNING)
            assert logging.root.manager.disable == level
    finally:
        logging.disable(before)


def test_a_graph_that_differs_or_lacks_an_output_is_refused(tmp_path: Path) -> None:
    module = open_run(write_run(tmp_path / "run", "concept"))
    path = tmp_path / "a.onnx"

    def close(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: x * (1 + 1e-6) for name, x in module(pixels).items()}

    assert 0 < graphs.check(module, close, "here", path) < 1e-5
    for wrong in (
        lambda pixels: {name: x * 1.01 for name, x in module(pixels).items()},
        lambda pixels: {name: x for name, x in module(pixels).items() if name != "group_map"},
        lambda pixels: {name: x * torch.nan for name, x in module(pixels).items()},
        lambda pixels: {name: x[:1] for name, x in module(pixels).items()},
    ):
        with pytest.raises(UserError, match=r"a.onnx: not written, since here gives other"):
            graphs.check(module, wrong, "here", path)
