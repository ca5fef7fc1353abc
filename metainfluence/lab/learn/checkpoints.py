"""Checkpoints of a training run, written by orbax, and a fingerprint that tells runs apart."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from metainfluence._disk import of_arrays

# The lab's name for this function.
fingerprint = of_arrays


class Checkpoints:
    """The checkpoints of one run in its own folder, of which the last two are kept; a context manager.

    Args:
      folder: created if it does not exist.
      identity: identity of the run.

    Raises:
      ValueError: the folder holds checkpoints of another run.
    """

    def __init__(self, folder: Path, identity: str):
        self._identity = identity
        self._folder = Path(folder)
        self._manager = ocp.CheckpointManager(
            self._folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, losses: np.ndarray) -> None:
        """Saves what a run needs to continue after `step`, and returns once it is on the disk."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave({"leaves": jax.tree.leaves(state), "losses": losses}),
            run=ocp.args.JsonSave({"identity": self._identity}),
        )
        self._manager.save(step, args=arguments)
        self._manager.wait_until_finished()

    def restore(self, state: Any, losses: np.ndarray) -> tuple[int, Any, np.ndarray]:
        """The last saved step, state and losses, or 0 and the given state and losses if nothing was saved."""
        step = self._manager.latest_step()
        if step is None:
            return 0, state, losses
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if run["identity"] != self._identity:
            raise ValueError(
                f"checkpoints: expected a folder of this run, got {self._folder} with a run of other data, initial "
                "parameters, weights or options; name another folder, or remove that one"
            )
        leaves, structure = jax.tree.flatten(state)
        target = {"leaves": leaves, "losses": losses}
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        return step, jax.tree.unflatten(structure, restored["leaves"]), np.array(restored["losses"])
