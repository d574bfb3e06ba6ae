"""Models of the hub, from a stand-in for it on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from sparsejepa.errors import UserError
from sparsejepa.interop import (
    IMAGENET,
    hub,
    load,
    save_encoder,
    save_groups,
    to_transformers,
)
from sparsejepa.interop.timm import TimmViT
from sparsejepa.model.encoder import ViT
from sparsejepa.model.groups import GroupMap


def small_vit() -> ViT:
    torch.manual_seed(0)
    return ViT(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)


def ours(folder: Path) -> None:
    save_encoder(folder, small_vit(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


def of_transformers(folder: Path) -> None:
    state, config = to_transformers(small_vit())
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def of_timm(folder: Path) -> None:
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
    }
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)
    save_file(model.state_dict(), folder / "model.safetensors")
    about = {"mean": [0.1, 0.1, 0.1], "std": [0.3, 0.3, 0.3], "license": "apache-2.0"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "model_args": sizes}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": about}))


def with_groups(folder: Path) -> None:
    ours(folder)
    save_groups(folder, GroupMap("concept", 24, (4, 4), num_groups=4))


FORMATS = {"ours": ours, "transformers": of_transformers, "timm": of_timm}


# Folders


def test_a_head_and_pretrained_weights_in_a_timm_folder_are_passed_over(tmp_path: Path) -> None:
    of_timm(tmp_path)
    before, file = load(tmp_path).fingerprint(), tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["model_args"] |= {"num_classes": 4, "pretrained": True}
    file.write_text(json.dumps(config))
    assert load(tmp_path).fingerprint() == before


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_a_folder_is_read_as_its_folder(kind: str, tmp_path: Path) -> None:
    """What tensors do not tell stands in config.json: heads, normalisation, licence."""
    vit = ViT(16, 4, 192, depth=1, num_heads=4, norm_eps=1e-5)
    weights = "encoder.safetensors" if kind == "ours" else "model.safetensors"
    if kind == "ours":
        save_encoder(tmp_path, vit, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    elif kind == "timm":
        of_timm(tmp_path)
    else:
        state, config = to_transformers(vit)
        save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / weights)
        (tmp_path / "config.json").write_text(json.dumps(config))
        about = {"image_mean": [0.1, 0.1, 0.1], "image_std": [0.3, 0.3, 0.3]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    encoder, folder = load(tmp_path / weights), load(tmp_path)
    assert encoder.fingerprint() == folder.fingerprint()
    assert encoder.license == folder.license is not None
    assert encoder.mean == folder.mean != IMAGENET[0]
    if kind != "timm":
        assert encoder.architecture["num_heads"] == 4 and encoder.architecture["norm_eps"] == 1e-5
    # A file that the folder does not load is not its encoder.
    other = tmp_path / "other.safetensors"
    save_file(dict(vit.state_dict()), other)
    assert load(other).mean == IMAGENET[0] and load(other).architecture["num_heads"] == 3


def test_a_folder_in_timms_format(tmp_path: Path) -> None:
    of_timm(tmp_path)
    encoder = load(tmp_path)
    assert isinstance(encoder.model, TimmViT) and encoder.img_size == (32, 32)
    assert encoder.mean == (0.1, 0.1, 0.1) and encoder.license == "apache-2.0"
    assert encoder.report is not None and set(encoder.report.ignored) == {
        "head.weight",
        "head.bias",
    }
    theirs: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.forward_features(pixels)[:, 1:]
        torch.testing.assert_close(encoder.model(pixels), expected, rtol=0, atol=1e-5)
    assert encoder.untrained().architecture == encoder.architecture
    assert encoder.architecture["settings"]["embed_dim"] == 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "vit_tny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"model_args": {"checkpoint_path": "x.bin"}}, "model_args: checkpoint_path = 'x.bin'"),
        ({"model_args": {"act_layer": {"a": 1}}}, "model_args: act_layer"),
        ({"model_args": {"embed_dim": 48}}, "cls_token is"),
        ({"model_args": {"embed_dim": 60_000}}, "cls_token is"),  # 43 GB a block
        ({"model_args": {"depth": 10**9}}, "model_args: depth = 1000000000"),
        ({"pretrained_cfg": {"mean": [1]}}, "no three numbers"),
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, "above 0"),
        ({"pretrained_cfg": {"license": 5}}, "licence 5 is no text"),
        ({"pretrained_cfg": [1]}, "must be objects"),
        ({"model_args": [1]}, "must be objects"),
        ({"model_args": {"img_size": "abc"}}, "no model can be made of it"),
        ({"model_args": {"patch_size": 0}}, "no model can be made of it"),
        ({"model_args": {"num_heads": 7}}, "no model can be made of it"),
        ({"model_args": {"act_layer": "nosuch"}}, "no model can be made of it"),
        ({"architecture": "resnet18"}, "no model can be made of it"),
    ],
)
def test_settings_of_timms_format_that_are_not_taken(
    change: dict, words: str, tmp_path: Path
) -> None:
    of_timm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if {"embed_dim", "img_size", "patch_size", "num_heads"} & set(change.get("model_args", ())):
        change = {"model_args": {**config["model_args"], **change["model_args"]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


# The stand-in


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: what a model's repository holds, and its files."""

    root: Path

    def sha(self, name: str) -> str:
        """Return the newest commit, which depends on what the files hold."""
        files = sorted((self.root / name).glob("*"))
        return hashlib.sha1(b"".join(path.read_bytes() for path in files)).hexdigest()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            _, _, _, owner, name, *rest = path.split("/")
            status, code = {
                "private": (403, ""),
                "gated": (403, "GatedRepo"),
                "nowhere": (401, "RepoNotFound"),
            }.get(name, (200, ""))
            if rest and rest[-1] not in ("main", self.sha(name)):
                status, code = 404, "RevisionNotFound"
            folder = self.root / name
            files = [{"rfilename": p.name} for p in folder.glob("*")]
            sha = self.sha(name)
            about = {"id": f"{owner}/{name}", "sha": sha, "siblings": files, "private": False}
            if "tree" in rest:
                sizes = [(p.name, p.stat().st_size) for p in folder.glob("*")]
                about = [{"type": "file", "path": n, "size": s, "oid": "b" * 40} for n, s in sizes]
            return self._send(status, json.dumps(about).encode(), {"X-Error-Code": code}, body)
        _, _, name, _, _, file = path.split("/")
        data = (self.root / name / file).read_bytes()
        if not data:  # listed, and not to be had
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": self.sha(name),
        }
        cut = name == "cut" and file.endswith("safetensors")
        if name == "noise" and file.endswith("safetensors"):
            data = bytes(len(data))
        return self._send(200, data, headers, body, cut)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = True


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where the stand-in listens; its models are folders of tmp_path/hub."""
    for name, write in {**FORMATS, "cut": of_transformers, "noise": ours}.items():
        (tmp_path / "hub" / name).mkdir(parents=True)
        write(tmp_path / "hub" / name)
    (tmp_path / "hub" / "empty").mkdir()
    (tmp_path / "hub" / "empty" / "README.md").write_text("nothing")
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


ASK = """
import json, sys
from sparsejepa.errors import UserError
from sparsejepa.interop import folder_of, load, load_groups
found = {}
for ref in sys.argv[1:]:
    try:
        encoder = load(ref)
        groups = load_groups(folder_of(ref), encoder.grid_size)
        found[ref] = [
            encoder.fingerprint(), encoder.license, list(encoder.mean), groups is not None
        ]
    except UserError as error:
        found[ref] = str(error)
print(json.dumps(found))
"""


def ask(address: str, cache: Path, *refs: str) -> dict:
    """Load each name in a process of its own, whose hub is at `address`."""
    settings = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    words = [sys.executable, "-c", ASK, *refs]
    environment = {**os.environ, **settings, **quiet}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_models_of_the_hub(address: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    names = [*FORMATS, "ours@main", "ours@v9", "gated", "private", "nowhere", "empty", "noise"]
    found = ask(address, cache, *(f"hub:owner/{name}" for name in names), "hub:owner")
    for name in FORMATS:
        local = load(tmp_path / "hub" / name)
        expected = [local.fingerprint(), local.license, list(local.mean), False]
        assert found[f"hub:owner/{name}"] == expected
    assert found["hub:owner/ours@main"] == found["hub:owner/ours"]
    for name, words in {
        "ours@v9": "no such revision",
        "gated": "accept the terms on its page on the hub, then log in with `hf auth login`",
        "private": "log in with `hf auth login`",
        "nowhere": "no such model, or it is private; check the name",
        "empty": "holds no encoder",
        "noise": "damaged",
    }.items():
        said = found[f"hub:owner/{name}"]
        assert isinstance(said, str), (name, said)
        assert said.startswith(f"hub:owner/{name}: ") and words in said and "\n" not in said
    assert "not of the form hub:OWNER/NAME" in found["hub:owner"]
    # What is in the cache is there without a network; what is not is said at once.
    nobody = "http://127.0.0.1:9"
    offline = ask(nobody, cache, "hub:owner/timm", "hub:owner/transformers", "hub:owner/other")
    assert offline["hub:owner/timm"] == found["hub:owner/timm"]
    assert offline["hub:owner/transformers"] == found["hub:owner/transformers"]
    said = offline["hub:owner/other"]
    assert "the hub cannot be reached (or there is no such name); connect" in said


def test_the_newest_version_is_taken_and_a_commit_stays(address: str, tmp_path: Path) -> None:
    repo, cache, name = tmp_path / "hub" / "ours", tmp_path / "cache", "hub:owner/ours"
    before = ask(address, cache, name)[name]
    (sha,) = (path.name for path in (cache / "models--owner--ours/snapshots").iterdir())
    torch.manual_seed(1)
    save_encoder(
        repo, ViT(16, 4, 24, depth=2, num_heads=3), mean=(0.1, 0.1, 0.1), std=(0.2, 0.2, 0.2)
    )
    found = ask(address, cache, name, f"{name}@main", f"{name}@{sha}")
    assert found[name][2] == [0.1] * 3 and found[f"{name}@main"] == found[name]
    assert found[f"{name}@{sha}"] == before
    # A version that cannot be had leaves the one that is there, also for the time without a hub.
    (repo / "encoder.safetensors").write_bytes(b"")
    assert ask(address, cache, name)[name] == found[name]
    cached = load(hub.fetch(name, cache_dir=cache, local_files_only=True))
    assert cached.fingerprint() == found[name][0]


def test_half_a_repository_does_not_pass_for_a_whole_one(address: str, tmp_path: Path) -> None:
    repo, cache, name = tmp_path / "hub" / "groups", tmp_path / "cache", "hub:owner/groups"
    repo.mkdir()
    with_groups(repo)
    whole = (repo / "groups.safetensors").read_bytes()
    (repo / "groups.safetensors").write_bytes(b"")
    assert "not fetched, or damaged on the way" in ask(address, cache, name)[name]
    with pytest.raises(UserError, match="not in the hub's cache"):
        hub.fetch(name, cache_dir=cache, local_files_only=True)
    (repo / "groups.safetensors").write_bytes(whole)
    found = ask(address, cache, name)[name]
    assert found[1] == "mit" and found[3], "the licence and the groups are there"


@pytest.mark.slow
def test_a_download_that_breaks_off(address: str, tmp_path: Path) -> None:
    """Slow, because the hub's client tries several times."""
    said = ask(address, tmp_path / "cache", "hub:owner/cut")["hub:owner/cut"]
    assert (
        said.startswith("hub:owner/cut: not fetched, or damaged on the way (") and "\n" not in said
    )
    assert "try again" in said


def test_files_that_are_fetched_and_files_that_are_not() -> None:
    beside = ["config.json", "README.md", "modeling_evil.py", "optimizer.pt", "x.onnx"]
    for weights in (
        ["encoder.safetensors", "groups.safetensors"],
        ["model.safetensors"],
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        ["pytorch_model.bin"],
    ):
        files = hub.choose_files([*beside, *weights])
        assert files == ["config.json", "README.md", *weights]
    assert hub.choose_files(beside) is None
    assert hub.choose_files(["model.safetensors"]) is None
