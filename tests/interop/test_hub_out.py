from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tomli_w
import torch
from huggingface_hub import ModelCard, constants

import sparsejepa as sj
from sparsejepa.cli import main
from sparsejepa.config import preset
from sparsejepa.errors import UserError
from sparsejepa.interop import load, load_groups
from sparsejepa.interop.card import model_card
from sparsejepa.interop.export import write_export

from .exported import assert_same, open_run, pixels_for, write_run

CASES = [
    (None, "square"), ("region", "wide"), ("concept", "stem"), ("feature", "token")
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_ours_to_a_hub_folder_and_back(tmp_path: Path, kind: str | None, shape: str) -> None:
    run = write_run(tmp_path / "run", kind, shape)
    module, out = open_run(run), tmp_path / "out"
    found = write_export(module, "hub", out)
    groups = [] if kind is None else ["groups.safetensors"]
    assert found.files == ["README.md", "config.json", "encoder.safetensors", *groups]
    assert found.difference == 0 and found.left_out == ""
    pixels = pixels_for(module)
    again = sj.SparseJEPAEncoder.from_pretrained(out)
    for name, tensor in module(pixels).items():
        assert torch.equal(again(pixels)[name], tensor)
    assert load(out).fingerprint() == load(run).fingerprint()
    # The group networks, which predict, are there as well: groups can be trained on.
    own, theirs = (load_groups(path, again.encoder.grid_size) for path in (out, run))
    if own is None or theirs is None:
        assert kind is None
        return
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)


def test_the_mixin_saves_and_loads(tmp_path: Path) -> None:
    module = open_run(write_run(tmp_path / "run", "concept"))
    module.save_pretrained(tmp_path / "out")
    again = sj.SparseJEPAEncoder.from_pretrained(tmp_path / "out")
    assert_same(again(pixels_for(module)), module(pixels_for(module)))
    assert (
        ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()["library_name"]
        == "sparsejepa"
    )
    run = sj.SparseJEPAEncoder.from_pretrained(tmp_path / "run")
    assert_same(run(pixels_for(module)), module(pixels_for(module)))


def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path) -> None:
    module = open_run(write_run(tmp_path / "run", "feature"))
    repo = tmp_path / "cache" / "models--me--model"
    write_export(module, "hub", repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    again = sj.SparseJEPAEncoder.from_pretrained(
        "me/model", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert_same(again(pixels_for(module)), module(pixels_for(module)))


def test_a_timm_model_is_saved_by_export_only(tmp_path: Path) -> None:
    module = sj.SparseJEPAEncoder(load("timm:vit_tiny_patch16_224?untrained"))
    with pytest.raises(UserError, match=r"export timm:vit_tiny_patch16_224.*--to hub"):
        module.save_pretrained(tmp_path / "out")


# The card


def test_the_card_has_groups_numbers_and_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sweep" / "run", "feature")
    config = preset("nano").replace(data="/home/somebody/photos", data_root="/home/somebody")
    (run / "config.toml").write_text(tomli_w.dumps(config.to_dict()))
    final = {"knn": 0.4321, "density": 0.25, "dead_groups": 1}
    (run / "summary.json").write_text(json.dumps({"steps": 1234, "images": 9, "final": final}))
    own = {"data": "cifar100", "target": "label", "protocol": "logistic", "accuracy": 0.3456}
    row = {"key": "a", "arm": "b", "seed": 0, "settings": config.to_dict(), "probes": [own]}
    other = {**row, "settings": config.replace(seed=9).to_dict(), "probes": [{"accuracy": 0.777}]}
    lines = [json.dumps(row), json.dumps(other), "torn {"]
    (tmp_path / "sweep" / "results.jsonl").write_text("\n".join(lines))
    measure = {"section": "sparsity", "name": "Hoyer", "unit": "", "values": {}}
    measure["values"] = {"this run": {"value": 0.625}, "untrained": {"value": None}}
    metrics = {"verdict": "Groups matter.", "data": "/home/somebody/x", "measures": [measure]}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "report.html").write_text("<p>page</p>")
    found = write_export(open_run(run), "hub", tmp_path / "out", run_dir=run)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "| k", "1,234", "0.4321", "34.6%", "4 groups of kind feature", "1 groups have none",
        "Groups matter.", "| sparsity | Hoyer | 0.625 |  |", 'data = "photos"', "16 x 16 pixels",
        'from_pretrained("out")',
    )[1:]:  # fmt: skip
        assert text in card, text
    assert "somebody" not in card and "77.7%" not in card
    assert "report.html" in found.files and "`report.html`" in card
    assert (tmp_path / "out" / "report.html").read_text() == "<p>page</p>"


@pytest.mark.parametrize("file", ["summary.json", "metrics.json"])
def test_damaged_numbers_are_named(tmp_path: Path, file: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.toml").write_text(tomli_w.dumps(preset("nano").to_dict()))
    (run / file).write_text('{"final": [1], "measures": {"a": 1}}')
    with pytest.raises(UserError, match=f"{file}: damaged"):
        write_export(open_run(run), "hub", tmp_path / "out", run_dir=run)
    assert not (tmp_path / "out").exists()


def test_texts_on_a_card_are_no_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    hostile = "a|b`<script>alert(1)</script>\n# [x](javascript:1)\n```\n"
    (run / "config.toml").write_text(tomli_w.dumps(preset("nano").replace(data=hostile).to_dict()))
    metrics = {"verdict": hostile, "data": hostile, "measures": []}
    (run / "metrics.json").write_text(json.dumps(metrics))
    architecture = load(run).architecture
    card = model_card(hostile, architecture, run_dir=run, license=hostile)
    fence, prose = "", []
    for line in card.splitlines():
        if line.startswith(("```", "~~~")):
            fence = "" if line == fence else fence or line.rstrip("abcdefghijklmnopqrstuvwxyz")
        elif not fence:
            prose.append(line)
    assert not fence, "a fence is left open"
    text = "\n".join(prose)
    assert "a\\|b\\`" in text
    assert "<script" not in text and "\n# [" not in text and "[x](javascript" not in text
    assert ModelCard(card).data.to_dict()["library_name"] == "sparsejepa"


def test_a_licence_travels_along(tmp_path: Path) -> None:
    encoder = load(write_run(tmp_path / "run"))
    encoder.license = "CC BY-NC 4.0 (if these are the published weights of I-JEPA)"
    module = sj.SparseJEPAEncoder(encoder)
    for to in ("hub", "timm", "transformers"):
        write_export(module, to, tmp_path / to)
        assert load(tmp_path / to).license == "cc-by-nc-4.0"


# Uploads, to a stand-in on the loopback


@dataclass
class Hub:
    """A hub that takes everything, or refuses with `status`."""

    status: int = 200
    made: list[dict] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    endpoint: str = ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            answer: dict = {}
            if self.path == "/api/repos/create":
                found.made.append(json.loads(body))
                answer = {"url": f"{found.endpoint}/me/model", "name": "me/model"}
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                answer["files"] = [
                    {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                ]
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        found.files[line["value"]["path"]] = content
                commit = f"{found.endpoint}/me/model/commit/{'0' * 40}"
                answer = {"commitUrl": commit, "commitOid": "0" * 40}
            self.answer(answer)

        def do_GET(self) -> None:
            self.answer({})

        def answer(self, content: dict) -> None:
            data = json.dumps(content).encode()
            self.send_response(found.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield found
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("public", [False, True])
def test_an_upload_is_the_folder_that_is_written(tmp_path: Path, hub: Hub, public: bool) -> None:
    run = write_run(tmp_path / "run", "concept")
    (run / "report.html").write_text("<p>page</p>")
    words = ["export", str(run), "--to", "hub", "--out", "hub:me/model"]
    assert main([*words, *(["--public"] if public else [])]) == 0
    assert [made["visibility"] for made in hub.made] == ["public" if public else "private"]
    for name, content in hub.files.items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    module, again = open_run(run), sj.SparseJEPAEncoder.from_pretrained(tmp_path / "copy")
    assert_same(again(pixels_for(module)), module(pixels_for(module)))
    assert hub.files["report.html"] == b"<p>page</p>"
    assert 'from_pretrained("me/model")' in hub.files["README.md"].decode()
    assert str(tmp_path) not in hub.files["README.md"].decode()


def test_the_mixin_uploads(tmp_path: Path, hub: Hub) -> None:
    open_run(write_run(tmp_path / "run", "concept")).push_to_hub("me/model")
    assert set(hub.files) == {
        "README.md", "config.json", "encoder.safetensors", "groups.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_login_is_one_line(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    hub.status = status
    run = write_run(tmp_path / "run")
    assert main(["export", str(run), "--to", "hub", "--out", "hub:me/model"]) == 2
    error = capsys.readouterr().err
    assert "needs a login that may write there" in error and len(error.splitlines()) == 1
    assert not hub.files


def test_a_hub_that_fails_is_one_line(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.status = 418
    run = write_run(tmp_path / "run")
    assert main(["export", str(run), "--to", "hub", "--out", "hub:me/model"]) == 2
    error = capsys.readouterr().err
    assert "--out hub:me/model: not uploaded (" in error and len(error.splitlines()) == 1
