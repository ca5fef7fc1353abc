"""The growth benchmark: its exponents of known series, and the whole at sizes that mean nothing."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metainfluence.lab.bench import growth
from metainfluence.lab.commands import cli

SMALL = """
suite = "growth"
pixels = 3
ways = 2
tasks = [2, 4]
examples = [7, 14]
widths = [2, 3]
steps = [1, 2]
some_tasks = 2
some_examples = 7
some_width = 2
repeats = 1
"""


def test_the_exponent_of_a_power_is_exact():
    slope, error = growth.exponent({size: 3.0 * size**1.5 for size in (2, 5, 11, 30)})
    assert slope == pytest.approx(1.5, abs=1e-12)
    assert error == pytest.approx(0.0, abs=1e-12)


def test_the_standard_error_is_that_of_least_squares():
    values = {1: 1.0, 2: 2.6, 4: 3.9, 8: 8.4}
    x, y = np.log(list(values)), np.log(list(values.values()))
    fit, covariance = np.polyfit(x, y, 1, cov=True)
    assert growth.exponent(values) == pytest.approx((fit[0], covariance[0, 0] ** 0.5))


def test_two_points_have_no_standard_error():
    slope, error = growth.exponent({2: 2.0, 4: 4.0})
    assert slope == pytest.approx(1.0)
    assert math.isnan(error)


def cells(scores):
    """Times that are linear in all but the scores' in the examples."""
    linear = [
        growth.Cell(growth.TASKS, size, name, float(size))
        for name in (growth.GRADIENT, growth.PRODUCT, growth.SCORES)
        for size in (1, 2, 4)
    ]
    forward = [growth.Cell(growth.EXAMPLES, size, growth.FORWARD, float(size)) for size in (1, 2, 4)]
    return [*linear, *forward, *(growth.Cell(growth.EXAMPLES, n, growth.SCORES, scores(n)) for n in (1, 2, 4))]


@pytest.mark.parametrize(("scores", "met"), [(lambda n: 3.0 * n, True), (lambda n: n**1.2, False)])
def test_scores_that_outgrow_the_forward_pass_miss_their_bar(scores, met):
    found = {row["target"]: row["met"] for row in growth.targets(growth.GrowthBenchConfig(), cells(scores))}
    assert found.pop(f"{growth.SCORES} over {growth.FORWARD} in {growth.EXAMPLES}") is met
    assert len(found) == 3
    assert all(found.values())


def test_the_default_widths_have_the_sizes_that_are_said():
    config = growth.GrowthBenchConfig()
    sizes = [sum(x.size for x in jax.tree.leaves(growth.make_layers(config, width))) for width in config.widths]
    assert np.allclose(sizes, [1e3, 1e4, 1e5, 1e6], rtol=0.05)


@pytest.fixture(scope="module")
def results():
    """Of the implicit and of two unrolled problems, by each program."""
    config = growth.GrowthBenchConfig(pixels=3, ways=2)
    layers, tasks = growth.make_layers(config, 2), growth.make_tasks(config, 2, 7)
    problems = {
        "implicit": growth.make_problem(config),
        "unrolled": growth.make_problem(config, 400),
        "remat": growth.make_problem(config, 400, remat=True),
    }
    names = {"implicit": (growth.GRADIENT, growth.PRODUCT, growth.SCORES)}
    return {
        kind: {
            name: jax.jit(growth.programs(problem)[name])(layers, tasks)
            for name in names.get(kind, (growth.GRADIENT, growth.PRODUCT))
        }
        for kind, problem in problems.items()
    }


@pytest.mark.parametrize("kind", [pytest.param("unrolled", marks=pytest.mark.slow), "remat"])
def test_many_unrolled_steps_reach_what_the_implicit_head_gives(results, kind):
    for name, found in results[kind].items():
        pairs = zip(*map(jax.tree.leaves, (found, results["implicit"][name])), strict=True)
        assert all(np.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in pairs)


def test_scores_of_a_task_are_the_product_of_its_gradient_and_the_vector(results):
    layers = growth.make_layers(growth.GrowthBenchConfig(pixels=3, ways=2), 2)
    gradients = results["implicit"][growth.GRADIENT]
    pairs = zip(*map(jax.tree.leaves, (gradients, layers)), strict=True)
    found = [jnp.sum(g * x[None], axis=tuple(range(1, g.ndim))) for g, x in pairs]
    assert np.allclose(np.sum(found, axis=0) / 2, results["implicit"][growth.SCORES].task)


def sizes_of(layers, tasks):
    return sum(leaf.size for leaf in jax.tree.leaves(layers)) + tasks.query[0]


def test_from_the_configuration_file_to_the_tables(tmp_path, monkeypatch):
    # What the real programs compute is tested above; here one that compiles at once stands for each.
    names = (growth.FORWARD, growth.GRADIENT, growth.PRODUCT, growth.SCORES)
    monkeypatch.setattr(growth, "programs", lambda problem, batch_size=None: dict.fromkeys(names, sizes_of))
    path = tmp_path / "growth.toml"
    path.write_text(SMALL)
    cli.main(["bench", "--config", str(path), "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "growth.json").read_text())
    axes = {}
    for cell in record["cells"]:
        assert cell["seconds"] > 0
        axes.setdefault((cell["axis"], cell["quantity"]), []).append(cell["size"])
    assert axes[growth.TASKS, growth.SCORES] == [2, 4]
    assert axes[growth.META_PARAMS, growth.PRODUCT] == [56, 76]
    assert axes[growth.STEPS_REMAT, growth.GRADIENT] == [1, 2]
    assert len(axes) == 3 * 4 + 3 * 2
    assert len(record["targets"]) == 6
    text = (tmp_path / "out" / "growth.md").read_text()
    assert text.count("| exponent") == 2
    assert "Scores over forward by examples per task: 7: " in text


@pytest.mark.parametrize("name", ["tasks", "examples", "widths", "steps"])
def test_one_size_has_no_exponent(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least two sizes"):
        growth.run(growth.GrowthBenchConfig(**{name: (4, 4)}))
