"""Damaged and hostile text files: each one works or is refused in one line, never a traceback.

Mutations are seeded, so that a failure names the case that repeats it. Images have such a test of
their own.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image

from sparsejepa.cli import main
from sparsejepa.config import Config, load_toml, preset
from sparsejepa.data.folders import read_folder
from sparsejepa.encoders.encoder import save_encoder
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError
from sparsejepa.model.vit import ViT
from sparsejepa.study.results import read_results, read_rows, row_key

DEADLINE = 10  # seconds for one case; the slowest takes a fraction of one
SPICE = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r", b",", b"[", b"]", b"{", b"}",
    b"nan", b"-inf", b"NaN", b"Infinity", b"1e999", b"-1", b"0", b"null", b"true", b'""', b"[]",
    b"{}", b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"1979-05-27T07:32:00Z", b"\xe2\x80\xa8",
    b"\xed\xa0\x80", b"\\ud800", b"../../x", b"\x1b[2J", b"[" * 3000, b'{"a":' * 3000,
    b"a.b.c = 1\n", b"=", b":", b"e", b"." ,
)  # fmt: skip

CASES = [
    pytest.param(300, id="300"),
    pytest.param(2000, id="2000", marks=pytest.mark.slow),
]


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """Return `whole` with one to four things done to it."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + rng.choice((1, 4, 40, 400)))
        match rng.randrange(7):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(len(data) + 1) :]
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * rng.choice((1, 2, 50))
            case 4:
                data[at:end] = rng.randbytes(end - at)
            case _:
                data[at : rng.choice((at, end))] = rng.choice(SPICE)
    return bytes(data)


def valued(whole: bytes, rng: random.Random) -> bytes:
    """Return JSON lines with some values, keys or lists in it exchanged for others."""
    odd = [None, True, -1, 0, 1e308, float("nan"), float("inf"), "x", "", [], {}, [1], {"a": 1},
           10**30, "\x1b[2J\u2028</script>", [[[]]], "0"]  # fmt: skip

    def change(value: Any) -> Any:
        if rng.random() < 0.03:
            return rng.choice(odd)
        if isinstance(value, dict):
            kept = {k: change(v) for k, v in value.items() if rng.random() > 0.01}
            return {("x" if rng.random() < 0.01 else k): v for k, v in kept.items()}
        return [change(v) for v in value] if isinstance(value, list) else value

    lines = [json.dumps(change(json.loads(line))) for line in whole.decode().splitlines()]
    return "\n".join(lines).encode()


@contextlib.contextmanager
def deadline(case: str) -> Iterator[None]:
    """Fail when the block takes too long."""

    def late(*_: object) -> None:
        raise TimeoutError(case)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def survive(
    count: int,
    path: Path,
    whole: bytes,
    read: Callable[[], object],
    *,
    json_too: bool = False,
    least: float = 0.1,
) -> None:
    """Read `count` mutations of a file: each works or is refused in one line that names it.

    `least` is the share that is refused at least: the mutations do damage.
    """
    refused = 0
    for case in range(count):
        rng = random.Random(f"{path.name} {case}")
        data = valued(whole, rng) if json_too and case % 2 else mutated(whole, rng)
        path.write_bytes(data)
        try:
            with deadline(f"case {case}"):
                read()
        except UserError as error:
            refused += 1
            text = str(error)
            named = path.name in text or str(path.parent) in text or "--" in text
            assert "\n" not in text and named and len(text) < 2010, f"case {case}: {text[:500]!r}"
        except Exception as error:
            pytest.fail(f"case {case}: {type(error).__name__}: {str(error)[:300]}")
    path.write_bytes(whole)
    read()
    assert refused >= least * count


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; its one line of complaint becomes the UserError that it was."""
    status = main(words)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "Traceback" not in err
    if status:
        assert status == 2 and err.count("\n") == 1 and err.startswith("sparsejepa: error: ")
        raise UserError(err.strip())


# Settings


@pytest.mark.parametrize("count", CASES)
def test_settings(count: int, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    config = preset("nano").replace(
        data="scenes", img_size=(32, 48), context_counts=(8, 12), data_root=tmp_path, density=0.2
    )

    def read() -> None:
        Config.from_dict(load_toml(path), str(path)).check()

    survive(count, path, tomli_w.dumps(config.to_dict()).encode(), read)


WRONG = {
    "a list for a number": "[optim]\nlr = [1, 2]",
    "a table for a number": "[optim]\nlr = {a = 1}",
    "a number for a table": "optim = 3",
    "text for a number": '[optim]\nbatch_size = "many"',
    "nan": "[groups]\nlam = nan",
    "infinity": "[optim]\nlr = inf",
    "too large for a float": f"[optim]\nlr = {'9' * 400}",
    "too large for Python": f"[optim]\nlr = {'9' * 5000}",
    "too large in base 16": f"[optim]\nbatch_size = 0x{'f' * 5000}",
    "a time": "[optim]\nlr = 1979-05-27T07:32:00Z",
    "lists in lists": f"[images]\nimg_size = {'[' * 5000}{']' * 5000}",
    "tables in tables": "a = " + "{a = " * 3000 + "1" + "}" * 3000,
    "an unknown name": "[optim]\nlearning = 1",
    "a name twice": "[optim]\nlr = 1\nlr = 2",
    "a setting in another section's name": "[x.y.z]\nlr = 1",
    "no text": "\udcff\udcfe",
    "nothing but an end": "\x00",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_wrong_settings_are_refused_by_name(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"mine\.toml|--lam|--lr"):
        shown(["pretrain", "scenes", "--config", str(path), "--dry-run"], capsys)


# What lies in a run directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with settings, an encoder, metrics and a summary."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(tomli_w.dumps(preset("nano").to_dict()))
    torch.manual_seed(0)
    vit = ViT(16, 4, embed_dim=24, depth=2, num_heads=3)
    save_encoder(folder, vit, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    rows = [{"step": i, "loss": 1 / (i + 1), "knn": 0.1, "alarm": "one"} for i in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    final = {"loss": 0.3, "knn": None, "density": 0.2, "dead_groups": 1}
    (folder / "summary.json").write_text(json.dumps({"final": final, "seconds": 3.0}))
    return folder


@pytest.mark.parametrize("count", CASES)
@pytest.mark.parametrize("name", ["config.toml", "summary.json", "metrics.jsonl"])
def test_a_run_is_described(
    name: str, count: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "metrics.jsonl":
        (run / "summary.json").unlink()
    whole = (run / name).read_bytes()
    # As --json, which has to write down all that the file may hold.
    survive(
        count // 3,
        run / name,
        whole,
        lambda: shown(["info", str(run), "--json"], capsys),
        json_too=name != "config.toml",
    )


@pytest.mark.parametrize("count", CASES)
@pytest.mark.parametrize("name", ["config.json", "encoder.safetensors"])
def test_an_encoder_is_loaded(name: str, count: int, run: Path) -> None:
    if name == "config.json":
        (run / name).write_text(json.dumps(json.loads((run / name).read_text())))  # as one line
    whole = (run / name).read_bytes()
    survive(count // 2, run / name, whole, lambda: load(run), json_too=name == "config.json")


# Lines of results


def line(arm: str, lam: float, seed: int) -> dict[str, Any]:
    groups = "none" if arm == "dense" else "concept"
    config = preset("nano").replace(data="scenes", lam=lam, seed=seed, groups=groups)
    probe = {
        "data": "scenes", "target": "count", "protocol": "logistic", "accuracy": 0.5 + lam,
        "interval": [0.4, 0.6], "n_test": 100, "untrained": 0.3, "pixels": 0.2,
    }  # fmt: skip
    return {
        "key": f"{arm}{seed}", "recipe": "", "arm": arm, "seed": seed, "data": "scenes",
        "probes": [probe, {**probe, "target": "shape"}], "measures": {}, "density": 0.5,
        "groups_per_latent": 2.0, "dead_groups": 0, "nonzero_elements": 10, "steps": 100,
        "seconds": 3.5, "probe_seconds": 1.0, "failed": None, "command": "sparsejepa sweep",
        "settings": config.to_dict(), "probed": {"data": ["scenes"], "protocols": ["logistic"]},
        "environment": {"gpus": [], "cpu": "x", "cores": 2, "commit": None, "sparsejepa": "1",
                        "torch": "2", "python": "3"},
        "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip


@pytest.mark.parametrize("count", CASES)
def test_results(count: int, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    arms = {"dense": 0.0, "lam=0": 0.0, "lam=0.1": 0.1}
    lines = [line(arm, lam, seed) for seed in range(2) for arm, lam in arms.items()]

    def read() -> None:
        rows = read_results(path)
        assert all(isinstance(row_key(row), str) for row in rows)
        read_rows(path, strict=True)

    whole = "".join(json.dumps(row) + "\n" for row in lines).encode()
    survive(count, path, whole, read, json_too=True)


# Tables of labels


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for i in range(24):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / "images" / f"{i}.png")
    return root


COLUMNS = {
    "file": [f"{i}.png" for i in range(24)],
    "count": [i % 3 for i in range(24)],
    "angle": [i / 7 for i in range(24)],
    "shape": [("disc", "a, \"b\"\nc", "ключ")[i % 3] for i in range(24)],
    "split": ["train" if i < 16 else "test" for i in range(24)],
}  # fmt: skip


def csv_text() -> bytes:
    rows = zip(*COLUMNS.values(), strict=True)
    quoted = [[f'"{str(v).replace(chr(34), 2 * chr(34))}"' for v in row] for row in rows]
    return "\n".join([",".join(COLUMNS), *map(",".join, quoted)]).encode()


@pytest.mark.parametrize("factors", [(), ("count", "angle")], ids=["labels", "factors"])
@pytest.mark.parametrize("count", CASES)
def test_tables_as_csv(count: int, factors: tuple[str, ...], images: Path) -> None:
    path = images / "factors.csv"
    survive(count, path, csv_text(), lambda: read_folder(images, "data", factors))


HARD = {
    "ragged": "file,count\n0.png,1\n1.png\n",
    "an end of text": "file,count\n0.png,1\x00\n1.png,2\n",
    "a cell of a million characters": "file,count\n0.png," + "9" * 10**6 + "\n1.png,2\n",
    "an open quote": 'file,count\n0.png,"1\n1.png,2\n',
    "no header": "0.png,1\n1.png,2\n",
    "no rows": "file,count\n",
    "nothing": "",
    "not a number": "file,count\n0.png,nan\n1.png,2\n2.png,2\n",
    "infinity": "file,count\n0.png,1e999\n1.png,2\n2.png,2\n",
    "another alphabet's digits": "file,count\n0.png,١\n1.png,٢\n2.png,٢\n",
    "the same name twice": "file,count,count\n0.png,1,5\n1.png,2,6\n2.png,2,6\n",
    "the same file twice": "file,count\n0.png,1\n0.png,2\n1.png,2\n",
    "names that lead out": "file,count\n../0.png,1\n/etc/passwd,2\nimages/../0.png,2\n",
    "carriage returns": "file,count\r0.png,1\r1.png,2\r2.png,2\r",
    "not UTF-8": "file,count\n0.png,\udcff\n",
    "a mark at the start": "\ufefffile,count\n0.png,1\n1.png,2\n2.png,2\n",
}


@pytest.mark.parametrize("factors", [(), ("count",)], ids=["labels", "factors"])
@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
def test_odd_tables_work_or_are_refused_by_name(
    text: str, factors: tuple[str, ...], images: Path
) -> None:
    (images / "factors.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        with deadline(text[:40]):
            sources = read_folder(images, "data", factors)
    except UserError as error:
        assert "factors.csv" in str(error) and "\n" not in str(error) and len(str(error)) < 2010
    else:
        assert set(sources) == {"train", "test"}
