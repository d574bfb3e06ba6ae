"""Models of timm, with the hub's weights or random ones, behind the interface of our own."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsejepa.errors import UserError, nearest
from sparsejepa.interop import hub
from sparsejepa.interop.foreign import build_vit, read_weights
from sparsejepa.interop.names import Report, beside
from sparsejepa.model.encoder import ViT

RGB = tuple[float, float, float]
_MOST = {"depth": 1 << 10}
# What a folder says of a head, which is left out, and of weights that lie elsewhere.
_OF_THE_HEAD = {"num_classes", "pretrained"}


class TimmViT(nn.Module):
    """A timm vision transformer behind the interface of `ViT`: patch tokens only, final norm on.

    Args:
        name: of the model in timm, with or without the tag of its weights.
        pretrained: with those weights instead of random ones.
        settings: further arguments of timm's model.

    Raises UserError if the name is unknown, the model is no plain vision transformer, or its
    weights are neither at hand nor reachable.
    """

    def __init__(
        self, name: str, *, pretrained: bool, settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        from timm.data.config import resolve_model_data_config

        self.timm_name = name
        self.settings = dict(settings or {})
        self.vit: Any = create_timm(name, pretrained, self.settings)
        patches = _patches(self.vit, name)
        about = resolve_model_data_config(self.vit)
        self.mean, self.std = rgb(about["mean"]), rgb(about["std"])
        self.license: str | None = self.vit.pretrained_cfg.get("license")
        self.img_size: tuple[int, int] = tuple(patches.img_size)
        self.grid_size: tuple[int, int] = tuple(patches.grid_size)
        self.embed_dim: int = self.vit.num_features
        self.depth = len(self.vit.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to patch tokens [B, N, D]."""
        return self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]

    def forward_intermediates(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the patch tokens [B, N, D] of the last `n` blocks, each through the final norm."""
        return self.vit.forward_intermediates(
            images, indices=n, norm=True, output_fmt="NLC", intermediates_only=True
        )


def read_timm(folder: Path, config: Mapping[str, Any]) -> tuple[TimmViT, Report]:
    """Return the model of a folder in timm's own format, a config.json and weights.

    Raises UserError if the model is unknown to timm, its settings make none, or the weights are not
    its own.
    """
    from timm.models import VisionTransformer

    file, name = folder / "config.json", str(config["architecture"])
    said, about = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    if not isinstance(said, dict) or not isinstance(about, dict):
        raise UserError(f"{file}: model_args and pretrained_cfg must be objects; fetch it again")
    license = about.get("license")  # timm's own is that of its weights, not of these
    if not isinstance(license, str | None):
        raise UserError(f"{file}: the licence {license!r} is no text; write its name")
    settings = {key: value for key, value in said.items() if key not in _OF_THE_HEAD}
    known = set(inspect.signature(VisionTransformer.__init__).parameters) - {"self"}
    # Anything else could be a file to load, or a function by its name.
    for key, value in settings.items():
        fits = key in known and isinstance(value, int | float | str | list | None)
        if not fits or (isinstance(value, int) and value > _MOST.get(key, 1 << 16)):
            raise UserError(f"{file}: model_args: {key} = {value!r} is not taken")
    try:
        with torch.device("meta"):  # takes no memory before the shapes are known to fit
            wanted = TimmViT(name, pretrained=False, settings=settings).vit.state_dict()
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError,
            AttributeError, LookupError) as error:  # fmt: skip
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{file}: no model can be made of it ({reason}); fetch it again") from None
    found: dict[str, Tensor] = {}
    for path in hub.weights_files(folder):
        found |= read_weights(path)[0]
    ignored = {key: "head" for key in found if key not in wanted and beside(key)}
    wrong = [key for key in found if key not in wanted and key not in ignored]
    wrong += [key for key, tensor in wanted.items() if key not in found]
    wrong += [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{folder}: the weights are not those of timm's {name}: {key} is "
            f"{list(found[key].shape) if key in found else 'missing'}, it should be "
            f"{list(wanted[key].shape) if key in wanted else 'missing'}; {len(wrong)} such tensors"
        )
    model = TimmViT(name, pretrained=False, settings=settings)
    model.vit.load_state_dict({key: found[key] for key in wanted})
    try:
        model.mean, model.std = scale(about.get("mean", model.mean), about.get("std", model.std))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: mean and std are no three numbers ({error})") from None
    model.license = license
    return model, Report("", tuple(wanted), {}, ignored, ())


@torch.no_grad()
def plain_vit(model: TimmViT) -> ViT:
    """Return our `ViT` with the weights of a timm model and the same tokens.

    The model itself stays where it is. Raises UserError if it computes something else: tensors that
    ours has not are named, another activation too, and what else no tensor tells shows in the
    tokens of two random images.
    """
    name = f"timm:{model.timm_name}"
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    held = {key: tensor.detach().cpu() for key, tensor in tensors}
    state = {key.removeprefix("vit."): held[key] for key in model.state_dict()}
    block = model.vit.blocks[0]
    heads, eps = getattr(block.attn, "num_heads", None), getattr(model.vit.norm, "eps", 1e-6)
    vit, _ = build_vit(state, name, num_heads=heads, img_size=model.img_size, norm_eps=eps)
    images = torch.randn(2, 3, *model.img_size, generator=torch.Generator().manual_seed(0))
    expected = torch.func.functional_call(model.eval(), held, (images,))
    same = torch.allclose(vit.eval()(images), expected, rtol=1e-3, atol=1e-3)
    if not same or not all(_is_gelu(block.mlp.act) for block in model.vit.blocks):
        raise UserError(
            f"{name}: its tensors are those of a plain ViT, its tokens are not (another activation "
            "or order of its parts); take a plain one"
        )
    return vit


def _is_gelu(activation: nn.Module) -> bool:
    """Return whether it is the exact GELU: the tanh one is too near to show in small tokens."""
    x = torch.linspace(-4, 4, 99)
    return torch.allclose(activation(x), F.gelu(x), rtol=0, atol=1e-5)


def scale(mean: Any, std: Any) -> tuple[RGB, RGB]:
    """Return mean and standard deviation of pixels; ValueError or TypeError if they are none."""
    found = rgb(mean), rgb(std)
    if not all(math.isfinite(x) for x in (*found[0], *found[1])) or min(found[1]) <= 0:
        raise ValueError("the standard deviation must be above 0, and all of them finite")
    return found


def rgb(values: Any) -> RGB:
    """Return three numbers as a tuple; ValueError or TypeError if they are something else."""
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def create_timm(name: str, pretrained: bool, settings: Mapping[str, Any]) -> nn.Module:
    """Build a timm model without a head, weights from the hub's cache or else the network."""
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        known = timm.list_models()
        alike = [other for other in known if other.startswith(f"{base.partition('_')[0]}_")]
        raise UserError(f"timm:{name}: no such model{nearest(base, alike or known)}")
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and name not in tagged:
        raise UserError(f"timm:{name}: no such weights{nearest(name, tagged)}")
    if not pretrained:
        return timm.create_model(name, pretrained=False, num_classes=0, **settings)
    # Before any weights are fetched; some models cannot be built without memory, and come later.
    with contextlib.suppress(RuntimeError), torch.device("meta"):
        _patches(timm.create_model(name, pretrained=False, num_classes=0, **settings), name)
    about = timm.models.get_pretrained_cfg(name)
    if about is None or not about.has_weights:
        raise UserError(
            f"timm:{name}: there are no pretrained weights; timm:{name}?untrained has random ones"
        )
    options: dict[str, Any] = {"pretrained": True, "num_classes": 0, **settings}
    cached = hub.cached_weights(about)
    if cached is not None:
        # The hub's files need none of the converters that some original files do.
        options["pretrained_cfg_overlay"] = {"file": cached, "custom_load": False}
    elif about.hf_hub_id and not hub.reachable():
        raise _no_weights(name, "the hub cannot be reached")
    try:
        if cached is not None and not cached.endswith(".safetensors"):
            # Older versions of timm would unpickle whatever the file holds.
            weights = torch.load(cached, map_location="cpu", weights_only=True)
            options["pretrained_cfg_overlay"] = {"state_dict": weights, "custom_load": False}
        return timm.create_model(name, **options)
    except Exception as error:  # whatever hub client, network and file readers raise
        reason = str(error).strip().splitlines() or [""]
        raise _no_weights(name, f"{type(error).__name__}: {reason[0]}") from error


def _patches(vit: nn.Module, name: str) -> Any:
    """Return the patch embedding of a vision transformer; UserError for another architecture."""
    patches: Any = getattr(vit, "patch_embed", None)
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(patches, "grid_size"):
        raise UserError(f"timm:{name}: not a vision transformer with a fixed grid of patches")
    return patches


def _no_weights(name: str, reason: str) -> UserError:
    return UserError(
        f"timm:{name}: weights not at hand and not fetched ({reason}); connect to the internet "
        "once, or copy the hub's cache folder (HF_HUB_CACHE) from a machine that has them; "
        f"timm:{name}?untrained has random weights"
    )
