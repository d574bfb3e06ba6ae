"""The model card of an exported encoder: what it is, how it is used, its numbers and its groups.

The card is Markdown that strangers read, from files that may be a stranger's: texts are escaped or
lie in a fenced block that they cannot leave, and no path of the machine gets into it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from sparsejepa import version
from sparsejepa.config import Config, load_toml
from sparsejepa.errors import UserError
from sparsejepa.files import read_json
from sparsejepa.model.groups import GroupMap
from sparsejepa.results import read_rows, versions

PAGE = "report.html"
"""Name of the page of ``explain``, in a run directory and beside the card."""
_FROM_INIT = {"encoder", "patch_size"}
"""What the encoder of --init decides: filled in in a run's settings, but not in a sweep's."""
_FINAL = {
    "knn": "accuracy of nearest neighbours while training",
    "rankme": "RankMe (effective rank of the pooled features)",
    "density": "share of latent-group connections that are not zero",
    "groups_per_latent": "groups per latent",
    "dead_groups": "groups without any latent",
    "loss": "training loss at the end",
}
_USE = """\
```python
import sparsejepa as sj

model = sj.SparseJEPAEncoder.from_pretrained("{name}")
pixels = model.preprocess(images)  # files, PIL images or uint8 [B, H, W, 3]
found = model(pixels)  # {outputs}
```
"""


def public_name(ref: str) -> str:
    """Return the name of a data set or an encoder without the folders of this machine."""
    return ref if ref.startswith(("hub:", "timm:")) else Path(ref).name


def model_card(
    name: str,
    architecture: Mapping[str, Any],
    groups: GroupMap | None = None,
    *,
    run_dir: Path | None = None,
    license: str | None = None,
    page: bool = False,
) -> str:
    """Return the text of README.md.

    Args:
        name: of the model, as `from_pretrained` takes it.
        architecture: that of the `Encoder`.
        run_dir: where summary.json, config.toml, metrics.json and the results of a sweep may be.
        license: of the weights, if their publisher states one.
        page: whether report.html lies beside the card.
    """
    outputs = "tokens [B, N, D], pooled [B, D]"
    if groups is not None:
        outputs += ", groups [B, G]" + ("" if groups.kind == "region" else ", group_map [B, N, G]")
    parts = [
        front_matter(license),
        f"# {_text(name)}\n",
        "A vision transformer that was trained without labels, as a frozen encoder of images.\n",
        _table(("", ""), _architecture(architecture).items()),
        "## How to use it\n",
        _USE.format(name=re.sub(r'["\\\s`]', "-", name), outputs=outputs),
    ]
    if license:
        parts.insert(3, f"The weights are under this licence: {_text(license)}.\n")
    if groups is not None:
        parts += ["## Groups\n", _groups(groups, page)]
    elif page:
        parts += ["`report.html` shows what the model has learned.\n"]
    if run_dir is not None:
        parts += _numbers(run_dir)
    return "\n".join(parts)


def front_matter(license: str | None, library: str = "sparsejepa") -> str:
    """Return the first lines of a card, which the hub and `load` read the licence from."""
    lines = [f"library_name: {library}", "pipeline_tag: image-feature-extraction"]
    if license:
        lines.append(f"license: {license_name(license)}")
    return "\n".join(["---", *lines, "tags:", "- sparsejepa", "- jepa", "---", ""])


def license_name(license: str) -> str:
    """Return a licence as the hub names it: ``CC BY-NC 4.0 (...)`` is cc-by-nc-4.0."""
    return re.sub("[^a-z0-9.]+", "-", license.lower().split(" (")[0]).strip("-")


def _architecture(arch: Mapping[str, Any]) -> dict[str, Any]:
    height, width = arch["img_size"]
    rows, cols = height // arch["patch_size"][0], width // arch["patch_size"][1]
    return {
        "images": f"{height} x {width} pixels, {rows} x {cols} patches",
        "width D": arch["embed_dim"],
        "blocks": arch["depth"],
        "heads": arch["num_heads"],
        "mean of the pixels": ", ".join(f"{x:.4f}" for x in arch["mean"]),
        "standard deviation": ", ".join(f"{x:.4f}" for x in arch["std"]),
    }


def _groups(groups: GroupMap, page: bool) -> str:
    norms = groups.block_norms().detach()
    kinds = {
        "region": "a group is a cell of the image",
        "concept": "groups are learned",
        "feature": "a group is a part of the embedding that it predicts",
    }
    shown = " `report.html` shows each of them." if page else ""
    return (
        f"{len(norms)} groups of kind {groups.kind}: {kinds[groups.kind]}. Of the connections "
        f"between latents and groups {float((norms > 0).float().mean()):.1%} are not zero; "
        f"{int((norms > 0).any(1).logical_not().sum())} groups have none.{shown}\n\n"
        "A group's activation is ||W z|| in units of its root mean square over training images.\n"
    )


def _numbers(run_dir: Path) -> list[str]:
    """Return the sections on training, probes and measures, as far as there are files of them."""
    parts = []
    settings = run_dir / "config.toml"
    if settings.is_file():
        config = Config.from_dict(load_toml(settings), str(settings)).replace(data_root=None)
        probes = _probes(run_dir, config)
        if probes:
            header = ("data", "target", "protocol", "accuracy", "untrained", "raw pixels")
            parts += ["## Probes\n", _table(header, probes)]
        parts += ["## Training\n", _final(run_dir / "summary.json")]
        named = {"data": config.data, "init": config.model.init, "pattern": config.groups.pattern}
        public = {key: name and public_name(name) for key, name in named.items()}
        shown = config.replace(**public).to_dict()
        parts += ["All settings:\n", f"~~~~toml\n{tomli_w.dumps(shown)}~~~~\n"]
    measures = run_dir / "metrics.json"
    if measures.is_file():
        parts += ["## Measures\n", _measures(measures)]
    return parts


def _final(path: Path) -> str:
    found = read_json(path) if path.is_file() else {}
    try:
        final = dict(found.get("final", {}))
        rows = [(f"{found[name]:,}", name) for name in ("steps", "images") if name in found]
        facts = [(about, f"{final[k]:.4g}") for k, about in _FINAL.items() if k in final]
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path}: damaged; copy the run again, or train it again") from None
    return _table(("", ""), [(name, value) for value, name in rows] + facts)


def _probes(run_dir: Path, config: Config) -> list[Sequence[str]]:
    """Return the lines on this run that a sweep wrote beside the run directories."""
    own = _compared(config)
    summary = run_dir / "summary.json"
    about = read_json(summary) if summary.is_file() else {"train_version": version.TRAIN_VERSION}
    trained = about.get("train_version", 1) if isinstance(about, dict) else 1
    rows: list[Sequence[str]] = []
    for row in read_rows(run_dir.resolve().parent / "results.jsonl"):
        try:
            theirs = Config.from_dict(row["settings"], "results").replace(data_root=None)
            if _compared(theirs) != own or versions(row)[0] != trained:
                continue
            rows += [
                (
                    public_name(probe["data"]),
                    probe["target"],
                    probe["protocol"],
                    *(_percent(probe.get(k)) for k in ("accuracy", "untrained", "pixels")),
                )
                for probe in row["probes"]
            ]
        except (LookupError, TypeError, ValueError, AttributeError):
            continue  # another version's line, or a damaged one: it is not this run's
    return rows


def _compared(config: Config) -> dict[str, Any]:
    """Return the settings that tell one run of a sweep from another."""
    left_out = _FROM_INIT if config.model.init else set[str]()
    return {name: value for name, value in config.flat().items() if name not in left_out}


def _measures(path: Path) -> str:
    found = read_json(path)
    try:
        rows = []
        for row in found["measures"]:
            own, floor = (_value(row["values"].get(k)) for k in ("this run", "untrained"))
            rows.append((row["section"], row["name"], own, floor, row["unit"]))
        text = f"{_text(found['verdict'])}\n\nOn {_text(public_name(found['data']))}:\n\n"
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: damaged; make it anew with sparsejepa explain") from None
    return text + _table(("section", "measure", "this model", "untrained", "unit"), rows)


def _value(estimate: Mapping[str, Any] | None) -> str:
    value = None if estimate is None else estimate["value"]
    return "" if value is None else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_text(str(cell)) for cell in line)} |\n" for line in lines)


def _text(text: str) -> str:
    """Return a text that is neither markup nor the end of a table's cell."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text)
