"""The benchmark of peers on a problem so small that its times mean nothing; peers that are missing are skipped."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.lab.bench.peers import candidates, compare, single_level, with_jax
from metainfluence.lab.bench.peers import problem as common
from metainfluence.lab.bench.peers import suite as bench_peers
from metainfluence.lab.bench.peers.candidates import GRADIENT, LINEAR, PRODUCT, ROUTE, SCORES
from metainfluence.lab.bench.peers.compare import Candidate, Row
from metainfluence.lab.commands import cli

TARGET = 1e-6


def settle(candidate, expected):
    if missing := [name for name in candidate.needs if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}; pip install 'metainfluence[peers]'")
    found = compare.settle(candidate, expected, TARGET)
    assert not isinstance(found, str), found
    return found


@pytest.fixture(scope="module")
def two_levels():
    rng = np.random.default_rng(0)

    def side(count):
        return jnp.asarray(rng.normal(size=(2, count, 4))), jnp.asarray(np.tile(np.arange(count) % 2, (2, 1)))

    layers = ((jnp.asarray(rng.normal(size=(4, 2))), jnp.asarray(rng.normal(size=2))),)
    return common.Problem(layers, 0.1, 2, mi.Task(side(4), side(3)))


@pytest.fixture(scope="module")
def references(two_levels):
    made = {name: bench_peers.reference(two_levels, name) for name in (GRADIENT, LINEAR, SCORES)}
    return made | {PRODUCT: made[LINEAR], ROUTE: made[SCORES]}


def test_the_dense_fit_has_the_derivatives_of_its_minimum(two_levels):
    """Of the quadratic model at the minimum, by central differences of refitted heads."""
    layers, tasks = two_levels.layers, two_levels.tasks
    first = jax.tree.map(lambda leaf: leaf[0], (tasks, mi.unit_weights(tasks)))
    loss = jax.jit(common.task_loss(common.dense_fit(two_levels)))
    along = jax.jit(lambda t: loss(jax.tree.map(lambda x, d: x + t * d, layers, two_levels.direction), *first))
    step = 1e-3
    up, here, down = (float(along(t)) for t in (step, 0.0, -step))
    assert float(jax.grad(along)(0.0)) == pytest.approx((up - down) / (2 * step), rel=1e-5)
    assert float(jax.grad(jax.grad(along))(0.0)) == pytest.approx((up - 2 * here + down) / step**2, rel=1e-4)


@pytest.mark.parametrize(
    "quantity", [GRADIENT, LINEAR, SCORES, *(pytest.param(name, marks=pytest.mark.slow) for name in (PRODUCT, ROUTE))]
)
def test_ours_is_right(two_levels, references, quantity):
    for candidate in candidates.two_level_candidates(two_levels, quantity):
        if candidate.ours:
            found = settle(candidate, references[quantity])
            assert found.error <= TARGET
            assert compare.relative_error(found.call(), references[quantity]) == found.error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("quantity", "library"),
    [
        (GRADIENT, "jaxopt, implicit"),
        (GRADIENT, "jaxopt, unrolled"),
        (GRADIENT, "optimistix"),
        (GRADIENT, "torch.func, vmap"),
        (GRADIENT, "torch.func, loop"),
        pytest.param(PRODUCT, "jaxopt, implicit", marks=pytest.mark.slow),
        (PRODUCT, "torch.func"),
        pytest.param(LINEAR, "jaxopt, implicit", marks=pytest.mark.slow),
        (LINEAR, "optimistix"),
        pytest.param(SCORES, "jaxopt, implicit", marks=pytest.mark.slow),
        (SCORES, "torch.func"),
        (ROUTE, "optimistix"),
    ],
)
def test_peers_are_right(two_levels, references, quantity, library):
    # jaxopt and optimistix promote as they like.
    with jax.numpy_rank_promotion("allow"):
        found = [c for c in candidates.two_level_candidates(two_levels, quantity) if c.library.startswith(library)]
        assert found
        assert settle(found[0], references[quantity]).error <= TARGET


@pytest.fixture(scope="module")
def one_level():
    rng = np.random.default_rng(1)
    train, test = ((jnp.asarray(rng.normal(size=(count, 3))), jnp.asarray(np.arange(count) % 2)) for count in (10, 2))
    return single_level.trained((3, 2, 2), train, test, damping=0.3, num_steps=20)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "library", ["metainfluence", "dattri, IFAttributorCG", "dattri, IFAttributorExplicit", "pyDVL, Cg", "pyDVL, Direct"]
)
def test_single_level_scores_agree(one_level, library):
    found = [c for c in candidates.one_level_candidates(one_level) if c.library.startswith(library)]
    assert found
    settle(found[0], single_level.dense_scores(one_level))


def test_single_level_scores_predict_a_removal(one_level):
    """By the step of Newton's method from λ at the weights without the example."""
    flat, unravel = jax.flatten_util.ravel_pytree(one_level.layers)
    score = single_level.dense_scores(one_level)[1, 4]
    hessian = jax.hessian(lambda x: jnp.mean(single_level.example_losses(unravel(x), one_level.train)))(flat)
    slopes = jax.jacrev(lambda x: single_level.example_losses(unravel(x), one_level.train))(flat)
    change = jnp.linalg.solve(hessian + one_level.damping * jnp.eye(flat.size), slopes[4]) / 10
    moved = jax.jvp(lambda x: single_level.example_losses(unravel(x), one_level.test), (flat,), (change,))[1]
    assert float(score) == pytest.approx(float(moved[1]), rel=1e-9)


def test_an_indefinite_hessian_is_refused(one_level):
    with pytest.raises(ValueError, match="damping: expected more"):
        single_level.dense_scores(one_level._replace(damping=-10.0))


def test_the_loosest_accurate_setting_is_taken():
    made = []

    def prepare(setting):
        made.append(setting)
        return lambda: np.array([1.0 + setting])

    found = compare.settle(Candidate("x", (1e-2, 1e-7, 1e-9), prepare), np.array([1.0]), TARGET)
    assert made == [1e-2, 1e-7]
    assert found.error == pytest.approx(1e-7)
    assert found.note == "tolerance 1e-07"


def test_what_never_gets_there_is_told_with_its_best_error():
    candidate = Candidate("x", (0.5, 0.1, 0.3), lambda setting: lambda: np.array([1.0 + setting]))
    (row,) = compare.race("q", [candidate], np.array([1.0]), target=TARGET, repeats=2, budget=9.0)
    assert row.error == pytest.approx(0.1)
    assert "none of 3 settings reaches the target" in row.note
    assert not bench_peers.accurate(bench_peers.PeersBenchConfig(), row)


def test_nan_is_no_best_error():
    candidate = Candidate("x", (1.0, 2.0), lambda setting: lambda: np.array([np.nan if setting == 1.0 else 1.5]))
    assert compare.settle(candidate, np.array([1.0]), TARGET).error == pytest.approx(0.5)


def test_refusals_and_missing_packages_have_no_time():
    def refuses(setting):
        raise TypeError("forward mode is not to be had")

    rows = compare.race(
        "q",
        [Candidate("x", (1,), refuses), Candidate("y", (1,), refuses, needs=("no_such_package",))],
        np.array([1.0]),
        target=TARGET,
        repeats=1,
        budget=1.0,
    )
    assert [row.seconds for row in rows] == [None, None]
    assert [row.note for row in rows] == ["refused: forward mode is not to be had", "not installed: no_such_package"]
    with pytest.raises(TypeError):
        compare.settle(Candidate("ours", (1,), refuses, ours=True), np.array([1.0]), TARGET)


def test_a_slow_candidate_is_run_once_and_a_fast_one_often(monkeypatch):
    clock = iter(np.cumsum([0.0, 5.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    both = [Candidate(name, (0.0,), lambda _: lambda: np.array([1.0])) for name in ("slow", "fast")]
    rows = compare.race("q", both, np.array([1.0]), target=TARGET, repeats=3, budget=4.0)
    assert [(row.seconds, row.runs) for row in rows] == [(5.0, 1), (1.0, 3)]


def test_a_target_is_judged_by_the_fastest_accurate_peer():
    def row(library, seconds, error, ours=False):
        return Row(GRADIENT, library, ours, seconds, error, 1, "")

    rows = [row("ours", 1.0, 0.0, ours=True), row("wrong", 1.1, 1e-3), row("a", 3.0, 1e-7), row("b", 1.9, 1e-7)]
    config = bench_peers.PeersBenchConfig()
    (target,) = bench_peers.targets(config, rows)
    assert (target.peer, target.ratio, target.met) == ("b", 1.9, False)
    assert "| total gradients | b | 1.90 | 2 | NO |" in bench_peers.markdown(config, rows)
    assert bench_peers.targets(config, rows[:-1])[0].met


def test_gradient_steps_are_as_long_as_the_curvature_allows(two_levels):
    assert 0.1 < with_jax.largest_curvature(two_levels) < 2.0


def test_from_the_configuration_file_to_the_tables(tmp_path):
    path = tmp_path / "peers.toml"
    path.write_text('suite = "peers"\ndataset = "digits"\nquantities = ["scores of all examples"]\n')
    small = ["--num-tasks", "2", "--ways", "2", "--queries", "1", "--widths", "2", "--repeats", "1"]
    small += ["--libraries", "metainfluence"]
    with jax.numpy_rank_promotion("allow"):
        cli.main(["bench", "--config", str(path), *small, "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "peers.json").read_text())["rows"]
    assert rows[0]["library"] == "metainfluence"
    assert rows[0]["error"] <= TARGET
    assert math.isfinite(rows[0]["seconds"])
    assert (tmp_path / "out" / "peers.md").read_text().count("| scores of all examples |") == len(rows) == 2


def test_an_unknown_quantity_is_named():
    with pytest.raises(ValueError, match=r"quantities: expected some of .*, got speed"):
        bench_peers.run(bench_peers.PeersBenchConfig(quantities=("speed",)))
