"""Public encoders: timm, the hub (a stand-in on this machine), transformers, files of weights."""

from __future__ import annotations

import hashlib
import json
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
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from sparsejepa.encoders.encoder import IMAGENET, Encoder, load_groups
from sparsejepa.encoders.export import Export, write_export
from sparsejepa.encoders.load import TimmViT, folder_of, load, plain
from sparsejepa.errors import UserError
from sparsejepa.model.vit import ViT

from .made import MEAN, STD, noise, small_vit, uint8, write_run

NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": (24, 24), "patch_size": (8, 8), "embed_dim": 192, "depth": 2, "num_heads": 3}
LEARNED = {"class_token": True, "pos_embed": "learned"}


def refused(ref: str | Path, *words: str) -> None:
    """Assert that `ref` is refused in one line that names it and has `words`."""
    with pytest.raises(UserError) as caught:
        load(ref)
    text = str(caught.value)
    assert "\n" not in text
    for word in (str(ref), *words):
        assert word in text


def test_our_own_runs_are_loaded_without_other_programs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "concept")
    code = (
        "import sys; from sparsejepa import load; load(sys.argv[1]); "
        "print({'timm', 'torchvision', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, str(run)]
    assert subprocess.run(words, capture_output=True, text=True).stdout == "set()\n"


# timm


def test_a_timm_model_gives_its_patch_tokens() -> None:
    encoder = load(f"timm:{NAME}?untrained")
    assert encoder.img_size == (224, 224) and encoder.grid_size == (14, 14)
    assert encoder.mean == (0.5, 0.5, 0.5)  # of these weights, not the usual ImageNet ones
    images = uint8(1, 224, 224, 3)
    vit: Any = encoder.model.vit
    with torch.no_grad():
        wanted = vit.forward_features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)[:, 1:]
    tokens = encoder.tokens(images)
    torch.testing.assert_close(tokens, wanted, atol=1e-4, rtol=1e-4)
    layers = encoder.layers(images, 4)
    assert len(layers) == 4
    torch.testing.assert_close(layers[-1], tokens, atol=1e-4, rtol=1e-4)
    assert encoder.untrained(0).fingerprint() == encoder.fingerprint()
    assert encoder.untrained(1).fingerprint() != encoder.fingerprint()


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("timm:vit_tny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        (f"timm:{NAME}.augreg_in21", "augreg_in21"),
        ("timm:resnet18?untrained", "not a vision transformer"),
        (f"timm:{NAME}?random", "only '?untrained' is"),
    ],
)
def test_timm_names_that_are_none(ref: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^timm:") as caught:
        load(ref)
    assert words in str(caught.value)


def test_timm_weights_come_from_the_cache_or_the_error_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(f"timm:{NAME}", "not fetched", "HF_HUB_CACHE", "?untrained")
    about: Any = timm.models.get_pretrained_cfg(NAME)
    repo = tmp_path / f"models--{about.hf_hub_id.replace('/', '--')}"
    (repo / "snapshots/abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    weights = timm.create_model(NAME, pretrained=False).state_dict()
    weights["norm.bias"] += 7
    save_file(weights, repo / "snapshots/abc/model.safetensors")
    loaded = load(f"timm:{NAME}")
    assert torch.equal(loaded.model.get_parameter("vit.norm.bias"), weights["norm.bias"])
    assert loaded.license == about.license
    (repo / "snapshots/abc/model.safetensors").write_bytes(b"no archive")
    refused(f"timm:{NAME}", "?untrained")


def test_a_plain_timm_model_becomes_ours() -> None:
    encoder = load(f"timm:{NAME}?untrained")
    found, pixels = plain(encoder), noise((224, 224), 2)
    assert isinstance(found.model, ViT) and isinstance(encoder.model, TimmViT)
    assert (found.mean, found.std, found.name) == (encoder.mean, encoder.std, encoder.name)
    with torch.no_grad():
        wanted = encoder.model(pixels)
        torch.testing.assert_close(found.model(pixels), wanted, rtol=1e-5, atol=1e-5)
    assert found.model.positions == "learned" and found.model.num_prefix_tokens == 1
    assert plain(found) is found


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("deit_tiny_distilled_patch16_224", "197 patches"),
        ("vit_small_patch14_dinov2", "ls1.gamma"),
        (f"{NAME}?relu", "its tokens are not"),
        (f"{NAME}?tanh", "another activation"),
    ],
)
def test_other_timm_models_do_not(name: str, what: str) -> None:
    name, _, activation = name.partition("?")
    encoder = load(f"timm:{name}?untrained")
    for block in encoder.model.vit.blocks if activation else ():  # no tensor tells
        # Of untrained weights tanh's tokens are nearer than those of another order of sums.
        tanh = torch.nn.GELU(approximate="tanh")
        block.mlp.act = torch.nn.ReLU() if activation == "relu" else tanh
        block.mlp.fc1.weight.data *= 30 if activation == "relu" else 1
    with pytest.raises(UserError, match=what) as caught:
        plain(encoder)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# Files of weights


def prefixed(state: dict[str, Tensor], before: str) -> dict[str, Tensor]:
    return {before + name: tensor for name, tensor in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def ijepa(path: Path, vit: ViT, **changes: Any) -> Path:
    """Write a checkpoint as I-JEPA does: several models of DistributedDataParallel and the rest."""
    state = prefixed(vit.state_dict(), "module.")
    parts = {
        "encoder": zeros(state), "predictor": {"module.x": torch.ones(3)}, "target_encoder": state,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": None, "epoch": 300, "loss": 0.2, "batch_size": 128, "world_size": 16, "lr": 1e-3,
    }  # fmt: skip
    torch.save({**parts, **changes}, path)
    return path


def assert_weights(encoder: Encoder, state: dict[str, Tensor]) -> None:
    found = encoder.model.state_dict()
    assert set(found) == set(state) and all(torch.equal(t, state[n]) for n, t in found.items())


@pytest.mark.parametrize("changes", [{}, LEARNED])
def test_ijepas_target_encoder_is_loaded(tmp_path: Path, changes: dict) -> None:
    vit, images = small_vit(**SIZES, **changes), uint8(3, 24, 24, 3)
    path = ijepa(tmp_path / "IN1K-vit.h.14-300e.pth.tar", vit)
    encoder = load(path)
    assert encoder.license is not None and encoder.license.startswith("CC BY-NC 4.0")
    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    expected = vit((pixels - mean) / std)
    torch.testing.assert_close(encoder.tokens(images), expected, rtol=1e-4, atol=1e-5)
    assert_weights(encoder, vit.state_dict())
    assert encoder.architecture["num_heads"] == 3 and encoder.depth == 2
    assert encoder.architecture["pos_embed"] == changes.get("pos_embed", "sincos")
    # What pretraining saved in half precision is computed in full.
    half = {name: tensor.bfloat16() for name, tensor in vit.state_dict().items()}
    torch.save({"model": {**half, "head.weight": torch.ones(2)}}, tmp_path / "half.pth")
    again = load(tmp_path / "half.pth")
    assert_weights(again, {name: tensor.float() for name, tensor in half.items()})
    assert again.architecture == encoder.architecture


def others(state: dict[str, Tensor]) -> dict[str, dict]:
    """Files as other programs write them; those of transformers are below."""
    head = {"head.weight": torch.ones(7, 192), "head.bias": torch.ones(7)}
    decoder = {"mask_token": torch.ones(1, 1, 192), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    dino = prefixed(state, "backbone.") | {"head.mlp.0.weight": torch.ones(4, 192)}
    return {
        "timm": {**state, **head},
        "mae": {"model": {**state, **decoder}},
        "dino": {"student": prefixed(zeros(dino), "module."), "teacher": dino},
        "ema": {"model": zeros(state), "model_ema": state},
        "moco": {
            "state_dict": prefixed({**state, **head}, "module.base_encoder.")
            | prefixed(zeros(state), "module.momentum_encoder.")
        },
        "compiled": prefixed(state, "_orig_mod."),
    }


@pytest.mark.parametrize("kind", others({}))
def test_files_of_other_programs(kind: str, tmp_path: Path) -> None:
    state = small_vit(**SIZES, **LEARNED).state_dict()
    # Torch's old format as well as the present one.
    old = {"_use_new_zipfile_serialization": kind != "ema"}
    torch.save(others(state)[kind], tmp_path / "x.pth", **old)
    encoder = load(tmp_path / "x.pth")
    assert_weights(encoder, state)
    assert encoder.architecture["num_heads"] == (12 if kind == "moco" else 3)


def test_biases_that_a_model_lacks_are_zero(tmp_path: Path) -> None:
    state = dict(small_vit(**SIZES).state_dict())
    names = [name for name in state if name.endswith("qkv.bias")]
    for name in names:
        state[name] = torch.zeros_like(state[name])
    without = {name: t for name, t in state.items() if name not in names}
    save_file(without, tmp_path / "x.safetensors")
    assert_weights(load(tmp_path / "x.safetensors"), state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pos_embed": None}, "lacks 'pos_embed'"),
        ({"pos_embed": torch.zeros(192)}, "not the encoder of a plain ViT"),
        ({"norm.bias": None}, 'Missing key(s) in state_dict: "norm.bias"'),
        ({"pos_embed": torch.zeros(1, 8, 192)}, "8 patches"),
        ({"blocks.1.mlp.fc2.weight": torch.ones(192, 9)}, "mismatch for blocks.1.mlp.fc2.weight"),
        ({"blocks.0.ls1.gamma": torch.ones(192)}, '"blocks.0.ls1.gamma"'),
        ({"reg_token": torch.ones(1, 4, 192)}, "only such a one is read"),
    ],
)
def test_tensors_of_no_plain_vit_are_named(tmp_path: Path, changes: dict, words: str) -> None:
    state = {**small_vit(**SIZES).state_dict(), **changes}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    path = ijepa(tmp_path / "x.pth.tar", small_vit(**SIZES), target_encoder=state)
    refused(path, words)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    refused(path, "no such file")
    torch.save([1, 2], path)
    refused(path, "lacks patch_embed.proj.weight and has no tensors at all")
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7), "bn1.bias": torch.ones(64)}, path)
    refused(path, "lacks patch_embed.proj.weight and has conv1.weight, bn1.bias")
    ijepa(path, small_vit())
    refused(path, "width 24; known widths are 96, 192, 384")
    path.write_bytes(path.read_bytes()[:1000])
    refused(path, "not a file of weights")
    torch.save({"model": Path("x")}, path)
    refused(path, "more than weights", "save its state_dict alone")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no archive")
    refused(path, "damaged")


# transformers

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 60,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers")


def moved(model: Any) -> Any:
    """Return a model with weights that are nowhere zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},  # its norms add 1e-12
        {"layer_norm_eps": 1e-6, "num_attention_heads": 4},
        {"image_size": [16, 24], "patch_size": [4, 8], "qkv_bias": False},
    ],
)
def test_a_random_ijepa_model_gives_the_same_tokens(
    transformers: Any, tmp_path: Path, changes: dict
) -> None:
    model = moved(transformers.IJepaModel(transformers.IJepaConfig(**{**SMALL, **changes})))
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    pixels = noise(encoder.img_size, 2)
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state
        torch.testing.assert_close(encoder.model(pixels), wanted, rtol=0, atol=1e-5)
    assert (encoder.mean, encoder.std) == IMAGENET


def test_a_classifier_in_several_files(transformers: Any, tmp_path: Path) -> None:
    """Its head is left out, its pixels and its licence are read."""
    config = transformers.ViTConfig(**SMALL, num_labels=5)
    model = moved(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.4]}')
    (tmp_path / "README.md").write_text("---\ntags:\n- a\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    encoder, pixels = load(tmp_path), noise((16, 16), 2)
    assert encoder.mean == (0.5, 0.5, 0.4) and encoder.std == IMAGENET[1]
    assert encoder.license == "cc-by-nc-4.0"
    with torch.no_grad():
        wanted = model.vit(pixels).last_hidden_state[:, 1:]
        torch.testing.assert_close(encoder.model(pixels), wanted, rtol=0, atol=1e-5)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    refused(tmp_path, "not the encoder of a plain ViT")


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"model_type": "dinov2"}, "model_type 'dinov2'"),
        ("config.json", {"num_attention_heads": 5}, "5 attention heads do not divide"),
        ("config.json", {"image_size": 10**9}, "pos_embed has 16 patches"),
        ("config.json", {"image_size": [16]}, "cannot be used"),
        ("config.json", {"layer_norm_eps": "x"}, "cannot be used"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "above 0"),
    ],
)
def test_what_configurations_say(
    transformers: Any, tmp_path: Path, file: str, changes: dict, words: Any
) -> None:
    transformers.IJepaModel(transformers.IJepaConfig(**SMALL)).save_pretrained(tmp_path)
    path = tmp_path / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **changes}))
    refused(tmp_path, words)


# The hub


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: what a model's repository holds, and its files."""

    root: Path

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            _, _, _, owner, name, *rest = path.split("/")
            status, code = {"gated": (403, "GatedRepo")}.get(name, (200, ""))
            files = [(p.name, p.stat().st_size) for p in (self.root / name).glob("*")]
            about: Any = {"id": f"{owner}/{name}", "sha": "a" * 40, "private": False}
            about["siblings"] = [{"rfilename": n} for n, _ in files]
            if "tree" in rest:
                about = [{"type": "file", "path": n, "size": s, "oid": "b" * 40} for n, s in files]
            data, headers = json.dumps(about).encode(), {"X-Error-Code": code}
        else:
            _, _, name, _, _, file = path.split("/")
            status, data = 200, (self.root / name / file).read_bytes()
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": "a" * 40}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder with the repositories of a stand-in for the hub, and that is where the hub is."""
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, files = (
        f"http://127.0.0.1:{server.server_port}",
        "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "hub"
    server.shutdown()
    server.server_close()


def test_models_of_the_hub(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(hub / "ours", "concept")
    (hub / "ours" / "README.md").write_text("---\nlicense: mit\n---\n")
    (hub / "ours" / "run.py").write_text("1 / 0")
    write_export(Export("", load(write_run(tmp_path / "run"))), "transformers", hub / "theirs")
    for name in ("ours", "theirs"):
        local, found = load(hub / name), load(f"hub:owner/{name}")
        assert (found.fingerprint(), found.license) == (local.fingerprint(), local.license)
    assert (found.mean, found.std, load("hub:owner/ours@main").license) == (MEAN, STD, "mit")
    folder = folder_of("hub:owner/ours")
    assert folder is not None and load_groups(folder, (4, 4)) is not None
    # Nothing but configuration, weights and the card is fetched.
    fetched = {"config.json", "encoder.safetensors", "groups.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == fetched
    refused("hub:owner/gated", "GatedRepoError", "`hf auth login`")
    # What is in the cache is there without a network; what is not is said.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("hub:owner/theirs").fingerprint() == found.fingerprint()
    refused("hub:owner/other", "HF_HUB_CACHE")
