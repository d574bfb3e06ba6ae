"""The package as a whole: what importing costs, which floor may use which, what is pinned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparsejepa
from tests.requirements import everything, normal

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparsejepa"

# From the ground up; a module imports from its own floor or one below it.
FLOORS = [
    ["errors"],
    ["config", "files", "rng", "environment", "distributed"],
    ["model"],
    ["data"],
    ["encoders"],
    ["training"],
    ["evaluation"],
    ["study"],
    ["explain"],
    ["verbs"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@pytest.mark.parametrize("module", ["sparsejepa", "sparsejepa.config", "sparsejepa.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = {
        "torch", "torchvision", "timm", "numpy", "scipy", "sklearn", "matplotlib", "pyarrow", "PIL",
        "rich", "huggingface_hub", "transformers", "onnx", "onnxruntime", "tensorboard", "wandb",
        "submitit", "IPython",
    }  # fmt: skip
    code = f"import sys, {module}; print(*{heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_module_needs_an_optional_package_to_be_imported() -> None:
    optional = {"transformers", "onnx", "onnxruntime", "onnxscript", "tensorboard", "wandb",
                "submitit", "IPython"}  # fmt: skip
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__main__.py"
    ]
    code = f"import sys, {', '.join(names)}; print(*{optional!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_can_be_had() -> None:
    for name in sparsejepa._EXPORTS:
        assert getattr(sparsejepa, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sparsejepa.nonsense


def test_rooms_import_only_from_floors_below() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("sparsejepa."):
                    room = name.split(".")[1]
                    assert HEIGHT[room] <= HEIGHT[own], f"{path.name} imports {name}"


CORE = {
    "errors", "rng", "files", "config", "distributed", "environment", "__version__",
    "data.images", "data.folders", "data.augment", "encoders.encoder", "encoders.load",
}  # fmt: skip
"""What a newcomer reads, with all of model and training."""


def test_the_core_imports_nothing_outside_itself() -> None:
    def is_core(module: str) -> bool:
        return module in CORE or module.split(".")[0] in ("model", "training")

    checked = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        if not is_core(".".join(path.relative_to(PACKAGE).with_suffix("").parts)):
            continue
        checked += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsejepa"):
                module = (node.module or "").removeprefix("sparsejepa").removeprefix(".")
                modules = [module] if module else [alias.name for alias in node.names]
                assert all(map(is_core, modules)), f"{path.name} imports {modules}"
    assert checked >= 25


def test_only_verbs_import_the_package_inside_functions() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "verbs.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                    assert not module.startswith("sparsejepa"), f"{path.name}: {module}"


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def pins() -> dict[str, str]:
    """The lines of constraints.txt, names normalised."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def test_constraints_are_names_and_versions() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version)


def test_constraints_pin_every_package_that_gets_installed() -> None:
    found = everything(["sparsejepa[dev]"])
    # torch's own metadata pins the libraries of its platform.
    loose = {name for name in found if re.match(r"nvidia-|cuda-|triton$", name)}
    assert found - loose - set(pins()) == {"sparsejepa"}
    assert found >= {"torch", "pytest", "timm", "numpy", "onnx", "mkdocs"}


# Calls that would run what they are given.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load",
    "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open",
    "joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "yaml.load",
    "pandas.read_pickle", "torch.hub.load", "subprocess.getoutput", "subprocess.getstatusoutput",
    "shutil.unpack_archive", "tarfile.TarFile.extractall",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "extract", "read_pickle"}


def test_the_code_calls_nothing_that_runs_what_it_reads() -> None:
    found = []
    for path in [*(ROOT / "sparsejepa").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}, line {node.lineno}: {name}"
            if name in FORBIDDEN:
                found.append(where)
            if name.rpartition(".")[2] in FORBIDDEN_METHODS:
                found.append(where)
            if name.endswith("torch.load") and options.get("weights_only") != "True":
                found.append(where)
            if options.get("allow_pickle", "False") != "False" or "trust_remote_code" in options:
                found.append(where)
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                found.append(where)
            if options.get("shell", "False") != "False":
                found.append(where)
            if name.startswith("subprocess.") and isinstance(node.args[0], ast.Constant):
                found.append(where)
    assert found == []
