"""What a run will take, before it starts: memory, operations and time, from one compiled chunk of tasks."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from metainfluence import _memory
from metainfluence._checks import check_positive, concrete, maker
from metainfluence.curvature import Curvature
from metainfluence.data import PIECE, Task, resolve_weights, sizes, stack_tasks
from metainfluence.problem import Bilevel, check_derivatives, check_meta_params
from metainfluence.response import Options, batch_pull, linearised_bytes

# A chunk that stays in a core's cache takes half the time, and a larger one gains nothing; an accelerator is filled.
_CACHE_BYTES = 4.5e6
_LEAST_ON_CPU = 8
_MOST_ELSEWHERE = 4096

# Vectors of λ's size that a solve holds.
_VECTORS = 12

# The other programs take up to this many times the memory of the compiled product.
_MARGIN = 2.0

FREE_SHARE = 0.6

_PROBE = 32


class Plan(NamedTuple):
    """What a run will take; `str` makes it a table.

    Attributes:
      num_tasks: T.
      num_meta_params: scalars in λ.
      batch_size: tasks per chunk that fit.
      most_tasks: the same, not bounded by T.
      kept_tasks: tasks whose linearisation fits as well, so that a product runs only its linear part; for the others,
        products run the gradient map again.
      memory: bytes that may be used.
      chunk_bytes: bytes of the compiled product of `batch_size` tasks, as XLA's memory analysis counts them, data
        included.
      linearised_bytes: bytes of one task's linearisation.
      flops: operations of all passes, as XLA's cost analysis counts them: once for the body of a loop of unknown
        length, such as an inner solver's.
      seconds: time of all passes, from the time that the compiled product took; None where no data were given.
      num_products: Hessian products that flops and seconds are for.
    """

    num_tasks: int
    num_meta_params: int
    batch_size: int
    most_tasks: int
    kept_tasks: int
    memory: float
    chunk_bytes: float
    linearised_bytes: float
    flops: float
    seconds: float | None
    num_products: int

    def __str__(self) -> str:
        """The plan in words."""
        seconds = "not measured" if self.seconds is None else f"{self.seconds:.3g} s"
        lines = {
            "tasks": f"{self.num_tasks}",
            "meta-parameters": f"{self.num_meta_params}",
            "memory that may be used": in_words(self.memory),
            "tasks per chunk": f"{self.batch_size}, {in_words(self.chunk_bytes)}",
            "tasks kept linearised": f"{self.kept_tasks}, {in_words(self.linearised_bytes)} each",
            f"operations of {self.num_products} products and the scores": f"at least {self.flops:.2e}",
            "time": f"{seconds} without compiling",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


class Sized(Protocol):
    """Single tasks by their number."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Any:
        """One of them."""


class PlanFor(Protocol):
    """What `preflight` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task | Sized) -> Plan:
        """The plan for λ and stacked tasks, or a source of single ones."""


@maker
def preflight(
    problem: Bilevel,
    *,
    curvature: Curvature | None = None,
    batch_size: int | None = None,
    memory: float | None = None,
    num_products: int = 20,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
) -> PlanFor:
    """Makes (meta_params, tasks) -> Plan: lowers and compiles one chunk's Hessian product, and reads XLA's analyses.

    Args:
      problem: the problem.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      batch_size: tasks per chunk; None for as many as fit, up to the number beyond which more gain nothing.
      memory: bytes that may be used on all devices together; None for 60 % of what is free.
      num_products: Hessian products that flops and time are estimated for; a solve takes a few tens.
      mesh: devices that share each chunk; None for one.
      hvp: as in `task_if`.
      precision: as in `task_if`.

    Returns:
      Function of λ and stacked tasks or a source of single ones. Given shapes (`jax.ShapeDtypeStruct`) instead of
      arrays, it measures no time.

    Raises:
      MemoryError: not one task, or not `batch_size` tasks, fit; with the numbers.
      TypeError: forward mode through a `custom_vjp`, see `bilevel`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> plan = mi.preflight(problem, memory=1e6)(jnp.asarray(2.0), tasks)
      >>> plan.num_tasks, plan.num_meta_params, plan.batch_size, plan.kept_tasks  # all fit at once
      (3, 1, 3, 3)
    """
    shared: dict[str, Any] = {
        "curvature": curvature,
        "batch_size": batch_size,
        "mesh": mesh,
        "hvp": hvp,
        "precision": precision,
    }
    options = Options.of(problem, **shared)
    check_positive("num_products", num_products, integer=True)
    if memory is not None:
        check_positive("memory", memory)

    def run(meta_params: PyTree, tasks: Task | Sized) -> Plan:
        if not _is_abstract(meta_params):
            check_meta_params(meta_params)
        if not isinstance(tasks, Task) and not (hasattr(tasks, "__len__") and hasattr(tasks, "__getitem__")):
            raise TypeError(
                "tasks: expected stacked tasks, or a source with a length and an index, as a list of single tasks, got "
                f"{type(tasks).__name__}; {PIECE}"
            )
        devices = 1 if mesh is None else mesh.size
        room = devices * free_memory() * FREE_SHARE if memory is None else memory
        count = sizes(tasks).lead[0] if isinstance(tasks, Task) else len(tasks)
        vectors = _VECTORS * _size(meta_params)
        wanted = min(count, _PROBE if batch_size is None else batch_size)
        with options.traced():
            measured = _measure(options.problem, options.curvature, meta_params, _first(tasks, wanted))
        fitting = int((room - vectors) / (_MARGIN * measured.bytes_per_task))
        if fitting < (1 if batch_size is None else wanted):
            least = vectors + _MARGIN * measured.bytes_per_task * (batch_size or 1)
            remedy = halving(meta_params, 1 if batch_size is None else wanted)
            raise MemoryError(
                f"memory: expected at least {in_words(least)} ({in_words(measured.bytes_per_task)} per task by XLA's "
                f"analysis, {_MARGIN:g} times for the largest program, and {in_words(vectors)} for vectors like "
                f"meta_params), got {in_words(room)}: {in_words(least - room)} are missing; {remedy}"
            )
        most = wanted
        if batch_size is None:
            useful = _MOST_ELSEWHERE
            if jax.default_backend() == "cpu":
                useful = max(int(_CACHE_BYTES / measured.bytes_per_task), _LEAST_ON_CPU)
            # Half of what fits, so that linearisations have room.
            most = min(useful * devices, max(fitting // 2, 1))
        chosen = min(count, most)
        chunk = measured.bytes_per_task * chosen
        kept = int(max(room - vectors - _MARGIN * chunk, 0) / measured.linearised_bytes)
        passes = num_products + 3
        return Plan(
            num_tasks=count,
            num_meta_params=sum(leaf.size for leaf in jax.tree.leaves(_shapes(meta_params))),
            batch_size=chosen,
            most_tasks=most,
            kept_tasks=min(kept, count),
            memory=room,
            chunk_bytes=chunk,
            linearised_bytes=measured.linearised_bytes,
            flops=passes * count * measured.flops_per_task,
            seconds=None if measured.seconds_per_task is None else passes * count * measured.seconds_per_task / devices,
            num_products=num_products,
        )

    return run


def free_memory() -> float:
    """Bytes that are free on the default device: those of an accelerator, or what the host's kernel can give."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return float(statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    return _memory.available()


def halving(meta_params: PyTree, batch_size: int) -> str:
    """Advice on what would take half of the memory, or nearly half."""
    if batch_size > 1:
        return f"batch_size={batch_size // 2} takes half"
    if any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(_shapes(meta_params))):
        return "float32 in place of float64 takes half: jax.config.update('jax_enable_x64', False)"
    return (
        "half the query examples take half, and jax.checkpoint around each layer of the network, or remat=True of "
        "adaptation.unrolled, may take less"
    )


class _Measured(NamedTuple):
    bytes_per_task: float
    linearised_bytes: float
    flops_per_task: float
    seconds_per_task: float | None


def _measure(problem: Bilevel, curvature: Curvature, meta_params: PyTree, tasks: Task) -> _Measured:
    count = sizes(tasks).lead[0]
    weights = jax.eval_shape(lambda: resolve_weights(None, tasks))
    check_derivatives(problem, meta_params, tasks, weights, twice=curvature.is_exact)

    def product(at: PyTree, vector: PyTree, tasks: Task, weights: Any) -> PyTree:
        return batch_pull(problem, curvature, at, tasks, weights)(vector)[0]

    lowered = jax.jit(product).lower(meta_params, meta_params, tasks, weights)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    seconds = None
    if not _is_abstract((meta_params, tasks)):
        arguments = jax.device_put((meta_params, meta_params, tasks, resolve_weights(None, tasks)))
        jax.block_until_ready(compiled(*arguments))
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds = (time.perf_counter() - start) / count
    return _Measured(
        bytes_per_task=max(used - 3 * _size(meta_params), 1) / count,
        linearised_bytes=linearised_bytes(problem, curvature, meta_params, tasks),
        flops_per_task=float(costs.get("flops", 0.0)) / count,
        seconds_per_task=seconds,
    )


def _first(tasks: Task | Sized, count: int) -> Task:
    if not isinstance(tasks, Task):
        return stack_tasks([tasks[k] for k in range(count)])
    if _is_abstract(tasks) or not concrete(tasks):
        shapes = _shapes(tasks)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), shapes)
    return jax.tree.map(lambda leaf: leaf[:count], tasks)


def _is_abstract(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _shapes(tree: PyTree) -> PyTree:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))

    return jax.tree.map(shape, tree)


def _size(tree: PyTree) -> float:
    """Bytes of arrays, or of what has their shapes."""
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_shapes(tree))))


def in_words(number: float) -> str:
    """Bytes, as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000 or unit == "GB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError
