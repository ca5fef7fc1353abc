"""What the commands after `train` work on, and how a user's function supplies it."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from metainfluence.lab.experiments.named import named_function
from metainfluence.lab.show.printing import say
from metainfluence.scoring import Source

# Tasks of the default target if a problem names none.
MOST_AIMED = 100


class Job(NamedTuple):
    """A problem with its data, as the function that `--problem module:function` names returns it, or a dict of this.

    Attributes:
      problem: as made by `metainfluence.bilevel` or `metainfluence.from_task_loss`.
      meta_params: λ, trained.
      source: the training tasks: a list of `metainfluence.Task`, or any `scoring.Source`.
      target_args: the target's arguments after λ: for `query_loss`, stacked held-out tasks. If none are given, the
        training tasks take their place.
      target: φ: (meta_params, *target_args) -> scalar; None for `query_loss(problem)`.
      test: tasks of the same kind as the source's, which neither training nor the target has seen, for `evaluate`.
      metric: (meta_params, stacked tasks) -> one number per task, which `evaluate` compares; None for the query loss.
      metric_name: name of that number.
      images: (a task's support or query) -> [n, H, W] or [n, H, W, 3] from 0 to 1, for the report; None if there are
        none.
      run: the training, made by `metainfluence.training` or `training_loop`, for scores by its trajectory.
      start: the state that the run starts from.
      checkpoints: of the training, made by `metainfluence.checkpoints`, for scores by segments.
      text: (a task's support or query) -> a string for each example, for the report on data other than images; None
        shows the numbers of short leaves, or the examples' ids.
      full: the same problem in full precision, if `problem` computes in half precision. `score` then first compares a
        few tasks, see `metainfluence.mixed`, and takes its target from here. None if there is nothing to compare.
    """

    problem: mi.Bilevel
    meta_params: Any
    source: Source
    target_args: tuple[Any, ...] = ()
    target: Callable[..., Any] | None = None
    test: Source | None = None
    metric: Callable[[Any, mi.Task], Any] | None = None
    metric_name: str = "metric"
    images: Callable[[Any], Any] | None = None
    text: Callable[[Any], Sequence[str]] | None = None
    run: Any = None
    start: Any = None
    checkpoints: Sequence[mi.Checkpoint] | None = None
    full: mi.Bilevel | None = None

    def stacked(self) -> mi.Task:
        """All training tasks; half-precision data as float32, as `scoring.score` takes them."""
        return mi.stack_tasks([widened(self.source[k]) for k in range(len(self.source))])

    def phi(self) -> Callable[..., Any]:
        """The target."""
        if self.target is not None:
            return self.target
        return mi.query_loss(self.problem if self.full is None else self.full)


def aimed(job: Job) -> Job:
    """The job with tasks for the default target: if none are given, the training tasks, evenly thinned if many.

    It prints a line that says so, since λ was trained to make exactly this loss small.
    """
    if job.target is not None or job.target_args:
        return job
    total = len(job.source)
    rows = np.unique(np.linspace(0, total - 1, min(total, MOST_AIMED)).round().astype(int)).tolist()
    few = f"{len(rows)} of the training tasks" if len(rows) < total else "the training tasks themselves"
    say(f"Target: the mean query loss of {few}, as the problem gives no target_args; held-out tasks there tell more")
    return job._replace(target_args=(mi.stack_tasks([widened(job.source[k]) for k in rows]),))


def tolerance(meta_params: Any, full: mi.Bilevel | None = None) -> float:
    """Relative residual to ask for: one that rounding reliably allows at these meta-parameters' precision.

    Half-precision products, which a `full` problem implies, leave a few hundredths.
    """
    if full is not None:
        return 2e-2
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(meta_params))
    return 1e-4 if eps > np.finfo(np.float64).eps else 1e-6


def of_function(name: str) -> Job:
    """Calls `module:function`, as `named_function` finds it.

    Raises:
      ConfigError: there is no such module or function.
      TypeError: it does not return a `Job` or a dict of its fields.
    """
    return checked(named_function(name, "--problem")(), name)


def checked(returned: Any, name: str) -> Job:
    """Converts what a user's function returned into a job.

    Half-precision meta-parameters and target arguments are converted to float32.

    Raises:
      TypeError: it, or a part of it, has the wrong type; meta-parameters that are not arrays.
    """
    if isinstance(returned, Mapping):
        required = {field for field in Job._fields if field not in Job._field_defaults}
        for key in [*sorted(required - set(returned)), *(key for key in returned if key not in Job._fields)]:
            near = difflib.get_close_matches(str(key), Job._fields, n=1, cutoff=0.0)[0]
            what = f"without {key!r}" if key in required else f"with {key!r}; nearest is {near!r}"
            raise TypeError(f"{name}: expected a dict with some of {', '.join(Job._fields)}, got one {what}")
        returned = Job(**returned)
    if not isinstance(returned, Job):
        raise TypeError(
            f"{name}: expected a metainfluence.lab.commands.job.Job or a dict of its fields, "
            f"got {type(returned).__name__}"
        )
    if not isinstance(returned.problem, mi.Bilevel):
        raise TypeError(
            f"{name}: problem: expected one made by metainfluence.bilevel, got {type(returned.problem).__name__}"
        )
    if returned.full is not None and not isinstance(returned.full, mi.Bilevel):
        raise TypeError(f"{name}: full: expected one made by metainfluence.bilevel, got {type(returned.full).__name__}")
    if not isinstance(returned.target_args, tuple):
        raise TypeError(f"{name}: target_args: expected a tuple, got {type(returned.target_args).__name__}")
    if returned.run is not None and returned.start is None:
        raise TypeError(f"{name}: start: expected what the run starts from, got none")
    check_arrays(returned.meta_params, f"{name}: meta_params")
    return returned._replace(
        meta_params=widened(jax.tree.map(jnp.asarray, returned.meta_params)), target_args=widened(returned.target_args)
    )


def check_arrays(tree: Any, name: str) -> None:
    """Raises TypeError, naming the leaf, unless all leaves are arrays or numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)}: expected an array, got an object of type {type(leaf).__name__}; "
                "keep functions out of λ, as equinox.partition(model, equinox.is_inexact_array) does"
            )


def widened(tree: Any) -> Any:
    """Half-precision arrays as float32, in which everything is computed; all other leaves unchanged."""

    def wide(leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None)
        half = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return jnp.asarray(leaf, jnp.float32) if half else leaf

    return jax.tree.map(wide, tree)
