"""Scores of more tasks than fit in memory: passes over a source, a solve that can be resumed, a file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Shaped

from metainfluence import _disk
from metainfluence._checks import check_floating, check_positive
from metainfluence._disk import Store
from metainfluence._progress import Progress, Reporter, reporter
from metainfluence._source import Reader, Source, ids_of, stack, widened
from metainfluence._spoilt import told_of_source
from metainfluence.curvature import Curvature, exact
from metainfluence.data import Sizes, Task, Weights, sizes
from metainfluence.operators import Domain, Operator, flat_norm
from metainfluence.problem import Bilevel, check_derivatives, check_meta_params, knows_inner, meta_regularization
from metainfluence.response import (
    RANK,
    Options,
    batch_pull,
    check_target,
    check_target_slope,
    check_total_effect,
    rule,
    slopes_of,
    solve_alone,
    target_gradient,
    warn_of_direct_effect,
)
from metainfluence.scoring import _table
from metainfluence.scoring._batch_size import Room, batch_size_for, keeps_lean, room_of
from metainfluence.scoring._passes import BatchScores, Passes, Slope, reader_of
from metainfluence.scoring._processes import agree, first, meet, share
from metainfluence.scoring._programs import holds_nan, programs_of
from metainfluence.scoring._solving import Memo, stepped
from metainfluence.solvers import SolveInfo, Solver
from metainfluence.trust import FREE_SHARE, free_memory

# One object for all runs, since programs are cached by it.
_EXACT = exact()

_ROWS_PER_SHARD = 1 << 14


class Result(NamedTuple):
    """Scores of a source, in host memory; tasks that could not be read have no row.

    Attributes:
      task: `[T]`, predicted change of the target on removal; positive helps, negative harms.
      support: `[T, n_support]`, 0 on padding.
      query: `[T, n_query]`.
      info: report on the solve.
      ids: of the tasks, `[T]`.
      skipped: id -> why it could not be read.
    """

    task: Float[np.ndarray, " T"]
    support: Float[np.ndarray, "T n_support"]
    query: Float[np.ndarray, "T n_query"]
    info: SolveInfo
    ids: Shaped[np.ndarray, " T"]
    skipped: Mapping[Any, str]


def score(
    problem: Bilevel,
    target: Callable[..., Array],
    meta_params: PyTree,
    source: Source,
    *target_args: Any,
    out: Path | str,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    memory: float | None = None,
    resume: bool = True,
    on_error: str = "raise",
    hvp: str | None = None,
    precision: str | None = "highest",
    progress: bool | Callable[[Progress], None] = True,
    metadata: Mapping[str, Any] | None = None,
    total_effect: bool = False,
) -> Result:
    """Scores all tasks and examples of a source that need not fit in memory, and writes them to a file.

    The numbers are the same as those of `influence_scores`. They come from passes over batches of tasks that a thread
    reads ahead: one pass for the gradient, one for each Hessian product, one for the scores. Batches whose
    linearisation fits in memory keep it, which makes their products cheaper; others run the gradient map again.

    A run that ends early, for whatever reason, continues where it stopped when it is called again: the folder `out` +
    ".run" holds the solver's state after each product, and each batch of scores. A call with other data, another λ or
    other settings is refused. A finished file is only read, and nothing is computed.

    Half-precision meta-parameters and data are first converted to float32.

    Args:
      problem: the problem.
      target: φ: (meta_params, *target_args) -> scalar, as made by `query_loss`.
      meta_params: λ.
      source: the tasks, see `scoring.Source`.
      *target_args: passed on to the target.
      out: the score file, Parquet; see `read_scores`. With several processes, it must be on a file system that all of
        them see.
      solver: one of `metainfluence.solvers`; None for `auto()`, as in `influence_scores`. `cg`, `minres` and `neumann`
        save their state after each step, all others save each product. Preconditioners work if they need no layers:
        `sampled`, `nystrom`, `lanczos`.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      damping: non-negative number, or "auto" for the rule of `damping.auto`.
      mesh: devices over which each batch is sharded, over all axes of the mesh. It may span processes; each of them
        then reads its share of each batch. None for the default device.
      batch_size: tasks in a batch; with a mesh, rounded up to a multiple of its size. None chooses by shapes: on a CPU
        what stays in its cache, on an accelerator what fits.
      memory: bytes that batches and linearisations may take on all devices together; None for 60 % of what is free.
      resume: False starts anew, and replaces what is at `out`.
      on_error: what to do with a task that cannot be read, or whose own gradient is NaN: "raise", or "skip", which
        leaves it out of F and of the file; `Result.skipped` and the file's metadata name it.
      hvp: as in `influence_scores`.
      precision: of matrix products, see `jax.default_matmul_precision`; None for JAX's.
      progress: True shows a bar; or a function of `scoring.Progress`.
      metadata: anything JSON can hold; the file keeps it next to what the run reports about itself.
      total_effect: as in `influence_scores`: the target also gets `weights=`, those of the source's tasks in their
        order, all 1 and stacked, `[T]`, `[T, n_support]`, `[T, n_query]`. All tasks must then be of one size.

    Returns:
      The scores, which are also in the file.

    Warns:
      DirectEffectWarning: as `influence_scores`; not given in a run of several processes, which cannot tell.

    Raises:
      ValueError: an `out` that holds another run, with the difference named; ids that repeat; and as
        `influence_scores`.
      TypeError: metadata that JSON cannot hold; forward mode through a `custom_vjp`, see `bilevel`; and as
        `influence_scores`.
      SourceError: a task that cannot be read, or a source that has changed during the run.
      MemoryError: not one task fits; the message says what is missing and what takes half. Or an allocation failed on
        the device; what was finished is kept.
      jax.errors.JaxRuntimeError: a device fails; what was finished is kept.
      BlockingIOError: another process is writing to `out`.
      OSError: `out` cannot be written to; what was finished is kept.
      ModuleNotFoundError: pyarrow is missing.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = [mi.Task((), jnp.asarray([query])) for query in (0.0, 1.0, 5.0)]  # any sequence
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     options = {"out": Path(folder) / "scores.parquet", "solver": mi.solvers.cg(), "progress": False}
      ...     result = mi.scoring.score(problem, lambda m: m, jnp.asarray(2.0), tasks, **options)
      >>> result.task.round(3).tolist(), result.ids.tolist()  # (2 - query) / 3
      ([0.667, 0.333, -1.0], [0, 1, 2])
    """
    _table.arrow()
    # Fails now rather than when all is computed.
    json.dumps(metadata)
    shared: dict[str, Any] = {"curvature": _EXACT if curvature is None else curvature, "mesh": mesh}
    options = Options.of(
        problem, solver=solver, damping=damping, batch_size=batch_size, hvp=hvp, precision=precision, **shared
    )
    check_target(target)
    check_total_effect(total_effect)
    if not isinstance(damping, str):
        options = options._replace(damping=float(damping))
    if memory is not None:
        check_positive("memory", memory)
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
    check_floating(meta_params, "meta_params")
    meta_params = widened(jax.tree.map(jnp.asarray, meta_params))
    check_meta_params(meta_params)
    ids_of(source)
    run = _Run(options, target, meta_params, source, target_args, memory, on_error, total_effect)
    with options.traced(), reporter(progress) as report, _failing_device():
        result = run(Path(out), resume, report, metadata or {})
    warn_of_direct_effect(result)
    return result


@contextlib.contextmanager
def _failing_device() -> Iterator[None]:
    """Says what can be done about an allocation that failed on the device, and about a device that is lost."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        advice = "what was finished is kept, and the same call goes on with it"
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise jax.errors.JaxRuntimeError(f"{error}; {advice}, in a new process where a device is lost") from error
        advice += " where more memory is free"
        raise MemoryError(f"{error}; {advice}; resume=False starts anew, with a smaller batch_size") from error


@dataclasses.dataclass(frozen=True)
class _Run:
    """The arguments of `score` that decide its result, and where it is computed."""

    options: Options
    target: Callable[..., Array]
    meta_params: PyTree
    source: Source
    target_args: tuple[Any, ...]
    memory: float | None
    on_error: str
    total_effect: bool

    def __call__(self, out: Path, resume: bool, report: Reporter, metadata: Mapping[str, Any]) -> Result:
        with _store(out) as store:
            if not resume:
                store.clear()
                if first():
                    out.unlink(missing_ok=True)
            ours = self.manifest()
            finished = store.shared(lambda: _table.metadata_of(out)["manifest"] if out.exists() else None)
            theirs = store.manifest if finished is None else finished
            agreed = self.agreed(ours, theirs, out)
            # Free memory may differ from process to process.
            manifest = store.shared(lambda: agreed)
            if finished is None:
                store.manifest = manifest
                self.compute(manifest, store, out, report, metadata)
            meet()
            result = _result(out)
            meet()
            store.remove()
            return result

    def manifest(self) -> dict[str, Any]:
        """What identifies this run; a batch size that is still to be chosen is None."""
        reader = Reader(self.source, 1, self.on_error)
        batch = stack([reader.template()], reader.template())
        self.check_columns(reader)
        twice = self.options.curvature.is_exact
        eps = check_derivatives(self.options.problem, self.meta_params, *batch, twice=twice)

        def product(meta_params: PyTree, vector: PyTree, batch: Any) -> PyTree:
            return batch_pull(self.options.problem, self.options.curvature, meta_params, *batch)(vector)[0]

        def regularizer(meta_params: PyTree) -> Array:
            return meta_regularization(self.options.problem, meta_params)

        return {
            "library": _disk.library(),
            "jax": jax.__version__,
            "dtype": str(jnp.result_type(*jax.tree.leaves(self.meta_params))),
            "default dtype": str(jnp.result_type(float)),
            "precision": self.options.precision,
            "working_eps": eps,
            "meta_params": _disk.of_arrays(self.meta_params),
            "problem and curvature": _disk.of_function(product, self.meta_params, self.meta_params, batch),
            "meta_regularizer": _disk.of_function(regularizer, self.meta_params),
            "target": _disk.of_function(self.slope_of_target, self.meta_params, *self.target_args),
            "target_args": _disk.of_arrays(self.target_args),
            "solver": _disk.of_strategy(self.options.solver),
            "damping": self.options.damping,
            "on_error": self.on_error,
            "source": {
                "length": len(reader.ids),
                "ids": _disk.of_texts(map(str, reader.ids)),
                "content": reader.fingerprint(),
            },
            "batch_size": None if self.options.batch_size is None else self.rounded(self.options.batch_size),
        }

    def check_columns(self, reader: Reader) -> None:
        """Makes the first task's rows, so that columns that do not fit are reported before the solve."""
        first_read = next(k for k in range(len(reader.ids)) if k not in reader.skipped)
        task = reader.template()
        size = sizes(task, stacked=False)
        masks = [
            np.ones((1, count), bool) if mask is None else np.asarray(mask)[None]
            for mask, count in ((task.support_mask, size.support), (task.query_mask, size.query))
        ]
        scores = [np.zeros(1), *(np.zeros(mask.shape) for mask in masks)]
        _table.rows([reader.ids[first_read]], scores, masks, _table.columns_of(self.source, [first_read]))

    def agreed(self, ours: dict[str, Any], theirs: dict[str, Any] | None, out: Path) -> dict[str, Any]:
        """The manifest to use: that of an earlier run, which must match this one, or a new one."""
        if theirs is None:
            return {**ours, "batch_size": self.chosen_batch_size(), "kept_bytes": self.usable_memory() / 2}
        if self.options.batch_size is None:
            ours = {**ours, "batch_size": theirs["batch_size"]}
        found = _disk.difference({**ours, "kept_bytes": theirs["kept_bytes"]}, theirs)
        if found is not None:
            raise ValueError(
                f"out: expected a new file or one of this run, got {out}, which differs in {found}; resume=False "
                "starts anew"
            )
        return theirs

    def slope_of_target(self, meta_params: PyTree, *args: Any) -> PyTree:
        """∇φ; with the total effect ∂_λφ, ∂_wφ."""
        if not self.total_effect:
            return target_gradient(self.target, meta_params, args)
        size = sizes(Reader(self.source, 1, self.on_error).template(), stacked=False)
        ones = Sizes((len(self.source),), size.support, size.query).shapes()
        weights = Weights(**{name: jnp.ones(shape) for name, shape in ones.items()})
        return slopes_of(self.target, meta_params, args, weights, True)

    def compiled_slope_of_target(self) -> Array:
        """∇φ as a flat vector, by a newly compiled function."""
        # A new function, for which JAX has no executable yet.
        compiled = jax.jit(lambda *args: self.slope_of_target(*args))
        found = compiled(self.meta_params, *self.target_args)
        return Domain.of(self.meta_params).ravel(found[0] if self.total_effect else found)

    @functools.cached_property
    def rhs(self) -> Array:
        """∇φ, flat.

        Raises:
          ValueError: it is not finite.
        """
        found = self.compiled_slope_of_target()
        if holds_nan(found):
            found = self.compiled_slope_of_target()
        check_target_slope(found, self.target_args)
        return found

    def direct_effect(self) -> Weights | None:
        """∂_wφ in host memory; None without the total effect."""
        if not self.total_effect:
            return None
        found = jax.jit(lambda *args: self.slope_of_target(*args)[1])(self.meta_params, *self.target_args)
        return jax.tree.map(np.asarray, found)

    def usable_memory(self) -> float:
        """Bytes that may be used."""
        devices = 1 if self.options.mesh is None else self.options.mesh.size
        return devices * FREE_SHARE * free_memory() if self.memory is None else float(self.memory)

    def rounded(self, batch_size: int) -> int:
        """The batch size as a multiple of the mesh's size."""
        return (
            batch_size
            if self.options.mesh is None
            else -(-batch_size // self.options.mesh.size) * self.options.mesh.size
        )

    def chosen_batch_size(self) -> int:
        """The batch size asked for, or one that fits."""
        if self.options.batch_size is not None:
            return self.rounded(self.options.batch_size)
        count = len(self.source)
        return self.rounded(batch_size_for(self.room, count, self.usable_memory(), self.meta_params, self.options.mesh))

    @functools.cached_property
    def room(self) -> Room:
        """What one task takes."""
        template = Reader(self.source, 1, self.on_error).template()
        return room_of(self.options.problem, self.options.curvature, self.meta_params, template)

    def compute(
        self, manifest: dict[str, Any], store: Store, out: Path, report: Reporter, metadata: Mapping[str, Any]
    ) -> None:
        """Solves, scores, and writes the file, as far as that is not done yet."""
        batch_size = manifest["batch_size"]
        if batch_size != self.rounded(batch_size):
            assert self.options.mesh is not None
            raise ValueError(
                f"mesh: expected a size that divides the run's batch_size {batch_size}, got {self.options.mesh.size}"
            )
        # What can be refused is refused before anything is saved.
        if not store.numbers("solution"):
            _ = self.rhs
        reader = reader_of(self.source, batch_size, self.on_error, self.options.mesh)
        lean = keeps_lean(self.room, len(self.source), manifest["kept_bytes"])
        programs = programs_of(self.options.problem, self.options.curvature, self.options.mesh, lean)
        passes = Passes(
            programs,
            self.meta_params,
            reader,
            memory=manifest["kept_bytes"],
            on_batch=report.batch,
            of_one_size="total_effect" if self.total_effect else None,
        )
        slope = _slope(self.options.problem, self.meta_params, passes, store, self.on_error == "skip")
        memo = Memo(Domain.of(self.meta_params), store)
        direction, info = self.solution(
            passes.operator(slope),
            passes.operator(slope, memo.around),
            slope,
            store,
            report,
            manifest["working_eps"],
        )
        report.phase("scores")
        shards = _Shards(reader)
        missing = [number for number in shards.numbers if store.read("shard", number) is None]
        batches = [batch for number in missing for batch in shards.batches(number)]
        tables: list[Any] = []
        direct, shared = self.direct_effect(), False
        others = () if self.total_effect else self.target_args
        for done, (batch, found) in enumerate(passes.scores(direction, batches, others), 1):
            shared |= found.shared
            if first():
                tables += _rows(self.source, reader, batch, found, direct)
            if batch == shards.batches(shards.of(batch))[-1]:
                if first():
                    if shared:
                        store.write("shared", shards.of(batch), b"yes", suffix="txt")
                    store.write("shard", shards.of(batch), _table.encoded(tables), suffix="parquet")
                tables, shared = [], False
            report.batch(done, len(batches))
        if first():
            if not self.total_effect:
                known = [store.read_here("shared", number) for number in shards.numbers]
                info = info._replace(support_shared=jnp.asarray(b"yes" in known))
            own = {
                "solve": _table.report(info),
                "score": "predicted change of the target on removal: positive helps, negative harms",
                "skipped": [[reader.ids[k], reason] for k, reason in sorted(reader.skipped.items())],
                "manifest": manifest,
            }
            _table.write_tables(out, lambda: _tables(store, shards.numbers), {**metadata, **own})

    def solution(
        self,
        operator: Operator,
        memorised: Operator,
        slope: Slope,
        store: Store,
        report: Reporter,
        working_eps: float,
    ) -> tuple[PyTree, SolveInfo]:
        """The solution of (H + δI) s = ∇φ; the second operator is the first one with its products saved."""
        domain = operator.domain
        saved = store.arrays("solution", 0)
        if saved is not None:
            known = {name: jnp.asarray(value) for name, value in _unpacked(saved, "info").items()}
            return domain.unravel(jnp.asarray(saved["solution"])), SolveInfo(**known)
        solution, info = self.solved(operator, memorised, slope, self.rhs, store, report)
        info = info._replace(
            outer_gradient_norm=flat_norm(slope.gradient),
            inner_gradient_norm=slope.inner_gradient_norm if knows_inner(self.options.problem) else None,
            meta_params_norm=flat_norm(self.meta_params),
            working_eps=jnp.asarray(working_eps, info.relative_residual.dtype),
        )
        given = {name: np.asarray(value) for name, value in info._asdict().items() if value is not None}
        store.write("solution", 0, {"solution": np.asarray(solution), **_packed("info", given)})
        store.forget("product")
        store.forget("solve")
        return domain.unravel(solution), info

    def solved(
        self, operator: Operator, memorised: Operator, slope: Slope, rhs: Array, store: Store, report: Reporter
    ) -> tuple[Array, SolveInfo]:
        """The flat solution: by the solver's steps, whose state is saved, or else with its products saved."""
        solver, damping, about = self.options.solver, self.options.damping, (slope.gradient, self.meta_params)
        if solver.iteration is None or solver.report is None:
            report.phase("solve")
            # Loops around products then run in Python.
            with jax.disable_jit():
                unraveled = operator.domain.unravel(rhs)
                solution, info, value, matvecs = solve_alone(solver, damping, memorised, about, unraveled)
            info = info._replace(num_matvecs=info.num_matvecs + matvecs, damping=value)
            return operator.domain.ravel(solution), info
        matvecs = 0
        if isinstance(damping, str):
            report.phase("damping")
            with jax.disable_jit():
                damping, matvecs = float(rule(memorised, *about).value), RANK
        report.phase("solve")
        flat, info = stepped(solver, operator.damped(damping), memorised.damped(damping), rhs, store, report)
        return flat, info._replace(num_matvecs=info.num_matvecs + matvecs, damping=jnp.asarray(damping, rhs.dtype))


def _slope(problem: Bilevel, meta_params: PyTree, passes: Passes, store: Store, skip: bool) -> Slope:
    """The gradient pass, or an earlier run's result of it; later passes must find the same tasks."""
    domain = passes.domain
    saved = store.arrays("gradient", 0)
    if saved is not None:
        passes.reader.recall(_unpacked(saved, "read"))
        slope = Slope(*(jnp.asarray(saved[name]) for name in Slope._fields))
        return slope._replace(gradient=domain.unravel(slope.gradient))
    slope = passes.slope()
    if holds_nan(slope.gradient) and (spoilt := passes.spoilt()):
        if not skip or jax.process_count() > 1 or len(spoilt) == len(passes.reader.ids) - len(passes.reader.skipped):
            told = told_of_source(
                problem,
                meta_params,
                [passes.reader.ids[row] for row in spoilt],
                cast(Task, passes.reader.task(spoilt[0])),
            )
            raise ValueError(f'source: {told}; mend it there, or leave these tasks out, as on_error="skip" does')
        passes.leave_out({row: f"task {passes.reader.ids[row]!r} has a gradient of NaN or infinity" for row in spoilt})
        slope = passes.slope()
    share(passes.reader)
    flat = slope._replace(gradient=domain.ravel(slope.gradient))
    arrays = {name: np.asarray(value) for name, value in flat._asdict().items()}
    store.write("gradient", 0, {**arrays, **_packed("read", passes.reader.memory())})
    return slope


def _packed(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in arrays.items()}


def _unpacked(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.partition(".")[2]: value for name, value in arrays.items() if name.startswith(f"{prefix}.")}


class _Shards:
    """How batches are grouped into files of some size."""

    def __init__(self, reader: Reader):
        size = sizes(reader.template(), stacked=False)
        rows = reader.batch_size * (1 + size.support + size.query)
        self._batches, self._per_shard = reader.num_batches, -(-_ROWS_PER_SHARD // rows)
        self.numbers = range(-(-self._batches // self._per_shard))

    def of(self, batch: int) -> int:
        """The shard that a batch belongs to."""
        return batch // self._per_shard

    def batches(self, shard: int) -> range:
        """The batches of a shard."""
        return range(shard * self._per_shard, min((shard + 1) * self._per_shard, self._batches))


def _rows(source: Source, reader: Reader, number: int, found: BatchScores, direct: Weights | None) -> list[Any]:
    """The rows of one batch, as a list of one table; an empty list if none of its tasks could be read."""
    start = number * reader.batch_size
    read = np.flatnonzero(found.weights[: len(reader.ids) - start])
    positions = (start + read).tolist()
    if not positions:
        return []
    scores = [found.task[read], found.support[read], found.query[read]]
    if direct is not None:
        scores = [through - own[positions] for through, own in zip(scores, direct, strict=True)]
    table = _table.rows(
        [reader.ids[k] for k in positions],
        scores,
        [found.support_mask[read], found.query_mask[read]],
        _table.columns_of(source, positions),
    )
    return [table]


def _tables(store: Store, numbers: Sequence[int]) -> Iterator[Any]:
    for number in numbers:
        content = store.read_here("shard", number)
        if content is None:
            raise OSError(f"out: expected shard {number}, which was whole before, got a damaged file; call again")
        yield _table.decoded(content)


def _result(out: Path) -> Result:
    metadata, found = _table.metadata_of(out), _table.read_dense(out)
    info, skipped = _table.info_of(metadata["solve"]), dict(metadata["skipped"])
    return Result(found.task, found.support, found.query, info, found.ids, skipped)


@contextlib.contextmanager
def _store(out: Path) -> Iterator[Store]:
    """The run's store: the first process's folder, or, on all others, what the first one reads from it."""
    if out.is_dir():
        raise IsADirectoryError(f"out: expected a file, got the folder {out}")
    if not first():
        yield Store(None, agree)
        return
    with Store.opened(out.with_name(f"{out.name}.run"), agree) as store:
        yield store
