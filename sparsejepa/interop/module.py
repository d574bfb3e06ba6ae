"""The exported model: pixels in; tokens, pooled features and group activations out.

A group's activation is ||W^(g) z|| / rms_g: how strongly the group is excited, in units of its own
root mean square over training images, so that groups compare. z is what enters W: the mean token of
an image for region groups, each patch's token for concept and feature groups, normalised per latent
with the statistics of whole images (`measure_seen`).

Letters: B images, N patches, D latents, G groups, P group width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from sparsejepa.errors import UserError
from sparsejepa.files import load_tensors
from sparsejepa.interop import hub
from sparsejepa.interop.card import PAGE, model_card
from sparsejepa.interop.encoder import Encoder, Precision
from sparsejepa.interop.images import RULE, at_size
from sparsejepa.interop.refs import load
from sparsejepa.interop.runs import GROUPS, load_groups, save_encoder, save_groups
from sparsejepa.model.encoder import ViT
from sparsejepa.model.groups import GroupMap, Kind, group_norms
from sparsejepa.model.losses import full
from sparsejepa.model.masks import MaskSampler

MAY_BE_GONE = [GROUPS, PAGE]
"""Files of an earlier model that a later one may be without: an upload removes them."""


class GroupActivations(nn.Module):
    """Activations of groups from tokens: what of a `GroupMap` is used after training.

    Args:
        kind: what a group is, see `GroupMap`.
        W: [G, P, D].
        mean, scale: [D]; the normalised latent is (z - mean) * scale.
        rms: [G], root mean square of ||W^(g) z|| over training images, from `measure_rms`; a group
            whose rms is 0 is dead, and so is its activation. Without it activations keep the units
            that they have.
    """

    def __init__(
        self, kind: Kind, W: Tensor, mean: Tensor, scale: Tensor, rms: Tensor | None = None
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.W: Tensor
        self.mean: Tensor
        self.scale: Tensor
        self.rms: Tensor
        units = torch.ones(len(W)) if rms is None else rms
        for name, tensor in {"W": W, "mean": mean, "scale": scale, "rms": units}.items():
            self.register_buffer(name, tensor.detach().clone())

    @classmethod
    def from_map(
        cls, groups: GroupMap, rms: Tensor | None = None, seen: Tensor | None = None
    ) -> GroupActivations:
        """Return the activations of a map; nothing is shared with it.

        `seen` [2, D], mean and variance from `measure_seen`, normalise z; without them the map's
        own do, which for groups that were trained are of contexts, not of whole images.
        """
        norm = groups.norm
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = (norm.running_mean, norm.running_var) if seen is None else seen
        mean, variance = mean.to(groups.W.device), variance.to(groups.W.device)
        return cls(groups.kind, groups.W, mean, (variance + norm.eps).rsqrt(), rms)

    @property
    def unit(self) -> Tensor:
        """1 / rms_g, [G]; 0 for a dead group."""
        alive = self.rms > 0
        return torch.where(alive, 1 / torch.where(alive, self.rms, 1.0), 0.0)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map tokens [B, N, D] to activations of images [B, G] and of patches [B, N, G].

        Region groups read the mean token and have no patches' activations (None). For concept and
        feature groups an image's activation is the mean of its patches', as on the page of
        ``explain``.
        """
        if self.kind == "region":
            return self._activate(full(tokens).mean(1)), None
        group_map = self._activate(full(tokens))
        return group_map.mean(1), group_map

    def _activate(self, z: Tensor) -> Tensor:
        """Map what enters W, [..., D], to activations [..., G]."""
        z = (z - self.mean) * self.scale
        return group_norms(self.W, z) * self.unit


@torch.no_grad()
def measure_seen(
    encoder: Encoder, kind: Kind, batches: Iterable[Tensor], sampler: MaskSampler | None = None
) -> Tensor:
    """Return mean and variance, [2, D], of what groups see of a frozen encoder.

    That is its tokens, for region groups their mean over an image. Training collects them of the
    context encoder; the EMA encoder, which is read afterwards, gives others.

    Args:
        batches: uint8 images [B, H, W, 3].
        sampler: of the masks whose context the encoder sees; whole images if not given.

    Raises ValueError if there is no image.
    """
    moments, count = torch.zeros(2, encoder.embed_dim, dtype=torch.float64), 0
    model: Any = encoder.model
    for step, images in enumerate(batches):
        if sampler is None:
            z = full(encoder.tokens(images))
        else:
            masks = sampler.sample(len(images), seed=0, step=step, device=encoder.device)
            z = full(model(encoder.pixels(images), masks.context))
        z = z.mean(1) if kind == "region" else z.flatten(0, 1)
        variance, mean = (x.cpu().double() for x in torch.var_mean(z, 0, correction=0))
        moments += len(z) * torch.stack([mean, variance + mean.square()])
        count += len(z)
    if count == 0:
        raise ValueError("no images to measure groups on")
    mean, power = moments / count
    return torch.stack([mean, power - mean.square()]).float()


def measure_rms(
    encoder: Encoder, groups: GroupMap, batches: Iterable[Tensor], seen: Tensor | None = None
) -> Tensor:
    """Return the root mean square of ||W^(g) z|| over images (region) or all patches, [G] float32.

    Args:
        batches: uint8 images [B, H, W, 3].
        seen: what normalises z, see `GroupActivations.from_map`.

    Raises ValueError if there is no image.
    """
    activations = GroupActivations.from_map(groups, seen=seen).to(encoder.device).float()
    squares, count = torch.zeros(len(groups.W), dtype=torch.float64, device=encoder.device), 0
    for images in batches:
        pooled, patches = activations(encoder.tokens(images))
        found = (pooled if patches is None else patches.flatten(0, 1)).double()
        squares, count = squares + found.square().sum(0), count + len(found)
    if count == 0:
        raise ValueError("no images to measure groups on")
    return (squares / count).sqrt().float().cpu()


def load_activations(run_dir: Path, grid_size: tuple[int, int]) -> GroupActivations | None:
    """Return the group activations of a folder with a groups.safetensors, None without one.

    Raises UserError if the file is damaged or does not fit the encoder's grid of patches.
    """
    groups, rms, seen = _read_groups(run_dir, grid_size)
    return None if groups is None else GroupActivations.from_map(groups, rms, seen)


def _read_groups(
    run_dir: Path, grid_size: tuple[int, int]
) -> tuple[GroupMap | None, Tensor | None, Tensor | None]:
    """Return a folder's map, its units and what it sees, which older runs lack."""
    groups = load_groups(run_dir, grid_size)
    tensors = {} if groups is None else load_tensors(run_dir / GROUPS)[0]
    return groups, tensors.get("rms"), tensors.get("seen")


class SparseJEPAEncoder(
    nn.Module, ModelHubMixin, library_name="sparsejepa", tags=["sparsejepa", "jepa"]
):
    """A frozen encoder and its groups as one module, with the hub's `from_pretrained`,
    `save_pretrained` and `push_to_hub`.

    What it saves is a folder as a run's: encoder.safetensors, groups.safetensors, config.json,
    and a model card.

    Args:
        encoder: as `load` returns it; its weights are not copied.
        groups: the map that it was trained with, or one that was fitted to it.
        rms: [G], the units of the groups' activations.
        seen: [2, D], what normalises their latents, see `GroupActivations.from_map`.
    """

    def __init__(
        self,
        encoder: Encoder,
        groups: GroupMap | None = None,
        rms: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> None:
        super().__init__()
        if groups is not None and groups.W.shape[2] != encoder.embed_dim:
            raise UserError(
                f"groups of {groups.W.shape[2]} latents do not fit {encoder.name}, which has "
                f"{encoder.embed_dim}; take those that were fitted to it"
            )
        self.encoder = encoder
        self.model = encoder.model
        self.groups = None if groups is None else GroupActivations.from_map(groups, rms, seen)
        # The group networks predict, which only training needs: they are kept to be written again,
        # and in a tuple they are no part of the module.
        self._written = (groups, rms, seen)
        self.eval()

    @property
    def kind(self) -> Kind | None:
        """What a group is; None without groups."""
        return None if self.groups is None else self.groups.kind

    @property
    def trained_groups(self) -> GroupMap | None:
        """The map with its group networks, which predict; None without groups."""
        return self._written[0]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode normalised pixels, float [B, 3, H, W].

        Returns:
            tokens [B, N, D] after the final norm, without class token, and pooled [B, D], their
            mean. With groups also groups [B, G] and, where a group is excited by patches (concept
            and feature), group_map [B, N, G].

        Raises UserError for another size than the model's.
        """
        wanted = (3, *self.encoder.img_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted:
            raise UserError(
                f"pixels [{', '.join(str(n) for n in pixels.shape)}]: this model takes "
                f"[B, {', '.join(map(str, wanted))}]; preprocess(images) brings them there"
            )
        tokens = self.model(pixels)
        found = {"tokens": tokens, "pooled": tokens.mean(1)}
        if self.groups is not None:
            groups, group_map = self.groups(tokens)
            found |= {"groups": groups} if group_map is None else {
                "groups": groups, "group_map": group_map
            }  # fmt: skip
        return found

    def preprocess(self, images: Any) -> Tensor:
        """Return pixels [B, 3, H, W] for `forward` from images of any size.

        `images`: a file, a PIL image, uint8 [H, W, 3] or [B, H, W, 3] (tensor or array), or a list
        of these. As in data sets of files the shorter side is resized and the longer one cropped
        around its centre. Raises UserError for anything else, and for what cannot be read.
        """
        return self.encoder.pixels(at_size(images, self.encoder.img_size))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        **unknown: Any,
    ) -> SparseJEPAEncoder:
        """Load a run directory, a folder that was saved, or OWNER/NAME from the hub.

        Args:
            device, precision: as for `load`.
            The others: as for every model of the hub; a folder needs none of them.

        Raises UserError, one line, if there is no encoder to be had or its groups do not fit, and
        TypeError for another argument.
        """
        if unknown:
            raise TypeError(f"from_pretrained takes no {', '.join(map(repr, unknown))}")
        name = str(pretrained_model_name_or_path)
        folder = Path(name)
        if not folder.is_dir():
            name = f"hub:{name.removeprefix('hub:')}"
            try:
                folder = hub.fetch(
                    name if revision is None else f"{name}@{revision}",
                    force_download=force_download,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            except UserError as error:
                there = f"no folder {pretrained_model_name_or_path}, and as a model of the hub"
                raise UserError(f"{there}: {error}") from None
        encoder = load(folder, device, precision)
        encoder.name = name
        return open_module(encoder, folder)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write encoder, groups, config.json and, where there is none, a model card to a folder.

        The options are those of every model of the hub. Raises UserError, before anything is
        written, for a timm model.
        """
        self._vit()
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to OWNER/NAME; return the commit's address.

        The options are those of every model of the hub. What an earlier model there had and this
        one may not have is removed (groups and page) unless `delete_patterns` says otherwise.
        Raises UserError, before anything is sent, for a timm model.
        """
        self._vit()
        if options.get("delete_patterns") is None:
            options["delete_patterns"] = MAY_BE_GONE
        card = {"name": repo_id, **(options.pop("model_card_kwargs", None) or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def generate_model_card(
        self, *_: Any, name: str | None = None, license: str | None = None, **__: Any
    ) -> ModelCard:
        """Return the card that `save_pretrained` writes where there is none.

        Args:
            name: of the model, as `from_pretrained` takes it; by default where it came from.
            license: of the weights; by default the encoder's.
            The others: of the hub's template, which is not used.
        """
        encoder = self.encoder
        own = encoder.name
        own = own.removeprefix("hub:") if own.startswith("hub:") else Path(own).resolve().name
        license = license or encoder.license
        card = model_card(name or own, encoder.architecture, self.trained_groups, license=license)
        return ModelCard(card)

    def _save_pretrained(self, save_directory: Path) -> None:
        encoder, (groups, rms, seen) = self.encoder, self._written
        extra: dict[str, Any] = {"preprocessing": RULE}
        if encoder.license:
            extra["license"] = encoder.license
        save_encoder(save_directory, self._vit(), mean=encoder.mean, std=encoder.std, extra=extra)
        if groups is None:
            # Those of an earlier model would pass for this one's.
            (save_directory / GROUPS).unlink(missing_ok=True)
        else:
            save_groups(save_directory, groups, rms, seen)

    def _vit(self) -> ViT:
        """Return the model in the form that is saved; UserError says what brings it there."""
        if not isinstance(self.model, ViT):
            name = self.encoder.name
            raise UserError(
                f"{name}: a timm model; `sparsejepa export {name} --to hub` brings it into the "
                "form that is saved"
            )
        return self.model


def open_module(encoder: Encoder, folder: Path | None) -> SparseJEPAEncoder:
    """Return an encoder with the groups of `folder`, if there are any.

    Raises UserError if the groups do not fit the encoder.
    """
    groups = (None, None, None) if folder is None else _read_groups(folder, encoder.grid_size)
    return SparseJEPAEncoder(encoder, *groups)
