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
from sparsejepa.interop import hub as hub_client
from sparsejepa.interop import load, load_groups
from sparsejepa.interop.card import model_card
from sparsejepa.interop.export import write_export
from sparsejepa.training.checkpoint import FROM_START
from sparsejepa.version import TRAIN_VERSION

from .exported import assert_same, open_run, pixels_for, write_run

CASES = [
    (None, "square"), ("region", "wide"), ("concept", "square"), ("feature", "token")
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


def test_a_model_of_the_hub_keeps_its_name_and_licence(tmp_path: Path) -> None:
    encoder = load(write_run(tmp_path / "run"))
    encoder.license = "cc-by-nc-4.0"
    repo = tmp_path / "cache" / "models--me--model"
    write_export(sj.SparseJEPAEncoder(encoder), "hub", repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    again = sj.SparseJEPAEncoder.from_pretrained(
        "me/model", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert (again.encoder.license, again.encoder.name) == ("cc-by-nc-4.0", "hub:me/model")
    again.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# me/model\n" in card and "license: cc-by-nc-4.0" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["license"] == "cc-by-nc-4.0"


def test_a_timm_model_is_saved_by_export_only(tmp_path: Path) -> None:
    module = sj.SparseJEPAEncoder(load("timm:vit_tiny_patch16_224?untrained"))
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UserError, match=r"export timm:vit_tiny_patch16_224.*--to hub"):
        module.save_pretrained(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.json", "mine")]


def test_groups_of_an_earlier_model_do_not_stay(tmp_path: Path) -> None:
    open_run(write_run(tmp_path / "run", "concept")).save_pretrained(tmp_path / "out")
    open_run(write_run(tmp_path / "dense")).save_pretrained(tmp_path / "out")
    assert sj.SparseJEPAEncoder.from_pretrained(tmp_path / "out").groups is None


@pytest.mark.parametrize("text", ["{", "[1]", "", None])
def test_a_folder_without_a_model_is_one_line(tmp_path: Path, text: str | None) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.json").unlink()
    if text is not None:
        (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json") as caught:
        sj.SparseJEPAEncoder.from_pretrained(run)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("runs/gone", "no folder runs/gone.*not in the hub's cache.*cannot be reached"),
        ("/gone", "no folder /gone.*not of the form hub:OWNER/NAME"),
    ],
)
def test_a_name_that_is_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    def asked(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked although nothing answers")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    with pytest.raises(UserError, match=line):
        sj.SparseJEPAEncoder.from_pretrained(name, cache_dir=tmp_path)


def test_what_the_hub_is_asked_for_can_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = write_run(tmp_path / "run", "concept"), []

    def download(*names: object, **options: object) -> Path:
        asked.append((names, options))
        return run

    monkeypatch.setattr(hub_client, "reachable", lambda: True)
    monkeypatch.setattr(hub_client, "download", download)
    own = {"token": "t", "cache_dir": tmp_path / "cache", "force_download": True}
    found = sj.SparseJEPAEncoder.from_pretrained("me/model", revision="v1", **own)
    assert asked == [(("me/model", "v1"), own)]
    assert found.kind == "concept" and found.encoder.name == "hub:me/model"
    with pytest.raises(UserError, match="not to be asked"):
        sj.SparseJEPAEncoder.from_pretrained("me/model", local_files_only=True, **own)


def test_where_and_how_a_model_runs_can_be_said_and_nothing_unknown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "concept")
    module = sj.SparseJEPAEncoder.from_pretrained(run, device="cpu", precision="bf16")
    assert module.encoder.precision == "bf16"
    with pytest.raises(TypeError, match="'devise'"):
        sj.SparseJEPAEncoder.from_pretrained(run, devise="cpu")
    with pytest.raises(RuntimeError, match="nonsense"):
        sj.SparseJEPAEncoder.from_pretrained(run, device="nonsense")


def test_the_card_can_be_given_a_name_and_a_licence(tmp_path: Path) -> None:
    module = open_run(write_run(tmp_path / "run"))
    module.save_pretrained(tmp_path / "out", model_card_kwargs={"license": "mit", "name": "a/b"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and 'from_pretrained("a/b")' in card
    assert load(tmp_path / "out").license == "mit"


# The card


def test_the_card_has_groups_numbers_and_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sweep" / "run", "feature")
    config = preset("nano").replace(
        data="/home/somebody/photos", data_root="/home/somebody", pattern="/home/somebody/learned"
    )
    (run / "config.toml").write_text(tomli_w.dumps(config.to_dict()))
    final = {"knn": 0.4321, "density": 0.25, "dead_groups": 1}
    (run / "summary.json").write_text(
        json.dumps({"steps": 1234, "images": 9, "final": final, "train_version": TRAIN_VERSION})
    )
    own = {"data": "cifar100", "target": "label", "protocol": "logistic", "accuracy": 0.3456}
    row = {"key": "a", "arm": "b", "seed": 0, "settings": config.to_dict(), "probes": [own]}
    row["train_version"] = TRAIN_VERSION
    other = {**row, "settings": config.replace(seed=9).to_dict(), "probes": [{"accuracy": 0.777}]}
    older = {**row, "train_version": TRAIN_VERSION - 1, "probes": [{**own, "accuracy": 0.777}]}
    lines = [*map(json.dumps, (row, other, older)), "torn {"]
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
        'from_pretrained("out")', 'pattern = "learned"',
    )[1:]:  # fmt: skip
        assert text in card, text
    assert "somebody" not in card and "77.7%" not in card
    assert "report.html" in found.files and "`report.html`" in card
    assert (tmp_path / "out" / "report.html").read_text() == "<p>page</p>"


@pytest.mark.parametrize(
    ("init", "shown"),
    [("/home/somebody/vit.pth", "vit.pth"), ("timm:vit_x.mae", "timm:vit_x.mae"),
     ("hub:me/model", "hub:me/model"), ("/home/somebody/run/", "run")],
)  # fmt: skip
def test_the_card_of_a_run_that_went_on_from_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, shown: str
) -> None:
    run = write_run(tmp_path / "sweep" / "run")
    given = preset("nano").replace(init=init)
    # The run's settings have what the encoder decides filled in, those of the sweep have not.
    filled = {"encoder": "24,2,3", "patch_size": 2}
    assert set(filled) == FROM_START
    (run / "config.toml").write_text(tomli_w.dumps(given.replace(**filled).to_dict()))
    probe = {"data": "cifar100", "target": "label", "protocol": "logistic", "accuracy": 0.3456}
    others = [given.replace(seed=9), given.replace(init="other"), given.replace(init=None)]
    lines = [
        {"key": "a", "settings": config.to_dict(), "probes": [{**probe, "accuracy": accuracy}]}
        | {"train_version": TRAIN_VERSION}
        for config, accuracy in [(given, 0.3456), *((other, 0.777) for other in others)]
    ]
    (tmp_path / "sweep" / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(run)
    card = model_card("x", load(run).architecture, run_dir=Path("."))
    assert "34.6%" in card and "77.7%" not in card
    assert f'init = "{shown}"' in card and "somebody" not in card


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
    there: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
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
                lines = [json.loads(line) for line in body.splitlines()]
                found.gone += [x["value"]["path"] for x in lines if x["key"] == "deletedFile"]
                for line in lines:
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        found.files[line["value"]["path"]] = content
                commit = f"{found.endpoint}/me/model/commit/{'0' * 40}"
                answer = {"commitUrl": commit, "commitOid": "0" * 40}
            self.answer(answer)

        def do_GET(self) -> None:
            tree = [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in found.there]
            self.answer(tree if "/tree/" in self.path else {})

        def answer(self, content: dict | list) -> None:
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
def test_an_upload_is_the_folder_that_is_written(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], public: bool
) -> None:
    run = write_run(tmp_path / "run", "concept")
    (run / "report.html").write_text("<p>page</p>")
    words = ["export", str(run), "--to", "hub", "--out", "hub:me/model"]
    assert main([*words, *(["--public"] if public else [])]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "report.html goes along: it shows images and folder names" in shown
    assert [made["visibility"] for made in hub.made] == ["public" if public else "private"]
    for name, content in hub.files.items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    module, again = open_run(run), sj.SparseJEPAEncoder.from_pretrained(tmp_path / "copy")
    assert_same(again(pixels_for(module)), module(pixels_for(module)))
    assert hub.files["report.html"] == b"<p>page</p>"
    assert 'from_pretrained("me/model")' in hub.files["README.md"].decode()
    assert str(tmp_path) not in hub.files["README.md"].decode()


def test_the_page_can_stay_here(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "concept")
    (run / "report.html").write_text("<p>page</p>")
    hub.there = ["report.html"]
    words = ["export", str(run), "--to", "hub", "--no-page", "--out"]
    for out in ("hub:me/model", str(tmp_path / "out")):
        assert main([*words, out]) == 0
        assert "goes along" not in capsys.readouterr().out
    assert "report.html" not in hub.files and b"report.html" not in hub.files["README.md"]
    assert hub.gone == ["report.html"]
    assert "report.html" not in [p.name for p in (tmp_path / "out").iterdir()]


def test_an_upload_removes_groups_and_page_of_an_earlier_model(tmp_path: Path, hub: Hub) -> None:
    run = write_run(tmp_path / "run")
    hub.there = ["report.html", "groups.safetensors", "config.json", "notes.txt"]
    assert main(["export", str(run), "--to", "hub", "--out", "hub:me/model"]) == 0
    assert sorted(hub.gone) == ["groups.safetensors", "report.html"]
    hub.gone.clear()
    open_run(run).push_to_hub("me/model")
    assert sorted(hub.gone) == ["groups.safetensors", "report.html"]
    hub.gone.clear()
    open_run(run).push_to_hub("me/model", delete_patterns=["notes.txt"])
    assert hub.gone == ["notes.txt"]


def test_the_mixin_uploads(tmp_path: Path, hub: Hub) -> None:
    open_run(write_run(tmp_path / "run", "concept")).push_to_hub("me/model")
    assert 'from_pretrained("me/model")' in hub.files["README.md"].decode()
    assert set(hub.files) == {
        "README.md", "config.json", "encoder.safetensors", "groups.safetensors"
    }  # fmt: skip


def test_a_timm_model_makes_no_repository(hub: Hub) -> None:
    module = sj.SparseJEPAEncoder(load("timm:vit_tiny_patch16_224?untrained"))
    with pytest.raises(UserError, match="--to hub"):
        module.push_to_hub("me/model")
    assert not hub.made


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
