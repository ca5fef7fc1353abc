"""What is needed to measure the solver benchmark's rows of one problem: expansions, exact answers, compiled solves."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import metainfluence as mi
from metainfluence.lab.bench.solvers.measure import CURVATURES, Program, solver_program
from metainfluence.lab.bench.solvers.options import SolverBenchConfig
from metainfluence.lab.bench.solvers.problems import Setting
from metainfluence.response import Expansion, expand

BATCHED = ("dense", "nystrom")


class Eigen(NamedTuple):
    """All eigenpairs of a curvature, without damping: `values` `[n]`, and `vectors` `[n, n]`, one per row."""

    values: np.ndarray
    vectors: np.ndarray

    def solve(self, rhs: np.ndarray, damping: float, *, absolute: bool = False) -> np.ndarray:
        """(H + damping)⁻¹ rhs, or (|H| + damping)⁻¹ rhs."""
        values = np.abs(self.values) if absolute else self.values
        return self.vectors.T @ ((self.vectors @ rhs) / (values + damping))


class Curved(NamedTuple):
    """The problem's expansion by one curvature, and the cost of its parts.

    Attributes:
      operator: without damping.
      stored: the same operator as a stored matrix.
      eigen: its eigenpairs.
      seconds: time to make it.
      product: program of one product.
      dense: program of all products at once, which gives the matrix.
    """

    operator: mi.Operator
    stored: mi.Operator
    eigen: Eigen
    seconds: float
    product: Program
    dense: Program


class Measured(NamedTuple):
    """One problem with everything that its rows are measured with.

    Attributes:
      name: name of the problem.
      setting: the problem at its λ.
      exact: expansion by the exact curvature.
      curved: the expansion by each curvature.
      programs: (whether the matrix is stored, solver) -> its program, or why there is none.
      epoch_seconds: time of one meta-gradient epoch.
      scores: program of (exact expansion, solution) -> Weights of sensitivities.
      slope: ∇φ of the held-out loss.
      removal: ∂_w D_λF along the removal of the flipped tasks; the solution for it is minus the change of λ.
      damping: damping of all cells.
    """

    name: str
    setting: Setting
    exact: Expansion
    curved: dict[str, Curved]
    programs: dict[tuple[bool, str], Program | str]
    epoch_seconds: float
    scores: Program
    slope: Any
    removal: Any
    damping: float

    def solved(self, rhs: Any) -> Any:
        """The exact answer, a pytree like λ."""
        vector, unravel = ravel_pytree(rhs)
        return unravel(jnp.asarray(self.curved["exact"].eigen.solve(np.asarray(vector), self.damping)))

    def task_scores(self, solution: Any) -> np.ndarray:
        """Scores of all tasks from a solution for the slope."""
        return np.asarray(self.scores(self.exact, solution).task)


def _multiply(matrix: jax.Array, vector: Any) -> Any:
    flat, unravel = ravel_pytree(vector)
    return unravel(matrix @ flat)


def _stored_sample(operator: mi.Operator, number: int) -> mi.Operator:
    del number  # By default `sampled` asks for the number of tasks that was stored.
    return operator


def stored(operator: mi.Operator, matrix: jax.Array, of_sample: jax.Array, losses: Any) -> mi.Operator:
    """An operator given by its matrix: however it was made, solvers then have one program for all."""
    product, sample = Partial(_multiply, matrix), Partial(_multiply, of_sample)
    part = dataclasses.replace(operator, product=sample, losses=None, sample=None, num_groups=1)
    return dataclasses.replace(operator, product=product, losses=losses, sample=Partial(_stored_sample, part))


def measure(config: SolverBenchConfig, name: str, setting: Setting) -> Measured:
    """Expands the problem by every curvature and diagonalises each."""
    problem, tasks, weights = setting.problem, setting.tasks, mi.unit_weights(setting.tasks)
    point = (setting.meta_params, tasks)
    epoch = Program(jax.vmap(mi.total_gradient(problem), in_axes=(None, 0)), *point)
    epoch.measure(*point, repeats=3 * config.repeats)
    slope = jax.jit(jax.grad(mi.query_loss(problem)))(setting.meta_params, setting.held_out)

    # The curvature of a sample of tasks is that at weights that leave out all others.
    count = jnp.shape(weights.task)[0]
    number = min(max(4, count // 16), count)
    chosen = jax.random.permutation(jax.random.key(0), count)[:number]
    of_sample = weights._replace(task=jnp.zeros(count).at[chosen].set(count / number))

    curved: dict[str, Curved] = {}
    exact: Any = None
    for curvature, make in CURVATURES.items():
        if curvature not in config.curvatures and curvature != "exact":
            continue
        program = Program(expand(problem, make(), None), *point, weights)
        expansion = program.measure(*point, weights, repeats=config.repeats)
        exact = expansion if curvature == "exact" else exact
        operator = expansion.operator
        if curvature == "gamma" and "linearized" in curved:
            # It differs from the linearised one by a multiple of the identity.
            other, shift = curved["linearized"], operator.shift
            curved[curvature] = other._replace(
                operator=dataclasses.replace(other.operator, shift=shift),
                stored=dataclasses.replace(other.stored, shift=shift),
                eigen=other.eigen._replace(values=other.eigen.values + float(shift)),
                seconds=program.seconds,
            )
            continue
        dense = Program(lambda operator: operator.dense(), operator)
        sample = program(*point, of_sample).operator
        matrix, part = dense.measure(operator, repeats=1), dense(sample) - sample.shift * jnp.eye(operator.size)
        product = Program(lambda operator, vector: operator.matvec(vector), operator, slope)
        product.measure(operator, slope, repeats=3 * config.repeats)
        values, vectors = np.linalg.eigh(np.asarray(matrix))
        unshifted = matrix - operator.shift * jnp.eye(operator.size)
        curved[curvature] = Curved(
            operator,
            stored(operator, unshifted, part, exact.operator.losses),
            Eigen(values, vectors.T),
            program.seconds,
            product,
            dense,
        )

    direction = jax.tree.map(jnp.subtract, setting.without, weights)
    values = curved["exact"].eigen.values
    scores = Program(lambda expansion, solution: expansion.mixed_transposed(solution), exact, slope)
    scores.measure(exact, slope, repeats=config.repeats)
    return Measured(
        name=name,
        setting=setting,
        exact=exact,
        curved=curved,
        programs={},
        epoch_seconds=epoch.seconds,
        scores=scores,
        slope=slope,
        removal=jax.jit(lambda expansion, direction: expansion.mixed(direction))(exact, direction),
        # The exact curvature is then positive definite, so there is one exact answer.
        damping=float(max(config.damping.grid * values[-1], -2 * values[0])),
    )


def program_for(
    config: SolverBenchConfig, measured: Measured, curvature: str, solver: str
) -> tuple[Program | str, mi.Operator]:
    """The compiled solve of one cell, or why there is none, and its damped operator."""
    kept = curvature != "exact" or solver == "dense"
    curved = measured.curved[curvature]
    operator = (curved.stored if kept else curved.operator).damped(measured.damping)
    if (kept, solver) not in measured.programs:
        try:
            program: Program | str = solver_program(config, solver, operator, measured.slope)
        except ValueError as error:
            program = str(error)
        measured.programs[kept, solver] = program
    return measured.programs[kept, solver], operator


def cost(
    measured: Measured, curvature: str, solver: str, program: Program, products: int
) -> tuple[float, float | None]:
    """Seconds from λ to a solution, and megabytes: measured, or, if the matrix is stored, added up from parts."""
    curved = measured.curved[curvature]
    if curvature == "exact" and solver != "dense":
        return curved.seconds + program.seconds, program.megabytes
    if solver in BATCHED:
        one, megabytes = curved.dense.seconds / curved.operator.size, curved.dense.megabytes
    else:
        one, megabytes = curved.product.seconds, curved.product.megabytes
    return curved.seconds + program.seconds + products * one, megabytes
