"""Code in README.md and docs/: commands parse, and each block runs on small stand-in data.

Python blocks of a page share their names and run in this process. A line of a shell block is a
process of its own, in the page's folder, where the stand-ins lie under the names that the pages
use. What cannot run here is in `NOT_RUN` with its reason. Running is slow, so only `make test-all`
does it; that commands parse and files exist is tested always.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import run as runner
from PIL import Image

from sparsejepa import cli
from sparsejepa.data import scenes
from sparsejepa.data.scenes import Scenes

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
SHELL, SHOWN = {"", "sh", "bash", "console"}, {"text", "toml", "json"}
COUNTS = {"train": 64, "test": 32}

NOT_RUN = {
    r"make\b": "sets up .venv from the network",
    r"(python3? -m )?(venv|pip)\b": "installs from the network",
    r"(torchrun|srun)\b": "several processes: tests/training/test_distributed.py starts them",
    r"HOST=\$\(scontrol\b": "asks SLURM for the name of a machine",
    r"sparsejepa demo\b": "minutes: tests/study runs the quick one from end to end",
    r"python bench/\w+\.py": "minutes: tests/test_bench.py runs each at a tiny size",
    r"python recipes/(run|search)\.py .*--budget": "minutes: tests/test_runner.py, test_search.py",
    r"python recipes/tables\.py": "writes these pages: tests/test_tables.py",
    r"sparsejepa sweep .*--slurm": "needs SLURM, for which tests have a stand-in",
    r"tensorboard\b": "serves until it is stopped",
}
"""What is not run: how a command begins, and why."""

NAMES = {"RUN": "runs/mine", "TWIN": "runs/other", "DATA": "my/images", "{000..127}": "{000..001}",
         "timm:NAME": "timm:vit_tiny_patch16_224"}  # fmt: skip
"""Words that a reader replaces, and with what."""

_TRAIN = "--encoder nano --predictor-dim 32 --predictor-depth 1 --batch-size 16 --steps 3 "
_TRAIN += "--warmup 0.2 --threads 1 --device cpu --workers 1"
SHORTER = {
    "pretrain": _TRAIN,
    "sweep": f"{_TRAIN} --img-size 32 --patch-size 8 --seeds 1 --jobs 1 --lam 0.01",
    "probe": "--limit 40",
    "explain": "--quick --limit 48 --test-limit 32 --fit-steps 6",
    "masks": "--batches 3",
    "own_groups.py": "--steps 3",
    "own_dataset.py": "--images 100 --steps 2",
    "own_metric.py": "--images 24",
    "minimal.py": "--steps 2 --images 60",
}
"""Flags that make a command or script short, by verb or file."""

SHORTER_PYTHON = (
    (r"\bepochs=\d+", "steps=1, limit=64, batch_size=16, patch_size=8"),
    (r"\bsteps=\d+", "steps=3"),
    (r"\bseeds=\d+", "seeds=1"),
    (r'data="scenes"', 'data="my/images", img_size=32, patch_size=8'),
    (r'"timm:[\w.]+"', '"timm:test_vit?untrained"'),
    (r"PostHocGroups\((?=\w)", "PostHocGroups(steps=8, "),
)

SMALLER = (
    (r"^timm:[\w.]+$", "timm:test_vit?untrained"),  # weights would come from the network
    (r"^runs/explain-vit_\w+$", "runs/explain-test_vit-untrained"),
    (r"^224$", "64"),
)
"""Words of a shell line, and what stands in for them."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line is, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def commands(self) -> list[tuple[int, str]]:
        """Return (line, command) of a shell block."""
        found, number = [], self.line
        lines = iter(self.text.splitlines())
        for line in lines:
            start, text = number, line
            number += 1
            while text.endswith("\\") or _open_quote(text):
                text = f"{text.removesuffix(chr(92))} {next(lines).strip()}"
                number += 1
            text = text.strip()
            if text and not text.startswith("#"):
                found.append((start, text))
        return found


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fence = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.S | re.M)
    found = []
    for match in fence.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match[1].strip(), match[2]))
    assert text.count("```") == 2 * len(found), f"{page}: a fence is open or indented"
    return found


def _open_quote(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def words_of(command: str) -> list[str]:
    """Return a command as words, with the reader's own names filled in."""
    words = shlex.split(command, comments=True)
    for name, value in NAMES.items():
        end = r"(?![\w-])" if name[-1].isalnum() else ""
        words = [re.sub(rf"(?<!\w){re.escape(name)}{end}", value, word) for word in words]
    return words


def shortened(words: list[str], flags: str) -> list[str]:
    """Return the words with `flags` in place of what they say about the same."""
    for old, new in SMALLER:
        words = [re.sub(old, new, word) for word in words]
    if words[1:2] == ["sweep"]:  # its jobs are processes of their own, with all of the scenes
        words = ["my/images" if word == "scenes" else word for word in words]
    for item in re.findall(r"--\S+(?: +[^-\s]\S*)*", flags):
        name, *values = item.split()
        if name in words:
            first = words.index(name)
            last = first + 1
            while last < len(words) and not words[last].startswith("-"):
                last += 1
            words = words[:first] + words[last:]
        words = [*words, name, *values]
    return words


SERVER = """
import json, os, runpy, sys, traceback
import sparsejepa.explain.run, sparsejepa.study.sweep, sparsejepa.training.loop
import sparsejepa.verbs
import matplotlib.backends.backend_svg, scipy.linalg, sklearn.linear_model, timm
from sparsejepa import cli
from sparsejepa.data import scenes
from sparsejepa.evaluation.disentangle import disentanglement

scenes.SCENE_COUNTS = json.loads(sys.argv[1])
disentanglement.__kwdefaults__["folds"] = 2  # intervals take most of the time of `explain`
for line in sys.stdin:
    words, folder, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(target, 1), os.dup2(target, 2)
        os.chdir(folder)
        sys.argv, status = words, 1
        try:
            if words[0] == "sparsejepa":
                status = cli.main(words[1:])
            else:
                sys.path[0] = os.path.dirname(words[0])
                runpy.run_path(words[0], run_name="__main__")
                status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    """Runs commands and scripts in forked children of a process that has imported all they need."""

    def __init__(self, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(COUNTS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT,
        )  # fmt: skip

    def run(self, words: list[str], folder: Path) -> tuple[int, str]:
        """Return the exit status and all that was printed."""
        log = folder / ".log"
        assert self._process.stdin and self._process.stdout
        print(json.dumps([words, str(folder), str(log)]), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        return status, log.read_text(errors="replace")

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of all commands: data sets of the hub as small local copies, one thread."""
    root = tmp_path_factory.mktemp("data-root")
    write_parquet(root / "uoft-cs/cifar100/cifar100", ("fine_label", "coarse_label"))
    write_parquet(root / "uoft-cs/cifar10/plain_text", ("label",))
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **one, "SPARSEJEPA_DATA": str(root), "COLUMNS": "200"}


@pytest.fixture(scope="session")
def server(environment: dict[str, str]) -> Iterator[Server]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    server = Server(environment)
    yield server
    server.close()


@pytest.fixture(scope="session")
def stand_ins(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages speak of: my/images, photos, shards, two runs that are explained."""
    root = tmp_path_factory.mktemp("stand-ins")
    scenes = Scenes().render(np.arange(sum(COUNTS.values())), 64)
    write_factors(root / "my/images", scenes)
    write_classes(root / "photos", scenes)
    (root / "shards").mkdir()
    for number in range(2):
        write_tar(root / f"shards/train-{number:03}.tar", scenes.images, number)
    settings = f"--img-size 64 --patch-size 8 --preset nano {_TRAIN} --out runs/mine"
    for line in (
        f"pretrain my/images {settings}",
        f"explain runs/mine --data my/images {SHORTER['explain']}",
    ):
        status, said = server.run(["sparsejepa", *line.split()], root)
        assert status == 0, said
    shutil.copytree(root / "runs/mine", root / "runs/other")
    return root


def write_factors(root: Path, scenes: Any) -> None:
    """Write images/, masks/ and factors.csv."""
    rows = ["file,count,shape,split"]
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i, (image, mask) in enumerate(zip(scenes.images, scenes.masks, strict=True)):
        Image.fromarray(image).save(root / f"images/{i:03}.png")
        Image.fromarray(mask).save(root / f"masks/{i:03}.png")
        split = "train" if i < COUNTS["train"] else "test"
        rows.append(f"{i:03}.png,{scenes.factors[i, 0]},{scenes.factors[i, 1]},{split}")
    (root / "factors.csv").write_text("\n".join(rows) + "\n")


def write_classes(root: Path, scenes: Any) -> None:
    """Write train/CLASS/ and test/CLASS/."""
    for i, image in enumerate(scenes.images):
        split = "train" if i < COUNTS["train"] else "test"
        folder = root / split / ("few" if scenes.factors[i, 0] < 4 else "many")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.png")


def write_tar(path: Path, images: np.ndarray, number: int) -> None:
    """Write a webdataset shard with every second image."""
    with tarfile.open(path, "w") as tar:
        for i in range(number, len(images), 2):
            folder = path.parent / "now"
            folder.mkdir(exist_ok=True)
            Image.fromarray(images[i]).save(folder / "image.png")
            (folder / "label").write_text(str(i % 3))
            tar.add(folder / "image.png", f"{i:03}.png")
            tar.add(folder / "label", f"{i:03}.cls")
    shutil.rmtree(path.parent / "now")


def write_parquet(folder: Path, labels: tuple[str, ...]) -> None:
    """Write images of 32x32 pixels in the hub's layout."""
    scratch, rng = folder / "image.png", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in COUNTS.items():
        files = []
        for image in rng.integers(0, 256, (count, 32, 32, 3), np.uint8):
            Image.fromarray(image).save(scratch)
            files.append({"bytes": scratch.read_bytes(), "path": None})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns: dict[str, Any] = {"img": pa.array(files, kind)}
        columns |= {name: pa.array(np.arange(count) % 4) for name in labels}
        parquet.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    scratch.unlink()


@pytest.fixture
def folder(
    stand_ins: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of the stand-ins for one page, as the working directory."""
    shutil.copytree(stand_ins, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("SPARSEJEPA_DATA", environment["SPARSEJEPA_DATA"])
    monkeypatch.setattr(scenes, "SCENE_COUNTS", COUNTS)
    return tmp_path / "page"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_command_of_a_page_parses(page: str) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, page, "exec")
        elif block.language in SHELL:
            for line, command in block.commands():
                parse(f"{page}:{line}", words_of(command))
        else:
            assert block.language in SHOWN, f"{page}:{block.line}: language {block.language}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_blocks_of_a_page_run(page: str, folder: Path, server: Server) -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    fresh = {path for path in folder.glob("runs/*")}  # ours until the page makes its own
    for block in blocks(page):
        if block.language == "python":
            source = block.text
            for old, new in SHORTER_PYTHON:
                source = re.sub(old, new, source)
            where = "\n" * (block.line - 1)
            exec(compile(where + source, str(ROOT / page), "exec"), names)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language in SHELL:
            for line, command in block.commands():
                run_line(f"{page}:{line}", command, folder, server, fresh)


def run_line(where: str, command: str, folder: Path, server: Server, fresh: set) -> None:
    """Run a command, shortened, unless `NOT_RUN` says why not."""
    words = words_of(command)
    if any(re.match(beginning, command) for beginning in NOT_RUN):
        return
    if words[0] == "sparsejepa":
        name = words[1]
        out = words[words.index("--out") + 1] if "--out" in words else ""
        if name == "pretrain" and "--resume" not in words and folder / out in fresh:
            shutil.rmtree(folder / out)
            fresh.discard(folder / out)
    else:
        assert words[0] == "python", f"{where}: {words[0]} is neither run nor listed in NOT_RUN"
        words = [str(ROOT / words[1]), *words[2:]]
        name = Path(words[0]).name
    words = shortened(words, SHORTER.get(name, ""))
    status, said = server.run(words, folder)
    assert status == 0, f"{where}: {command}\n{shlex.join(words)}\n{said}"


def parse(where: str, words: list[str]) -> None:
    """Read the flags of a command with the parser that it has; of others check that they exist."""
    if "sparsejepa" in words:  # also behind a launcher
        rest = words[words.index("sparsejepa") + 1 :]
        if rest[:1] != ["--version"]:
            try:
                cli.parse(rest)
            except SystemExit as stop:  # --help
                assert stop.code == 0, where
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets), f"{where}: no such target"
    elif words[:2] == ["python", "recipes/run.py"]:
        runner.parse(words[2:])
    elif words[0] in ("python", "pytest"):
        for word in words[1:]:
            assert not word.endswith(".py") or (ROOT / word).exists(), f"{where}: no {word}"


def test_names_of_files_in_the_text_exist() -> None:
    named = re.compile(r"`((?:sparsejepa|tests|recipes|examples|docs|results)/[\w./-]+\.\w+)[`: ]")
    missing = [
        f"{page}: {path}"
        for page in PAGES
        for path in named.findall((ROOT / page).read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    ]
    assert not missing


def test_what_is_not_run_is_still_on_some_page() -> None:
    commands = [c for page in PAGES for b in blocks(page) for _, c in b.commands()]
    unused = [start for start in NOT_RUN if not any(re.match(start, c) for c in commands)]
    assert not unused


def test_public_encoders_that_pages_name_exist() -> None:
    import timm

    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    named = {name for text in texts for name in re.findall(r"timm:([a-z][\w.]+\w)", text)}
    assert named and not [name for name in named if not timm.is_model(name.split(".")[0])]
