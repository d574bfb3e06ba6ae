"""The command: help, one-line errors with their exit status, --json, --dry-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsejepa import cli
from sparsejepa.config import Config, flat_fields
from sparsejepa.errors import UserError
from sparsejepa.verbs import VERBS
from sparsejepa.verbs.looking import Info
from sparsejepa.verbs.training import Pretrain, Settings

# The smallest thing that trains: three steps on the built-in scenes.
TINY = ["--preset=nano", "--limit=64", "--batch-size=16", "--steps=3", "--threads=1"]


def run(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sparsejepa", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        timeout=120,
    )


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command inside this process; returns status, standard output, standard error."""
    status = cli.main(words)
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
    for name, (verb, _) in VERBS.items():
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
    if issubclass(VERBS[name][0], Settings):
        missing = [
            n for n in flat_fields() if n != "data" and f"--{n.replace('_', '-')}" not in text
        ]
        assert not missing


def test_version() -> None:
    assert run("--version").stdout == "sparsejepa 0.1.0\n"


MISTAKES = [
    ("pretrian x", "unknown verb 'pretrian' (did you mean 'pretrain'?)"),
    ("--lam 1 pretrain x", "'--lam' before a verb"),
    ("pretrain", "which images?"),
    ("pretrain scenes --lamda 1", "unknown flag '--lamda' (did you mean '--lam'?)"),
    ("pretrain scenes --group_detatch=1", "unknown flag '--group-detatch'"),
    ("pretrain scenes cifar10", "unexpected argument 'cifar10'"),
    ("pretrain scenes --preset nanno", "--preset nanno: unknown (did you mean 'nano'?)"),
    ("pretrain scenes --encoder minute", "'minute'"),
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
    ("probe", "which run?"),
    ("probe runs/a", "--data is needed"),
    ("embed", "which encoder?"),
    ("data lisst", "'lisst'"),
    ("masks audit --target-scale 0.9 0.95", "--target-scale"),
    ("masks audit --img-size 30 --patch-size 4", "--patch-size 4 does not divide"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES)
def test_a_mistake_gets_one_line(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_line(*call(capsys, *command.split()))


def test_a_settings_file_with_mistakes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.toml"
    for text, said in [
        ("lam = ", "not valid TOML"),
        ("lamda = 1", "unknown setting 'lamda' (did you mean 'lam'?)"),
        ('preset = "nanno"', "a.toml: --preset nanno"),
        ('epochs = "ten"', "a.toml: --epochs: invalid literal"),
        ("flip = 3", "a.toml: no setting takes 3"),
        ('[model]\nencoder = "minute"', "a.toml: invalid choice 'minute'"),
    ]:
        file.write_text(text)
        line = error_line(*call(capsys, "pretrain", "scenes", "--config", str(file)))
        assert said in line and "a.toml" in line


def test_defaults_come_from_the_preset_then_the_file_then_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('preset = "nano"\ndata = "cifar10"\n[groups]\nlam = 0.5\nnum_groups = 8\n')
    args = cli.parse(["pretrain", "--config", str(file), "--num-groups", "4"])
    config = args.settings(args.data)
    assert (config.data, config.preset) == ("cifar10", "nano")
    assert config.model.encoder == "nano"  # the preset's
    assert (config.groups.lam, config.groups.num_groups) == (0.5, 4)
    # A whole config.toml gives back the same settings.
    import tomli_w

    file.write_text(tomli_w.dumps(config.to_dict()))
    again = cli.parse(["pretrain", f"--config={file}"])
    assert again.settings(again.data) == config


def test_every_setting_can_be_given_as_a_flag() -> None:
    words = "x --img-size 32 48 --no-flip --groups none --lam 0 --density 0.5 --context-counts 9 12"
    args = cli.parse(["pretrain", *words.split(), "--data-root", "/data", "--ema", "0.99"])
    config = args.settings(args.data)
    expected = Config(data="x").replace(
        img_size=(32, 48), flip=False, groups="none", lam=0.0, density=0.5,
        context_counts=(9, 12), data_root=Path("/data"), ema=0.99,
    )  # fmt: skip
    assert config == expected


def test_a_sweep_takes_lists_and_keeps_the_other_group_settings() -> None:
    words = "sweep x --lam 0.1 1 --density 0.2 0.4 --num-groups 8 --seed 3"
    args = cli.parse(words.split())
    assert (args.lam, args.density) == ((0.1, 1.0), (0.2, 0.4))
    config = args.settings(args.data)
    assert config == Config(data="x").replace(num_groups=8, seed=3)


def fake(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    """Put a verb of that outcome in the place of info."""

    def function(args: Any, console: Any) -> dict[str, Any]:
        console.print("for people")
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setitem(VERBS, "info", (Info, function))
    monkeypatch.setitem(VERBS, "pretrain", (Pretrain, function))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("--x: wrong\n way"), 2, "sparsejepa: error: --x: wrong way\n"),
        (OSError(28, "No space left on device", "/runs/a"), 2, "/runs/a: no space left on device"),
        (RuntimeError("x: No space left on device (os error 28)"), 2, "no space left on device"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "sparsejepa: interrupted\n"),
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
    status, _, err = call(capsys, "pretrain", "my images", "--lam", "0")
    assert status == 130
    assert err == (
        "sparsejepa: interrupted; continue with: sparsejepa pretrain 'my images' --lam 0 --resume\n"
    )
    assert call(capsys, "pretrain", "x", "--resume")[2].count("--resume") == 1
    fake(monkeypatch, OSError(28, "No space left on device"))
    _, _, err = call(capsys, "pretrain", "x")
    assert "free some, then run sparsejepa pretrain x --resume" in err


def test_json_is_the_last_line_and_strict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, {"path": Path("a/b"), "nan": float("nan"), "nested": [(1, float("inf"))]})
    status, out, err = call(capsys, "info", "--json")
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


def test_dry_run_says_what_a_run_would_be_and_writes_nothing(tmp_path: Path) -> None:
    done = run("pretrain", "scenes", *TINY, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    assert (plan["data"], plan["steps"], plan["train_images"]) == ("scenes", 3, 64)
    assert plan["patches"] == 64 and plan["context_counts"] == [16, 20, 24]
    assert plan["minutes"] > 0 and plan["peak_memory_mb"] >= 0
    assert plan["would_write"] == "runs/scenes-lam=0.01-s0"
    assert "context counts" in done.stderr and "16, 20, 24" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pretrain_then_info_embed_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, "pretrain", "scenes", *TINY, "--out", "a", "--json")
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert (found["run"], found["summary"]["steps"]) == ("a", 3)
    assert found["config"]["model"]["encoder"] == "nano"

    # A second start needs --resume; other settings are refused and the flag at fault is named.
    assert "--resume" in error_line(*call(capsys, "pretrain", "scenes", *TINY, "--out", "a"))
    line = error_line(*call(capsys, "pretrain", "--out", "a", "--resume", "--lam", "0.5"))
    assert line.startswith("--lam 0.5") and "0.01" in line
    status, out, _ = call(capsys, "pretrain", "--out", "a", "--resume", "--json")
    assert (status, json.loads(out)["summary"]) == (0, found["summary"])

    status, out, _ = call(capsys, "info", "a", "--json")
    about = json.loads(out)
    assert status == 0 and about["finished"]
    assert about["config"]["groups"]["lam"] == 0.01 and about["last"]["step"] == 2

    features = "embed a --data scenes --split test --limit 10 --json --out".split()
    for name in ("f.parquet", "f.npz", "f.safetensors"):
        status, out, _ = call(capsys, *features, name)
        assert (status, json.loads(out)["images"]) == (0, 10)
        assert (tmp_path / name).stat().st_size > 10 * 96 * 4
    assert ".parquet" in error_line(*call(capsys, *features, "f.csv"))
    assert "no-folder" in error_line(*call(capsys, *features, "no-folder/f.npz"))

    status, out, _ = call(
        capsys, *"probe a --data scenes --targets count --protocol knn --limit 100 --json".split()
    )
    (row,) = json.loads(out)["probes"]
    assert (row["target"], row["protocol"], row["n_train"]) == ("count", "knn", 100)
    assert row["untrained"] is not None and row["pixels"] is not None
    line = error_line(*call(capsys, *"probe a --data scenes --targets cuont".split()))
    assert "did you mean 'count'?" in line


def test_masks_and_data_end_with_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("preview", "audit"):
        picture = tmp_path / f"{action}.png"
        words = f"masks {action} --batches 20 --count 4 --json --out".split()
        status, out, err = call(capsys, *words, str(picture))
        found = json.loads(out)
        assert status == 0 and found["target_shapes"] == [[3, 3], [3, 4], [4, 3]]
        assert picture.read_bytes().startswith(b"\x89PNG") and "3x3, 3x4, 4x3" in err
    assert found["counts_right"] and found["blocks_whole"]

    status, out, _ = call(capsys, "data", "list", "--json")
    names = {row["name"] for row in json.loads(out)["datasets"]}
    assert status == 0 and names >= {"scenes", "cifar100", "cifar10", "svhn"}


def test_mistakes_about_data_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_text("no image")
    for words, said in [
        ("pretrain ./nowhere", "nowhere: no such folder"),
        ("pretrain empty", "empty: no images"),
        ("pretrain file.png", "file.png: not a folder"),
        ("pretrain cifar1000", "(did you mean 'cifar100'?)"),
        ("pretrain scenes --patch-size 5", "--patch-size 5 does not divide"),
        ("pretrain scenes --img-size 32 48", "--img-size 32 48"),
        ("pretrain scenes --target-scale 0.9 0.95", "--target-scale"),
        ("pretrain scenes --limit 10", "--batch-size"),
        ("pretrain scenes --device abacus", "--device abacus"),
        ("pretrain cifar10 --data-root nowhere", "nowhere"),
        ("pretrain scenes --out file.png", "--out file.png is a file"),
        ("pretrain scenes --out .", "--out . holds other files"),
        ("data get", "which one?"),
        ("data check nosuchset", "unknown data set 'nosuchset'"),
        ("probe nowhere --data scenes", "nowhere: no such run directory"),
        ("probe empty --data scenes", "empty: not a run directory"),
        ("info empty", "empty: not a run directory"),
        ("embed empty --data scenes", "empty: not a run directory"),
    ]:
        assert said in error_line(*call(capsys, *words.split())), words
