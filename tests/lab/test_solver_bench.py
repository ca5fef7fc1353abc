"""The solver benchmark on problems so small that its numbers mean nothing: that they are there, and the right ones."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metainfluence.lab.bench.solvers import measure, options, problems
from metainfluence.lab.bench.solvers import targets as solver_bench_targets
from metainfluence.lab.bench.solvers.measure import Program
from metainfluence.lab.commands import cli
from metainfluence.lab.data import omniglot
from metainfluence.lab.experiments import inner_solvers
from metainfluence.lab.experiments.measures import cosine, spearman

SMALL = """
suite = "solvers"
tables = ["grid", "budgets", "removals"]
problems = ["maml"]
curvatures = ["exact", "linearized", "gamma"]
solvers = ["cg", "ekfac", "dense"]
repeats = 1

[solve]
budgets = [2, 400]

[damping]
removals = [0.1]

[tasks]
count = 6
flipped = 2
ways = 3

[maml]
hidden = 2
num_steps = 1

[training]
num_steps = 5
"""


def config_file(folder, text):
    path = folder / "bench.toml"
    path.write_text(text)
    return str(path)


def rejected(args, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """From the configuration file to the files that it makes; the command line's options override the file's."""
    folder = tmp_path_factory.mktemp("bench")
    out = folder / "new" / "folder"
    cli.main(["bench", "--config", config_file(folder, SMALL), "--tasks.flipped", "1", "--out", str(out)])
    return json.loads((out / "solvers.json").read_text()), (out / "solvers.md").read_text()


def test_the_command_line_overrides_the_file(small_run):
    assert small_run[0]["config"]["tasks"]["count"] == 6
    assert small_run[0]["config"]["tasks"]["flipped"] == 1


def test_every_solver_meets_every_curvature(small_run):
    rows = {(row["curvature"], row["solver"]): row for row in small_run[0]["rows"]["grid"]}
    assert len(rows) == 9
    for solver in ("cg", "dense"):
        exact = rows["exact", solver]
        assert exact["status"] == "CONVERGED"
        assert exact["step_error"] < 1e-5
        assert exact["scores_error"] < 1e-5
        assert exact["spearman"] == pytest.approx(1.0)
        # A converged solve has its curvature's error, whatever solved it.
        for curvature in ("linearized", "gamma"):
            assert rows[curvature, solver]["step_error"] > 1e-3
            assert rows[curvature, solver]["step_error"] == pytest.approx(rows[curvature, "cg"]["step_error"], rel=1e-3)
    assert all(rows[curvature, "cg"]["epochs"] > 0 for curvature in ("exact", "gamma"))
    assert rows["exact", "cg"]["megabytes"] > 0


def test_what_does_not_apply_says_why(small_run):
    rows, text = small_run
    reasons = [row["reason"] for row in rows["rows"]["grid"] if row["solver"] == "ekfac"]
    assert len(reasons) == 3
    assert all("covered by no layer" in reason for reason in reasons)
    assert "Not applicable: ekfac" in text


def test_more_products_are_more_accurate(small_run):
    few, many = small_run[0]["rows"]["budgets"]
    assert few["products"] == 3
    assert many["scores_error"] < 1e-6 < few["scores_error"]


def test_removal_steps_are_judged(small_run):
    rows = small_run[0]["rows"]["removals"]
    assert len(rows) == 6
    assert all(math.isfinite(row["decrease"]) for row in rows)
    # Γ makes the operator positive definite, so that signs change nothing.
    plain, absolute = (row for row in rows if row["curvature"] == "gamma")
    assert plain["decrease"] == pytest.approx(absolute["decrease"], rel=1e-6)


def test_the_tables_are_written_as_they_are_printed(small_run):
    text = small_run[1]
    for title in ("### Problems", "### Solvers × curvatures: maml", "### What a removal step gains"):
        assert title in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_inner_solvers_by_condition_number(monkeypatch):
    chosen = ("dense cholesky", "cg, tol 1e-3")
    monkeypatch.setattr(
        inner_solvers,
        "LINEAR_SOLVERS",
        {name: inner_solvers.LINEAR_SOLVERS[name] for name in chosen},
    )
    conditions = (1e1, 1e6)
    rows = {(row["inner_solver"], row["asked"]): row for row in inner_solvers.rows(conditions)}
    assert len(rows) == 6
    for asked in conditions:
        assert 0.5 * asked < rows["dense cholesky", asked]["condition"] < 3 * asked
        for key in ("gradient_error", "task_if_error"):
            assert rows["dense cholesky", asked][key] < 1e-8 < rows["cg, tol 1e-3", asked][key]
    assert rows[inner_solvers.UNROLLED, 1e6]["gradient_error"] > 0.1


def test_targets_that_are_missed_or_rest_on_nothing_say_so():
    met, missed, baseless = (
        solver_bench_targets.target("a", "what", value, 0.5, at_most=True, sound=sound)["met"]
        for value, sound in ((0.4, True), (0.6, True), (0.4, False))
    )
    assert (met, missed) == ("met", "missed")
    assert baseless.startswith("missed")


def test_task_if_together_is_compared_with_separate_solves():
    rows = [
        {"problem": "anil", "tasks": 64, "solver": "cg, each alone", "products": 1000, "status": "CONVERGED"},
        {"problem": "anil", "tasks": 64, "solver": "auto", "products": 300, "status": "CONVERGED"},
    ]
    (found,) = solver_bench_targets.all_tasks_together(rows)
    assert found["value"] == pytest.approx(0.3)
    assert found["met"] == "missed"


def test_random_images_stand_in_for_omniglot(monkeypatch):
    def missing():
        raise FileNotFoundError

    monkeypatch.setattr(omniglot, "load", missing)

    config = options.SolverBenchConfig(
        tasks=options.Tasks(ways=3, shots=1, queries=2),
        large=options.Large(widths=(4,), num_tasks=3, num_steps=2, learning_rate=0.01),
    )
    setting, name = problems.large(config)
    assert "random images" in name
    assert setting.tasks.query.images.shape == (3, 6, 28, 28)
    images, labels = problems.random_images(0)
    assert np.all(np.unique(labels, return_counts=True)[1] == problems.RANDOM_IMAGES)
    np.testing.assert_array_equal(images, problems.random_images(0)[0])


def test_rank_correlation_and_cosine():
    left, right = np.array([0.1, 0.2, 5.0]), np.array([1.0, 2.0, 3.0])
    assert spearman(left, right) == pytest.approx(1.0)
    assert spearman(left, -right) == pytest.approx(-1.0)
    assert math.isnan(spearman(left, np.array([1.0, np.nan, 2.0])))
    assert cosine(left, np.zeros(3)) == 0.0


def test_a_program_whose_first_results_hold_nan_is_compiled_again():
    program = Program(lambda x: jnp.log(x), jnp.ones(2))
    first = program._executable
    assert np.all(np.isnan(program(-jnp.ones(2))))
    assert program._executable is not first
    assert jax.tree.leaves(program(jnp.ones(2)))[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('suite = "solvers"\n[solve]\nrnak = 3', ("unknown key 'solve.rnak'", "rank")),
        ('suite = "solvers"\n[digits]\nnum_taks = 3', ("unknown key 'digits.num_taks'", "num_tasks")),
        ('suite = "solvers"\ndigits = 3', ("digits: expected a table",)),
        ('suite = "solvers"\n[repeats]\na = 1', ("repeats: expected a value",)),
        ('suite = "solver"', ("expected one of costs, solvers",)),
        ("suite =", ("bench.toml",)),
        ('suite = "solvers"\n[solve]\nrank = "many"', ("--solve.rank",)),
        ("rank = 3", ("unknown key 'rank'", "num_separate")),
    ],
)
def test_configuration_files_that_make_no_sense(text, expected, tmp_path, capsys):
    message = rejected(["bench", "--config", config_file(tmp_path, text)], capsys)
    for part in expected:
        assert part in message


@pytest.mark.parametrize("args", [["--config"], ["--config", "a.toml", "--config=b.toml"], ["--config="]])
def test_one_configuration_file_is_expected(args, capsys):
    assert "--config: expected one file" in rejected(["bench", *args], capsys)


def test_a_configuration_file_that_is_not_there(tmp_path, capsys):
    assert "nowhere.toml" in rejected(["bench", "--config", str(tmp_path / "nowhere.toml")], capsys)


@pytest.mark.parametrize("field", ["tables", "problems", "curvatures", "solvers"])
def test_names_that_there_are_not(field, tmp_path):
    path = config_file(tmp_path, f'suite = "solvers"\n{field} = ["nonsense"]')
    with pytest.raises(ValueError, match=f"{field}: expected some of .*; got 'nonsense'"):
        cli.main(["bench", "--config", path])


@dataclasses.dataclass
class Inner:
    on: bool = True


@dataclasses.dataclass
class Outer:
    names: tuple[str, ...] = ()
    on: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_booleans_lists_and_nested_tables_become_arguments(tmp_path):
    values = {"names": ["a b", "c"], "on": True, "inner": {"on": False}}
    assert cli.as_arguments(values, Outer, tmp_path) == ["--names", "a b", "c", "--on", "--inner.no-on"]


def test_the_configuration_that_comes_with_the_project_is_the_default():
    suite, values = cli.read_config(Path(__file__).parents[2] / "configs" / "solvers.toml", ["costs", "solvers"])
    assert suite == "solvers"
    config = options.SolverBenchConfig()
    options.check(config)
    assert with_values(config, values) == config


def with_values(config, values):
    """The configuration with a file's values in place of its own."""
    changed = {
        key: with_values(getattr(config, key), value)
        if isinstance(value, dict)
        else (tuple(value) if isinstance(value, list) else value)
        for key, value in values.items()
    }
    return dataclasses.replace(config, **changed)


def test_every_name_that_can_be_asked_for_is_there():
    assert set(options.PROBLEMS) == set(problems.PROBLEMS)
    assert set(options.CURVATURES) == set(measure.CURVATURES)
    assert set(options.SOLVERS) == set(measure.SOLVERS)


def test_exact_inner_solutions_are_minima():
    tasks, meta_params = inner_solvers.make_tasks(1e4), inner_solvers.start()
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    coefficients = jnp.full(inner_solvers.NUM_SUPPORT, 1 / inner_solvers.NUM_SUPPORT)

    def objective(params):
        return jnp.vdot(coefficients, inner_solvers.inner_loss(params, meta_params, task.support))

    params = inner_solvers.solution(meta_params, task.support, coefficients)
    assert float(jnp.max(jnp.abs(jax.grad(objective)(params)["kernel"]))) < 1e-12
