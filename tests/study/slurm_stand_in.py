"""A stand-in for SLURM's commands: `sbatch`, `srun`, `sacct`, `scontrol` and `scancel` in one file.

Called under one of these names, with jobs kept as folders of SLURM_STAND_IN. `sbatch` starts each
job of an array at once; what a job's script asks for is written down in `script`. `scontrol
requeue` has a job run again after it has ended, `scancel --signal X` sends a job's step a signal.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(os.environ["SLURM_STAND_IN"])


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    number = str(1000 + len(list(ROOT.glob("*.script"))))
    (ROOT / f"{number}.script").write_text(text)
    tasks = re.search(r"--array=0-(\d+)", text)
    for task in range(int(tasks[1]) + 1) if tasks else [None]:
        name = number if task is None else f"{number}_{task}"
        (ROOT / name).mkdir()
        own = {"SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
        if task is not None:
            own |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.Popen(
            [sys.executable, __file__, "daemon", name, str(ROOT / f"{number}.script")],
            env=os.environ | own, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(f"Submitted batch job {number}")


def daemon(name: str, script: str) -> None:
    folder = ROOT / name
    while True:
        (folder / "state").write_text("RUNNING")
        (folder / "again").unlink(missing_ok=True)
        code = subprocess.run(["bash", script], check=False).returncode
        if not (folder / "again").exists():
            break
    (folder / "state").write_text("COMPLETED" if code == 0 else "FAILED")


def srun(*words: str) -> None:
    """Run what comes after the options, its output to the files that they name."""
    values = dict(pairwise(words))
    job = os.environ["SLURM_JOB_ID"]
    name = job
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        name = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}"

    def path(text: str) -> str:
        array, _, task = name.partition("_")
        for mark, value in {"%j": name, "%A": array, "%a": task, "%t": "0"}.items():
            text = text.replace(mark, value)
        return text

    command = words[words.index(values["--error"]) + 1 :]
    with open(path(values["--output"]), "a") as out, open(path(values["--error"]), "a") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        (ROOT / name / "pid").write_text(str(process.pid))
        sys.exit(process.wait())


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")
    for folder in sorted(p for p in ROOT.iterdir() if p.is_dir()):
        state = folder / "state"
        print(f"{folder.name}|{state.read_text() if state.exists() else 'PENDING'}|here")


def scontrol(what: str, name: str) -> None:
    assert what == "requeue"
    (ROOT / name / "again").touch()


def scancel(name: str, *words: str) -> None:
    number = getattr(signal, words[1]) if words else signal.SIGTERM
    while not (ROOT / name / "pid").exists():
        time.sleep(0.05)
    os.kill(int((ROOT / name / "pid").read_text()), number)


if __name__ == "__main__":
    called = Path(sys.argv[0]).name
    words = sys.argv[1:]
    if called == Path(__file__).name:
        called, *words = words
    {f.__name__: f for f in (sbatch, daemon, srun, sacct, scontrol, scancel)}[called](*words)
