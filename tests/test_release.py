"""What is given away: the archives, what installing them adds, the files that go with a release."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import sparsejepa
from tests.requirements import everything, needs, project

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"hub", "onnx", "tensorboard", "wandb", "slurm", "docs", "test", "dev"}


def build(source: Path, out: Path, kind: str) -> Path:
    """Build a wheel or an sdist of the tree `source` as `python -m hatchling build` does."""
    pytest.importorskip("hatchling", reason="builds the archives: pip install '.[test]'")
    words = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    subprocess.run(words, cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


def sources() -> set[str]:
    """The files of the package, as the checkout has them."""
    found = (ROOT / "sparsejepa").rglob("*")
    return {
        path.relative_to(ROOT).as_posix()
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    meta = {name for name in names if ".dist-info/" in name}
    assert names - meta == sources()
    assert {"sparsejepa/py.typed", "sparsejepa/study/page.html"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in meta)
    assert wheel.stat().st_size < 1_000_000


def test_the_wheel_says_what_pyproject_says(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    read = {Path(name).name: archive.read(name).decode() for name in archive.namelist()
            if ".dist-info/" in name}  # fmt: skip
    meta = read["METADATA"]
    assert f"\nVersion: {sparsejepa.__version__}\n" in meta
    assert set(re.findall(r"^Provides-Extra: (.+)$", meta, re.M)) == EXTRAS
    lines = re.findall(r"^Requires-Dist: (.+)$", meta, re.M)
    assert len([line for line in lines if "extra" not in line]) == len(project()["dependencies"])
    assert "sparsejepa = sparsejepa.cli:main" in read["entry_points.txt"]


def test_the_sdist_holds_what_the_checks_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources() <= names
    for name in ("tests/conftest.py", "docs/theory.md", "examples/minimal.py", "mkdocs.yml",
                 "recipes/tables.py", "bench/step.py", "constraints.txt", "Makefile", ".ci/run",
                 "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md",
                 "SECURITY.md", "pyproject.toml"):  # fmt: skip
        assert name in names, name
    # Nothing that a run, a cache or a build left behind.
    assert not [n for n in names if re.match(r"(runs|site|build|dist|\.venv)/|.*__pycache__", n)]
    assert sdist.stat().st_size < 10_000_000


def test_a_wheel_from_the_sdist_is_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            if member.isfile():
                path = tmp_path / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    (tree,) = tmp_path.iterdir()
    again = build(tree, tmp_path / "dist", "wheel")
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert sorted(first.namelist()) == sorted(second.namelist())
    for name in first.namelist():
        assert first.read(name) == second.read(name), name


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """Installed alone; what it needs comes from the environment of the tests, without a download.

    `make install-check` does the same with everything installed anew.
    """
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    words = ["-m", "pip", "install", "--no-index", "--no-deps", "-q", str(wheel)]
    subprocess.run([python, *words], check=True, capture_output=True)
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    (here,) = {Path(path) for path in sys.path if (Path(path) / "torch").is_dir()}
    # A plain line of a .pth file: the links of editable installations in there are not followed.
    (packages / "borrowed.pth").write_text(f"{here}\n", encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=elsewhere, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run(python, "-c", "import sparsejepa; print(sparsejepa.__file__)")
    assert Path(found.strip()).is_relative_to(packages)
    run(tmp_path / "env" / "bin" / "sparsejepa", "demo", "--quick")
    assert (elsewhere / "runs" / "demo" / "report.html").exists()


def test_the_base_adds_few_packages() -> None:
    added = everything(needs("sparsejepa")) - everything(("torch", "torchvision", "timm"))
    assert {"scikit-learn", "pyarrow", "matplotlib"} <= added
    assert not {"transformers", "onnx", "tensorboard", "wandb", "submitit"} & added
    assert len(added) <= 25


def test_every_optional_package_is_named_in_an_extra() -> None:
    table = project()["optional-dependencies"]
    assert set(table) == EXTRAS
    for extra, package in (("hub", "transformers"), ("onnx", "onnx"), ("slurm", "submitit"),
                           ("tensorboard", "tensorboard"), ("wandb", "wandb")):  # fmt: skip
        assert any(line.startswith(package) for line in table[extra])
    # Messages name extras that exist.
    for path in (ROOT / "sparsejepa").rglob("*.py"):
        for extra in re.findall(r"'sparsejepa\[([a-z,]+)\]'", path.read_text(encoding="utf-8")):
            assert set(extra.split(",")) <= EXTRAS, f"{path.name}: {extra}"


def test_the_version_stands_in_one_place() -> None:
    text = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in text["project"] and "version" in text["project"]["dynamic"]
    assert text["tool"]["hatch"]["version"]["path"] == "sparsejepa/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", sparsejepa.__version__)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(sparsejepa.__version__)}\b", changes, re.M)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {sparsejepa.__version__}\n" in citation


def test_the_citation_can_be_read_and_invents_nothing() -> None:
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and cited["license"] == "Apache-2.0"
    assert cited["authors"] == [{"name": "The SparseJEPA developers"}]
    assert not {"url", "repository-code", "doi", "contact"} & set(cited)


def test_every_word_of_make_help_is_a_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    helped = set(re.findall(r'@echo "make ([a-z-]+)', text))
    phony = re.search(r"^\.PHONY: (.+)$", text, re.M)
    assert phony and helped | {"help"} == set(phony[1].split())
    for script in (ROOT / ".ci").iterdir():
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.stat().st_mode & 0o111, f"{script.name} cannot be executed"


def test_contributing_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", make, re.M), target
    rooms = "sparsejepa|tests|docs|recipes|results|examples"
    paths = re.findall(rf"`((?:{rooms}|\.ci)/[\w./-]*)`", text)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
