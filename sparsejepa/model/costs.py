"""Operations, memory traffic and parameters of one training step, from the sizes alone.

Operations are those of matrix products, two per multiply-add, as every published count has them;
pointwise work is left out of them (it is what the traffic is for), as are the regularisers (less
than 1 %). Traffic assumes that every operation reads its inputs and writes its outputs once, in the
compute type; that attention is one operation (its probabilities stay on the chip) and bias,
normalisation, GELU and residual sum are one each; that a weight is read once per product; and that
the optimiser works on fp32 values. What a cache or a fused kernel saves is not taken off.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sparsejepa.config import Config
from sparsejepa.model.encoder import stem_sides
from sparsejepa.model.groups import partition_cells

Kind = Literal["forward", "input gradient", "weight gradient"]
Part = Literal["augmentation", "target", "context", "predictor", "groups"]

GROUP_HIDDEN = 64  # GroupMap's own default
FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """What the cost of a step depends on."""

    batch: int
    grid: tuple[int, int]
    """Rows and columns of patches."""
    patch_size: int
    context: int
    """Patches that the context encoder sees, C."""
    num_targets: int
    """Target blocks per image, M; 1 if they are merged."""
    target: int
    """Patches in a target block, K."""
    width: int
    depth: int
    predictor: str = "transformer"
    predictor_pass: str = "blocks"
    predictor_dim: int = 128
    predictor_depth: int = 4
    groups: str = "none"
    num_groups: int = 16
    group_dim: int = 12
    kl: bool = False
    """Whether the aggregate KL term is there."""
    stem: str = "linear"
    predict: str = "embeddings"
    heads: int = 1
    """Attention heads of the encoder; no count of operations depends on it."""

    @classmethod
    def of(
        cls, config: Config, grid: tuple[int, int], context: int, num_targets: int, target: int
    ) -> Sizes:
        """Return the sizes of a run's step whose masks are [B, context], [B, num_targets, target].

        `grid` is the rows and columns of patches.
        """
        model, groups = config.model, config.groups
        return cls(
            batch=config.optim.batch_size,
            grid=grid,
            patch_size=model.patch_size,
            context=context,
            num_targets=num_targets,
            target=target,
            width=config.encoder_shape[0],
            depth=config.encoder_shape[1],
            predictor=model.predictor,
            predictor_pass=model.predictor_pass,
            predictor_dim=model.predictor_dim,
            predictor_depth=model.predictor_depth,
            groups=groups.groups,
            num_groups=groups.num_groups,
            group_dim=config.group_dim,
            kl=config.loss.kl == "aggregate" and config.loss.beta > 0,
            stem=model.stem,
            predict=config.loss.predict,
            heads=config.encoder_shape[2],
        )

    @property
    def patches(self) -> int:
        """Patches of an image, N."""
        return math.prod(self.grid)

    @property
    def out(self) -> int:
        """Width of what is predicted of a patch."""
        return 3 * self.patch_size**2 if self.predict == "pixels" else self.width

    @property
    def stages(self) -> list[tuple[int, int, int]]:
        """The maps from a patch to its token: how many per patch, inputs, outputs."""
        d, places = self.width, self.patch_size
        if self.stem == "linear":
            return [(1, 3 * places**2, d)]
        found, before = [], 3
        for side in stem_sides(places):
            places //= side
            after = d if places == 1 else max(1, d // 4)
            found.append((places**2, side**2 * before, after))
            before = after
        return found


class Product(NamedTuple):
    """A product of [m, k] with [k, n] that a step takes `count` times."""

    name: str
    m: int
    k: int
    n: int
    count: int
    kind: Kind

    @property
    def flops(self) -> int:
        """Operations of all `count` of them."""
        return 2 * self.m * self.k * self.n * self.count


class Cost(NamedTuple):
    """Operations and bytes moved."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Linear(NamedTuple):
    """[rows, inputs] times a weight, in `batch` independent products, `count` times a step."""

    part: Part
    name: str
    rows: int
    inputs: int
    outputs: int
    count: int = 1
    batch: int = 1
    input_gradient: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs * self.batch

    @property
    def weight(self) -> int:
        return self.inputs * self.outputs * self.batch

    def forward(self) -> tuple[int, int]:
        """Return operations and elements moved of one."""
        return self.flops, self.batch * self.rows * (self.inputs + self.outputs) + self.weight

    def backward(self) -> tuple[int, int]:
        operations, moved = self.forward()
        # Each gradient reads that of the output; one writes the input's, one reads the input.
        return operations * (1 + self.input_gradient), moved * (1 + self.input_gradient)

    @property
    def saved(self) -> int:
        """Numbers that the backward pass keeps of all of them."""
        return self.batch * self.rows * self.inputs * self.count


class Attention(NamedTuple):
    """Attention of `queries` to `keys` in `sequences` sequences, all heads together `width`."""

    part: Part
    name: str
    sequences: int
    queries: int
    keys: int
    width: int
    count: int = 1

    def forward(self) -> tuple[int, int]:
        operations = 4 * self.sequences * self.queries * self.keys * self.width
        return operations, 2 * self.sequences * (self.queries + self.keys) * self.width

    def backward(self) -> tuple[int, int]:
        operations, moved = self.forward()  # reads q, k, v, output, its gradient; writes three
        return 2 * operations, 2 * moved

    @property
    def saved(self) -> int:
        """Numbers that the backward pass keeps of all of them: query, key, value, output."""
        return 2 * self.sequences * (self.queries + self.keys) * self.width * self.count

    @property
    def logits(self) -> int:
        """Pairs of query and key in all of them, one head."""
        return self.sequences * self.queries * self.keys * self.count


class Pointwise(NamedTuple):
    """An operation on `elements` numbers: how many arrays of them it moves, there and back."""

    part: Part
    name: str
    elements: int
    moves: int = 2
    moves_back: int = 3
    count: int = 1

    def forward(self) -> tuple[int, int]:
        return 0, self.elements * self.moves

    def backward(self) -> tuple[int, int]:
        return 0, self.elements * self.moves_back

    @property
    def saved(self) -> int:
        """Numbers that the backward pass keeps of all of them."""
        return self.elements * self.count if self.moves == 2 else 0  # a sum keeps nothing


Operation = Linear | Attention | Pointwise


def products(sizes: Sizes) -> list[Product]:
    """Return the products of the linear layers of target encoder, context encoder and predictor.

    Forward is x W^T, the input gradient dY W, the weight gradient dY^T x; the target encoder has
    only the first. Attention and the group map are not among them.
    """
    found = []
    for layer in operations(sizes):
        if not isinstance(layer, Linear) or layer.part not in ("target", "context", "predictor"):
            continue
        name, rows, inputs, outputs, count = (f"{layer.part} {layer.name}", *layer[2:6])
        found.append(Product(name, rows, inputs, outputs, count, "forward"))
        if layer.part != "target":
            if layer.input_gradient:
                found.append(Product(name, rows, outputs, inputs, count, "input gradient"))
            found.append(Product(name, outputs, rows, inputs, count, "weight gradient"))
    return found


def costs(sizes: Sizes, element_size: int = 2) -> dict[str, Cost]:
    """Return the cost of one step by part, in the order of the step.

    Args:
        sizes: of the step.
        element_size: bytes of a number in the compute type, 2 for bf16.
    """
    parts = {name: Cost(0, 0) for name in ("augmentation", "target", "context", "predictor")}
    parts |= {"groups": Cost(0, 0), "backward": Cost(0, 0)}
    for operation in operations(sizes):
        flops, moved = operation.forward()
        size = FP32 if operation.part == "augmentation" else element_size
        parts[operation.part] += Cost(flops * operation.count, moved * operation.count * size)
        if operation.part not in ("augmentation", "target"):
            flops, moved = operation.backward()
            moved *= element_size
            parts["backward"] += Cost(flops * operation.count, moved * operation.count)
    if sizes.kl:  # the Cholesky factor's gradient is one more product of D x D matrices
        parts["backward"] += Cost(2 * sizes.width**3, 0)
    encoder, predictor, groups, w = parameters(sizes).values()
    trained = encoder + predictor + groups
    # Clipping reads the gradient, scales it; AdamW reads gradient, weight and two moments and
    # writes three of them; the EMA reads two weights and writes one, the prox W some times.
    parts["optimiser"] = Cost(0, FP32 * 10 * trained)
    parts["prox + EMA"] = Cost(0, FP32 * (3 * encoder + 8 * w))
    return parts


def total(parts: dict[str, Cost]) -> Cost:
    """Return the sum of all parts."""
    return sum(parts.values(), Cost(0, 0))


def repeated(sizes: Sizes, parts: Collection[Part]) -> int:
    """Return the operations that are taken twice if the blocks of `parts` are not kept.

    All of a block but its last product, whose result no gradient needs.
    """
    again = ("qkv", "attention", "proj", "fc1")
    return sum(
        operation.forward()[0] * operation.count
        for operation in operations(sizes)
        if operation.part in parts and operation.name.partition(",")[0] in again
    )


def parameters(sizes: Sizes) -> dict[str, int]:
    """Return the trained numbers of encoder, predictor, group networks, and W."""
    d, p, g = sizes.width, sizes.predictor_dim, sizes.num_groups
    biases = 1 if sizes.stem == "linear" else 3  # the other stem's stages end in a norm
    stem = sum((inputs + biases) * outputs for _, inputs, outputs in sizes.stages)
    encoder = stem + sizes.depth * block_parameters(d) + 2 * d
    last = (p + 1) * sizes.out
    predictor = (d + 1) * p + sizes.predictor_depth * block_parameters(p) + 2 * p + p + last
    if sizes.predictor == "mlp":
        predictor = (d + 1) * p + p * p + (sizes.predictor_depth - 1) * (p + 1) * p + last
    hidden, out = GROUP_HIDDEN, sizes.out // g if sizes.groups == "feature" else sizes.out
    groups = {
        "none": 0,
        "region": g * hidden * (sizes.group_dim + 1 + out) + sizes.patches * hidden + g * out,
        # key, value and four maps of the position, mask token, M, b; then B and c.
        "concept": g * hidden * (2 * sizes.group_dim + 5 * hidden + 2) + g * out * (hidden + 1),
    }["concept" if sizes.groups == "feature" else sizes.groups]
    w = g * sizes.group_dim * d if sizes.groups != "none" else 0
    return {"encoder": encoder, "predictor": predictor, "groups": groups, "W": w}


def block_parameters(width: int) -> int:
    """Return the trained numbers of a transformer block."""
    return 12 * width * width + 13 * width


def operations(sizes: Sizes) -> list[Operation]:
    """Return the operations of the forward pass."""
    side, batch = sizes.patch_size, sizes.batch
    height, width = (side * count for count in sizes.grid)
    # Crop, flip and resize: two products with a pair of weight matrices per image.
    operations: list[Operation] = [
        Linear("augmentation", "rows", height, height, 3 * width, batch=batch),
        Linear("augmentation", "columns", 3 * height, width, width, batch=batch),
        Pointwise("augmentation", "normalise", batch * 3 * height * width),
    ]
    if sizes.predict == "embeddings":
        operations += _encoder(sizes, "target", sizes.patches)
    operations.append(Pointwise("target", "normalise", batch * sizes.patches * sizes.out))
    operations += _encoder(sizes, "context", sizes.context)
    operations += _mlp(sizes) if sizes.predictor == "mlp" else _predictor(sizes)
    return operations + _groups(sizes)


def _encoder(sizes: Sizes, part: Part, tokens: int) -> list[Operation]:
    rows, d = sizes.batch * tokens, sizes.width
    stem: list[Operation] = []
    for i, (places, inputs, outputs) in enumerate(sizes.stages):
        if i:
            stem.append(Pointwise(part, "gelu, patches", rows * places * inputs))
        name = "patches" if i == 0 else f"patches, stage {i + 1}"
        stem.append(Linear(part, name, rows * places, inputs, outputs, input_gradient=i > 0))
        if sizes.stem != "linear":
            stem.append(Pointwise(part, "norm, patches", rows * places * outputs))
    attention = Attention(part, "attention", sizes.batch, tokens, tokens, d, sizes.depth)
    return [
        *stem,
        *_blocks(part, rows, d, sizes.depth, [attention]),
        Pointwise(part, "norm", rows * d),
    ]


def _blocks(
    part: Part,
    rows: int,
    d: int,
    depth: int,
    attention: list[Attention],
    asked: int | None = None,
) -> list[Operation]:
    """Return the operations of `depth` blocks, the last with outputs for `asked` rows only."""
    operations: list[Operation] = [
        Pointwise(part, "norm", rows * d, count=depth),
        Linear(part, "qkv", rows, d, 3 * d, depth),
        *attention,
    ]
    for label, tokens, count in (
        ("", rows, depth if asked is None else depth - 1),
        (", last", asked or 0, 0 if asked is None else 1),
    ):
        if count:
            operations += [
                Linear(part, f"proj{label}", tokens, d, d, count),
                Pointwise(part, f"norm{label}", tokens * d, count=count),
                Linear(part, f"fc1{label}", tokens, d, 4 * d, count),
                Pointwise(part, f"gelu{label}", tokens * 4 * d, count=count),
                Linear(part, f"fc2{label}", tokens, 4 * d, d, count),
                Pointwise(part, f"residual{label}", tokens * d, 3, 3, count=2 * count),
            ]
    return operations


def _predictor(sizes: Sizes) -> list[Operation]:
    b, c, m, k = sizes.batch, sizes.context, sizes.num_targets, sizes.target
    d, dim, depth = sizes.width, sizes.predictor_dim, sizes.predictor_depth
    part: Part = "predictor"
    # One sequence per block, or one of all of them (what its mask hides is computed as well).
    sequences, tokens = (b, c + m * k) if sizes.predictor_pass == "packed" else (b * m, c + k)
    rows, asked = sequences * tokens, b * m * k
    every = Attention(part, "attention", sequences, tokens, tokens, dim, depth - 1)
    # In the last block only the tokens that are asked for are more than keys and values.
    last = Attention(part, "attention, last", sequences, asked // sequences, tokens, dim)
    return [
        Linear(part, "embed", b * c, d, dim),
        *_blocks(part, rows, dim, depth, [every, last], asked),
        Pointwise(part, "norm", asked * dim),
        Linear(part, "out", asked, dim, sizes.out),
        Pointwise(part, "loss", b * m * k * sizes.out, 2, 2),
    ]


def _mlp(sizes: Sizes) -> list[Operation]:
    rows, dim = sizes.batch * sizes.num_targets * sizes.target, sizes.predictor_dim
    part: Part = "predictor"
    return [
        Linear(part, "embed", sizes.batch, sizes.width, dim),
        Linear(part, "positions", sizes.patches, dim, dim, input_gradient=False),
        Linear(part, "hidden", rows, dim, dim, sizes.predictor_depth - 1),
        Pointwise(part, "gelu", rows * dim, count=sizes.predictor_depth),
        Linear(part, "out", rows, dim, sizes.out),
        Pointwise(part, "loss", rows * sizes.out, 2, 2),
    ]


def _groups(sizes: Sizes) -> list[Operation]:
    part: Part = "groups"
    b, d, g, p, h = sizes.batch, sizes.width, sizes.num_groups, sizes.group_dim, GROUP_HIDDEN
    out = sizes.out
    # The covariance of the pooled context; both factors carry a gradient.
    operations: list[Operation] = [Linear(part, "covariance", d, b, d)] if sizes.kl else []
    if sizes.groups == "none":
        return operations
    if sizes.groups == "region":
        cell = int(partition_cells(sizes.grid, g).bincount().max())
        return [
            *operations,
            Linear(part, "W", b, d, g * p),
            Linear(part, "A", b, p, h, batch=g),
            Pointwise(part, "gelu", g * b * cell * h),
            Linear(part, "B", b * cell, h, out, batch=g),
            Pointwise(part, "gather, loss", b * (sizes.patches - sizes.context) * out, 4, 4),
        ]
    rows = b * sizes.num_targets * sizes.target
    last = Linear(part, "B", rows, g * h, out)
    if sizes.groups == "feature":
        last = Linear(part, "B", rows, h, out // g, batch=g)
    return [
        *operations,
        Pointwise(part, "norm", b * sizes.context * d),
        Linear(part, "W", b * sizes.context, d, g * p),
        Linear(part, "E", sizes.patches, h, 4 * h, batch=g, input_gradient=False),
        Linear(part, "A", b * sizes.context, p, 2 * h, batch=g),
        Attention(part, "attention", g * b, rows // b, sizes.context, h),
        Linear(part, "M", rows, h, h, batch=g),
        Pointwise(part, "gelu", rows * g * h),
        last,
        Pointwise(part, "loss", rows * out, 2, 2),
    ]
