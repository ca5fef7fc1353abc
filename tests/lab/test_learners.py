"""Every learner against oracles: its adaptation by hand, and its derivatives by central differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special

import metainfluence as mi
from metainfluence.lab.data import digits, fewshot
from metainfluence.lab.learn import learners, models
from metainfluence.lab.learn.models import MLP

WAYS = 3
FEATURES = MLP((4,))
LEARNERS = {
    "maml": learners.maml(FEATURES, WAYS, steps=2, lr=0.3, meta_l2=0.01),
    "meta_sgd": learners.meta_sgd(FEATURES, WAYS, lr=0.3, meta_l2=0.01),
    "anil": learners.anil(FEATURES, WAYS, steps=2, lr=0.5, meta_l2=0.01),
    "implicit_head": learners.implicit_head(FEATURES, WAYS, head_l2=0.1, tol=1e-11),
    "imaml": learners.imaml(FEATURES, WAYS, proximal=2.0, meta_l2=0.01),
    "r2d2": learners.r2d2(FEATURES, WAYS, meta_l2=0.01),
    "protonet": learners.protonet(FEATURES, WAYS, meta_l2=0.01),
}


@pytest.fixture(scope="module")
def tasks():
    source = digits.dataset(size=4)
    listed = fewshot.sample(source, "train", num_tasks=3, ways=WAYS, shots=2, queries=2, seed=0)
    return fewshot.materialize(listed, source.images)


@functools.cache
def adapt(name):
    return jax.jit(LEARNERS[name].problem.adapt)


def started(name, tasks):
    learner = LEARNERS[name]
    return learner.problem, learner.init(jax.random.key(1), tasks.support.images[0])


def along(problem, meta_params, tasks, direction, step):
    """F after a step in λ and in all weights along fixed directions."""
    in_params, in_weights = direction
    weights = jax.tree.map(lambda w, d: w + step[1] * d, mi.unit_weights(tasks), in_weights)
    moved = jax.tree.map(lambda leaf, d: leaf + step[0] * d, meta_params, in_params)
    return mi.total_objective(problem)(moved, tasks, weights)


def derivatives(problem, meta_params, tasks, direction):
    def value(step):
        return along(problem, meta_params, tasks, direction, step)

    steps = 1e-3 * jnp.array([[-1, 0], [0, 0], [1, 0], [0, -1], [0, 1]], float)
    # The second derivative through an implicit minimum is the core's to test, and slow to compile.
    curvature = jnp.nan
    if problem.inner_gradient_norm is None:
        curvature = jax.jvp(jax.grad(value), (jnp.zeros(2),), (jnp.array([1.0, 0.0]),))[1][0]
    return jax.vmap(value)(steps), jax.grad(value)(jnp.zeros(2)), curvature


@pytest.mark.parametrize("name", LEARNERS)
def test_derivatives_are_those_of_the_loss(name, tasks, rng):
    """Central differences along one direction in λ, and along one in all weights, support examples' included."""
    problem, meta_params = started(name, tasks)
    direction = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), (meta_params, mi.unit_weights(tasks))
    )
    run = jax.jit(derivatives, static_argnums=0)
    (low, middle, high, less, more), slopes, curvature = run(problem, meta_params, tasks, direction)
    h = 1e-3
    np.testing.assert_allclose(slopes, [(high - low) / (2 * h), (more - less) / (2 * h)], rtol=1e-4, atol=1e-6)
    assert np.abs(slopes).min() > 1e-3
    if problem.inner_gradient_norm is None:
        np.testing.assert_allclose(curvature, (high - 2 * middle + low) / h**2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_loss_is_a_head_on_logits(name, tasks):
    problem, meta_params = started(name, tasks)
    task, weights = jax.tree.map(lambda leaf: leaf[0], (tasks, mi.unit_weights(tasks)))
    params = adapt(name)(meta_params, task, weights)
    logits = problem.outputs(params, meta_params, task)
    assert logits.shape == (6, WAYS)
    expected = -np.mean(np.asarray(jax.nn.log_softmax(logits))[np.arange(6), np.asarray(task.query.labels)])
    np.testing.assert_allclose(problem.head(logits, task, weights), expected, rtol=1e-12)
    np.testing.assert_allclose(problem.outer(params, meta_params, task, weights), expected, rtol=1e-12)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_support_example_of_weight_zero_is_absent(name, tasks):
    """Whatever it shows; at weight 1 it matters."""
    _, meta_params = started(name, tasks)
    task, weights = jax.tree.map(lambda leaf: leaf[0], (tasks, mi.unit_weights(tasks)))
    images = task.support.images.at[4].set(1 - task.support.images[4])
    other = task._replace(support=task.support._replace(images=images))

    def change(own):
        return optax.tree.norm(optax.tree.sub(*(adapt(name)(meta_params, one, own) for one in (task, other))))

    assert change(weights._replace(support=weights.support.at[4].set(0.0))) < 1e-9
    assert change(weights) > 1e-3


def test_maml_is_gradient_descent_by_hand(tasks):
    problem, meta_params = started("maml", tasks)
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    model = learners.WithHead(FEATURES, WAYS)

    def loss(params):
        logits = model.apply(params, task.support.images)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), task.support.labels[:, None], axis=1))

    expected = meta_params
    for _ in range(2):
        expected = jax.tree.map(lambda p, g: p - 0.3 * g, expected, jax.grad(loss)(expected))
    adapted = problem.adapt(meta_params, task, mi.Weights(jnp.ones(()), jnp.ones(6), jnp.ones(6)))
    for a, b in zip(jax.tree.leaves(adapted), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_first_order_maml_has_the_gradient_at_the_adapted_parameters(tasks):
    first, second = (learners.maml(FEATURES, WAYS, steps=1, lr=0.3, order=order).problem for order in (1, 2))
    _, meta_params = started("maml", tasks)
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    weights = mi.Weights(jnp.ones(()), jnp.ones(6), jnp.ones(6))
    adapted = first.adapt(meta_params, task, weights)
    expected = jax.grad(first.outer)(adapted, meta_params, task, weights)
    gradient, other = (mi.total_gradient(problem)(meta_params, task) for problem in (first, second))
    for a, b, c in zip(*map(jax.tree.leaves, (gradient, expected, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
        assert not np.allclose(a, c, rtol=1e-3)
    np.testing.assert_allclose(*(mi.task_loss(problem)(meta_params, task) for problem in (first, second)), rtol=1e-14)


def test_meta_sgd_at_equal_rates_is_maml(tasks):
    problem, meta_params = started("meta_sgd", tasks)
    task, weights = jax.tree.map(lambda leaf: leaf[0], (tasks, mi.unit_weights(tasks)))
    expected = learners.maml(FEATURES, WAYS, steps=1, lr=0.3).problem.adapt(meta_params["network"], task, weights)
    for a, b in zip(*map(jax.tree.leaves, (problem.adapt(meta_params, task, weights), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)


def test_a_head_that_is_not_learned_is_that_which_learning_starts_from(tasks):
    problem, meta_params = started("r2d2", tasks)
    fixed = learners.r2d2(FEATURES, WAYS, learned_head=False)
    alone = fixed.init(jax.random.key(1), tasks.support.images[0])
    assert jax.tree.structure(alone) == jax.tree.structure(meta_params["features"])
    training, held_out = (jax.tree.map(lambda leaf, part=part: leaf[part], tasks) for part in (slice(2), slice(2, 3)))
    of_learned, of_fixed = (
        mi.query_loss(each)(start, held_out) for each, start in ((problem, meta_params), (fixed.problem, alone))
    )
    np.testing.assert_allclose(of_fixed, of_learned, rtol=1e-9)
    ekfac_if = mi.baselines.ekfac_if(fixed.problem, mi.query_loss(fixed.problem), damping=0.1)
    scores = jax.jit(ekfac_if)(alone, training, held_out)
    assert np.all(np.isfinite(scores.task))
    assert np.any(scores.task)


@pytest.mark.parametrize("width", [4, 9])
def test_r2d2_is_ridge_regression(width, tasks):
    """Both forms, in the features (4 of them, 6 examples) and in the examples (9 features), against least squares."""
    features = MLP((width,))
    learner = learners.r2d2(features, WAYS, ridge=0.2)
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    meta_params = learner.init(jax.random.key(1), task.support.images)
    support = np.array([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
    kernel = learner.problem.adapt(meta_params, task, mi.Weights(jnp.ones(()), jnp.asarray(support), jnp.ones(6)))
    root = np.sqrt(support / 6)[:, None]
    seen = np.asarray(features.apply(meta_params["features"], task.support.images))
    rows = np.concatenate([root * seen, np.sqrt(0.2) * np.eye(width)])
    targets = np.concatenate([root * np.eye(WAYS)[np.asarray(task.support.labels)], np.zeros((width, WAYS))])
    np.testing.assert_allclose(kernel, np.linalg.lstsq(rows, targets)[0], rtol=1e-9, atol=1e-12)


def test_protonet_has_the_means_and_squared_distances(tasks):
    problem, meta_params = started("protonet", tasks)
    task, weights = jax.tree.map(lambda leaf: leaf[0], (tasks, mi.unit_weights(tasks)))
    prototypes = problem.adapt(meta_params, task, weights)
    seen, query = (np.asarray(FEATURES.apply(meta_params, side.images)) for side in (task.support, task.query))
    means = np.stack([seen[np.asarray(task.support.labels) == way].mean(axis=0) for way in range(WAYS)])
    np.testing.assert_allclose(prototypes, means, rtol=1e-12)
    expected = -np.sum((query[:, None] - means) ** 2, axis=-1)
    np.testing.assert_allclose(problem.outputs(prototypes, meta_params, task), expected, rtol=1e-12)


def test_a_class_without_weight_has_a_finite_prototype(tasks):
    problem, meta_params = started("protonet", tasks)
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    weights = mi.Weights(jnp.ones(()), jnp.ones(6).at[:2].set(0.0), jnp.ones(6))
    np.testing.assert_array_equal(problem.adapt(meta_params, task, weights)[0], 0)
    loss, gradient = jax.value_and_grad(mi.task_loss(problem))(meta_params, task, weights)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_imaml_is_at_its_minimum(tasks):
    problem, meta_params = started("imaml", tasks)
    task, weights = jax.tree.map(lambda leaf: leaf[0], (tasks, mi.unit_weights(tasks)))
    adapted = adapt("imaml")(meta_params, task, weights)
    assert problem.inner_gradient_norm(adapted, meta_params, task, weights) < 1e-10
    assert optax.tree.norm(optax.tree.sub(adapted, meta_params)) > 0.01


def test_regression_learners_take_a_squared_error():
    learner = learners.maml(MLP((4,), image_ndim=1), 1, loss=models.squared_error)
    task = mi.Task((jnp.linspace(-1, 1, 5)[:, None], jnp.arange(5.0)), (jnp.ones((2, 1)), jnp.array([1.0, 3.0])))
    meta_params = learner.init(jax.random.key(0), task.support[0])
    adapted = learner.problem.adapt(meta_params, task, mi.Weights(jnp.ones(()), jnp.ones(5), jnp.ones(2)))
    outputs = learner.problem.outputs(adapted, meta_params, task)
    expected = np.mean((np.asarray(outputs)[:, 0] - [1.0, 3.0]) ** 2) / 2
    np.testing.assert_allclose(mi.task_loss(learner.problem)(meta_params, task), expected, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_accuracy_counts_real_query_examples(batch_size):
    """On ragged tasks, by a head that knows the answer but for one example."""

    def outputs(params, meta_params, query):
        return params * jax.nn.one_hot(query.images, 3)

    adapt = mi.adaptation.closed_form(lambda meta_params, support, coefficients: meta_params)
    problem = mi.bilevel(outputs, adapt, outer_head=lambda out, query: models.cross_entropy(out, query.labels))

    def task(answers, labels):
        return mi.Task(fewshot.Batch(jnp.zeros(1, int), jnp.zeros(1, int)), fewshot.Batch(answers, labels))

    tasks = mi.stack_tasks(
        [
            task(jnp.array([0, 1, 2, 2]), jnp.array([0, 1, 2, 0])),
            task(jnp.array([1, 1]), jnp.array([1, 0])),
            task(jnp.array([2]), jnp.array([2])),
        ]
    )
    got = learners.accuracy(problem, batch_size=batch_size)(jnp.asarray(1.0), tasks)
    np.testing.assert_allclose(got, [0.75, 0.5, 1.0])
    # NaN is no answer, though argmax would give class 0; on padding, where the logits are 0 · NaN too, it is none's.
    broken = learners.accuracy(problem, batch_size=batch_size)(jnp.asarray(jnp.nan), tasks)
    assert np.all(np.isnan(broken))

    def padded_nan(params, meta_params, query):
        return outputs(params, meta_params, query) + jnp.where(query.images == 9, jnp.nan, 0.0)[:, None]

    hidden = mi.bilevel(padded_nan, adapt, outer_head=lambda out, query: models.cross_entropy(out, query.labels))
    images = jnp.where(tasks.query_mask, tasks.query.images, 9)
    tasks = tasks._replace(query=tasks.query._replace(images=images))
    got = learners.accuracy(hidden, batch_size=batch_size)(jnp.asarray(1.0), tasks)
    np.testing.assert_allclose(got, [0.75, 0.5, 1.0])


def test_the_calibrated_loss_is_the_least_over_temperatures(tasks):
    """Value by SciPy's minimum, slope by central differences of it; how sure the outputs are changes neither."""
    problem, start = started("r2d2", tasks)
    loss = learners.calibrated_loss(problem)

    def logits(meta_params):
        task_logits = lambda task, w: problem.outputs(problem.adapt(meta_params, task, w), meta_params, task)  # noqa: E731
        return np.asarray(jax.vmap(task_logits)(tasks, mi.unit_weights(tasks)))

    def least(meta_params):
        fixed, labels = logits(meta_params), np.asarray(tasks.query.labels)

        def at(inverse):
            scaled = scipy.special.log_softmax(inverse * fixed, axis=-1)
            return -np.mean(np.take_along_axis(scaled, labels[..., None], -1))

        return scipy.optimize.minimize_scalar(at, bounds=(1e-3, 1e3), options={"xatol": 1e-12}).fun

    np.testing.assert_allclose(loss(start, tasks), least(start), rtol=1e-9)
    assert float(loss(start, tasks)) < float(mi.query_loss(problem)(start, tasks))
    surer = {**start, "scale": 5 * start["scale"]}
    np.testing.assert_allclose(loss(surer, tasks), loss(start, tasks), rtol=1e-9)
    slope = jax.jit(jax.grad(loss))(start, tasks)
    assert abs(slope["scale"]) < 1e-9
    direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(4), leaf.shape), start)
    moved = (jax.tree.map(lambda a, d, s=s: a + s * d, start, direction) for s in (1e-4, -1e-4))
    expected = np.subtract(*map(least, moved)) / 2e-4
    np.testing.assert_allclose(optax.tree.vdot(slope, direction), expected, rtol=1e-5)


def test_the_calibrated_loss_of_ragged_tasks_is_the_mean_of_their_means():
    def outputs(params, meta_params, query):
        return params * jax.nn.one_hot(query.images, 2)

    adapt = mi.adaptation.closed_form(lambda meta_params, support, coefficients: meta_params)
    problem = mi.bilevel(outputs, adapt, outer_head=lambda out, query: models.cross_entropy(out, query.labels))
    support = fewshot.Batch(jnp.zeros(1, int), jnp.zeros(1, int))
    answers, labels = [jnp.array([0, 1, 1, 0]), jnp.array([1])], [jnp.array([0, 1, 0, 0]), jnp.array([1])]
    tasks = mi.stack_tasks([mi.Task(support, fewshot.Batch(*each)) for each in zip(answers, labels, strict=True)])
    # Right in 3 of 4 and 1 of 1, a share of 7/8: the best temperature says just that.
    share = 7 / 8
    expected = -share * np.log(share) - (1 - share) * np.log(1 - share)
    value, slope = jax.value_and_grad(learners.calibrated_loss(problem))(jnp.asarray(1.0), tasks)
    np.testing.assert_allclose([value, slope], [expected, 0.0], rtol=1e-9, atol=1e-9)


def test_the_interval_is_196_standard_errors():
    values = [0.8, 0.9, 1.0, 0.7]
    mean, half = learners.mean_interval(values)
    np.testing.assert_allclose([mean, half], [0.85, 1.96 * np.std(values, ddof=1) / 2])
    with pytest.raises(ValueError, match="accuracies: expected at least two numbers"):
        learners.mean_interval([0.8])


def test_bad_input():
    with pytest.raises(ValueError, match="order: expected 1 or 2, got 3"):
        learners.maml(FEATURES, WAYS, order=3)
    without = mi.bilevel(lambda p, m, q: jnp.zeros(1), mi.adaptation.closed_form(lambda m, s, c: m))
    with pytest.raises(ValueError, match="problem: expected one made by"):
        learners.accuracy(without)
    with pytest.raises(ValueError, match="problem: expected one made by"):
        learners.calibrated_loss(without)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: learners.implicit_head(FEATURES, WAYS, head_l2=-1.0), "head_l2"),
        (lambda: learners.implicit_head(FEATURES, WAYS, head_l2=0.0), "head_l2"),
        (lambda: learners.implicit_head(FEATURES, WAYS, meta_l2=-1.0), "meta_l2"),
        (lambda: learners.imaml(FEATURES, WAYS, proximal=0.0), "proximal"),
        (lambda: learners.r2d2(FEATURES, WAYS, ridge=-0.1), "ridge"),
        (lambda: learners.maml(FEATURES, WAYS, meta_l2=np.nan), "meta_l2"),
        (lambda: learners.protonet(FEATURES, WAYS, meta_l2=-1e-3), "meta_l2"),
    ],
)
def test_penalties_without_a_minimum_are_refused(make, name):
    with pytest.raises(ValueError, match=f"{name}: expected a number (above|of at least) 0, got"):
        make()
