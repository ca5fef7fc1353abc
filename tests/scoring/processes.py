"""One of two processes that score together on loopback, each reading half of every batch.

Arguments: port of the coordinator, this process's number, output, read at which this process kills itself (0: none).
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COUNT = 9


class Half(list):
    """Counts this process's reads, and ends the process at one of them."""

    def __init__(self, tasks, kill_at):
        super().__init__(tasks)
        self.kill_at, self.read = kill_at, []

    def __getitem__(self, index):
        self.read.append(index)
        if len(self.read) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def main(port, number, out, kill_at):
    jax.distributed.initialize(
        f"localhost:{port}",
        num_processes=2,
        process_id=int(number),
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=20,
    )
    from metainfluence.scoring import _engine
    from scoring import setting

    _engine._ROWS_PER_SHARD = 1
    mesh = jax.sharding.Mesh(jax.devices(), ("tasks",))
    assert mesh.size == 2
    source = Half(setting.tasks(COUNT), int(kill_at))
    result = setting.score(source, Path(out), mesh=mesh, batch_size=4, memory=1.0)
    print(json.dumps({"task": result.task.tolist(), "last": sorted(set(source.read[-5:]))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
