"""Each test is an attack; SECURITY.md says what a hostile file can and cannot do."""

from __future__ import annotations

import io
import json
import pickle
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from sparsejepa import files
from sparsejepa.cli import main
from sparsejepa.config import Config, preset
from sparsejepa.data import hub
from sparsejepa.data.catalog import load_dataset
from sparsejepa.distributed import World
from sparsejepa.encoders.encoder import load_groups, save_encoder
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError
from sparsejepa.explain.page import as_script
from sparsejepa.explain.run import run_folder
from sparsejepa.files import write_text
from sparsejepa.model.vit import ViT
from sparsejepa.study import resource
from sparsejepa.study.page import STYLE, Page, Table, inline_svg, write_page
from sparsejepa.training import checkpoint
from sparsejepa.training.build import default_run_dir

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = [
    "../../outside",
    "/etc/outside",
    "$(touch outside)",
    "`touch outside`",
    "; touch outside #",
    "a\nb\rtouch outside",
    "--out=outside",
    "..",
    "\x1b]0;owned\x07\x1b[2J",
    "<script>alert(1)</script>",
    "con\u202etxt.exe",
    "' \" \\",
]
TAG = (
    "</title></script></style><script>alert(1)</script>\" ' onload=x <!-- --> --!> \u2028 {{ 7*7 }}"
)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that shows, when it is there, that code was run."""
    return tmp_path / "outside"


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, so that what a command leaves there is seen."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SPARSEJEPA_CACHE", str(tmp_path / "cache"))


def a_run(folder: Path, **settings: Any) -> Path:
    """Write what a stranger's run directory holds."""
    folder.mkdir(parents=True, exist_ok=True)
    vit = ViT(16, 4, embed_dim=24, depth=2, num_heads=3)
    save_encoder(folder, vit, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    import tomli_w

    config = preset("nano").replace(**{"data": "scenes", **settings})
    (folder / "config.toml").write_text(tomli_w.dumps(config.to_dict()))
    (folder / "summary.json").write_text(json.dumps({"final": {"loss": 1.0}}))
    return folder


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path, "PNG")
    return path


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


# Weights, checkpoints and caches


@pytest.mark.parametrize("name", ["encoder.safetensors", "groups.safetensors", "config.json"])
def test_a_pickle_in_a_run_is_not_unpickled(name: str, tmp_path: Path, mark: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match=re.escape(name)):
        load(run)
        load_groups(run, (4, 4))
    assert not mark.exists()


def test_a_pickle_as_a_checkpoint_is_not_unpickled(tmp_path: Path, mark: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    store = checkpoint.Checkpoints(tmp_path)
    store.save(model, optimizer, {"step": 3})
    assert store.restore(model, optimizer) == {"step": 3}
    (saved,) = (tmp_path / "checkpoints").iterdir()
    about = json.loads((saved / "manifest.json").read_text())
    for name, entry in about["files"].items():
        (saved / name).write_bytes(pickle.dumps(Bomb(mark)))
        # With checksums that are right: whoever sends the file can compute them.
        entry |= {
            "size": (saved / name).stat().st_size,
            "blake2b": checkpoint._digest(saved / name),
        }
    (saved / "manifest.json").write_text(json.dumps(about))
    (saved / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))  # torch's own pickled index
    with pytest.raises(UserError, match=r"step-0+3"):
        store.restore(model, optimizer)
    assert not mark.exists()


@pytest.mark.parametrize("content", ["objects", "pickle"])
def test_a_pickle_in_the_cache_is_not_unpickled(
    content: str, tmp_path: Path, mark: Path, tiny_images: Path
) -> None:
    load_dataset(tiny_images, "train")
    for path in (tmp_path / "cache").glob("*/*.npy"):
        if content == "objects":
            np.save(path, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match=r"damaged .* delete this folder"):
        load_dataset(tiny_images, "train")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["x.pth.tar", "x.pth", "x.pt"])
def test_a_foreign_checkpoint_runs_no_code(name: str, tmp_path: Path, mark: Path) -> None:
    state = ViT(16, 4, embed_dim=192, depth=1, num_heads=3).state_dict()
    path = tmp_path / name
    for content in ({"target_encoder": state, "opt": Bomb(mark)}, Bomb(mark)):
        torch.save(content, path)
        with pytest.raises(UserError, match="holds more than weights"):
            load(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match="not a file of weights"):
        load(path)
    assert not mark.exists()


def test_timms_cached_weights_run_no_code(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about: Any = timm.models.get_pretrained_cfg("vit_tiny_patch16_224")
    repo = tmp_path / f"models--{about.hf_hub_id.replace('/', '--')}"
    (repo / "snapshots/abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    content = {"norm.weight": torch.ones(192), "more": Bomb(mark)}
    torch.save(content, repo / "snapshots/abc/pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="weights_only"):
        load("timm:vit_tiny_patch16_224")
    assert not mark.exists()


# Run directories


def test_writing_replaces_a_link_and_does_not_follow_it(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    # The name that is written to before the rename can be guessed: it has the process's number.
    with files.atomic_path(run / "config.toml") as beside:
        planted = beside
        beside.write_text("")
    planted.symlink_to(treasure)
    (run / "summary.json").symlink_to(treasure)
    write_text(run / "config.toml", "a")
    write_text(run / "summary.json", "b")
    assert treasure.read_text() == "mine"
    assert not (run / "summary.json").is_symlink() and (run / "config.toml").read_text() == "a"
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "summary.json"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_data_stay_one_folder_below_runs(name: str) -> None:
    for data in (name, f"hub:owner/{name}", f"/data/{name}/"):
        path = default_run_dir(Config(data=data))
        assert path.parent == Path("runs") and re.fullmatch(r"[\w.=-]+", path.name)
        assert not path.name.startswith(".")
    folder = run_folder(f"timm:{name}")
    assert folder.parent == Path("runs") and re.fullmatch(r"explain-[\w.-]*", folder.name)


def test_a_strangers_run_is_shown_without_effect(
    tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(HOSTILE):
        run = a_run(tmp_path / str(i), data=name, data_root=Path(name))
        (run / "summary.json").write_text(json.dumps({"final": {name: name}}))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert main(["info", str(run)]) == 0
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        shown = capsys.readouterr().out
        assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown


def test_a_name_in_a_run_does_not_become_a_command(
    tmp_path: Path, mark: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "x; touch outside; $(touch outside)"
    data.symlink_to(tiny_images)
    words = ["pretrain", str(data), "--preset", "nano", "--steps", "2", "--batch-size", "32"]
    assert main([*words, "--out", "a b; touch outside", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("next: "))
    parts = shlex.split(line.removeprefix("next: ") + out.partition(line)[2].partition("\n\n")[0])
    assert parts[:3] == ["sparsejepa", "probe", "a b; touch outside"]
    assert not mark.exists() and not Path("outside").exists()


# Data


def test_a_table_names_only_files_inside_images(tmp_path: Path) -> None:
    secret, root = picture(tmp_path / "secret.png", 200), tmp_path / "data"
    inside = [picture(root / "images" / f"{i}.png", i).name for i in range(8)]
    names = [*inside, "../../secret.png", str(secret), "../images/0.png", "..\\..\\secret.png"]
    text = "\n".join(["file,label", *(f"{file},{i % 2}" for i, file in enumerate(names))])
    (root / "factors.csv").write_text(text)
    parts = [load_dataset(root, split) for split in ("train", "test")]
    assert sorted(file for part in parts for file in part.files) == sorted(inside)
    assert max(int(np.asarray(part.images).max()) for part in parts) < 8
    assert {file for file, _ in parts[0].skipped} >= {"../../secret.png", str(secret)}


def test_paths_in_parquet_files_are_not_followed(tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret.png", 200)
    rows = [{"bytes": png(i), "path": str(secret)} for i in range(8)]
    rows += [{"bytes": None, "path": str(secret)}, {"bytes": None, "path": "../secret.png"}]
    table = pa.table({"image": rows, "label": [i % 2 for i in range(len(rows))]})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    parts = [load_dataset(tmp_path / "data", split) for split in ("train", "test")]
    assert sum(map(len, parts)) == 8 and sum(len(part.skipped) for part in parts) == 2
    assert max(int(np.asarray(part.images).max()) for part in parts) < 8


def test_archives_are_not_unpacked(tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret.png", 200)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:

        def add(name: str, content: bytes = b"", **settings: Any) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in settings.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))

        for i, name in enumerate(
            ["../../out", "/abs/out", "a/../../out", "$(touch out)", *"abcdef"]
        ):
            add(f"{name}.png", png(i))
            add(f"{name}.cls", str(i % 2).encode())
        add("link.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add("hard.png", type=tarfile.LNKTYPE, linkname="../secret.png")
        add("pipe.png", type=tarfile.FIFOTYPE)
        add("device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    parts = [load_dataset(tmp_path / "x.tar", split) for split in ("train", "test")]
    assert sum(map(len, parts)) == 10
    assert max(int(np.asarray(part.images).max()) for part in parts) < 200
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def test_code_of_a_hub_repository_is_neither_fetched_nor_run(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    names = ["data/train-00000-of-00001.parquet", "set.py", "data/train.py", "x.pkl", "README.md"]
    asked: dict[str, Any] = {}

    class Api:
        def dataset_info(self, repo: str, **_: Any) -> Any:
            siblings = [type("File", (), {"rfilename": name}) for name in names]
            return type("Info", (), {"siblings": siblings, "sha": "abc"})

    def snapshot(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError(repo)
        asked.update(options)
        return str(tmp_path / "set")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    hub.fetch("owner/set", None)
    assert asked["allow_patterns"] == names[:1] and "trust_remote_code" not in asked
    # Nor is code of a local copy, of whatever name.
    rows = [{"bytes": png(i), "path": ""} for i in range(8)]
    (tmp_path / "set").mkdir()
    table = pa.table({"image": rows, "label": [i % 2 for i in range(8)]})
    pq.write_table(table, tmp_path / "set" / "train-00000-of-00001.parquet")
    for name in ("set.py", "__init__.py", "conftest.py", "dataset_infos.json"):
        (tmp_path / "set" / name).write_text(f"open({str(mark)!r}, 'w')")
    (tmp_path / "set" / "x.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    assert len(load_dataset(tmp_path / "set", "train")) and not mark.exists()


@pytest.mark.parametrize("name", ["hub:../..", "hub:../secret", "hub:a/..", "hub:./.", "hub:a/b;c"])
def test_names_of_the_hub_stay_below_the_data_root(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        picture(tmp_path / "secret" / f"{i}.png", i)
    (tmp_path / "root" / "a").mkdir(parents=True)
    monkeypatch.setenv("SPARSEJEPA_DATA", str(tmp_path / "root"))
    with pytest.raises(UserError, match="write hub:OWNER/NAME"):
        load_dataset(name, "train")


def test_names_of_files_and_classes_are_only_names(
    tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [name.replace("/", "\u2215").strip(".") or "dots" for name in HOSTILE]
    for label in dict.fromkeys(classes):
        for i in range(4):
            picture(tmp_path / "data" / label / f"{label} {i}.png", i)
        (tmp_path / "data" / label / f"{label} broken.png").write_bytes(b"\x1b[2J")
    assert main(["data", "check", str(tmp_path / "data")]) == 0
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(out + err)
    assert not mark.exists() and not any(Path().iterdir())
    assert main(["pretrain", str(tmp_path / "data" / classes[8]), "--epochs", "x"]) == 2
    assert main(["info", str(tmp_path / "no\x1b[2Jne")]) == 2
    assert main(["probe", str(tmp_path / "no\x1b[2Jne"), "--data", "scenes"]) == 2
    assert "\x1b" not in capsys.readouterr().err


# Pages


def hostile_page(folder: Path) -> Path:
    """Write a sweep's page of which every text is hostile."""
    page = Page(
        title=TAG, subtitle=TAG, verdict=TAG, remarks=[TAG], command=TAG, settings=TAG,
        tables=[Table(TAG, [TAG, "uninformative" + TAG], [[TAG, TAG + "floor"]], TAG)],
        pictures=[], environment={TAG: TAG},
    )  # fmt: skip
    return write_page(folder / "report.html", page)


def test_pages_allow_no_script_but_their_own_and_no_request(tmp_path: Path) -> None:
    html = hostile_page(tmp_path).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    assert "base-uri 'none'" in policy and "form-action 'none'" in policy
    assert "<script" not in html and "49" not in html
    assert html.index("Content-Security-Policy") < html.index("<title>")
    # Only what autoescape covers: no value stands in an attribute without quotes or in a script.
    for package in ("study", "explain"):
        template = str(resource("page.html", f"sparsejepa.{package}"))
        assert "|safe" not in template.replace(" ", "") and "autoescape" not in template
        for tag in re.findall(r"<[a-z][^>]*>", re.sub(r"{%.*?%}", "", template)):
            assert "{{" not in re.sub(r'"[^"]*"', "", tag), tag


def test_text_cannot_leave_a_script_element() -> None:
    text = str(as_script({TAG: [TAG]}))
    assert json.loads(text) == {TAG: [TAG]}
    assert "<" not in text and "\u2028" not in text


def test_text_in_figures_is_neither_markup_nor_a_formula() -> None:
    import matplotlib

    for text in (TAG, r"$\undefined{x}$", "a $ b $ c_{", "--> <script>"):
        with matplotlib.rc_context({"text.usetex": True}), matplotlib.rc_context(STYLE):
            figure = Figure()
            figure.add_subplot().set(title=text, xlabel=text)
        svg = inline_svg(figure, "p")
        outside = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
        assert "<script" not in outside and "onload" not in outside
        # A comment ends where matplotlib ends it: by all of HTML's ways to end one.
        assert "--!>" not in svg and not re.search(r"<!--(?:(?!-->).)*<!--", svg, re.S)


# The machine


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_images: Path
) -> None:
    run = a_run(tmp_path / "r\x1b[31mun", data="\x1b]0;x\x07")
    assert main(["info", str(run)]) == 0
    assert main(["info", str(tmp_path / "\x9b2J\x7f\udcff")]) == 2
    assert main(["pretrain", "\x1b[2J"]) == 2
    assert main(["\x1b[2J"]) == 2
    assert main(["probe", str(run), "--data", "\x1b[2J"]) == 2
    out, err = capsys.readouterr()
    assert not set("\x1b\x07\x9b\x7f") & set(out + err) and "\\x1b" in out and "\\x1b" in err


@pytest.mark.parametrize("value", HOSTILE)
def test_cluster_variables_are_numbers_or_refused(value: str, mark: Path) -> None:
    with pytest.raises(UserError, match="RANK"):
        World.from_environment({"RANK": value, "WORLD_SIZE": "2"})
    assert not mark.exists()
