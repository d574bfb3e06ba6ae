"""The names of a ViT's tensors: other programs' names to those of timm, which are ours.

A file of weights often holds more than the encoder: other models, heads, an optimiser's state. Here
it is decided which part is the encoder, what its tensors are called, and what is left out; all of
it is written down in a `Report`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# transformers' names within a block and ours; the part before them is "encoder.layer.N.".
_BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# The names that the modules of transformers 5 have; its files keep those above.
_NEWER = {"attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_AROUND = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_QKV = {"query": 0, "key": 1, "value": 2, "q_proj": 0, "k_proj": 1, "v_proj": 2}
_FIRST = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
# Several models in one file: the better choice first. The EMA teacher is the one that is probed,
# of MoCo v3's two encoders the trained one.
_BEST = ("target", "teacher", "ema", "base_encoder")
_WORST = ("student", "momentum", "decoder", "predictor")
# What lies beside the encoder, and why it is left out.
_BESIDE = {
    r"(head|heads|classifier|head_dist|fc|pre_logits|fc_norm|projector|projection_head)\.": "head",
    r"pooler\.": "pooler, which nothing here reads",
    r"(decoder_.*|decoder\..*|mask_token|embeddings\.mask_token)$": "only for pretraining",
}
# What a ViT may have and ours has not.
_FOREIGN = {
    r"\bls[12]\b|\bgamma(_[12])?$|layer_scale|lambda1": "layer scale",
    r"reg_token|register_tokens|storage_tokens": "register tokens",
    r"dist_token|distillation_token": "a distillation token",
    r"[qk]_norm|norm_[qk]\b": "normalised queries and keys",
    r"rel_pos|relative_position|rope": "relative positions",
    r"mlp\.(w12|w3|fc1_[gx]|weights_(in|out)|gate_proj|norm\b)": "a gated MLP (SwiGLU)",
    r"norm_pre|pre_layernorm|pre_layrnorm": "a norm before the blocks",
    r"patch_embed\.(?!proj\.(weight|bias)$)": "another stem",
}


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a foreign file.

    Attributes:
        part: what the names of the encoder's tensors begin with in the file.
        matched: tensors whose names are ours as they stand, but for `part`.
        renamed: {name in the file: ours}.
        ignored: {name in the file: reason}.
        missing: ours that the file lacks; biases, for which zeros stand in.
    """

    part: str
    matched: tuple[str, ...]
    renamed: dict[str, str]
    ignored: dict[str, str]
    missing: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return the report as a few JSON-able lines: counts, and one name for each."""
        ignored = Counter(self.ignored.values())
        first = {reason: name for name, reason in reversed(self.ignored.items())}
        old, new = next(iter(self.renamed.items()), ("", ""))
        return {
            "part": self.part or "the whole file",
            "matched": len(self.matched),
            "renamed": f"{len(self.renamed)} ({old} is {new})" if self.renamed else 0,
            "ignored": [f"{n} of {why}: {first[why]}" for why, n in ignored.items()],
            "missing": f"{len(self.missing)} biases, zero" if self.missing else 0,
        }


def choose_part(names: Iterable[str]) -> str | None:
    """Return what the names of the encoder's tensors begin with; None if there is no ViT."""
    found = [n.removesuffix(first) for n in names for first in _FIRST if n.endswith(first)]

    def rank(part: str) -> tuple[int, int]:
        good = next((i for i, word in enumerate(_BEST) if word in part), len(_BEST))
        return good + 10 * any(word in part for word in _WORST), len(part)

    whole = (part for part in found if part == "" or part.endswith("."))
    return min(whole, key=rank, default=None)


def translate(name: str) -> tuple[str, int | None]:
    """Return our name of a tensor, and which third of it if it is only a query, key or value.

    A name that is none of transformers' comes back as it is.
    """
    if name in _AROUND:
        return _AROUND[name], None
    block = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        return name, None
    number, middle, kind = block.groups()
    head, _, last = middle.rpartition(".")
    if head in ("attention", "attention.attention") and last in _QKV:
        return f"blocks.{number}.attn.qkv.{kind}", _QKV[last]
    ours = (_BLOCK | _NEWER).get(middle)
    return (name if ours is None else f"blocks.{number}.{ours}.{kind}"), None


def transformers_name(name: str) -> str:
    """Return the name in transformers' files of one of our tensors, queries, keys, values apart."""
    around = {ours: theirs for theirs, ours in _AROUND.items()}
    if name in around:
        return around[name]
    _, number, middle, kind = re.fullmatch(r"(blocks)\.(\d+)\.(.+)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
    theirs = next(theirs for theirs, ours in _BLOCK.items() if ours == middle)
    return f"encoder.layer.{number}.{theirs}.{kind}"


def beside(name: str) -> str | None:
    """Return why a tensor within the encoder's part is left out, None if it is not."""
    return next((why for pattern, why in _BESIDE.items() if re.match(pattern, name)), None)


def describe_foreign(names: Iterable[str]) -> str:
    """Return in words what models with these tensors have and ours has not; "" if unknown."""
    text = "\n".join(names)
    found = [what for like, what in _FOREIGN.items() if re.search(like, text, re.MULTILINE)]
    return " and ".join(found)
