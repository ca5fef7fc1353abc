"""Runs the engine in a process of its own, which may end itself by SIGKILL at a given one of its reads and writes.

Arguments: output, events before the kill (0: none), seconds that each read takes.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metainfluence.scoring import _engine  # noqa: E402
from scoring import setting  # noqa: E402

NUM_TASKS, BATCH_SIZE = 23, 4


class Events:
    """Counts what a kill may come between."""

    def __init__(self, kill_at):
        self.kill_at, self.count = kill_at, 0

    def __call__(self):
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Watched(list):
    """A source whose reads are events."""

    def __init__(self, tasks, event, seconds):
        super().__init__(tasks)
        self.event, self.seconds = event, seconds

    def __getitem__(self, index):
        self.event()
        time.sleep(self.seconds)
        return super().__getitem__(index)


def main(out, kill_at, seconds):
    event = Events(int(kill_at))
    replace, write = os.replace, Path.write_bytes

    def replacing(*args):
        event()
        replace(*args)
        event()

    def writing(path, content):
        # Killed here, a part of the file is there.
        write(path, content[: len(content) // 2])
        event()
        return write(path, content)

    os.replace, Path.write_bytes = replacing, writing
    _engine._ROWS_PER_SHARD = 1
    source = Watched(setting.tasks(NUM_TASKS), event, float(seconds))
    setting.score(source, out, batch_size=BATCH_SIZE, memory=1.0)
    print(event.count)


if __name__ == "__main__":
    main(*sys.argv[1:])
