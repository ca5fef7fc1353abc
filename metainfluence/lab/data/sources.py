"""Few-shot tasks as a source for `metainfluence.scoring`: read one by one, with the ground truth next to the scores."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import metainfluence as mi
from metainfluence.lab.data import fewshot


class FewShotSource(fewshot.TaskSource):
    """Single tasks in host memory, and the columns that their score file has in addition to the scores.

    Columns: `example`, the examples' ids in the dataset; `label`, the class that the learner is told or, for a task,
    all of its classes; `harm`, what was done to the task; `label_flipped`, whether this example's label was replaced,
    null for a task.

    Args:
      tasks: T tasks.
      images: as `fewshot.materialize` takes them.
      class_names: names of the dataset's classes; None for their numbers.
    """

    def __init__(self, tasks: fewshot.FewShotTasks, images: np.ndarray, class_names: Sequence[str] | None = None):
        super().__init__(tasks, np.asarray(images, np.dtype(jax.numpy.result_type(float))))
        self._harm = fewshot.harm(tasks)
        classes = np.asarray(tasks.classes)
        names = map(str, range(int(classes.max(initial=-1)) + 1)) if class_names is None else map(str, class_names)
        self._names = np.array(list(names), object)
        self._whole = ~tasks.shortcut & (tasks.noise_seed == fewshot.NO_NOISE)

    def __getitem__(self, k: int) -> mi.Task:
        tasks = self.tasks
        if not self._whole[k]:
            return jax.tree.map(np.asarray, super().__getitem__(k))
        # Avoids the device, which would take ten times as long.
        return mi.Task(
            fewshot.Batch(self.images[tasks.support_ids[k]], tasks.support_labels[k]),
            fewshot.Batch(self.images[tasks.query_ids[k]], tasks.query_labels[k]),
        )

    def columns(self, k: int) -> dict[str, tuple[Any, Any, Any]]:
        """Values for the task's own row, its support and its query examples."""
        tasks, harm, names = self.tasks, str(self._harm[k]), self._names[self.tasks.classes[k]]
        return {
            "example": (None, tasks.support_ids[k], tasks.query_ids[k]),
            "label": (
                ", ".join(names.tolist()),
                names[tasks.support_labels[k]].tolist(),
                names[tasks.query_labels[k]].tolist(),
            ),
            "harm": (harm, [harm] * tasks.support_ids.shape[1], [harm] * tasks.query_ids.shape[1]),
            "label_flipped": (None, tasks.support_flipped[k], tasks.query_flipped[k]),
        }
