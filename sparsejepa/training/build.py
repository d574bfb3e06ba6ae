"""From settings to parts: the images, the model and the optimiser of one run.

A run with ``--init`` starts from a given encoder (`Start`). Width, depth, heads, patches, class
token and kind of positions are those of the encoder, and so are the mean and standard deviation of
the pixels: its first layer was trained on pixels of that scale. Both encoders start from its
weights; predictor and group map are new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsejepa.config import ENCODER_SIZES, Config, check_pattern
from sparsejepa.data.augment import Augment
from sparsejepa.data.images import Images
from sparsejepa.distributed import World, first_here, local
from sparsejepa.encoders.encoder import GROUPS, RGB, vit_arguments
from sparsejepa.encoders.load import load, plain
from sparsejepa.errors import TooFewImages, UserError
from sparsejepa.files import load_tensors
from sparsejepa.model.groups import GroupMap, random_pattern
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.model.masks import MaskSampler
from sparsejepa.model.predictor import MLPPredictor, TransformerPredictor
from sparsejepa.model.vit import ViT
from sparsejepa.rng import derive_seed
from sparsejepa.training.schedule import Schedule

ADAM_BETA2 = 0.98
"""AdamW's second-moment decay."""


@dataclass(frozen=True)
class Start:
    """The encoder that a run starts from.

    Attributes:
        ref: its name, as `load` takes it.
        vit: the encoder itself.
        mean, std: of the pixels, in units of [0, 1].
        license, fingerprint: of the encoder.
    """

    ref: str
    vit: ViT
    mean: RGB
    std: RGB
    license: str | None
    fingerprint: str

    def settings(self, config: Config) -> Config:
        """Return the settings with the encoder's sizes in them, checked.

        Raises UserError if they say otherwise, or cannot work with an encoder of this size.
        """
        arch, wanted = vit_arguments(self.vit), config.model.encoder
        sizes = f"{arch['embed_dim']},{arch['depth']},{arch['num_heads']}"
        if wanted not in (sizes, *ENCODER_SIZES):
            raise UserError(
                f"--encoder {wanted}: --init {self.ref} has {sizes}; leave --encoder out"
            )
        height, width = arch["patch_size"]
        if height != width:
            raise UserError(
                f"--init {self.ref}: its patches are {height}x{width} pixels, only square ones can "
                "be trained on here"
            )
        return config.replace(encoder=sizes, patch_size=height).check()

    def encoder(self, img_size: tuple[int, int], drop_path: float) -> ViT:
        """Return the encoder for images of `img_size` (h, w).

        On another grid of patches learned positions are interpolated, fixed ones computed anew.
        """
        changes = {"img_size": img_size, "drop_path": drop_path}
        vit = ViT(**{**vit_arguments(self.vit), **changes})
        state = dict(self.vit.state_dict())
        if vit.grid_size != self.vit.grid_size:
            state["pos_embed"] = vit.state_dict()["pos_embed"]
            if vit.positions == "learned":
                from timm.layers.pos_embed import resample_abs_pos_embed

                state["pos_embed"] = resample_abs_pos_embed(
                    self.vit.pos_embed.detach(),
                    list(vit.grid_size),
                    list(self.vit.grid_size),
                    num_prefix_tokens=vit.num_prefix_tokens,
                )
        vit.load_state_dict(state)
        return vit


def find_start(config: Config) -> Start | None:
    """Return what a run starts from, None for random weights.

    Raises UserError if there is no encoder of that name, or none that can be trained here.
    """
    ref = config.model.init
    if ref is None:
        return None
    try:
        encoder = load(ref)
        fingerprint, vit = encoder.fingerprint(), plain(encoder).model
    except UserError as error:
        raise UserError(f"--init {error}") from None
    return Start(ref, vit, encoder.mean, encoder.std, encoder.license, fingerprint)


def arm_name(config: Config) -> str:
    """Return the arm that a run belongs to: dense, lam=0, lam=0.01 or density=0.25.

    Controls say what they are: density=0.25+pattern=random, +pattern=RUN, +predictor=groups.
    """
    groups = config.groups
    if groups.groups == "none":
        return "dense"
    name = f"lam={groups.lam:g}" if groups.density is None else f"density={groups.density:g}"
    if groups.pattern != "learned":
        name += f"+pattern={'random' if groups.pattern == 'random' else 'RUN'}"
    return name + "+predictor=groups" * (config.model.predictor == "groups")


def default_run_dir(config: Config) -> Path:
    """Return the folder of a run for which none is given: runs/DATA-ARM-sSEED."""
    data = config.data.rstrip("/").rpartition("/")[2]  # of a path or a hub name its last part
    data = "".join(c if c.isalnum() or c in "-_." else "-" for c in data).strip("-.")
    return Path("runs") / f"{data[-60:]}-{arm_name(config)}-s{config.run.seed}"


def prepare(
    config: Config,
    images: Images | Callable[[Config], Images],
    world: World = World(),  # noqa: B008  (it is frozen)
) -> tuple[Start | None, Config, Images]:
    """Return what a run starts from, its settings and its images.

    With ``--init`` the settings have the encoder's sizes, and the images its mean and standard
    deviation. `images` are loaded, or a function that loads them. Raises UserError for an encoder
    or images that do not fit the settings.
    """
    start = first_here(world, lambda: find_start(config))
    config = start.settings(config) if start else config
    image_set = images if isinstance(images, Images) else first_here(world, partial(images, config))
    config.check_image(image_set.img_size)
    if start is not None:
        image_set = dataclasses.replace(image_set, mean=start.mean, std=start.std)  # type: ignore[type-var]
    return start, config, image_set


def total_steps(config: Config, num_images: int) -> int:
    """Return the optimiser steps of a run; the last, incomplete batch of an epoch is dropped.

    Raises TooFewImages, a UserError, for fewer images than a batch has.
    """
    batch = config.optim.batch_size
    if batch > num_images:
        raise TooFewImages(
            f"--batch-size {batch} is more than the {num_images} training images of "
            f"{config.data}; use at most {num_images}",
            num_images,
        )
    return config.optim.steps or config.optim.epochs * (num_images // batch)


def build_sampler(config: Config, grid_size: tuple[int, int]) -> MaskSampler:
    """Return the sampler of a run's masks on a grid of patches (rows, columns).

    The one place that makes it: what previews, audits and scores draw is what is trained. Raises
    UserError for masks that are impossible on this grid.
    """
    merge = config.model.predictor_pass == "union"
    return MaskSampler(grid_size, **vars(config.masks), merge=merge)


def build_model(
    config: Config, img_size: tuple[int, int], total: int, start: Start | None = None
) -> SparseJEPA:
    """Build the model of a run of `total` steps on images of `img_size` (h, w) pixels.

    With `start` the encoder is that one, and `config` has its sizes. Each part's initial weights
    are keyed on (seed, part): runs with one seed start from the same encoder and predictor whatever
    their arm.
    """
    config.check().check_image(img_size)
    seed, (width, depth, heads) = config.run.seed, config.encoder_shape
    patch, drop = config.model.patch_size, config.model.drop_path
    grid = (img_size[0] // patch, img_size[1] // patch)
    out_dim = 3 * patch**2 if config.loss.predict == "pixels" else width
    sampler = build_sampler(config, grid)
    predictor = groups = zeros = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 0, "init-encoder"))
        if start is not None:
            encoder = start.encoder(img_size, drop)
        else:
            encoder = ViT(
                img_size, patch, embed_dim=width, depth=depth, num_heads=heads, drop_path=drop
            )
        torch.manual_seed(derive_seed(seed, 0, "init-predictor"))
        sizes = {"dim": config.model.predictor_dim, "depth": config.model.predictor_depth}
        if config.model.predictor == "mlp":
            predictor = MLPPredictor(width, grid, out_dim=out_dim, **sizes)
        elif config.model.predictor == "transformer":
            predictor = TransformerPredictor(width, grid, out_dim=out_dim, **sizes)
        torch.manual_seed(derive_seed(seed, 0, "init-groups"))
        if config.groups.groups != "none":
            groups = GroupMap(
                config.groups.groups,
                width,
                grid,
                num_groups=config.groups.num_groups,
                group_dim=config.group_dim,
                sphere=config.groups.w_form == "sphere",
                out_dim=out_dim,
            )
            if config.groups.pattern != "learned":
                zeros = _random_pattern(config, groups)
        return SparseJEPA(
            encoder,
            predictor,
            sampler,
            groups,
            rates=Schedule(config, total),
            loss=config.loss,
            total_steps=total,
            steer_density=config.groups.density is not None and config.penalised,
            random_pattern=zeros,
            seed=seed,
        )


def _random_pattern(config: Config, groups: GroupMap) -> Tensor:
    """Return the random zero pattern [G, D] of a control.

    Raises UserError if --pattern names a run without a group map of this size and density.
    """
    name, shape, like = config.groups.pattern, groups.block_norms().shape, None
    if name != "random":
        check_pattern(config)
        W = load_tensors(Path(name) / GROUPS)[0].get("W", torch.empty(0, 0, 0))
        like = torch.linalg.vector_norm(W, dim=1) > 0
        if like.shape != shape:
            raise UserError(
                f"--pattern {name}: its map is {like.shape[0]} groups by {like.shape[1]} latents, "
                f"this run's {shape[0]} by {shape[1]}"
            )
        kept = float(like.float().mean())
        if round((config.groups.density or 1.0) * like.numel()) != int(like.sum()):
            raise UserError(f"--pattern {name}: that run kept {kept:.6g}; use --density {kept:.6g}")
    return random_pattern(shape[0], shape[1], config.groups.density or 1.0, like)


def build_optimizer(config: Config, model: SparseJEPA) -> torch.optim.AdamW:
    """Return AdamW over everything but W, which the model moves itself.

    Parameters that are shared out among processes and whole ones are groups of their own: one
    call of the optimiser's kernel takes one kind.
    """
    groups = []
    decays = (config.optim.weight_decay, 0.0)
    for parameters, decay in zip(model.network_parameters(), decays, strict=True):
        whole = [p for p in parameters if local(p) is p]
        shared = [p for p in parameters if local(p) is not p]
        groups += [{"params": kind, "weight_decay": decay} for kind in (whole, shared) if kind]
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, ADAM_BETA2), fused=True)


def build_augment(config: Config, image_set: Images) -> Augment:
    """Return the augmentation of a run; a crop of all of the image keeps its proportions."""
    whole = config.images.crop_scale == (1.0, 1.0)
    return Augment(
        image_set.img_size,
        mean=image_set.mean,
        std=image_set.std,
        crop_scale=config.images.crop_scale,
        crop_ratio=(1.0, 1.0) if whole else (3 / 4, 4 / 3),
        flip=config.images.flip,
    )


def describe_parameters(model: SparseJEPA) -> dict[str, Any]:
    """Return the number of parameters of each part."""
    names = {"encoder": "context_encoder", "predictor": "predictor", "groups": "groups"}
    parts = {name: getattr(model, attribute) for name, attribute in names.items()}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part}
