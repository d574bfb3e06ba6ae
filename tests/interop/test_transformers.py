from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsejepa.errors import UserError
from sparsejepa.interop import IMAGENET, from_transformers, load, to_transformers
from sparsejepa.model.encoder import ViT

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


def tokens(model: Any, vit: ViT, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels).last_hidden_state[:, vit.num_prefix_tokens :]


@pytest.mark.parametrize(
    "changes",
    [
        SMALL,  # its norms add 1e-12
        {"num_hidden_layers": 3, "layer_norm_eps": 1e-6},  # ViT-B/16 but for the depth
        {**SMALL, "image_size": [16, 24], "patch_size": [4, 8], "qkv_bias": False},
    ],
)
def test_a_random_ijepa_model_gives_the_same_tokens(transformers: Any, changes: dict) -> None:
    model = moved(transformers.IJepaModel(transformers.IJepaConfig(**changes)))
    vit = from_transformers(model.state_dict(), model.config.to_dict()).eval()
    pixels = torch.randn(2, 3, *vit.img_size)
    with torch.no_grad():
        torch.testing.assert_close(vit(pixels), tokens(model, vit, pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"img_size": (16, 24), "patch_size": (4, 8)}, {"class_token": True}, {"norm_eps": 1e-5}],
)
def test_ours_becomes_a_model_of_transformers_and_comes_back(
    transformers: Any, tmp_path: Path, changes: dict
) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = moved(ViT(**{**sizes, **changes}))  # type: ignore[arg-type]
    state, config = to_transformers(vit)
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind, options = transformers.IJepaModel, {}
    if vit.cls_token is not None:
        kind, options = transformers.ViTModel, {"add_pooling_layer": False}
    model, said = kind.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    pixels = torch.randn(2, 3, *vit.img_size)
    with torch.no_grad():
        torch.testing.assert_close(tokens(model, vit, pixels), vit(pixels), rtol=0, atol=1e-5)
    again = load(tmp_path)
    assert all(torch.equal(t, vit.state_dict()[n]) for n, t in again.model.state_dict().items())
    assert again.report is not None and len(again.report.renamed) == len(state)


def test_a_folder_in_transformers_format(transformers: Any, tmp_path: Path) -> None:
    """A classifier in several files: its head is left out, its pixels and its licence are read."""
    config = transformers.ViTConfig(**SMALL, num_labels=5)
    model = moved(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.4]}')
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    encoder = load(tmp_path)
    assert encoder.mean == (0.5, 0.5, 0.4) and encoder.std == IMAGENET[1]
    assert encoder.license == "cc-by-nc-4.0"
    assert encoder.report is not None
    assert encoder.report.part == "vit." and set(encoder.report.ignored) == {
        "classifier.weight",
        "classifier.bias",
    }
    vit: Any = encoder.model
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(vit(pixels), tokens(model.vit, vit, pixels), rtol=0, atol=1e-5)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="missing; fetch it again"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    with pytest.raises(UserError, match="weights missing; fetch it again"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3)),
        ({"do_normalize": False, "image_mean": None}, ((0.0,) * 3, (1.0,) * 3)),
        ({"rescale_factor": 0.003921568627, "image_std": [0.5] * 3}, (IMAGENET[0], (0.5,) * 3)),
        ({"rescale_factor": 1 / 127.5}, "pixels are multiplied by 0.00784"),
        ({"do_rescale": False}, "pixels are multiplied by 1 instead of 1/255"),
        ({"rescale_factor": "x"}, "no three numbers each"),
        ({"image_std": [0, 1, 1]}, "above 0"),
        ({"image_mean": [0, 1]}, "no three numbers each"),
    ],
)
def test_what_the_image_processor_does(about: dict, expected: Any, tmp_path: Path) -> None:
    state, config = to_transformers(ViT(16, 4, 24, depth=1, num_heads=3))
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    if isinstance(expected, tuple):
        encoder = load(tmp_path)
        assert (encoder.mean, encoder.std) == expected
        return
    with pytest.raises(UserError, match=expected) as caught:
        load(tmp_path)
    assert "preprocessor_config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "dinov2"}, "model_type 'dinov2'"),
        ({"model_type": ["a"]}, r"model_type \['a'\]"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        ({"image_size": 10**9}, "is no size"),
        ({"image_size": [16]}, "is no size"),
        ({"image_size": 24}, r"pos_embed has 16 patches"),
        ({"patch_size": 8}, "says patches of"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps 'x'"),
    ],
)
def test_settings_that_ours_has_not(changes: dict, words: str) -> None:
    vit = ViT(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    state, config = to_transformers(vit)
    with pytest.raises(UserError, match=words) as caught:
        from_transformers(state, {**config, **changes})
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit() -> None:
    vit = ViT(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    state, config = to_transformers(vit)
    name = "encoder.layer.0.attention.attention.key.weight"
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.weight: only 2 of query, key"):
        from_transformers({k: t for k, t in state.items() if k != name}, config)
    with pytest.raises(UserError, match="register tokens"):
        from_transformers({**state, "embeddings.register_tokens": torch.ones(1, 4, 24)}, config)
