"""What must hold for every problem, on small ones drawn at random.

Compiling takes seconds and running a millisecond, so the shapes and strategies come from a short list and the numbers
from hypothesis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import metainfluence as mi
from reliability import cases
from reliability.cases import DRAWN, LONG, MORE, QUICK, STRUCTURES, group_of, inputs_of, operator_of, ravel, scores_of

CLAIMS = {}


def claim(check):
    """Makes a test of a function (structure, drawn), and keeps the function for the longer run."""
    CLAIMS[check.__name__] = check
    return pytest.mark.parametrize("structure", STRUCTURES, ids=str)(QUICK(given(drawn=DRAWN)(check)))


def same(structure, found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **cases.tolerance(structure)), found, expected)


def scores(structure, inputs):
    return cases.values(scores_of(structure)(inputs))


def vectors(structure, drawn):
    return [cases.cast(cases.meta_params_of(vector), structure.dtype) for vector in drawn.vectors]


@claim
def test_operators_are_linear_and_symmetric(structure, drawn):
    inputs, (left, right) = inputs_of(structure, drawn), vectors(structure, drawn)
    product = operator_of(structure)
    of_left, of_right = (ravel(product(inputs, vector)) for vector in (left, right))
    combined = jax.tree.map(lambda a, b: 2 * a - 3 * b, left, right)
    same(structure, ravel(product(inputs, combined)), 2 * of_left - 3 * of_right)
    same(structure, ravel(left) @ of_right, ravel(right) @ of_left)


@claim
def test_damping_is_an_l2_term_in_the_operator(structure, drawn):
    inputs, (vector, _) = inputs_of(structure, drawn), vectors(structure, drawn)
    more = jnp.asarray(0.75, inputs.delta.dtype)
    by_damping = operator_of(structure)(inputs._replace(damping=inputs.damping + more), vector)
    by_regularizer = operator_of(structure)(inputs._replace(delta=inputs.delta + more), vector)
    same(structure, ravel(by_damping), ravel(by_regularizer))
    assert np.max(np.abs(ravel(by_damping))) > 0 or np.all(ravel(vector) == 0)


@claim
def test_permuting_tasks_permutes_scores(structure, drawn):
    inputs, order = inputs_of(structure, drawn), np.asarray(drawn.order)
    tasks, weights = jax.tree.map(lambda leaf: leaf[order], (inputs.tasks, inputs.weights))
    expected = jax.tree.map(lambda leaf: leaf[order], scores(structure, inputs))
    same(structure, scores(structure, inputs._replace(tasks=tasks, weights=weights)), expected)


@claim
def test_permuting_examples_permutes_scores(structure, drawn):
    inputs, order = inputs_of(structure, drawn), np.asarray(drawn.order)
    flipped = np.asarray([1, 0])

    def permuted(tree, support, query):
        moved = {"support": lambda leaf: leaf[:, support], "query": lambda leaf: leaf[:, query]}
        names = [name for name in tree._fields if name != "task"]
        return tree._replace(**{n: jax.tree.map(moved[n.removesuffix("_mask")], getattr(tree, n)) for n in names})

    changed = inputs._replace(
        tasks=permuted(inputs.tasks, order, flipped), weights=permuted(inputs.weights, order, flipped)
    )
    same(structure, scores(structure, changed), permuted(scores(structure, inputs), order, flipped))


@claim
def test_a_task_twice_is_a_task_of_double_weight(structure, drawn):
    """The number of tasks stays the same, so that the mean's 1/T does."""
    inputs = inputs_of(structure, drawn)
    twice = np.asarray([0, 1, 1])
    tasks, weights = jax.tree.map(lambda leaf: leaf[twice], (inputs.tasks, inputs.weights))
    doubled = weights.task.at[1].multiply(2).at[2].set(0)
    copied = scores(structure, inputs._replace(tasks=tasks, weights=weights))
    weighted = scores(structure, inputs._replace(weights=inputs.weights._replace(task=doubled)))
    for field in mi.Weights._fields:
        two, one = getattr(copied, field), getattr(weighted, field)
        same(structure, two[0], one[0])
        same(structure, two[1] + two[2], one[1])
        assert np.all(one[2] == 0)


@claim
def test_a_task_of_weight_0_is_a_task_that_is_not_there(structure, drawn):
    """Among two tasks the mean is 1/2, among three 1/3: the others' weights make up for it."""
    inputs = inputs_of(structure, drawn)
    two = inputs._replace(**jax.tree.map(lambda leaf: leaf[:2], {"tasks": inputs.tasks, "weights": inputs.weights}))
    task = (1.5 * inputs.weights.task).at[2].set(0)
    padded = scores(structure, inputs._replace(weights=inputs.weights._replace(task=task)))
    same(structure, jax.tree.map(lambda leaf: leaf[:2], padded), scores(structure, two))
    assert all(np.all(leaf[2] == 0) for leaf in padded)


@claim
def test_an_example_of_weight_0_is_padding(structure, drawn):
    """Padding is left out of a task's 1/n, and the others' weights make up for it."""
    inputs = inputs_of(structure, drawn)
    full = jnp.asarray(drawn.data.shape[0] * [[True] * cases.SUPPORT]), jnp.ones((cases.T, cases.QUERY), bool)
    masks = [mask.at[0, -1].set(False) for mask in full]
    weights = inputs.weights._replace(
        support=inputs.weights.support.at[0].multiply(3 / 2).at[0, -1].set(0),
        query=inputs.weights.query.at[0].multiply(2).at[0, -1].set(0),
    )
    names = ("support_mask", "query_mask")
    kept = inputs._replace(tasks=inputs.tasks._replace(**dict(zip(names, full, strict=True))), weights=weights)
    cut = inputs._replace(tasks=inputs.tasks._replace(**dict(zip(names, masks, strict=True))))
    same(structure, scores(structure, kept), scores(structure, cut))


@claim
def test_a_multiple_of_the_target_has_that_multiple_of_the_scores(structure, drawn):
    inputs = inputs_of(structure, drawn)
    tripled = scores(structure, inputs._replace(factor=-3 * inputs.factor))
    same(structure, tripled, jax.tree.map(lambda leaf: -3 * leaf, scores(structure, inputs)))


@claim
def test_query_scores_add_up_to_their_tasks_score(structure, drawn):
    found = scores(structure, inputs_of(structure, drawn))
    same(structure, jnp.sum(found.query, axis=1), found.task)


@claim
def test_reverse_mode_equals_forward_mode(structure, drawn):
    """⟨∇φ, dλ*/dw · d⟩ is −Σ score / w · d, for any direction d."""
    inputs = inputs_of(structure, drawn)
    rates = jax.tree.map(lambda score, w: -score / w, scores(structure, inputs), inputs.weights)
    direction = jax.tree.map(lambda w: jnp.cos(5 * w), inputs.weights)
    _, along = group_of(structure)(inputs, direction)
    same(structure, along, ravel(rates) @ ravel(direction))


@claim
def test_removing_a_group_is_the_sum_of_its_members(structure, drawn):
    inputs = inputs_of(structure, drawn)
    pairs = [(0, 0), (2, 1)]

    def delta(**removed):
        new = mi.drop(inputs.weights, **removed)
        return ravel(group_of(structure)(inputs, jax.tree.map(jnp.subtract, new, inputs.weights))[0].delta)

    alone = [delta(tasks=[1]), *(delta(support=[pair]) for pair in pairs), delta(query=[(2, 0)])]
    same(structure, delta(tasks=[1], support=pairs, query=[(2, 0)]), sum(alone))
    found = scores(structure, inputs)
    predicted = found.task[1] + found.support[0, 0] + found.support[2, 1] + found.query[2, 0]
    new = mi.drop(inputs.weights, tasks=[1], support=pairs, query=[(2, 0)])
    same(structure, group_of(structure)(inputs, jax.tree.map(jnp.subtract, new, inputs.weights))[1], predicted)


@claim
def test_padding_may_hold_anything(structure, drawn):
    if not structure.ragged:
        return
    inputs = inputs_of(structure, drawn)

    def spoilt(batch, mask):
        return jax.tree.map(
            lambda leaf: jnp.where(mask.reshape(*mask.shape, *[1] * (leaf.ndim - 2)), leaf, jnp.nan), batch
        )

    tasks = inputs.tasks
    dirty = tasks._replace(
        support=spoilt(tasks.support, tasks.support_mask), query=spoilt(tasks.query, tasks.query_mask)
    )
    jax.tree.map(
        np.testing.assert_array_equal, scores(structure, inputs._replace(tasks=dirty)), scores(structure, inputs)
    )


@functools.cache
def variants():
    """The same scores in chunks of two tasks, and under vmap over all inputs."""
    structure = STRUCTURES[0]

    def chunked(inputs):
        problem = cases.problem(structure.adapt, inputs.delta)
        maker = mi.influence_scores(problem, cases.target, batch_size=2, **cases.strategies(structure, inputs.damping))
        return maker(inputs.meta_params, inputs.tasks, inputs.test_tasks, inputs.factor, weights=inputs.weights)

    return jax.jit(chunked), jax.jit(jax.vmap(scores_of(structure)))


@QUICK
@given(drawn=DRAWN)
def test_chunks_and_vmap_change_nothing(drawn):
    structure = STRUCTURES[0]
    inputs = inputs_of(structure, drawn)
    expected = scores(structure, inputs)
    chunked, mapped = variants()
    same(structure, cases.values(chunked(inputs)), expected)
    other = inputs._replace(damping=inputs.damping + 1)
    pair = cases.values(mapped(jax.tree.map(lambda *leaves: jnp.stack(leaves), other, inputs)))
    same(structure, jax.tree.map(lambda leaf: leaf[1], pair), expected)
    same(structure, jax.tree.map(lambda leaf: leaf[0], pair), scores(structure, other))


@pytest.mark.slow
@pytest.mark.parametrize("structure", [*STRUCTURES, *MORE], ids=str)
@pytest.mark.parametrize("name", CLAIMS)
def test_every_property_at_length(name, structure):
    @LONG
    @given(drawn=DRAWN)
    def run(drawn):
        CLAIMS[name](structure, drawn)

    run()
