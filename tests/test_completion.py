"""Shell completion, in the shells themselves."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sparsejepa import cli
from sparsejepa.verbs import VERBS
from sparsejepa.verbs.completing import completions


@pytest.fixture
def scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the script of each shell, named after it, and a file `run-a`."""
    for shell in ("bash", "zsh", "fish"):
        assert cli.main(["completion", shell]) == 0
        (tmp_path / shell).write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "run-a").write_text("")
    return tmp_path


def typed(shell: list[str], folder: Path, keys: str) -> str:
    """Type `keys` into an interactive shell, and return the words that it then passes to echo."""
    screen, terminal = pty.openpty()
    dumb = {"TERM": "dumb", "PS1": "READY> ", "HOME": str(folder), "ZDOTDIR": str(folder)}
    process = subprocess.Popen(
        shell, stdin=terminal, stdout=terminal, stderr=terminal, cwd=folder,
        env={**os.environ, **dumb}, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    try:
        wait_for(screen, "READY> ")
        os.write(screen, f". ./{Path(shell[0]).name}; echo LOAD''ED\n".encode())
        wait_for(screen, "LOADED")
        # Tab completes; Ctrl-A and echo turn the finished line into one that prints itself.
        os.write(screen, keys.encode() + b"\x01echo GO''T \x05 EN''D\n")
        return wait_for(screen, " END").rpartition("GOT ")[2].removesuffix(" END").strip()
    finally:
        process.kill()
        process.wait()
        os.close(screen)


def wait_for(screen: int, text: str) -> str:
    seen, end = "", time.monotonic() + 60
    while text not in seen:
        assert select.select([screen], [], [], max(0, end - time.monotonic()))[0], seen
        seen += os.read(screen, 4096).decode(errors="replace")
    return seen[: seen.index(text) + len(text)]


CASES = [
    ("sparsejepa pret\t", "sparsejepa pretrain"),
    ("sparsejepa pretrain scenes --patch-s\t", "sparsejepa pretrain scenes --patch-size"),
    ("sparsejepa pretrain --encoder na\t", "sparsejepa pretrain --encoder nano"),
    ("sparsejepa data che\t", "sparsejepa data check"),
    ("sparsejepa probe run\t", "sparsejepa probe run-a"),  # a file, where nothing is known
]


@pytest.mark.parametrize(("keys", "line"), CASES)
def test_tab_in_bash(scripts: Path, keys: str, line: str) -> None:
    if not (bash := shutil.which("bash")):
        pytest.skip("bash is not installed")
    assert typed([bash, "--norc", "--noprofile", "-i"], scripts, keys) == line


@pytest.mark.parametrize(("keys", "line"), CASES)
def test_tab_in_zsh(scripts: Path, keys: str, line: str) -> None:
    if not (zsh := shutil.which("zsh")):
        pytest.skip("zsh is not installed")
    assert typed([zsh, "-f", "-i"], scripts, keys) == line


@pytest.mark.parametrize(("keys", "line"), CASES)
def test_what_fish_offers(scripts: Path, keys: str, line: str) -> None:
    if not (fish := shutil.which("fish")):
        pytest.skip("fish is not installed")
    words = ["-c", f"source fish; complete -C '{keys.strip()}'"]
    done = subprocess.run(
        [fish, "--no-config", *words], cwd=scripts, capture_output=True, text=True
    )
    assert line.rpartition(" ")[2] in [row.partition("\t")[0] for row in done.stdout.splitlines()]


@pytest.mark.parametrize("name", VERBS)
def test_every_flag_offered_is_a_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse([name, "--help"])
    text = capsys.readouterr().out
    offered = completions(VERBS[name][0])
    assert [flag for flag in offered if flag not in text] == []
    assert "--json" in offered


def test_values_are_those_that_the_settings_name() -> None:
    offered = completions(VERBS["pretrain"][0])
    assert offered["--encoder"] == ("nano", "tiny", "small", "base", "large", "huge")
    assert "nano" in offered["--preset"] and offered["--lr"] == ()
    assert {"--flip", "--no-flip", "--resume"} <= set(offered) and "--no-resume" not in offered
    assert completions(VERBS["completion"][0])[""] == ("bash", "zsh", "fish")


def test_json_holds_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and '"shell": "fish"' in out


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert "invalid choice 'tcsh' for argument 'shell'" in capsys.readouterr().err
