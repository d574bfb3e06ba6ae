"""Bytes that one training step holds at its peak, by part, from the sizes alone.

Weights, gradients, moments and the target encoder are fp32. What the backward pass keeps is counted
operation by operation, in the compute type, with what is special on a device:

- bf16 on a GPU: layer norms run in fp32 and keep their input so; fused attention writes its output
  where the projection reads it; every weight has a copy in bf16 until its gradient is there.
- bf16 on the CPU: the same copies; attention is written out (it is faster there than the fused
  kernel), so its probabilities and the scaled queries are kept instead of its output.
- fp32: attention is fused, its output is kept twice (before and after its heads are joined).

Allocators, libraries, communication buffers and scratch space come on top: `tests` and
docs/scaling.md say how near the sum is to what torch allocates.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from sparsejepa.model.costs import (
    FP32,
    Attention,
    Operation,
    Part,
    Sizes,
    block_parameters,
    operations,
    parameters,
)


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: float
    gradients: float
    moments: float
    """Of AdamW, two per weight but W's."""
    target: float
    """The target encoder, an average of the context encoder."""
    gathered: float
    """fsdp: whole blocks, gathered for as long as they compute."""
    copies: float
    """Weights in the compute type."""
    activations: float
    """What the backward pass keeps, of one part of the step where it is taken in parts."""
    images: float
    together: bool
    """Whether all gradients are there while activations are: with several processes (their buckets
    stay) or in the later parts of a step. Otherwise gradients come as activations go."""

    @property
    def state(self) -> float:
        """What is there between steps."""
        return self.weights + self.moments + self.target

    @property
    def peak(self) -> float:
        """All that is there at once."""
        kept = self.activations + self.copies
        varying = kept + self.gradients if self.together else max(kept, self.gradients)
        return self.state + self.gathered + self.images + varying


def memory(
    sizes: Sizes,
    element_size: int = 2,
    *,
    device: str = "cuda",
    processes: int = 1,
    sharded: bool = False,
    accumulate: int = 1,
    checkpointed: Collection[Part] = (),
) -> Memory:
    """Return the bytes that a step takes on each device.

    Args:
        sizes: of the whole step; its batch is the global one.
        element_size: bytes of the compute type, 2 for bf16.
        device: cuda or cpu.
        processes: devices that share the batch.
        sharded: each has its share of weights, gradients, moments and target (fsdp), not all (ddp);
            of a step in several parts gradients stay whole until the last, and so does the group
            map always.
        accumulate: parts in which each device takes its share of the batch.
        checkpointed: parts whose blocks are computed a second time instead of being kept.
    """
    batch = math.ceil(sizes.batch / (processes * accumulate))
    encoder, predictor, groups, w = parameters(sizes).values()
    trained = encoder + predictor + groups + w
    own = (encoder + predictor) / processes if sharded else encoder + predictor
    weights = FP32 * (own + groups + w)
    listed = operations(replace(sizes, batch=batch))
    # The whole is there once per block: computing, fetched ahead, and its gradient on its way out.
    gathered = 3 * FP32 * block_parameters(sizes.width) if sharded and processes > 1 else 0
    pixels = math.prod(sizes.grid) * sizes.patch_size**2 * 3 * batch
    return Memory(
        weights=weights,
        gradients=weights if accumulate == 1 else FP32 * trained,
        moments=2 * (weights - FP32 * w),
        target=FP32 * (encoder / processes if sharded else encoder),
        gathered=gathered,
        copies=_copies(sizes, element_size, device, checkpointed),
        activations=_activations(sizes, listed, element_size, device, checkpointed)
        + FP32 * batch * sizes.patches * sizes.out,  # the targets, until the losses are there
        images=pixels * (1 + FP32),
        together=processes > 1 or accumulate > 1,
    )


def peak_memory(sizes: Sizes, element_size: int = 2) -> float:
    """Estimate the bytes of a step in one process on the CPU; allow twice as much for the rest."""
    return memory(sizes, element_size, device="cpu").peak


def _copies(sizes: Sizes, size: int, device: str, checkpointed: Collection[Part]) -> float:
    """Return the bytes of the weights in the compute type, of which autocast keeps one each."""
    if size == FP32:
        return 0.0
    parts = parameters(sizes)
    numbers = sum(parts.values()) - parts["W"]
    # On the CPU a layer makes its own, which go with the activations of its block.
    if device == "cpu" and "context" in checkpointed:
        numbers -= (sizes.depth - 1) * block_parameters(sizes.width)
    if device == "cpu" and "predictor" in checkpointed:
        numbers -= (sizes.predictor_depth - 1) * block_parameters(sizes.predictor_dim)
    return size * numbers


def _activations(
    sizes: Sizes,
    listed: list[Operation],
    size: int,
    device: str,
    checkpointed: Collection[Part],
) -> float:
    """Return the bytes that the backward pass keeps."""
    kept = 0.0
    blocks: dict[Part, float] = dict.fromkeys(checkpointed, 0.0)
    for operation in listed:
        if operation.part in ("augmentation", "target"):
            continue
        number = _kept(sizes, operation, size, device)
        if operation.part in blocks and operation.name.partition(",")[0] in _BLOCK:
            blocks[operation.part] += number
        else:
            kept += number
    for part, number in blocks.items():
        depth = sizes.depth if part == "context" else sizes.predictor_depth
        inputs = sum(
            o.saved * size for o in listed if o.part == part and o.name == "qkv"
        )  # as large as what enters a block
        kept += inputs + number / depth
    return kept


_BLOCK = {"norm", "qkv", "attention", "proj", "fc1", "gelu", "fc2", "residual"}


def _kept(sizes: Sizes, operation: Operation, size: int, device: str) -> float:
    """Return the bytes that the backward pass keeps of an operation."""
    name = operation.name.partition(",")[0]
    if name in ("loss", "gather"):  # prediction and what it should be, both in fp32
        return 2 * FP32 * operation.elements  # type: ignore[union-attr]
    if size == FP32:
        return size * operation.saved
    if device == "cpu":
        if isinstance(operation, Attention):
            heads = sizes.heads if operation.part == "context" else sizes.predictor_dim // 32
            return size * (operation.saved + max(1, heads) * operation.logits)
    elif name == "norm":
        return FP32 * operation.saved
    elif name == "proj":
        return 0
    return size * operation.saved
