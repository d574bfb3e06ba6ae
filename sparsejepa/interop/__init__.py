"""Frozen encoders in and out: run directories, timm models, I-JEPA's files; all untrained too."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import socket
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsejepa import __version__
from sparsejepa.data.augment import normalize
from sparsejepa.environment import has_bf16
from sparsejepa.errors import UserError, nearest
from sparsejepa.files import load_tensors, save_tensors, write_text
from sparsejepa.model.encoder import ViT
from sparsejepa.model.foreign import ENDINGS, read_checkpoint
from sparsejepa.model.groups import GroupMap
from sparsejepa.rng import derive_seed

FORMAT = 1
WEIGHTS, CONFIG, GROUPS = "encoder.safetensors", "config.json", "groups.safetensors"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the pixels that foreign checkpoints were trained on."""
LARGEST_SIDE = 4096
"""Of an image, in pixels; a file that says more would only exhaust memory."""
RGB = tuple[float, float, float]
Precision = Literal["fp32", "bf16"]


class TimmViT(nn.Module):
    """A timm vision transformer behind the interface of `ViT`: patch tokens only, final norm on.

    Raises UserError if timm is missing, the name is unknown, the model is no plain vision
    transformer, or its weights are neither at hand nor reachable.
    """

    def __init__(self, name: str, *, pretrained: bool) -> None:
        super().__init__()
        self.timm_name = name
        self.vit: Any = _create_timm(name, pretrained)
        patches: Any = getattr(self.vit, "patch_embed", None)
        if not hasattr(self.vit, "num_prefix_tokens") or not hasattr(patches, "grid_size"):
            raise UserError(f"timm:{name}: not a vision transformer with a fixed grid of patches")
        about = _timm().data.resolve_model_data_config(self.vit)
        self.mean, self.std = _rgb(about["mean"]), _rgb(about["std"])
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


class Encoder:
    """A frozen encoder together with what its pixels must look like.

    Args:
        model: put into evaluation mode; its weights are not copied.
        name: what tables call it.
        mean, std: of the pixels that it was trained on, in units of [0, 1].
        precision: bf16 runs matrix products in bf16 where the hardware has it.
    """

    def __init__(
        self,
        model: ViT | TimmViT,
        *,
        name: str,
        mean: RGB,
        std: RGB,
        precision: Precision = "fp32",
    ) -> None:
        self.model = model.eval()
        self.name = name
        self.mean, self.std = mean, std
        self.precision: Precision = precision
        self.img_size = model.img_size
        self.grid_size = model.grid_size
        self.embed_dim = model.embed_dim
        self.depth = model.depth

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def license(self) -> str | None:
        """Licence of foreign weights, where their publisher states one."""
        return getattr(self.model, "license", None)

    @property
    def architecture(self) -> dict[str, Any]:
        """Everything but the weights; equal for encoders that share an untrained floor."""
        return {
            **_architecture(self.model),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def to(self, device: torch.device | str) -> Encoder:
        """Move the weights and return the encoder itself."""
        self.model.to(device)
        return self

    def tokens(self, images: Tensor) -> Tensor:
        """Map uint8 images [B, H, W, 3] of any size to float32 patch tokens [B, N, D].

        Images of another size are resized (bilinear with antialiasing, the aspect ratio gives way)
        to the encoder's; the tokens are those after the final norm, without class token.
        """
        return self._run(images, lambda pixels: [self.model(pixels)])[0]

    def layers(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the tokens [B, N, D] of the last `n` blocks, each through the final norm.

        Raises UserError if the encoder has fewer blocks.
        """
        if not 1 <= n <= self.depth:
            raise UserError(f"{self.name}: has {self.depth} blocks, so not the last {n} of them")
        return self._run(images, lambda pixels: self.model.forward_intermediates(pixels, n))

    def untrained(self, seed: int = 0) -> Encoder:
        """Return the same architecture with fresh weights, a fixed function of `seed`."""
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's generator: weights are drawn there, and a GPU's keeps its state.
            torch.default_generator.manual_seed(derive_seed(seed, 0, "untrained"))
            if isinstance(self.model, ViT):
                model: ViT | TimmViT = ViT(**vit_arguments(self.model))
            else:
                model = TimmViT(self.model.timm_name, pretrained=False)
        name = f"{self.name} (untrained)"
        fresh = Encoder(model, name=name, mean=self.mean, std=self.std, precision=self.precision)
        return fresh.to(self.device)

    def fingerprint(self) -> str:
        """Return a hash of architecture, weights and precision, the same on every machine."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.architecture, self.precision], sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {list(data.shape)}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images [B, H, W, 3] as the model sees them: resized and normalised."""
        images = images.to(self.device)
        if tuple(images.shape[1:3]) != self.img_size:
            # The whole image, not a crop of it: a count must still be the count of what is seen.
            planes = images.permute(0, 3, 1, 2).float()
            planes = F.interpolate(planes, self.img_size, mode="bilinear", antialias=True)
            images = planes.permute(0, 2, 3, 1)
        return normalize(images, self.mean, self.std)

    # Not inference_mode: its tensors can never enter autograd, and maps are trained on tokens.
    @torch.no_grad()
    def _run(self, images: Tensor, forward: Any) -> list[Tensor]:
        device, pixels = self.device, self.pixels(images)
        bf16 = self.precision == "bf16" and has_bf16(str(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = forward(pixels)
        return [x.float() for x in outputs]


def save_encoder(
    run_dir: Path, vit: ViT, *, mean: RGB, std: RGB, extra: dict[str, Any] | None = None
) -> None:
    """Write encoder.safetensors, then config.json, to `run_dir`, each whole or not at all."""
    save_tensors(run_dir / WEIGHTS, dict(vit.state_dict()), {})
    config = {
        "format": FORMAT,
        "sparsejepa": __version__,
        "kind": "vit",
        "arch": vit_arguments(vit),
        "mean": list(mean),
        "std": list(std),
        "img_size": list(vit.img_size),
        **(extra or {}),
    }
    write_text(run_dir / CONFIG, json.dumps(config, indent=2) + "\n")


def save_groups(run_dir: Path, groups: GroupMap) -> None:
    """Write groups.safetensors to `run_dir`, whole or not at all."""
    about = {"kind": groups.kind, "num_groups": len(groups.W), "sphere": groups.sphere}
    save_tensors(run_dir / GROUPS, groups.state_dict(), about)


def load_groups(run_dir: Path, grid_size: tuple[int, int]) -> GroupMap | None:
    """Return the group map of a run in evaluation mode, None for a dense run.

    Raises UserError if the file is damaged or does not fit the encoder's grid of patches.
    """
    path = run_dir / GROUPS
    if not path.exists():
        return None
    tensors, about = load_tensors(path)
    try:
        if not all(tensor.numel() for tensor in tensors.values()):
            raise ValueError("an empty tensor")  # whose other sides could be of any length
        num_groups, group_dim, embed_dim = tensors["W"].shape
        _, own, hidden = tensors["networks.B"].shape
        groups = GroupMap(
            about["kind"],
            embed_dim,
            grid_size,
            num_groups=num_groups,
            group_dim=group_dim,
            sphere=about.get("sphere", True),
            hidden=hidden,
            out_dim=own * num_groups if about["kind"] == "feature" else own,
        )
        groups.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit {CONFIG} ({detail}); copy the run again") from None
    return groups.eval()


def load(
    ref: str | Path, device: torch.device | str = "cpu", precision: Precision = "fp32"
) -> Encoder:
    """Load a frozen encoder.

    Args:
        ref: a run directory; ``timm:NAME`` for a public model with its pretrained weights;
            ``timm:NAME?untrained`` for the same model with random ones; or a checkpoint of I-JEPA
            (.pth.tar, .pth), of which the target encoder is taken.

    Raises UserError, one line with the path and the remedy, if there is no encoder to be had.
    """
    if str(ref).startswith("timm:"):
        name, _, query = str(ref).removeprefix("timm:").partition("?")
        if query not in ("", "untrained"):
            raise UserError(f"{ref}: '?{query}' is not known; only '?untrained' is")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(0, 0, "untrained"))
            model: ViT | TimmViT = TimmViT(name, pretrained=not query)
        encoder = Encoder(model, name=str(ref), mean=model.mean, std=model.std, precision=precision)
    else:
        path = Path(ref)
        foreign = path.name.endswith(ENDINGS) and not path.is_dir()
        model, mean, std = (read_checkpoint(path), *IMAGENET) if foreign else _load_run(path)
        encoder = Encoder(model, name=str(path), mean=mean, std=std, precision=precision)
    return encoder.to(device)


def vit_arguments(vit: ViT) -> dict[str, Any]:
    """Return the arguments that build `vit` again, JSON-able and without drop path.

    A linear stem is not named: files and fingerprints stay those of versions that knew no other.
    """
    block: Any = vit.blocks[0]
    hidden: int = block.mlp.fc1.out_features
    ratio = hidden / vit.embed_dim
    if int(vit.embed_dim * ratio) < hidden:  # the division was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return {
        "img_size": tuple(vit.img_size),
        "patch_size": tuple(vit.patch_size),
        "embed_dim": vit.embed_dim,
        "depth": vit.depth,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": ratio,
        "in_chans": vit.in_chans,
        "class_token": vit.cls_token is not None,
        "pos_embed": "learned" if vit.pos_embed.requires_grad else "sincos",
        **({} if vit.stem == "linear" else {"stem": vit.stem}),
    }


def _architecture(model: ViT | TimmViT) -> dict[str, Any]:
    if isinstance(model, ViT):
        return {"kind": "vit", **vit_arguments(model)}
    return {"kind": "timm", "name": model.timm_name}


def _load_run(path: Path) -> tuple[ViT, RGB, RGB]:
    """Build the encoder that `save_encoder` wrote; UserError says what is wrong with the folder."""
    remedy = "give a directory that `sparsejepa pretrain` wrote, or timm:NAME"
    if not path.is_dir():
        what = "is a file, not a run directory" if path.exists() else "no such run directory"
        raise UserError(f"{path}: {what}; {remedy}")
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            if (path / "checkpoints").is_dir():
                raise UserError(f"{path}: {file} is missing, the run is unfinished; --resume it")
            raise UserError(f"{path}: not a run directory ({file} is missing); {remedy}")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        format_, writer = config["format"], config["sparsejepa"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path / CONFIG}: not an encoder's configuration; {remedy}") from None
    if format_ != FORMAT or config.get("kind") != "vit":
        raise UserError(
            f"{path / CONFIG}: format {format_} of kind {config.get('kind')!r}, this version reads "
            f"format {FORMAT} of kind 'vit'; use sparsejepa {writer}, which wrote it"
        )
    tensors, _ = load_tensors(path / WEIGHTS)
    try:
        tuples = ("img_size", "patch_size")
        arch: dict[str, Any] = {
            k: tuple(v) if k in tuples else v for k, v in config["arch"].items()
        }
        if not (0 < arch["depth"] <= len(tensors) and max(arch["img_size"]) <= LARGEST_SIDE):
            raise ValueError("sizes that no encoder has")
        with torch.device("meta"):  # takes no memory before the sizes are known to fit
            vit = ViT(**arch)
        mean, std = _rgb(config["mean"]), _rgb(config["std"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as e:
        raise UserError(f"{path / CONFIG}: damaged ({e!r}); train or copy it again") from None
    try:
        vit.load_state_dict(tensors, assign=True)
        vit.float()
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path / WEIGHTS}: does not fit {CONFIG} ({detail})") from None
    return vit, mean, std


def _rgb(values: Any) -> RGB:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _timm() -> ModuleType:
    try:
        import timm
        import timm.data
    except ModuleNotFoundError:
        raise UserError(
            "timm models need timm, which is not installed: pip install 'sparsejepa[timm]'"
        ) from None
    return timm


def _create_timm(name: str, pretrained: bool) -> nn.Module:
    """Build a timm model without a head, weights from the hub's cache or else the network."""
    timm = _timm()
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UserError(f"timm:{name}: no such model{nearest(base, timm.list_models())}")
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and name not in tagged:
        raise UserError(f"timm:{name}: no such weights{nearest(name, tagged)}")
    if not pretrained:
        return timm.create_model(name, pretrained=False, num_classes=0)
    about = timm.models.get_pretrained_cfg(name)
    if about is None or not about.has_weights:
        raise UserError(
            f"timm:{name}: there are no pretrained weights; timm:{name}?untrained has random ones"
        )
    settings: dict[str, Any] = {"pretrained": True, "num_classes": 0}
    cached = _cached_weights(about)
    if cached is not None:
        # The hub's files need none of the converters that some original files do.
        settings["pretrained_cfg_overlay"] = {"file": cached, "custom_load": False}
    elif about.hf_hub_id and not _hub_reachable():
        raise _no_weights(name, "the hub cannot be reached")
    try:
        if cached is not None and not cached.endswith(".safetensors"):
            # Older versions of timm would unpickle whatever the file holds.
            weights = torch.load(cached, map_location="cpu", weights_only=True)
            settings["pretrained_cfg_overlay"] = {"state_dict": weights, "custom_load": False}
        return timm.create_model(name, **settings)
    except Exception as error:  # whatever hub client, network and file readers raise
        reason = str(error).strip().splitlines() or [""]
        raise _no_weights(name, f"{type(error).__name__}: {reason[0]}") from error


def _no_weights(name: str, reason: str) -> UserError:
    return UserError(
        f"timm:{name}: weights not at hand and not fetched ({reason}); connect to the internet "
        "once, or copy the hub's cache folder (HF_HUB_CACHE) from a machine that has them; "
        f"timm:{name}?untrained has random weights"
    )


def _cached_weights(about: Any) -> str | None:
    """Return the weights' file if the hub's cache has it, so that no network is needed."""
    from huggingface_hub import try_to_load_from_cache

    if not about.hf_hub_id or about.custom_load == "hf":
        return None
    repo, _, revision = about.hf_hub_id.partition("@")
    wanted = about.hf_hub_filename
    for file in (wanted,) if wanted else ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repo, file, revision=revision or None)
        if isinstance(found, str):
            return found
    return None


def _hub_reachable(timeout: float = 5.0) -> bool:
    """Return whether the hub answers; asked first because its client retries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies():
        return True  # the proxy knows, we cannot
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout):
            return True
    except OSError as error:
        logging.getLogger(__name__).debug("hub not reachable: %s", error)
        return False
