"""What a run will take, before it is started: operations, memory, messages, time and money.

Everything follows from the sizes of the model and the data sheet of a processor, but for a few
numbers that are assumptions; they are the constants below, and docs/scaling.md says where each
comes from and how far the rest is from what was measured.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from sparsejepa.benchmarks.hardware import Processor
from sparsejepa.config import ENCODER_SIZES, PRESETS, Config, preset
from sparsejepa.errors import UserError, nearest
from sparsejepa.model.costs import FP32, Cost, Part, Sizes, costs, parameters, repeated, total
from sparsejepa.model.masks import MaskSampler
from sparsejepa.model.memory import Memory, memory

MFU = 0.3
"""Share of the peak rate that a step reaches. An assumption: I-JEPA's ViT-H/14, 300 epochs on 16
A100 in under 72 hours (Assran et al. 2023, section 7), is at least 0.2 by our count of operations;
large transformers on GPUs and TPUs are reported at 0.44 to 0.55 (Narayanan et al. 2021, table 1:
44 to 52 % on A100; Dehghani et al. 2023: ViT-22B 54.9 %)."""
LINK_SHARE = 0.8
"""Share of a link's rate that collective operations reach: an assumption."""
HOP_SECONDS = 5e-6
"""Time of a message however short, times log2 of the processes for a collective: an assumption."""
BUCKET_BYTES = 25 * 2**20
"""Gradients that DDP sends at a time (torch's default)."""
NETWORK = 50e9
"""Bytes per second and GPU between machines: 400 Gb/s."""
JPEG_BYTES = 147_897_477_120 / 1_281_167
"""Bytes of an ImageNet training image: the official tar file over its images."""
IMAGENET = 1_281_167
DECODES = 280.0
"""Images of that size that a core decodes and cuts out per second: measured on a core of an EPYC
(results/loading.jsonl, 500x375 to 224)."""
ROOM = 0.85
"""Share of a processor's memory that the sum of parts may take; allocator, libraries and buffers
have the rest: an assumption."""
CHECKPOINTED: tuple[Part, ...] = ("context", "predictor")
"""What --checkpoint-activations computes a second time."""


class Fleet(NamedTuple):
    """The processors of a run."""

    processor: Processor
    count: int = 1
    per_machine: int = 8
    network: float = NETWORK
    """Bytes per second and processor between machines."""

    @property
    def link(self) -> float:
        """Bytes per second of the slowest link that a collective of all crosses."""
        inside = self.processor.link
        return LINK_SHARE * (
            inside if self.count <= self.per_machine else min(inside, self.network)
        )


class Step(NamedTuple):
    """Where the time of a step goes, in seconds."""

    compute: float
    optimiser: float
    messages: float
    """All collectives, whether anything hides them or not."""
    exposed: float
    """The part of them that nothing hides."""
    sent: float
    """Bytes that each processor sends."""
    bound: str
    """What the compute waits for: products or memory."""

    @property
    def seconds(self) -> float:
        return self.compute + self.optimiser + self.exposed


@dataclass(frozen=True)
class Prediction:
    """A run on a fleet, for which `config` says batch, parallel, accumulate and the rest.

    Raises UserError if the batch cannot be shared out, or the image does not fit.
    """

    config: Config
    fleet: Fleet
    mfu: float = MFU

    def __post_init__(self) -> None:
        self.config.check().check_image(self.img_size)
        batch, parts = self.config.optim.batch_size, self.fleet.count * self.config.optim.accumulate
        if batch % parts:
            shares = f"{self.fleet.count} GPUs times --accumulate {self.config.optim.accumulate}"
            raise UserError(
                f"--batch {batch} cannot be shared out equally to {shares}; use a multiple of "
                f"{parts}"
            )

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width; 32 if the data set would say."""
        size = self.config.images.img_size or (32,)
        return size[0], size[-1]

    @cached_property
    def shapes(self) -> list[tuple[float, Sizes]]:
        """The sizes of a step of the global batch, each with its probability."""
        patch, masks = self.config.model.patch_size, self.config.masks
        grid = (self.img_size[0] // patch, self.img_size[1] // patch)
        chances: dict[tuple[int, int], float] = {}
        for plan, chance in MaskSampler(grid, **vars(masks)).plans.items():
            key = (plan.count, math.prod(plan.target))
            chances[key] = chances.get(key, 0.0) + chance
        whole = sum(chances.values())
        return [
            (chance / whole, Sizes.of(self.config, grid, context, masks.num_targets, target))
            for (context, target), chance in chances.items()
        ]

    @property
    def largest(self) -> Sizes:
        """The sizes of the step that takes most memory."""
        return max((sizes for _, sizes in self.shapes), key=lambda s: (s.context, s.target))

    @property
    def parameters(self) -> dict[str, int]:
        """Trained numbers of encoder, predictor, group networks, and W."""
        return parameters(self.largest)

    def costs(self, batch: int) -> dict[str, Cost]:
        """Return the mean cost of `batch` images by part of the step."""
        size = 2 if self.precision == "bf16" else FP32
        found: dict[str, Cost] = {}
        for chance, sizes in self.shapes:
            for part, cost in costs(replace(sizes, batch=batch), size).items():
                more = Cost(chance * cost.flops, chance * cost.bytes)
                found[part] = found.get(part, Cost(0, 0)) + more
        return found

    @property
    def precision(self) -> str:
        """The compute type on this processor."""
        return self.fleet.processor.peak(self.config.optim.precision)[0]

    def flops_per_image(self) -> dict[str, float]:
        """Return the operations that an image takes: forward, backward and what is repeated."""
        batch = self.config.optim.batch_size
        parts = {name: cost.flops / batch for name, cost in self.costs(batch).items()}
        del parts["augmentation"]
        backward = parts["backward"]
        again = 0.0
        if self.config.run.checkpoint_activations:
            again = sum(chance * repeated(s, CHECKPOINTED) for chance, s in self.shapes) / batch
        return {"forward": sum(parts.values()) - backward, "backward": backward, "repeated": again}

    def memory(
        self, parallel: str | None = None, checkpoint: bool | None = None, accumulate: int = 0
    ) -> Memory:
        """Return the bytes per processor; what is not given is the run's own setting."""
        run = self.config.run
        wanted = run.checkpoint_activations if checkpoint is None else checkpoint
        return memory(
            self.largest,
            2 if self.precision == "bf16" else FP32,
            device="cpu" if self.fleet.processor.linked_by == "memory" else "cuda",
            processes=self.fleet.count,
            sharded=(parallel or run.parallel) == "fsdp",
            accumulate=accumulate or self.config.optim.accumulate,
            checkpointed=CHECKPOINTED if wanted else (),
        )

    def step(self) -> Step:
        """Return where the time of a step goes."""
        fleet, config = self.fleet, self.config
        chip, n, parts = fleet.processor, fleet.count, config.optim.accumulate
        sharded = config.run.parallel == "fsdp" and n > 1
        flops = self.flops_per_image()
        local = config.optim.batch_size / n
        rate = self.mfu * chip.peak(config.optim.precision)[1]
        by_part = self.costs(max(1, round(local)))
        update = by_part.pop("optimiser") + by_part.pop("prox + EMA")
        products, traffic = (
            local * sum(flops.values()) / rate,
            total(by_part).bytes / chip.bandwidth,
        )
        # The KL term is of the global batch, in fp32, on every processor.
        others = config.optim.batch_size - local if self.largest.kl else 0
        whole = 6 * others * self.largest.width**2 / (self.mfu * chip.fp32)
        compute = max(products, traffic) + whole
        optimiser = update.bytes / chip.bandwidth / (n if sharded else 1)
        sent, calls = self._messages(sharded)
        messages = sent / fleet.link + calls * HOP_SECONDS * math.log2(n) if n > 1 else 0.0
        # Gradients of the last part alone travel under DDP, while its backward pass goes on; under
        # FSDP blocks travel all the time.
        hides = compute * (1 if sharded else flops["backward"] / sum(flops.values()) / parts)
        last = min(messages, messages / calls) if calls else 0.0
        exposed = max(0.0, messages - hides, last)
        bound = "products" if products >= traffic else "memory"
        bound = "messages" if exposed > compute else bound
        return Step(compute, optimiser, messages, exposed, sent, bound)

    def _messages(self, sharded: bool) -> tuple[float, int]:
        """Return the bytes that each processor sends in a step, and the collectives it takes."""
        n, parts = self.fleet.count, self.config.optim.accumulate
        encoder, predictor, groups, w = self.parameters.values()
        ring, whole = (n - 1) / n, FP32 * (groups + w)
        if not sharded:  # an all-reduce is a reduce-scatter and an all-gather
            size = FP32 * (encoder + predictor) + whole
            return 2 * ring * size, 2 * math.ceil(size / BUCKET_BYTES)
        # Weights are gathered forward and backward for each part, the target's forward; gradients
        # travel once, those of the group map in an all-reduce.
        own = FP32 * (encoder + predictor)
        sent = (2 * own + FP32 * encoder) * parts + own + 2 * whole
        blocks = self.largest.depth + self.largest.predictor_depth
        return ring * sent, (2 * blocks + self.largest.depth) * parts + blocks + 2

    def describe(self, images: int = IMAGENET, price: float | None = None) -> dict[str, Any]:
        """Return all that is predicted, as plain numbers with units in their names."""
        chip, step, flops = self.fleet.processor, self.step(), self.flops_per_image()
        largest, run = self.largest, self.config.run
        precision, peak = chip.peak(self.config.optim.precision)
        table = []
        for parallel in ("ddp", "fsdp") if self.fleet.count > 1 else ("ddp",):
            for checkpoint in (False, True):
                need = self.memory(parallel, checkpoint)
                changes = {"parallel": parallel, "checkpoint_activations": checkpoint}
                other = replace(self, config=self.config.replace(**changes))
                table.append(
                    {
                        "parallel": parallel,
                        "checkpoint_activations": checkpoint,
                        "state_gb": need.state / 1e9,
                        "gradients_gb": need.gradients / 1e9,
                        "gathered_gb": need.gathered / 1e9,
                        "copies_gb": need.copies / 1e9,
                        "activations_gb": need.activations / 1e9,
                        "peak_gb": need.peak / 1e9,
                        "step_seconds": other.step().seconds,
                        "fits": need.peak < ROOM * chip.memory,
                        "chosen": (parallel, checkpoint)
                        == (run.parallel, run.checkpoint_activations),
                    }
                )
        return {
            "model": {
                "encoder": self.config.model.encoder,
                "width": largest.width,
                "depth": largest.depth,
                "grid": list(largest.grid),
                "context": sorted({sizes.context for _, sizes in self.shapes}),
                "target": sorted({sizes.target for _, sizes in self.shapes}),
                "predictor": [largest.predictor_dim, largest.predictor_depth],
            },
            "parameters": self.parameters,
            "gflop_per_image": {k: v / 1e9 for k, v in flops.items()}
            | {"total": sum(flops.values()) / 1e9},
            "hardware": {
                "processor": chip.name,
                "count": self.fleet.count,
                "precision": precision,
                "peak_tflops": peak / 1e12,
                "memory_gb": chip.memory / 1e9,
                "assumed_mfu": self.mfu,
                "link_gb_per_second": self.fleet.link / 1e9,
            },
            "batch": self.config.optim.batch_size,
            "batch_per_processor": self.config.optim.batch_size // self.fleet.count,
            "accumulate": self.config.optim.accumulate,
            "memory": table,
            "step": {
                "seconds": step.seconds,
                "compute_seconds": step.compute,
                "optimiser_seconds": step.optimiser,
                "messages_seconds": step.messages,
                "exposed_seconds": step.exposed,
                "sent_gb": step.sent / 1e9,
                "bound_by": step.bound,
            },
            "images_per_second": self.data()["images_per_second"],
            "data": self.data(),
            "run": {"images": images, "epochs": self.config.optim.epochs} | self.run(images, price),
        }

    def run(self, images: int, price: float | None = None) -> dict[str, Any]:
        """Return steps, hours and cost of the whole run on `images` training images."""
        optim, seconds = self.config.optim, self.step().seconds
        if optim.batch_size > images:
            raise UserError(f"--images {images} is less than --batch {optim.batch_size}")
        steps = optim.steps or optim.epochs * (images // optim.batch_size)
        hours = steps * seconds / 3600
        found = {"steps": steps, "hours": hours, "gpu_hours": hours * self.fleet.count}
        return found | ({"cost": found["gpu_hours"] * price} if price is not None else {})

    def data(self) -> dict[str, float]:
        """Return what the images of the run ask of disks and decoders."""
        rate = self.config.optim.batch_size / self.step().seconds
        return {
            "images_per_second": rate,
            "gb_per_second": rate * JPEG_BYTES / 1e9,
            "decoding_cores": rate / DECODES,
        }


def named_model(name: str) -> Config:
    """Return the settings for a model by name: a preset, an encoder size or a timm ViT.

    ``huge`` is ``vit-h14``, ``large`` ``vit-l16``, ``base`` ``vit-b16``; smaller sizes have the
    settings of ``best`` at 32x32. A name such as ``vit_small_patch16_224`` gives size, patch and
    image; the rest is that of the preset of its size, of ``vit-b16`` for smaller ones.

    Raises UserError naming --model for anything else.
    """
    if name in PRESETS:
        return preset(name)
    large = {"base": "vit-b16", "large": "vit-l16", "huge": "vit-h14"}
    if name in large:
        return preset(large[name])
    if name in ENCODER_SIZES:
        return preset("best").replace(encoder=name)
    found = re.fullmatch(r"vit_([a-z]+)_patch(\d+)(?:_[a-z]+)*_(\d+)(?:\..*)?", name)
    if found and found[1] in ENCODER_SIZES:
        size, patch, side = found[1], int(found[2]), int(found[3])
        settings = {"encoder": size, "patch_size": patch, "img_size": (side,)}
        return preset(large.get(size, "vit-b16")).replace(**settings)
    known = list(dict.fromkeys([*ENCODER_SIZES, *PRESETS]))
    raise UserError(
        f"--model {name}: unknown{nearest(name, known)}; there are {', '.join(known)} and timm's "
        "names such as vit_small_patch16_224"
    )
