"""Metrics against their definitions, against scikit-learn and SciPy, and against λ that was really retrained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

import convex
import metainfluence as mi
from metainfluence import evaluation

SCORES = np.array([0.3, -2.0, 0.1, -1.0, 0.2])
DAMAGED = np.array([False, True, False, False, True])


def test_detection_curve_counts_from_the_most_harmful():
    np.testing.assert_array_equal(evaluation.detection_curve(SCORES, DAMAGED), [0, 0.5, 0.5, 0.5, 1, 1])
    np.testing.assert_array_equal(evaluation.detection_curve(SCORES, np.zeros(5, bool)), 0)
    ties = evaluation.detection_curve(np.zeros(5), DAMAGED)
    np.testing.assert_array_equal(ties, [0, 0, 0.5, 0.5, 0.5, 1])


@pytest.mark.parametrize(("share", "found"), [(0, 0), (0.2, 0.5), (0.6, 0.5), (0.8, 1), (1, 1)])
def test_found_at(share, found):
    assert evaluation.found_at(SCORES, DAMAGED, share) == found


def test_roc_auc_is_the_share_of_pairs_in_the_right_order():
    """Damaged -2.0 is below all three others, damaged 0.2 below 0.3 only."""
    assert evaluation.roc_auc(SCORES, DAMAGED) == pytest.approx(4 / 6)
    assert evaluation.roc_auc(-SCORES, DAMAGED) == pytest.approx(2 / 6)


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_roc_auc_against_scikit_learn(levels, rng):
    scores, damaged = rng.integers(levels, size=200) / 7, rng.random(200) < 0.3
    expected = roc_auc_score(damaged, -scores)
    assert evaluation.roc_auc(scores, damaged) == pytest.approx(expected, abs=1e-12)


def test_roc_auc_where_nothing_can_be_ranked():
    assert evaluation.roc_auc(np.ones(5), DAMAGED) == 0.5
    assert np.isnan(evaluation.roc_auc(SCORES, np.zeros(5, bool)))
    assert np.isnan(evaluation.roc_auc(SCORES, np.ones(5, bool)))


def test_paired_intervals_are_narrower_than_those_of_two_samples(rng):
    """Two methods that err on the same data: a difference too small for two intervals is clear in pairs."""
    damaged = rng.random(300) < 0.4
    shared = rng.normal(size=300) - 0.8 * damaged
    one, other = shared - 0.25 * damaged, shared + 0.02 * rng.normal(size=300)
    areas = [evaluation.bootstrap(evaluation.roc_auc, scores, damaged) for scores in (one, other)]
    difference = evaluation.roc_auc_difference(one, other, damaged)
    assert difference.value == pytest.approx(float(areas[0].value - areas[1].value), abs=1e-12)
    assert areas[0].low < areas[1].high
    assert 0 < difference.low < difference.value < difference.high
    same = evaluation.roc_auc_difference(one, one, damaged, num=50)
    np.testing.assert_array_equal(same, 0)


def test_bootstrap_intervals_cover_as_often_as_they_say():
    """A 90 % interval for the mean of 40 normal numbers holds 0 in some 90 % of 300 samples, give or take 1.7 %."""
    rng = np.random.default_rng(0)
    covered = [
        estimate.low <= 0 <= estimate.high
        for estimate in (
            evaluation.bootstrap(np.mean, rng.normal(size=40), num=200, seed=k, level=0.9) for k in range(300)
        )
    ]
    assert 0.84 <= np.mean(covered) <= 0.95


def test_bootstrap_agrees_with_scipy(rng):
    data = rng.exponential(size=60)
    ours = evaluation.bootstrap(np.mean, data, num=4000)
    theirs = scipy.stats.bootstrap((data,), np.mean, n_resamples=4000, method="percentile", rng=1)
    assert ours.value == np.mean(data)
    # The ends of both scatter by 0.006.
    np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval, atol=0.03)


def test_bootstrap_of_arrays_and_of_what_is_not_always_defined(rng):
    data = rng.normal(size=(30, 2))
    estimate = evaluation.bootstrap(lambda rows: np.mean(rows, axis=0), data)
    assert estimate.low.shape == estimate.high.shape == (2,)
    assert np.all((estimate.low < estimate.value) & (estimate.value < estimate.high))
    # A third of the draws hold no damaged datum.
    some = evaluation.bootstrap(evaluation.roc_auc, SCORES, np.array([True, False, False, False, False]))
    assert np.isfinite(some.low)
    never = evaluation.bootstrap(evaluation.roc_auc, SCORES, np.zeros(5, bool), num=20)
    assert np.all(np.isnan(never))


@pytest.fixture(scope="module")
def truth():
    """λ retrained without each task, the target on held-out tasks for each, and influence at the optimum."""
    tasks, held_out = convex.tasks(), convex.tasks(count=5, seed=9)
    weights = mi.unit_weights(tasks)
    without = evaluation.leave_one_out(weights, tasks=range(convex.NUM_TASKS))
    meta_params = jax.jit(convex.train)(weights, tasks, convex.START)
    retrained = evaluation.retrain(convex.train)(without, tasks, convex.START)
    gradients = jax.jit(jax.vmap(jax.grad(mi.total_objective(convex.PROBLEM)), (0, None, 0)))
    assert np.max(np.abs(gradients(retrained, tasks, without))) <= 1e-13
    target = mi.query_loss(convex.PROBLEM)
    dense = mi.solvers.dense()
    scores = jax.jit(mi.influence_scores(convex.PROBLEM, target, solver=dense))(meta_params, tasks, held_out)
    steps = jax.jit(mi.task_if(convex.PROBLEM, solver=dense))(meta_params, tasks)
    outcomes = jax.jit(jax.vmap(target, (0, None)))(retrained, held_out)
    changes = outcomes - jax.jit(target)(meta_params, held_out)
    return np.asarray(scores.task), np.asarray(changes), -steps.delta, retrained - meta_params[None]


def test_loo_correlation_of_exact_scores_with_really_retrained_meta_params(truth):
    scores, changes, _, _ = truth
    found = evaluation.loo_correlation(scores, changes)
    assert found.pearson.value >= 0.99
    assert found.spearman.value >= 0.95
    assert found.pearson.value == pytest.approx(scipy.stats.pearsonr(scores, changes).statistic, abs=1e-12)
    assert found.spearman.value == pytest.approx(scipy.stats.spearmanr(scores, changes).statistic, abs=1e-12)
    assert found.pearson.low <= found.pearson.value <= found.pearson.high
    assert evaluation.loo_correlation(-scores, changes).pearson.value <= -0.99


def test_step_agreement_with_really_retrained_meta_params(truth):
    _, _, predicted, retrained = truth
    found = evaluation.step_agreement(predicted, retrained)
    assert np.all(found.cosine >= 0.99)
    # Without a task there is less curvature than the first order knows of: the step is longer than predicted.
    assert np.all((found.norm_ratio > 0.7) & (found.norm_ratio < 1))
    assert np.all(found.relative_error >= (1 - found.norm_ratio) * (1 - 1e-12))
    assert np.all(found.relative_error <= 0.3)


def test_step_agreement_against_its_definition(rng):
    ours, truth = ({"a": rng.normal(size=(4, 2, 3)), "b": rng.normal(size=(4,))} for _ in range(2))
    truth["a"][2], truth["b"][2] = 0, 0
    ours["a"][1], ours["b"][1] = 2 * truth["a"][1], 2 * truth["b"][1]
    found = evaluation.step_agreement(ours, truth)
    flat = [np.concatenate([tree["a"].reshape(4, -1), tree["b"][:, None]], axis=1) for tree in (ours, truth)]
    norms = np.linalg.norm(flat[0], axis=1), np.linalg.norm(flat[1], axis=1)
    for k in (0, 1, 3):
        assert found.cosine[k] == pytest.approx(flat[0][k] @ flat[1][k] / norms[0][k] / norms[1][k], abs=1e-12)
        assert found.norm_ratio[k] == pytest.approx(norms[0][k] / norms[1][k], abs=1e-12)
        assert found.relative_error[k] == pytest.approx(np.linalg.norm(flat[0][k] - flat[1][k]) / norms[1][k])
    np.testing.assert_allclose([field[1] for field in found], [1, 2, 1], rtol=1e-12)
    assert np.all(np.isnan([field[2] for field in found]))


def quadratic_loss(meta_params, task, weights):
    """½ ‖λ − c‖²: λ* is affine in the task weights as long as their sum is the same."""
    return 0.5 * jnp.sum(weights.query[:, None] * (meta_params[None] - task.query) ** 2)


@pytest.fixture(scope="module")
def subsets():
    """Exact scores of a quadratic F for two linear targets, and the targets after retraining on subsets."""
    rng = np.random.default_rng(5)
    tasks = mi.Task((), jnp.asarray(rng.normal(size=(10, 1, 4))))
    problem = mi.from_task_loss(quadratic_loss, meta_regularizer=mi.l2(0.3))
    directions = jnp.asarray(rng.normal(size=(2, 4)))
    weights = mi.unit_weights(tasks)
    left, kept = evaluation.random_subsets(weights, 40, 0.5, seed=0)

    def train(weights, tasks):
        pull = jnp.mean(weights.task[:, None] * tasks.query[:, 0], axis=0)
        return pull / (jnp.mean(weights.task) + 0.3)

    trained = evaluation.retrain(train, batch_size=16)(left, tasks)
    meta_params = train(weights, tasks)

    def score(direction):
        target = lambda meta_params, direction: jnp.vdot(direction, meta_params)  # noqa: E731
        return mi.influence_scores(problem, target, solver=mi.solvers.dense())(meta_params, tasks, direction).task

    scores = jnp.stack([jax.jit(score)(direction) for direction in directions])
    return np.asarray(scores), kept, np.asarray(trained @ directions.T)


def test_datamodeling_score_of_exact_scores_of_a_quadratic_objective(subsets):
    scores, kept, outcomes = subsets
    found = evaluation.linear_datamodeling_score(scores, kept, outcomes)
    np.testing.assert_allclose(found.targets.value, 1, atol=1e-12)
    np.testing.assert_allclose(found.mean, 1, atol=1e-12)
    flipped = evaluation.linear_datamodeling_score(-scores, kept, outcomes)
    np.testing.assert_allclose(flipped.mean, -1, atol=1e-12)
    single = evaluation.linear_datamodeling_score(scores[1], kept, outcomes[:, 1])
    np.testing.assert_allclose(single.mean, 1, atol=1e-12)
    assert single.targets.value.shape == (1,)


def test_datamodeling_score_against_its_definition_in_the_paper(subsets, rng):
    """Spearman between outcomes and Σ_kept of attributions, where an attribution is minus a score."""
    scores, kept, outcomes = subsets
    rough = scores + rng.normal(size=scores.shape) * np.std(scores)
    found = evaluation.linear_datamodeling_score(rough, kept, outcomes, num=300)
    expected = [scipy.stats.spearmanr(kept @ -rough[k], outcomes[:, k]).statistic for k in range(2)]
    np.testing.assert_allclose(found.targets.value, expected, atol=1e-12)
    assert found.mean.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert np.all(found.targets.low < found.targets.value)
    assert np.all(found.targets.value < found.targets.high)
    assert found.mean.low < found.mean.value < found.mean.high < 1


def test_correlations_of_what_is_constant_are_not_defined(subsets):
    scores, kept, outcomes = subsets
    constant = evaluation.linear_datamodeling_score(np.stack([np.full(10, 0.1), scores[1]]), kept, outcomes, num=20)
    assert np.isnan(constant.targets.value[0])
    assert constant.targets.value[1] == pytest.approx(1)
    assert np.all(np.isnan(constant.mean))
    # Sums of 20 equal terms among 43, whose rounding depends on which ones they are.
    many = np.argsort(np.random.default_rng(2).random((40, 43)), axis=1) >= 20
    rounded = evaluation.linear_datamodeling_score(np.full(43, 0.1), many, outcomes[:, 0], num=20)
    assert np.isnan(rounded.mean.value)
    flat = evaluation.linear_datamodeling_score(scores[0], kept, np.ones(40), num=20)
    assert np.isnan(flat.mean.value)
    assert np.all(np.isnan(evaluation.loo_correlation(np.full(7, 0.1), np.arange(7.0), num=20)))


def test_seed_agreement_is_the_mean_over_pairs_of_seeds(rng):
    outcomes = rng.normal(size=20)[None] + 0.5 * rng.normal(size=(3, 20))
    found = evaluation.seed_agreement(outcomes, num=200)
    pairs = [scipy.stats.spearmanr(outcomes[i], outcomes[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.value == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found.low < found.value < found.high
    np.testing.assert_allclose(evaluation.seed_agreement(np.stack([outcomes[0]] * 2), num=20), 1, atol=1e-12)


def test_brittleness_removes_what_helps_most():
    tasks, held_out = convex.tasks(), convex.tasks(count=5, seed=9)
    weights, target = mi.unit_weights(tasks), mi.query_loss(convex.PROBLEM)
    retrain = evaluation.retrain(convex.train)
    seen = []

    def outcome(left):
        seen.append(np.asarray(left.task))
        return jax.vmap(target, (0, None))(retrain(left, tasks, convex.START), held_out)

    meta_params = jax.jit(convex.train)(weights, tasks, convex.START)
    score = mi.influence_scores(convex.PROBLEM, target, solver=mi.solvers.dense())
    scores = jax.jit(score)(meta_params, tasks, held_out).task
    found = evaluation.brittleness(scores, outcome, weights, [1, 4])
    order = np.argsort(-scores)
    np.testing.assert_array_equal(seen[0][0], 1)
    for row, count in ((1, 1), (2, 4)):
        assert sorted(np.flatnonzero(seen[0][row] == 0)) == sorted(order[:count])
    assert found.before == pytest.approx(float(target(meta_params, held_out)), abs=1e-12)
    assert 0 < found.changes[0] < found.changes[1]
    opposite = evaluation.brittleness(-scores, outcome, weights, [4])
    assert opposite.changes[0] < 0


NAN = np.array([0.1, np.nan, 0.2, 0.3, 0.4])
KEPT = np.ones((3, 5), bool)
WEIGHTS = mi.unit_weights(convex.tasks(count=5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluation.detection_curve(SCORES, DAMAGED[:4]), r"^damaged: expected shape \(5,\), got \(4,\)"),
        (lambda: evaluation.detection_curve(SCORES, DAMAGED * 1), r"^damaged: expected booleans, got int"),
        (lambda: evaluation.detection_curve(NAN, DAMAGED), r"^scores: expected finite numbers, got NaN"),
        (lambda: evaluation.detection_curve([], np.zeros(0, bool)), r"^scores: expected.*got shape \(0,\)"),
        (lambda: evaluation.found_at(SCORES, DAMAGED, 1.5), r"^share: expected.*got 1.5"),
        (lambda: evaluation.roc_auc(np.ones((2, 5)), DAMAGED), r"^scores: expected.*1 axes.*got shape \(2, 5\)"),
        (lambda: evaluation.roc_auc(NAN, DAMAGED), r"^scores: expected finite"),
        (lambda: evaluation.bootstrap(np.mean), r"^arrays: expected at least one.*got none"),
        (lambda: evaluation.bootstrap(np.mean, SCORES, NAN[:3]), r"^arrays: expected a common.*\(5,\), \(3,\)"),
        (lambda: evaluation.bootstrap(np.mean, 3.0), r"^arrays: expected a common.*got shapes \[\(\)\]"),
        (lambda: evaluation.bootstrap(np.mean, []), r"^arrays: expected.*not empty.*got shapes \[\(0,\)\]"),
        (lambda: evaluation.bootstrap(np.mean, SCORES, num=0), r"^num: expected a positive integer, got 0"),
        (lambda: evaluation.bootstrap(np.mean, SCORES, level=1.0), r"^level: expected.*got 1.0"),
        (lambda: evaluation.linear_datamodeling_score(SCORES, KEPT[:, :4], np.ones(3)), r"^kept: expected.*\(3, 5\)"),
        (lambda: evaluation.linear_datamodeling_score(SCORES, KEPT * 1, np.ones(3)), r"^kept: expected booleans"),
        (lambda: evaluation.linear_datamodeling_score(SCORES, KEPT[:0], []), r"^outcomes: expected.*got shape \(0,\)"),
        (lambda: evaluation.linear_datamodeling_score(NAN, KEPT, np.ones(3)), r"^scores: expected finite"),
        (lambda: evaluation.linear_datamodeling_score(SCORES, KEPT, np.ones((3, 2))), r"^outcomes: expected.*\(3, 2\)"),
        (
            lambda: evaluation.linear_datamodeling_score(np.ones((2, 5)), KEPT, np.ones((3, 3))),
            r"^outcomes: expected.*one column for each row.*\(3, 3\) and \(2, 5\)",
        ),
        (lambda: evaluation.loo_correlation(SCORES, SCORES[:4]), r"^changes: expected the shape \(5,\).*got \(4,\)"),
        (lambda: evaluation.loo_correlation([], []), r"^scores: expected.*got shape \(0,\)"),
        (lambda: evaluation.loo_correlation(SCORES, NAN), r"^changes: expected finite"),
        (lambda: evaluation.seed_agreement(np.ones((1, 5))), r"^outcomes: expected at least two seeds.*\(1, 5\)"),
        (lambda: evaluation.seed_agreement(SCORES), r"^outcomes: expected an array of 2 axes.*\(5,\)"),
        (lambda: evaluation.step_agreement({"a": SCORES}, [SCORES]), r"^retrained: expected the structure.*got"),
        (lambda: evaluation.step_agreement(np.ones((2, 3)), np.ones((3, 3))), r"^retrained: expected.*\(2, 3\)"),
        (lambda: evaluation.step_agreement(np.ones(()), np.ones(())), r"^predicted: expected leaves with a common"),
        (lambda: evaluation.brittleness(SCORES[:4], len, WEIGHTS, [1]), r"^scores: expected shape \(5,\), got \(4,\)"),
        (lambda: evaluation.brittleness(SCORES, len, WEIGHTS, [0]), r"^counts: expected integers from 1 to 4"),
        (lambda: evaluation.brittleness(SCORES, len, WEIGHTS, [5]), r"^counts: expected integers from 1 to 4"),
        (lambda: evaluation.brittleness(SCORES, len, WEIGHTS, []), r"^counts: expected integers.*got \[\]"),
        (
            lambda: evaluation.brittleness(SCORES, lambda left: np.ones(3), WEIGHTS, [1]),
            r"^outcome: expected 2 on the leading axis, got shape \(3,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
