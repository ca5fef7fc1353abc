"""Finds data of a source by the ids in score files: their places in the source, and the weights without them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

import metainfluence as mi
from metainfluence.scoring import ids_of

SIDES = ("support", "query")


class Place(NamedTuple):
    """Where a datum is: the task's position, and, for an example, its side and its position among the real examples."""

    task: int
    side: str | None = None
    example: int | None = None


def locator(source: mi.scoring.Source, table: mi.scoring.ScoreTable) -> Callable[[int], Place]:
    """Makes (row of a score file) -> the place of its datum in the source.

    Raises:
      ValueError: when called, for a row about data that the source does not hold.
    """
    position = {str(id_): k for k, id_ in enumerate(ids_of(source))}

    def place(row: int) -> Place:
        id_, role = table.task[row], table.role[row]
        if str(id_) not in position or role not in ("task", *SIDES):
            raise ValueError(f"scores: expected rows about tasks of the source, got {role} of task {id_}")
        if role == "task":
            return Place(position[str(id_)])
        first = row
        # A task's rows of one side are next to each other, in the order of its real examples.
        while first > 0 and table.task[first - 1] == id_ and table.role[first - 1] == role:
            first -= 1
        return Place(position[str(id_)], role, row - first)

    return place


def named(source: mi.scoring.Source, names: Sequence[str], role: str) -> list[Place]:
    """Places of data named by the ids in score files: `TASK`, or `TASK:EXAMPLE` of one side.

    Raises:
      ValueError: an unknown name.
    """
    position = {str(id_): k for k, id_ in enumerate(ids_of(source))}
    found = []
    for name in names:
        task, colon, example = name.rpartition(":") if role != "task" else (name, ":", "")
        if not colon or task not in position:
            form = "TASK, an id" if role == "task" else "TASK:EXAMPLE, ids"
            hint = ""
            if role == "task" and name.rpartition(":")[0] in position:
                hint = "; for an example add --role support or --role query"
            raise ValueError(f"remove: expected {form} of the source, got {name!r}{hint}")
        if role == "task":
            found.append(Place(position[task]))
            continue
        examples = example_ids(source, position[task], role)
        if example not in examples:
            raise ValueError(
                f"remove: expected a {role} example of task {task}, as {', '.join(examples[:5])}; got {example!r}"
            )
        found.append(Place(position[task], role, examples.index(example)))
    return found


def example_ids(source: mi.scoring.Source, task: int, side: str) -> list[str]:
    """Ids of the real examples on one side, as in score files."""
    describe = getattr(source, "columns", None)
    columns = {} if describe is None else describe(task)
    if "example" in columns:
        return [str(id_) for id_ in columns["example"][1 + SIDES.index(side)]]
    single = source[task]
    mask = getattr(single, f"{side}_mask")
    count = len(jax.tree.leaves(getattr(single, side))[0]) if mask is None else int(np.sum(mask))
    return [str(k) for k in range(count)]


def without(tasks: mi.Task, removed: Sequence[Place]) -> mi.Weights:
    """Weights of stacked tasks without some data.

    Raises:
      ValueError: an example that the tasks do not have.
    """
    pairs: dict[str, list[tuple[int, int]]] = {side: [] for side in SIDES}
    for place in removed:
        if place.side is not None:
            mask = getattr(tasks, f"{place.side}_mask")
            count = jax.tree.leaves(getattr(tasks, place.side))[0].shape[1]
            real = np.flatnonzero(np.ones(count, bool) if mask is None else np.asarray(mask)[place.task])
            if place.example not in range(len(real)):
                raise ValueError(f"scores: expected {len(real)} {place.side} examples in task {place.task}, got more")
            pairs[place.side].append((place.task, int(real[place.example])))
    whole = [place.task for place in removed if place.side is None]
    return mi.drop(mi.unit_weights(tasks), tasks=whole, support=pairs["support"], query=pairs["query"])
