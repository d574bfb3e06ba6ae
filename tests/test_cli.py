"""The command: help, one-line errors with their exit status, --json, --dry-run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

import sparsejepa
from sparsejepa import cli
from sparsejepa.config import Config, flat_fields
from sparsejepa.errors import Interrupted, UserError
from sparsejepa.verbs import VERBS, Info, Pretrain, Settings

# The smallest thing that trains.
TINY = "--preset nano --batch-size 16 --steps 3 --threads 1"


def run(command: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    words = [sys.executable, "-m", "sparsejepa", *shlex.split(command)]
    return subprocess.run(words, capture_output=True, text=True)


def call(capsys: pytest.CaptureFixture[str], command: str) -> tuple[int, str, str]:
    """Run the command inside this process; returns status, standard output, standard error."""
    status = cli.main(shlex.split(command))
    out, err = capsys.readouterr()
    return status, out, err


def error_line(status: int, out: str, err: str) -> str:
    """Check the form of every user's mistake and return what the line says."""
    assert status == 2, err
    assert err.startswith("sparsejepa: error: "), err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err
    return err.removeprefix("sparsejepa: error: ").strip()


def test_program_help_names_every_verb() -> None:
    done = run("--help")
    assert done.returncode == 0 and not done.stderr
    for name, verb in VERBS.items():
        assert name in done.stdout
        assert verb.__doc__
    assert run().stdout == done.stdout


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from sparsejepa.cli import main\n"
        "try: main(['pretrain', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "False\n"


@pytest.mark.parametrize("name", VERBS)
def test_verb_help_names_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    if issubclass(VERBS[name], Settings):
        missing = [
            n for n in flat_fields() if n != "data" and f"--{n.replace('_', '-')}" not in text
        ]
        assert not missing


def test_completion_is_tyros() -> None:
    done = run("--tyro-print-completion bash")
    assert done.returncode == 0 and "--patch-size" in done.stdout and "pretrain" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_version() -> None:
    assert run("--version").stdout == "sparsejepa 0.1.0\n"


MISTAKES = [
    ("pretrian x", "unknown verb 'pretrian' (did you mean 'pretrain'?)"),
    ("--lam 1 pretrain x", "'--lam' before a verb"),
    ("pretrain", "which images?"),
    ("pretrain scenes --lamda 1", "unknown flag '--lamda' (did you mean '--lam'?)"),
    (
        "pretrain scenes --balance 0.1",
        "--balance: this setting was taken out, all runs are alike in it; leave it out",
    ),
    ("sweep scenes --w_lr_sum=60", "--w-lr-sum: this setting was taken out"),
    ("pretrain scenes --density 0.5 --pattern leanred", "leanred: not learned, random or a fini"),
    ("pretrain scenes --density 0.5 --pattern leanred --dry-run", "(did you mean 'learned'?)"),
    ("sweep scenes --density 0.5 --pattern runs/a", "--pattern runs/a: not learned, random or a"),
    ("pretrain scenes --group_detatch=1", "unknown flag '--group-detatch'"),
    ("pretrain scenes cifar10", "unexpected argument 'cifar10'"),
    ("pretrain scenes --preset nanno", "--preset nanno: unknown (did you mean 'nano'?)"),
    ("pretrain scenes --encoder minute", "--encoder minute: unknown; there are nano"),
    ("pretrain scenes --epochs ten", "--epochs: invalid literal"),
    ("pretrain scenes --epochs 0", "--epochs 0: must be at least 1"),
    ("pretrain scenes --lam", "'--lam'"),
    ("pretrain scenes --lam -0.1", "--lam -0.1: must be at least 0"),
    ("pretrain scenes --lam nan", "--lam nan"),
    ("pretrain scenes --num-groups 1000", "--num-groups 1000"),
    ("pretrain scenes --groups feature --num-groups 7", "--num-groups 7 does not divide"),
    ("pretrain scenes --crop-scale 0.9 0.1", "--crop-scale"),
    ("pretrain scenes --config nowhere.toml", "nowhere.toml: no such file"),
    ("sweep scenes --lam 0 x", "--lam"),
    ("sweep scenes --lam 0.1 -0.1", "--lam -0.1"),
    ("sweep scenes --seeds 0", "--seeds 0"),
    ("probe", "Missing from sparsejepa probe: --data"),
    ("probe runs/a", "Missing from sparsejepa probe: --data"),
    ("probe runs/a --data scenes --limit 0", "--limit 0: must be at least 1"),
    ("embed", "Missing from sparsejepa embed: RUN"),
    ("embed runs/a --data scenes --limit -3", "--limit -3: must be at least 1"),
    ("masks preview --count 0", "--count 0: must be at least 1"),
    ("data lisst", "'lisst'"),
    ("masks audit --target-scale 0.9 0.95", "--target-scale"),
    ("masks audit --img-size 30 --patch-size 4", "--patch-size 4 does not divide"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES)
def test_a_mistake_gets_one_line(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_line(*call(capsys, command))


def test_a_settings_file_with_mistakes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.toml"
    for text, said in [
        ("lam = ", "not valid TOML"),
        ("lamda = 1", "unknown setting 'lamda' (did you mean 'lam'?)"),
        ('preset = "nanno"', "a.toml: --preset nanno"),
        ('epochs = "ten"', "a.toml: --epochs ten: must be a whole number"),
        ("flip = 3", "a.toml: --flip 3: must be true or false"),
        ('[loss]\nloss = "minute"', "a.toml: --loss minute: unknown"),
    ]:
        file.write_text(text)
        line = error_line(*call(capsys, f"pretrain scenes --config {file}"))
        assert said in line and "a.toml" in line


def test_defaults_come_from_the_preset_then_the_file_then_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('preset = "nano"\ndata = "cifar10"\n[groups]\nlam = 0.5\nnum_groups = 8\n')
    args = cli.parse(["pretrain", "--config", str(file), "--num-groups", "4"])
    config = args.settings()
    assert (config.data, config.preset) == ("cifar10", "nano")
    assert config.model.encoder == "nano"  # the preset's
    assert (config.groups.lam, config.groups.num_groups) == (0.5, 4)
    # A whole config.toml gives back the same settings.
    import tomli_w

    file.write_text(tomli_w.dumps(config.to_dict()))
    again = cli.parse(["pretrain", f"--config={file}"])
    assert again.settings() == config
    # So does that of an earlier version, whose settings that are gone have the value of all runs.
    older = config.to_dict()
    older["groups"] |= {"balance": 0.03, "w_lr_sum": 60.0, "stem": "linear", "vicreg": [0.0, 0.0]}
    file.write_text(tomli_w.dumps(older))
    again = cli.parse(["pretrain", f"--config={file}"])
    assert again.settings() == config
    assert Config.from_dict(older) == config
    with pytest.raises(UserError, match="--w-lr-sum: this setting was taken out"):
        config.replace(w_lr_sum=60.0)
    older["groups"]["vicreg"] = [0.1, 0.0]
    with pytest.raises(UserError, match=r"^config: --vicreg: .*; leave it out$"):
        Config.from_dict(older)


def test_sizes_of_an_encoder_in_files_of_earlier_versions(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('data = "cifar10"\n[model]\nencoder_dims = [24, 2, 3]\nencoder = "tiny"\n')
    config = cli.parse(["pretrain", "cifar10", f"--config={file}"]).settings()
    assert config.model.encoder == "24,2,3" and config.encoder_shape == (24, 2, 3)


def test_every_setting_can_be_given_as_a_flag() -> None:
    words = "x --img-size 32 48 --no-flip --groups none --density 0.5 --context-counts 9 12"
    args = cli.parse(["pretrain", *words.split(), "--data-root", "/data", "--ema", "0.99"])
    config = args.settings()
    expected = Config(data="x").replace(
        img_size=(32, 48), flip=False, groups="none", density=0.5,
        context_counts=(9, 12), data_root=Path("/data"), ema=0.99,
    )  # fmt: skip
    assert config == expected


def test_a_sweep_takes_lists_and_keeps_the_other_group_settings() -> None:
    words = "sweep x --lam 0.1 1 --density 0.2 0.4 --num-groups 8 --seed 3"
    args = cli.parse(words.split())
    assert (args.lam, args.density) == ((0.1, 1.0), (0.2, 0.4))
    config = args.settings()
    assert config == Config(data="x").replace(num_groups=8, seed=3)


def fake(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    """Put a verb of that outcome in the place of info."""

    def function(self: Any, console: Any) -> dict[str, Any]:
        console.print("for people")
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(Info, "__call__", function)
    monkeypatch.setattr(Pretrain, "__call__", function)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("--x: wrong\n way"), 2, "sparsejepa: error: --x: wrong way\n"),
        (OSError(28, "No space left on device", "/runs/a"), 2, "/runs/a: no space left on device"),
        (RuntimeError("x: No space left on device (os error 28)"), 2, "no space left on device"),
        (PermissionError(13, "Permission denied", "/some/x"), 2, "/some/x: Permission denied"),
        (MemoryError(), 2, "out of memory"),
        (OSError(27, "File too large", "/some/x"), 2, "/some/x: File too large"),
        (OSError(5, "Input/output error", "/some/x"), 2, "/some/x: Input/output error"),
        (KeyboardInterrupt(), 130, "sparsejepa: interrupted\n"),
        (Interrupted(2), 130, "sparsejepa: interrupted\n"),
        (Interrupted(15), 143, "sparsejepa: interrupted\n"),
    ],
)
def test_what_goes_wrong_below_becomes_one_line(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake(monkeypatch, error)
    got, _, err = call(capsys, "info")
    assert got == status
    assert said in err and err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_an_interrupted_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, KeyboardInterrupt())
    status, _, err = call(capsys, "pretrain 'my images' --lam 0")
    assert status == 130
    assert err == (
        "sparsejepa: interrupted; continue with: sparsejepa pretrain 'my images' --lam 0 --resume\n"
    )
    assert call(capsys, "pretrain x --resume")[2].count("--resume") == 1
    fake(monkeypatch, OSError(28, "No space left on device"))
    _, _, err = call(capsys, "pretrain x")
    assert "free some, then run sparsejepa pretrain x --resume" in err


def test_json_is_the_last_line_and_strict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, {"path": Path("a/b"), "nan": float("nan"), "nested": [(1, float("inf"))]})
    status, out, err = call(capsys, "info --json")
    assert status == 0
    assert json.loads(out) == {"path": "a/b", "nan": None, "nested": [[1, None]]}
    assert out.count("\n") == 1
    assert err == "for people\n"


def test_a_closed_pipe_is_harmless() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "sparsejepa", "pretrain", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout and child.stderr
    child.stdout.close()
    assert "Traceback" not in (err := child.stderr.read()) and "BrokenPipe" not in err, err
    child.wait(60)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with 64 + 16 small noise images in two classes, in the folder `photos`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEJEPA_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 16)):
        for i in range(count):
            folder = tmp_path / "photos" / split / ("dark" if i % 2 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 128, (32, 32, 3)) + 127 * (i % 2 == 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_dry_run_says_what_a_run_would_be_and_writes_nothing(photos: Path) -> None:
    done = run(f"pretrain photos {TINY} --dry-run --json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    assert (plan["data"], plan["steps"], plan["train_images"]) == ("photos", 3, 64)
    assert plan["patches"] == 64
    assert plan["minutes"] > 0
    assert plan["would_write"] == "runs/photos-lam=0.01-s0"
    assert {path.name for path in photos.iterdir()} == {"photos", "cache"}


def test_pretrain_then_look_at_the_run(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, f"pretrain photos {TINY} --out a --json")
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert (found["run"], found["summary"]["steps"]) == ("a", 3)
    assert found["config"]["model"]["encoder"] == "nano"

    # A second start needs --resume; other settings are refused and the flag at fault is named.
    assert "--resume" in error_line(*call(capsys, f"pretrain photos {TINY} --out a"))
    assert "--resume --out a" in error_line(*call(capsys, "pretrain --resume a"))
    line = error_line(*call(capsys, "pretrain --out a --resume --lam 0.5"))
    assert line.startswith("--lam 0.5") and "0.01" in line
    status, out, _ = call(capsys, "pretrain --out a --resume --json")
    assert (status, json.loads(out)["summary"]) == (0, found["summary"])

    status, out, _ = call(capsys, "info a --json")
    about = json.loads(out)
    assert status == 0 and about["finished"]
    assert about["config"]["groups"]["lam"] == 0.01 and about["last"]["step"] == 2

    command = "probe a --data photos --protocol knn,logistic --limit 40"
    status, out, err = call(capsys, f"{command} --json")
    rows = json.loads(out)["probes"]
    assert status == 0
    assert [(r["target"], r["protocol"], r["n_train"]) for r in rows] == [
        ("class", "knn", 40),
        ("class", "logistic", 40),
    ]
    assert all(r["untrained"] is not None and r["pixels"] is not None for r in rows)
    assert "untrained" in err and "pixels" in err
    assert "did you mean 'class'?" in error_line(*call(capsys, f"{command} --targets clas"))
    assert "did you mean 'knn'?" in error_line(*call(capsys, f"{command} --protocol kn"))
    large = "probe a --data photos --protocol knn --limit 40 --seed -1 --img-size 40"
    assert "--upscale" in error_line(*call(capsys, large))
    status, out, _ = call(capsys, f"{large} --upscale --json")
    assert status == 0
    assert json.loads(out)["probes"][0]["settings"]["data_img_size"] == [40, 40]

    Path("a/summary.json").write_text("{")
    assert "summary.json: damaged" in error_line(*call(capsys, "info a"))


def test_embed_writes_what_the_encoder_sees(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, f"pretrain photos {TINY} --out a")[0] == 0
    command = "embed a --data photos --split test --json --out"
    for name in ("f.parquet", "f.npz"):
        status, out, _ = call(capsys, f"{command} {name}")
        found = json.loads(out)
        assert (status, found["images"], found["features"]) == (0, 16, 96)
    table = parquet.read_table("f.parquet").to_pydict()
    arrays = np.load("f.npz")
    assert arrays["x"].shape == (16, 96)
    np.testing.assert_array_equal(arrays["x"], np.array(table["features"], np.float32))
    # Each row belongs to the file that is named beside it.
    test = {path.name: path for path in (photos / "photos" / "test").rglob("*.png")}
    assert {Path(file).name for file in table["file"]} == set(test)
    assert [Path(file).parent.name for file in table["file"]] == table["class"]
    assert list(arrays["names.class"][arrays["target.class"]]) == table["class"]
    pixels = np.array(Image.open(test[Path(table["file"][3]).name]))
    tokens = sparsejepa.load("a").tokens(torch.from_numpy(pixels[None]))
    np.testing.assert_allclose(tokens.mean(1)[0], table["features"][3], atol=1e-5)

    assert ".parquet" in error_line(*call(capsys, f"{command} f.csv"))
    assert call(capsys, f"{command} new/folder/f.npz")[0] == 0 and Path("new/folder/f.npz").exists()
    Path("in-the-way").write_text("")
    line = error_line(*call(capsys, f"{command} in-the-way/folder/f.npz"))
    assert "in-the-way/folder cannot be made" in line


def test_probe_says_which_classes_only_one_split_has(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, f"pretrain photos {TINY} --out a")[0] == 0
    (photos / "photos" / "test" / "dark").rename(photos / "photos" / "test" / "dim")
    status, out, err = call(capsys, "probe a --data photos --protocol knn")
    assert status == 0, err
    assert "photos: class: only in train: dark (32 images); only in test: dim (8 images)" in out


def test_masks_and_data_end_with_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, command = tmp_path / "masks.png", "masks audit --batches 20 --json"
    status, out, err = call(capsys, f"masks preview --count 4 --json --out {picture}")
    assert status == 0 and json.loads(out)["target_shapes"] == [[3, 3], [3, 4], [4, 3]]
    assert picture.read_bytes().startswith(b"\x89PNG") and "3x3, 3x4, 4x3" in err
    found = json.loads(call(capsys, command)[1])
    assert found["counts_right"] and found["blocks_whole"]
    shares = found["target_min_over_max"]
    status, out, _ = call(capsys, f"{command} --predictor-pass union")
    assert status == 0 and json.loads(out)["passed"]
    assert json.loads(out)["target_min_over_max"] != shares  # of what union trains on

    status, out, _ = call(capsys, "data list --json")
    names = {row["name"] for row in json.loads(out)["datasets"]}
    assert status == 0 and names >= {"scenes", "cifar100", "cifar10", "svhn"}


def test_data_check_counts_what_it_could_not_read(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "photos" / "train" / "dark" / "torn.png").write_bytes(b"\x89PNG no more")
    status, out, err = call(capsys, "data check photos --json")
    (about,) = json.loads(out)["datasets"]
    assert status == 0
    assert about["splits"]["train"]["images"] == 64 and about["splits"]["test"]["images"] == 16
    assert "torn.png" in about["splits"]["train"]["skipped"][0][0] and "torn.png" in err


def test_mistakes_about_data_are_one_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "empty").mkdir()
    (photos / "file.png").write_text("no image")
    for command, said in [
        ("pretrain ./nowhere", "nowhere: no such folder"),
        ("pretrain empty", "empty: no images"),
        ("pretrain file.png", "file.png: not a folder"),
        ("pretrain cifar1000", "(did you mean 'cifar100'?)"),
        ("pretrain photos --patch-size 5", "--patch-size 5 does not divide"),
        ("pretrain photos --batch-size 16 --target-scale 0.9 0.95", "--target-scale"),
        ("pretrain photos --batch-size 65", "--batch-size 65"),
        ("pretrain photos --img-size 64", "--img-size"),
        ("pretrain photos --batch-size 16 --device abacus", "--device abacus"),
        ("pretrain cifar10 --data-root nowhere", "nowhere"),
        ("pretrain photos --out file.png", "--out file.png is a file"),
        ("pretrain photos --out .", "--out . holds other files"),
        ("data get", "which one?"),
        ("data check nosuchset", "unknown data set 'nosuchset'"),
        ("probe nowhere --data photos", "nowhere: no such run directory"),
        ("probe empty --data photos", "empty: not a run directory"),
        ("embed empty --data photos", "empty: not a run directory"),
        ("info empty", "empty: not a run directory"),
    ]:
        assert said in error_line(*call(capsys, command)), command
