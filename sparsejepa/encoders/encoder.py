"""A frozen encoder, its groups, and the run directory that keeps both.

Letters: B images, H x W pixels, N patches, D latents, G groups, P group width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsejepa import __version__
from sparsejepa.data.augment import normalize
from sparsejepa.environment import has_bf16
from sparsejepa.errors import UserError
from sparsejepa.files import load_tensors, read_json, save_tensors, write_text
from sparsejepa.model.groups import GroupMap, Kind, group_norms
from sparsejepa.model.losses import full
from sparsejepa.model.masks import MaskSampler
from sparsejepa.model.vit import ViT
from sparsejepa.rng import derive_seed

RGB = tuple[float, float, float]
Precision = Literal["fp32", "bf16"]
IMAGENET: tuple[RGB, RGB] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the pixels that foreign checkpoints were trained on."""
FORMAT = 1
WEIGHTS, CONFIG, GROUPS = "encoder.safetensors", "config.json", "groups.safetensors"
FITTED = "fitted-groups"
"""Where in its folder ``explain`` keeps the groups that it fits: beside the encoder of a dense run
they would pass for those that it was trained with."""


@dataclass(eq=False, repr=False)
class Encoder:
    """A frozen encoder together with what its pixels must look like.

    Args:
        model: a `ViT`, or a module with the same interface such as `load.TimmViT`; put into
            evaluation mode, its weights are not copied.
        name: what tables call it.
        mean, std: of the pixels that it was trained on, in units of [0, 1].
        precision: bf16 runs matrix products in bf16 where the hardware has it.
        license: of foreign weights, where their publisher states one.
    """

    model: Any
    _: KW_ONLY
    name: str
    mean: RGB
    std: RGB
    precision: Precision = "fp32"
    license: str | None = None

    def __post_init__(self) -> None:
        self.model.eval()
        self.img_size: tuple[int, int] = self.model.img_size
        self.grid_size: tuple[int, int] = self.model.grid_size
        self.embed_dim: int = self.model.embed_dim
        self.depth: int = self.model.depth

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def architecture(self) -> dict[str, Any]:
        """Everything but the weights; equal for encoders that share an untrained floor."""
        model = self.model
        own = {"kind": "vit", **vit_arguments(model)} if isinstance(model, ViT) else model.about
        return {**own, "mean": list(self.mean), "std": list(self.std)}

    def to(self, device: torch.device | str) -> Encoder:
        """Move the weights and return the encoder itself."""
        self.model.to(device)
        return self

    def tokens(self, images: Tensor) -> Tensor:
        """Map uint8 images [B, H, W, 3] of any size to float32 patch tokens [B, N, D].

        Images of another size are resized (bilinear with antialiasing, the aspect ratio gives way)
        to the encoder's; the tokens are those after the final norm, without class token.
        """
        return self._run(images)[0]

    def layers(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the tokens [B, N, D] of the last `n` blocks, each through the final norm.

        Raises UserError if the encoder has fewer blocks.
        """
        if not 1 <= n <= self.depth:
            raise UserError(f"{self.name}: has {self.depth} blocks, so not the last {n} of them")
        return self._run(images, n)

    def untrained(self, seed: int = 0) -> Encoder:
        """Return the same architecture with fresh weights, a fixed function of `seed`."""
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's generator: weights are drawn there, and a GPU's keeps its state.
            torch.default_generator.manual_seed(derive_seed(seed, 0, "untrained"))
            ours = isinstance(self.model, ViT)
            model = ViT(**vit_arguments(self.model)) if ours else self.model.fresh()
        name = f"{self.name} (untrained)"
        return replace(self, model=model, name=name, license=None).to(self.device)

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
    def _run(self, images: Tensor, n: int | None = None) -> list[Tensor]:
        model, pixels = self.model, self.pixels(images)
        bf16 = self.precision == "bf16" and has_bf16(str(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            found = [model(pixels)] if n is None else model.forward_intermediates(pixels, n)
        return [x.float() for x in found]


def vit_arguments(vit: ViT) -> dict[str, Any]:
    """Return the arguments that build `vit` again, JSON-able and without drop path.

    Norms with 1e-6 are not named: files and fingerprints stay those of versions that knew no other.
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
        "pos_embed": vit.positions,
        **({} if vit.norm.eps == 1e-6 else {"norm_eps": vit.norm.eps}),
    }


def save_encoder(
    run_dir: Path, vit: ViT, *, mean: RGB, std: RGB, extra: dict[str, Any] | None = None
) -> None:
    """Write encoder.safetensors, then config.json, to `run_dir`, each whole or not at all."""
    save_tensors(run_dir / WEIGHTS, dict(vit.state_dict()), {})
    config = {"format": FORMAT, "sparsejepa": __version__, "kind": "vit"}
    config |= {"arch": vit_arguments(vit), "mean": mean, "std": std, "img_size": vit.img_size}
    write_text(run_dir / CONFIG, json.dumps(config | (extra or {}), indent=2) + "\n")


def load_run(path: Path) -> Encoder:
    """Load what `save_encoder` wrote; UserError says what is wrong with the folder."""
    remedy = "give a directory that `sparsejepa pretrain` wrote, or timm:NAME"
    if not path.is_dir():
        what = "is a file, not a run directory" if path.exists() else "no such run directory"
        raise UserError(f"{path}: {what}; {remedy}")
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            if (path / "checkpoints").is_dir():
                raise UserError(f"{path}: {file} is missing, the run is unfinished; --resume it")
            raise UserError(f"{path}: not a run directory ({file} is missing); {remedy}")
    config, (tensors, _) = read_json(path / CONFIG), load_tensors(path / WEIGHTS)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path / CONFIG}: not an encoder's, or of another version; {remedy}")
    with refusing(f"{path / CONFIG}: damaged, or does not fit {WEIGHTS}", "copy the run again"):
        arch: Any = dict(config["arch"])
        arch |= {name: tuple(arch[name]) for name in ("img_size", "patch_size")}
        if not 0 < arch["depth"] <= len(tensors):
            raise ValueError("a depth that no encoder has")
        with torch.device("meta"):  # takes no memory before the sizes are known to fit
            vit = ViT(**arch)
        mean, std = check_scale(config["mean"], config["std"])
        license = config.get("license") and str(config["license"])
        vit.load_state_dict(tensors, assign=True)
    return Encoder(vit.float(), name=str(path), mean=mean, std=std, license=license)


@contextlib.contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Make errors that a file's content causes one line: ``WHAT (REASON); REMEDY``."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as e:
        text = f"lacks {e}" if isinstance(e, KeyError) else str(e) or repr(e)
        raise UserError(f"{what} ({text.splitlines()[-1].strip()}); {remedy}") from None


def check_scale(mean: Any, std: Any) -> tuple[RGB, RGB]:
    """Return mean and standard deviation of pixels; ValueError or TypeError if they are none."""
    m, s = [float(x) for x in mean], [float(x) for x in std]
    if len(m) != 3 or len(s) != 3 or not all(map(math.isfinite, m + s)) or min(s) <= 0:
        raise ValueError("mean and std must be three finite numbers each, std above 0")
    return (m[0], m[1], m[2]), (s[0], s[1], s[2])


def save_groups(
    run_dir: Path, groups: GroupMap, rms: Tensor | None = None, seen: Tensor | None = None
) -> None:
    """Write groups.safetensors to `run_dir`, whole or not at all.

    `rms` [G] are the units of the groups' activations, see `group_rms`, and `seen` [2, D] mean and
    variance of `measure_seen` on whole images.
    """
    about = {"kind": groups.kind, "num_groups": len(groups.W)}
    about |= {"sphere": groups.sphere, "eps": groups.norm.eps}
    tensors = {**groups.state_dict(), "rms": rms, "seen": seen}
    del tensors["mean_gradient"]  # for training only
    save_tensors(run_dir / GROUPS, {k: t for k, t in tensors.items() if t is not None}, about)


def groups_folder(folder: Path) -> Path:
    """Return where in `folder` groups lie: there, or else where ``explain`` puts fitted ones."""
    fitted = folder / FITTED
    return fitted if (fitted / GROUPS).exists() and not (folder / GROUPS).exists() else folder


def load_groups(run_dir: Path, grid_size: tuple[int, int]) -> GroupMap | None:
    """Return the group map of a run in evaluation mode, None for a dense run.

    Raises UserError if the file is damaged or does not fit the encoder's grid of patches.
    """
    return _read_groups(run_dir, grid_size)[0]


def _read_groups(
    run_dir: Path, grid_size: tuple[int, int]
) -> tuple[GroupMap | None, Tensor | None, Tensor | None]:
    """Return what `save_groups` was given."""
    path = run_dir / GROUPS
    if not path.exists():
        return None, None, None
    tensors, about = load_tensors(path)
    with refusing(f"{path}: damaged, or does not fit {CONFIG}", "copy the run again"):
        if not all(tensor.numel() for tensor in tensors.values()):
            raise ValueError("an empty tensor")  # whose other sides could be of any length
        num_groups, group_dim, embed_dim = tensors["W"].shape
        _, own, hidden = tensors["networks.B"].shape
        out_dim = own * num_groups if about["kind"] == "feature" else own
        sizes: dict[str, Any] = {"num_groups": num_groups, "group_dim": group_dim, "hidden": hidden}
        sizes |= {"out_dim": out_dim, "sphere": about.get("sphere", True)}
        groups = GroupMap(about["kind"], embed_dim, grid_size, **sizes)
        groups.norm.eps = float(about.get("eps", groups.norm.eps))
        rms, seen = tensors.pop("rms", None), tensors.pop("seen", None)
        for units, shape in ((rms, (num_groups,)), (seen, (2, embed_dim))):
            if units is not None and units.shape != shape:
                raise ValueError("units of other groups")
        groups.load_state_dict(tensors | {"mean_gradient": groups.mean_gradient})
    return groups.eval(), rms, seen


class GroupActivations(nn.Module):
    """Activations of groups from tokens: what of a `GroupMap` is used after training.

    A group's activation is ||W^(g) z|| / rms_g: how strongly the group is excited, in units of its
    own root mean square over training images, so that groups compare. z is what enters W: the mean
    token of an image for region groups, each patch's token for concept and feature groups,
    normalised per latent with the statistics of whole images (`measure_seen`).

    Args:
        groups: nothing is shared with it.
        rms: [G], from `group_rms`; a group whose rms is 0 is dead, and so is its activation.
            Without it activations keep the units that they have.
        seen: [2, D], mean and variance from `measure_seen`; without them those of the map, which
            for groups that were trained are of contexts, not of whole images.

    Buffers: W [G, P, D]; mean and scale [D], the normalised latent is (z - mean) * scale; rms [G].
    """

    W: Tensor
    mean: Tensor
    scale: Tensor
    rms: Tensor

    def __init__(
        self, groups: GroupMap, rms: Tensor | None = None, seen: Tensor | None = None
    ) -> None:
        super().__init__()
        self.kind: Kind = groups.kind
        W, norm = groups.W, groups.norm
        mean, variance = (norm.running_mean, norm.running_var) if seen is None else seen.to(W)
        assert mean is not None and variance is not None
        scale, rms = (variance + norm.eps).rsqrt(), torch.ones(len(W)) if rms is None else rms
        for name, tensor in {"W": W, "mean": mean, "scale": scale, "rms": rms}.items():
            self.register_buffer(name, tensor.detach().clone())

    @property
    def unit(self) -> Tensor:
        """1 / rms_g, [G]; 0 for a dead group."""
        alive = self.rms > 0
        return torch.where(alive, 1 / torch.where(alive, self.rms, 1.0), 0.0)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map tokens [B, N, D] to activations of images [B, G] and of patches [B, N, G].

        Region groups read the mean token and have no patches' activations (None). For concept and
        feature groups an image's activation is the mean of its patches', as ``explain`` shows it.
        """
        tokens = full(tokens)
        z = tokens.mean(1) if self.kind == "region" else tokens
        found = group_norms(self.W, (z - self.mean) * self.scale) * self.unit
        return (found, None) if self.kind == "region" else (found.mean(1), found)


@torch.no_grad()
def measure_seen(
    encoder: Encoder, kind: Kind, batches: Iterable[Tensor], sampler: MaskSampler | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] of what groups see of a frozen encoder, in float64.

    That is its tokens, for region groups their mean over an image. Training collects them of the
    context encoder; the EMA encoder, which is read afterwards, gives others.

    Args:
        batches: uint8 images [B, H, W, 3].
        sampler: of the masks whose context the encoder sees; whole images if not given.

    Raises ValueError if there is no image.
    """
    total, power, count = 0.0, 0.0, 0
    for step, images in enumerate(batches):
        if sampler is None:
            z = full(encoder.tokens(images))
        else:
            masks = sampler.sample(len(images), seed=0, step=step, device=encoder.device)
            z = full(encoder.model(encoder.pixels(images), masks.context))
        z = z.mean(1) if kind == "region" else z.flatten(0, 1)
        # Centred in float32 on the device, added up in float64.
        mean, covariance = z.mean(0).cpu().double(), torch.cov(z.T, correction=0).cpu().double()
        total, power = total + len(z) * mean, power + len(z) * (covariance + mean.outer(mean))
        count += len(z)
    if not isinstance(total, Tensor) or not isinstance(power, Tensor):
        raise ValueError("no images to measure groups on")
    mean = total / count
    return mean, power / count - mean.outer(mean)


def group_rms(groups: GroupMap, covariance: Tensor) -> Tensor:
    """Return the root mean square of ||W^(g) z||, [G], where z is normalised by its statistics.

    `covariance` [D, D] is that of `measure_seen`, before the normalisation.
    """
    W = groups.W.detach().cpu().double()
    W = W * (covariance.diagonal() + groups.norm.eps).rsqrt()
    return ((W @ covariance) * W).sum((1, 2)).clamp(min=0).sqrt().float()


def load_activations(run_dir: Path, grid_size: tuple[int, int]) -> GroupActivations | None:
    """Return the group activations of a folder with a groups.safetensors, None without one.

    Raises UserError if the file is damaged or does not fit the encoder's grid of patches.
    """
    groups, rms, seen = _read_groups(run_dir, grid_size)
    return None if groups is None else GroupActivations(groups, rms, seen)
