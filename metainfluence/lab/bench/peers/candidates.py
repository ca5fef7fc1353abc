"""Which library computes what, and how: the candidates for each quantity, ours first."""

import functools
from collections.abc import Callable
from typing import Any

import jax

import metainfluence as mi
from metainfluence.curvature import exact
from metainfluence.lab.bench.peers import problem as common
from metainfluence.lab.bench.peers import single_level, with_jax
from metainfluence.lab.bench.peers.compare import Candidate, kept, traced
from metainfluence.lab.bench.peers.problem import Problem
from metainfluence.lab.bench.peers.single_level import SingleLevel
from metainfluence.response import expand

GRADIENT = "total gradients"
PRODUCT = "Hessian product from λ"
LINEAR = "Hessian product, linear part kept"
SCORES = "scores of all examples"
ROUTE = "scores of all examples, our route"
SINGLE = "single-level scores"

OURS = "metainfluence"
_JAXOPT, _OPTIMISTIX = "jaxopt, implicit (L-BFGS, CG)", "optimistix, ImplicitAdjoint (BFGS, CG)"
_TOLERANCES = tuple(10.0**-power for power in range(1, 13))
# Three steps are not enough for any useful target.
_NEWTON_STEPS = (4, 5, 6, 7)
_UNROLLED_STEPS = (40, 60, 80, 120)
_CG_STEPS = (5, 10, 20, 40, 80, 160, 320)

# (task loss, layers, tasks, ...) -> the quantity.
_Way = Callable[..., Any]


def two_level_candidates(problem: Problem, quantity: str) -> list[Candidate]:
    """Candidates for a quantity of the few-shot problem."""
    data = (problem.layers, problem.tasks)
    along = (*data, problem.direction)
    reverse, forward = ", reverse over reverse", ", forward over reverse"
    ours = _ours(problem, quantity)
    if quantity == GRADIENT:
        return [
            *ours,
            _implicit(problem, _JAXOPT, with_jax.gradients, data),
            _unrolled(problem),
            _implicit(problem, _OPTIMISTIX, with_jax.gradients, data),
            _torch(problem, lambda peer: peer.gradients),
            _torch(problem, lambda peer: peer.gradients, ", loop over tasks", batched=False),
        ]
    if quantity == PRODUCT:
        return [
            *ours,
            _implicit(problem, _JAXOPT, with_jax.reverse_over_reverse, along, reverse),
            _implicit(problem, _OPTIMISTIX, with_jax.reverse_over_reverse, along, reverse),
            _implicit(problem, _OPTIMISTIX, with_jax.forward_over_reverse, along, forward),
            _torch(problem, lambda peer: functools.partial(peer.product, forward=False), reverse),
            _torch(problem, lambda peer: functools.partial(peer.product, forward=True), forward),
        ]
    if quantity == LINEAR:
        return [
            *ours,
            _linear(problem, _JAXOPT),
            _linear(problem, _OPTIMISTIX),
            _torch(problem, lambda peer: peer.linear(), reverse),
        ]
    if quantity == SCORES:
        return [
            *ours,
            _implicit(problem, _JAXOPT, with_jax.scores_per_example, along),
            _implicit(problem, _OPTIMISTIX, with_jax.scores_per_example, along),
            _torch(problem, lambda peer: peer.scores),
        ]
    return [*ours, _implicit(problem, _OPTIMISTIX, with_jax.scores_at_once, along)]


def _ours(problem: Problem, quantity: str) -> list[Candidate]:
    def expanded(tol: Any, layers: Any, tasks: mi.Task) -> Any:
        return expand(common.ours(problem, tol), exact(), None)(layers, tasks, mi.unit_weights(tasks))

    def gradients(tol: Any, layers: Any, tasks: mi.Task) -> Any:
        return jax.vmap(mi.total_gradient(common.ours(problem, tol)), in_axes=(None, 0))(layers, tasks)

    def product(tol: Any, layers: Any, tasks: mi.Task, vector: Any) -> Any:
        return mi.total_hessian(common.ours(problem, tol))(layers, tasks).matvec(vector)

    def scores(tol: Any, layers: Any, tasks: mi.Task, vector: Any) -> Any:
        return scaled(expanded(tol, layers, tasks).mixed_transposed, vector)

    def scaled(mixed_transposed: Any, vector: Any) -> Any:
        # Scores of F, which is a mean over tasks; the other libraries give scores of the sum over tasks.
        found = mixed_transposed(vector)
        return jax.tree.map(lambda leaf: leaf * found.task.size, (found.support, found.query))

    data = (problem.layers, problem.tasks)
    along = (*data, problem.direction)
    linear = kept(
        lambda *args: expanded(*args).operator.product, lambda linear, vector: linear(vector), data, problem.direction
    )
    after = kept(lambda *args: expanded(*args).mixed_transposed, scaled, data, problem.direction)
    ways = {
        GRADIENT: {OURS: traced(gradients, *data)},
        PRODUCT: {OURS: traced(product, *along)},
        LINEAR: {OURS: linear},
        SCORES: {OURS: traced(scores, *along), f"{OURS}, linear part kept from the solve": after},
        ROUTE: {OURS: traced(scores, *along)},
    }
    return [Candidate(name, _TOLERANCES, prepare, ours=True) for name, prepare in ways[quantity].items()]


def _fit(problem: Problem, library: str, tol: Any) -> common.Fit:
    made = with_jax.jaxopt_implicit if library == _JAXOPT else with_jax.optimistix_implicit
    return made(problem, tol)


def _implicit(problem: Problem, library: str, way: _Way, args: tuple[Any, ...], named: str = "") -> Candidate:
    def function(tol: Any, *args: Any) -> Any:
        return way(common.task_loss(_fit(problem, library, tol)), *args)

    return Candidate(library + named, _TOLERANCES, traced(function, *args), needs=_needs(library))


def _linear(problem: Problem, library: str) -> Candidate:
    def prepare(tol: float) -> Callable[[], Any]:
        # The kept map closes over the tolerance, so the tolerance must not be traced: each has its own program.
        loss = common.task_loss(_fit(problem, library, tol))
        linear = jax.jit(lambda layers, tasks: jax.vjp(with_jax.slope(loss, tasks), layers)[1])(
            problem.layers, problem.tasks
        )
        product = jax.jit(lambda linear, vector: linear(vector)[0])
        return lambda: jax.block_until_ready(product(linear, problem.direction))

    return Candidate(f"{library}, reverse over reverse", _TOLERANCES[4:], prepare, needs=_needs(library))


def _needs(library: str) -> tuple[str, ...]:
    return ("jaxopt",) if library == _JAXOPT else ("optimistix", "lineax")


def _unrolled(problem: Problem) -> Candidate:
    """Uses the longest step that is sure to converge, 1 / the largest curvature."""
    step_size = 1 / with_jax.largest_curvature(problem)

    def prepare(num_steps: int) -> Callable[[], Any]:
        loss = common.task_loss(with_jax.jaxopt_unrolled(problem, num_steps, step_size))
        return traced(lambda _, *args: with_jax.gradients(loss, *args), problem.layers, problem.tasks)(0.0)

    name = "jaxopt, unrolled (gradient descent)"
    return Candidate(name, _UNROLLED_STEPS, prepare, "{} steps".format, needs=("jaxopt",))


def _torch(
    problem: Problem,
    call: Callable[[Any], Callable[[], Any]],
    named: str = ", vmap over tasks",
    *,
    batched: bool = True,
) -> Candidate:
    def prepare(num_steps: int) -> Callable[[], Any]:
        from metainfluence.lab.bench.peers import with_torch

        compute = call(with_torch.Peer(problem, num_steps, batched=batched))
        return lambda: with_torch.arrays(compute())

    return Candidate(f"torch.func{named}", _NEWTON_STEPS, prepare, "{} Newton steps".format, needs=("torch",))


def one_level_candidates(problem: SingleLevel) -> list[Candidate]:
    """Candidates for the single-level scores."""

    def ours(tol: Any, layers: Any, train: Any, test: Any) -> Any:
        return single_level.our_scores(SingleLevel(layers, train, test, problem.damping), tol)

    def dattri(setting: Any) -> Any:
        from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit

        def make(task: Any) -> Any:
            if setting is None:
                return IFAttributorExplicit(task, regularization=problem.damping)
            return IFAttributorCG(task, max_iter=setting, regularization=problem.damping)

        return single_level.dattri_scores(problem, make)

    def pydvl(setting: Any, *, together: bool) -> Any:
        from pydvl.influence.torch import CgInfluence, DirectInfluence

        def make(model: Any, loss: Any) -> Any:
            if setting is None:
                return DirectInfluence(model, loss, regularization=problem.damping)
            return CgInfluence(
                model, loss, regularization=problem.damping, rtol=setting, atol=0.0, solve_simultaneously=together
            )

        return single_level.pydvl_scores(problem, make)

    dense = "dense Hessian".format
    return [
        Candidate(OURS, _TOLERANCES, traced(ours, problem.layers, problem.train, problem.test), ours=True),
        Candidate("dattri, IFAttributorCG", _CG_STEPS, dattri, "{} steps".format, needs=("dattri",)),
        Candidate("dattri, IFAttributorExplicit", (None,), dattri, dense, needs=("dattri",)),
        *(
            Candidate(
                f"pyDVL, CgInfluence{name}",
                _TOLERANCES,
                functools.partial(pydvl, together=together),
                needs=("pydvl",),
            )
            for together, name in ((True, ", solve_simultaneously"), (False, ""))
        ),
        Candidate("pyDVL, DirectInfluence", (None,), functools.partial(pydvl, together=False), dense, needs=("pydvl",)),
    ]
