"""The same training step with the peers that the package registry has, in turn with ours.

lightly and stable-pretraining train I-JEPA and are used as their documentation has it; transformers
and timm have encoders only and are set against our two encoders alone. In the peers' favour, images
reach them as normalised floats, while our step crops, flips and normalises bytes.

The work is not equal everywhere, so patches and operations are counted as they happen. lightly's
collator draws its masks, which are then replaced by as many patches as ours have: its contexts are
cut to the smallest of the batch. stable-pretraining has one set of targets for a whole batch and
predicts their union at once. The context encoder of transformers sees every patch.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.settings import BenchSettings, Section, available_memory
from sparsejepa.benchmarks.steps import our_step
from sparsejepa.benchmarks.timing import entries, interleave, ratios, spread
from sparsejepa.config import ENCODER_SIZES
from sparsejepa.data.augment import normalize
from sparsejepa.environment import has_bf16
from sparsejepa.model.costs import FP32, parameters
from sparsejepa.model.encoder import ViT
from sparsejepa.model.memory import peak_memory

NUM_TARGETS = 4
MOMENTUM = 0.996
COUNTED = 8
"""Images in the calls whose operations are counted."""

Precision = Literal["fp32", "bf16"]
Seen = tuple[int, int]
"""Patches per image of a call: of the context encoder, and of all targets."""
Step = Callable[[int], Seen]
Build = Callable[[BenchSettings, Precision], Step]


@dataclass(frozen=True)
class Peer:
    """A package, the version of it that was tried, what it can do, and how its step is built."""

    package: str
    tried: str
    work: Literal["step", "encoders"]
    build: Build


@dataclass(frozen=True)
class Work:
    """What a step does for one image, on average."""

    context: float
    targets: float
    flops: float


def section(settings: BenchSettings) -> Section:
    """Time our step and the peers' in fp32 and, where the hardware has it, under bf16 autocast.

    Peers that are not there or do not work as they did are named in a note and left out.
    """
    result = Section("peers", "The same work with other packages")
    precisions: list[Precision] = ["fp32", "bf16"] if has_bf16(settings.device) else ["fp32"]
    if len(precisions) == 1:
        result.notes.append("no bf16 instructions on this machine: bf16 contenders left out")
    usable = {peer: work for peer in PEERS if (work := _try(peer, settings, precisions, result))}
    sizes = bench.sizes(settings, bench.config(settings))
    # Weights, gradient, two moments and the target encoder of each; the activations of one.
    each, activations = 5 * FP32 * sum(parameters(sizes).values()), 2 * peak_memory(sizes, FP32)
    for kind, precision in product(("step", "encoders"), precisions):
        # Built for each group and dropped after it: large models would not all fit at once.
        builds, works, rivals = dict[str, Build](), dict[str, Work](), dict[str, str]()
        for peer, work in usable.items():
            if peer.work == kind:
                name, build = _ours(peer, work)
                builds |= {name: build, peer.package: peer.build}
                works |= {name: count(build, settings, "fp32"), peer.package: work}
                rivals |= {name: name, peer.package: name}
        if settings.compile and "ours" in builds:
            said: Callable[[str], None] = result.notes.append
            builds["ours, compiled"] = partial(_our_step, say=said, compile=True)
            works["ours, compiled"], rivals["ours, compiled"] = works["ours"], "ours"
        needed, room = len(builds) * each + activations, available_memory(settings.device)
        if needed > room:
            result.notes.append(
                f"{kind}, {precision}, left out: about {needed / 2**30:.1f} GiB needed, "
                f"{room / 2**30:.1f} free"
            )
            continue
        with unchanged():
            contenders = {name: build(settings, precision) for name, build in builds.items()}
            timings = interleave(
                contenders,
                rounds=settings.rounds,
                device=settings.device,
                warmup=1 if settings.quick else 2,
            )
        if any(note.startswith("--compile") for note in result.notes):  # it was not compiled
            rivals.pop("ours, compiled", None)
        for name, rival in rivals.items():
            work, timing = works[name], timings[name]
            row = replace(timing, name=f"{name}, {precision}").row(version=installed(name))
            rates = spread([settings.batch / s for s in timing.seconds])
            row |= entries("images_per_second", rates)
            row |= entries("x_ours_faster", ratios(timing, timings[rival]))
            row["x_per_operation"] = row["x_ours_faster"] * works[rival].flops / work.flops
            row |= {"context": work.context, "targets": work.targets}
            row["gflop_per_image"] = work.flops / 1e9
            row["gflops"] = work.flops * settings.batch / timing.median / 1e9
            result.rows.append(row)
    return result


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def count(build: Build, settings: BenchSettings, precision: Precision) -> Work:
    """Take as many steps as are timed, on a few images, and count what they do."""
    small = replace(settings, batch=min(COUNTED, settings.batch))
    step = build(small, precision)
    calls = range(settings.rounds + 2)
    with FlopCounterMode(display=False) as counter:
        context, targets = zip(*(step(number) for number in calls), strict=True)
    flops = counter.get_total_flops() / (len(calls) * small.batch)
    return Work(statistics.mean(context), statistics.mean(targets), flops)


def _try(
    peer: Peer, settings: BenchSettings, precisions: list[Precision], result: Section
) -> Work | None:
    """Return what a peer's step does, or None, and the reason in a note."""
    found = installed(peer.package)
    if found is None:
        result.notes.append(f"{peer.package}: not installed; pip install 'sparsejepa[bench]'")
        return None
    try:
        with unchanged():
            # All precisions are tried, fp32 counts: there all products are torch's own.
            work, *_ = [count(peer.build, settings, precision) for precision in precisions]
    except Exception as error:  # another version may fail with anything, and the rest goes on
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        result.notes.append(
            f"{peer.package} {found} left out ({type(error).__name__}: {reason}); "
            f"{peer.tried} is known to work"
        )
        return None
    if found != peer.tried:
        result.notes.append(f"{peer.package} {found}: not the version that was tried, {peer.tried}")
    return work


@contextmanager
def unchanged() -> Iterator[None]:
    """Keep the environment and the logging of the process, which peers change when imported."""
    environment, handlers, level = dict(os.environ), logging.root.handlers[:], logging.root.level
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def _ours(peer: Peer, work: Work) -> tuple[str, Build]:
    """Return the name of what of ours does the work of `peer`, and how to build it."""
    if peer.work == "step":
        return "ours", _our_step
    context = round(work.context)

    def encoders(settings: BenchSettings, precision: Precision) -> Step:
        width, depth, heads = ENCODER_SIZES[settings.encoder]
        encoder = ViT(settings.img_size, settings.patch_size, width, depth, heads)
        images = _images(settings)
        draws = torch.rand(len(images), encoder.num_patches, device=images.device)
        index = draws.argsort(1)[:, :context]

        def encode(model: nn.Module, target: bool) -> Tensor:
            return model(images, None if target else index)

        return _encoders(encoder, encode, context, settings, precision)

    return f"ours, encoders, {context} patches", encoders


def _our_step(settings: BenchSettings, precision: Precision, **changes: Any) -> Step:
    step, _ = our_step(settings, precision=precision, **changes)
    seen = settings.context, NUM_TARGETS * settings.target_shape[0] * settings.target_shape[1]

    def call(number: int) -> Seen:
        step(number)
        return seen

    return call


def lightly_collator(grid: tuple[int, int], target_shape: tuple[int, int]) -> Any:
    """Return lightly's mask collator for target blocks of one shape; it takes a list of images.

    Raises whatever another version of lightly does.
    """
    from lightly.data import IJEPAMaskCollator  # pyright: ignore[reportMissingImports]

    height, width = target_shape
    share = (height * width + 0.5) / (grid[0] * grid[1])  # its areas are rounded down
    return IJEPAMaskCollator(
        input_size=grid,
        patch_size=1,
        enc_mask_scale=(0.85, 1.0),
        pred_mask_scale=(share, share),
        aspect_ratio=(height / width, height / width),
        npred=NUM_TARGETS,
        min_keep=min(4, height * width - 1),  # with as many as a block has it would never end
    )


def _lightly(settings: BenchSettings, precision: Precision) -> Step:
    """I-JEPA from lightly's building blocks, as in its example."""
    from lightly.models import utils  # pyright: ignore[reportMissingImports]
    from lightly.models.modules import (  # pyright: ignore[reportMissingImports]
        IJEPAPredictorTIMM,
        MaskedVisionTransformerTIMM,
    )

    width, dim = ENCODER_SIZES[settings.encoder][0], settings.predictor_dim
    rows, cols = settings.grid
    encoder = MaskedVisionTransformerTIMM(_timm_vit(settings)).to(settings.device)
    predictor = IJEPAPredictorTIMM(
        num_patches=rows * cols,
        depth=settings.predictor_depth,
        mlp_dim=width,
        predictor_embed_dim=dim,
        num_heads=next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0),
    ).to(settings.device)
    target = copy.deepcopy(encoder)
    collator = lightly_collator(settings.grid, settings.target_shape)
    sampler = bench.model(settings, bench.config(settings)).sampler
    images = list(_images(settings).cpu())
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=1e-4)

    def step(number: int) -> Seen:
        batch = collator(images)[0].to(settings.device)
        masks = sampler.sample(len(batch), seed=0, step=number, device=settings.device)
        seen, wanted = [masks.context], list(masks.targets.unbind(1))
        with _autocast(settings, precision):
            with torch.no_grad():
                h = F.layer_norm(target.encode(batch), (width,))
                h = utils.apply_masks(h, wanted)
            z = predictor(encoder.encode(batch, idx_keep=masks.context), seen, wanted)
            loss = F.smooth_l1_loss(z, h)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        utils.update_momentum(encoder, target, MOMENTUM)
        return masks.context.shape[1], masks.targets[0].numel()

    return step


def _stable_pretraining(settings: BenchSettings, precision: Precision) -> Step:
    """The I-JEPA module of stable-pretraining, and the EMA that its callback calls."""
    from stable_pretraining.methods.ijepa import IJEPA  # pyright: ignore[reportMissingImports]

    rows, cols = settings.grid
    height, length = settings.target_shape
    model = IJEPA(
        _timm_vit(settings),
        predictor_embed_dim=settings.predictor_dim,
        predictor_depth=settings.predictor_depth,
        num_targets=NUM_TARGETS,
        target_scale=(height * length / (rows * cols),) * 2,
        target_aspect_ratio=(length / height,) * 2,
    )
    model = model.to(settings.device).train()
    images = _images(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(number: int) -> Seen:
        # Its masks come from torch's own generator: what is counted is to be what is timed.
        torch.manual_seed(number)
        with _autocast(settings, precision):
            output = model(images)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.encoder.update_teacher()
        return output.num_context, output.num_targets

    return step


def _transformers(settings: BenchSettings, precision: Precision) -> Step:
    """Transformers' I-JEPA encoder; it cannot leave patches out."""
    from transformers import IJepaConfig, IJepaModel  # pyright: ignore[reportMissingImports]

    width, depth, heads = ENCODER_SIZES[settings.encoder]
    config = IJepaConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=settings.img_size,
        patch_size=settings.patch_size,
    )
    images, (rows, cols) = _images(settings), settings.grid

    def encode(model: nn.Module, target: bool) -> Tensor:
        return model(images).last_hidden_state

    return _encoders(IJepaModel(config), encode, rows * cols, settings, precision)


def _timm(settings: BenchSettings, precision: Precision) -> Step:
    """Timm's vision transformer, the context chosen by its own random patch dropout."""
    rows, cols = settings.grid
    dropped = 1 - (settings.context + 0.5) / (rows * cols)  # what is kept is rounded down
    images = _images(settings)

    def encode(model: nn.Module, target: bool) -> Tensor:
        return model.forward_features(images)  # type: ignore[operator]

    encoder = _timm_vit(settings, patch_drop_rate=dropped)
    return _encoders(encoder, encode, settings.context, settings, precision)


def _encoders(
    encoder: nn.Module,
    encode: Callable[[nn.Module, bool], Tensor],
    context: int,
    settings: BenchSettings,
    precision: Precision,
) -> Step:
    """Return a call of the target encoder's forward and the context encoder's both passes."""
    encoder = encoder.to(settings.device).train()
    target = copy.deepcopy(encoder).requires_grad_(False).eval()

    def step(number: int) -> Seen:
        with _autocast(settings, precision):
            with torch.no_grad():
                encode(target, True)
            loss = encode(encoder, False).square().mean()
        loss.backward()
        encoder.zero_grad()
        return context, 0

    return step


def _timm_vit(settings: BenchSettings, **more: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = ENCODER_SIZES[settings.encoder]
    return VisionTransformer(
        img_size=settings.img_size,
        patch_size=settings.patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        class_token=False,
        global_pool="",
        **more,
    )


def _images(settings: BenchSettings) -> Tensor:
    """Return normalised images [B, 3, H, W] on the device."""
    return normalize(bench.images(settings), bench.MEAN, bench.STD)


def _autocast(settings: BenchSettings, precision: Precision) -> torch.autocast:
    device = torch.device(settings.device).type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


PEERS = (
    Peer("lightly", "1.6.0", "step", _lightly),
    Peer("stable-pretraining", "0.1.8", "step", _stable_pretraining),
    Peer("timm", "1.0.31", "encoders", _timm),
    Peer("transformers", "5.23.0", "encoders", _transformers),
)
