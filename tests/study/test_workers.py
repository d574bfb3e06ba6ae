"""Worker processes that die are reported, and their errors come through."""

from __future__ import annotations

import os
import pickle
import signal
import time

import pytest

from sparsejepa.errors import Interrupted, SizesDiffer, TooFewImages, UserError
from sparsejepa.study.workers import workers


def end(how: int) -> None:
    """Die: by a signal if `how` is negative, else with that exit status."""
    if how < 0:
        os.kill(os.getpid(), -how)
        time.sleep(60)
    os._exit(how)


@pytest.mark.parametrize("how", [-signal.SIGKILL, 3])
def test_a_worker_that_dies_is_reported(how: int) -> None:
    """Also while another one is at work, which the pool then ends."""
    with pytest.raises(UserError, match="a worker process was killed"), workers(2) as submit:
        submit(time.sleep, 30)
        submit(end, how).result()


@pytest.mark.parametrize(
    "error",
    [UserError("a"), SizesDiffer("b"), TooFewImages("c", 5), Interrupted(15)],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_the_way_from_a_worker(error: BaseException) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
