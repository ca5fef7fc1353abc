"""Several devices, and several processes: the same numbers as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np

import metainfluence as mi
from scoring import devices, processes, setting


def test_four_devices_give_what_one_gives():
    ended = subprocess.run(
        [sys.executable, "-W", "error", devices.__file__], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert len(found["errors"]) == 13
    assert max(found["errors"].values()) <= 1e-12, found
    # The tasks are really spread.
    assert found["partitions"] == 1
    assert found["reduces"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(out, kill_at=(0, 0)):
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, processes.__file__, str(port), str(number), str(out), str(kill_at[number])],
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]


def finish(running, seconds=300):
    """Output of all processes; none is left behind."""
    try:
        return [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_two_processes_give_what_one_gives_and_one_that_is_lost_ends_the_other(tmp_path):
    out = tmp_path / "scores.parquet"
    lost = start(out, kill_at=(0, 22))
    began = time.monotonic()
    while lost[1].poll() is None and time.monotonic() - began < 300:
        time.sleep(0.1)
    assert lost[1].returncode == -signal.SIGKILL
    began = time.monotonic()
    (_, stderr), _ = finish(lost)
    assert time.monotonic() - began < 60
    assert lost[0].returncode != 0
    assert stderr
    assert not out.exists()
    assert list(tmp_path.glob("scores.parquet.run/solve-*"))

    whole = start(out)
    outputs = finish(whole)
    assert [process.returncode for process in whole] == [0, 0], outputs
    found = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    expected = setting.score(setting.tasks(processes.COUNT), tmp_path / "one.parquet", memory=1.0)
    for each in found:
        np.testing.assert_allclose(each["task"], expected.task, rtol=1e-12)
    # Of batches 0-3, 4-7 and 8, the first process has read the first halves and the second one the others.
    assert found[0]["last"] == [0, 1, 4, 5, 8]
    assert found[1]["last"] == [2, 3, 6, 7]
    one, two = mi.read_scores(tmp_path / "one.parquet"), mi.read_scores(out)
    np.testing.assert_allclose(two.score, one.score, rtol=1e-12, atol=1e-15)
    assert two.task.tolist() == one.task.tolist()
