"""What the pictures show, read off their artists."""

from functools import partial

import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import metainfluence as mi
from metainfluence.lab.data import fewshot
from metainfluence.lab.show import plots

SCORES = np.array([0.3, -0.2, 0.1, -0.5, 0.4])


def heights(ax):
    """Rank -> height of the bars, over all colours."""
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches}


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def line(ax, label):
    (found,) = (line for line in ax.lines if line.get_label() == label)
    return found


def spectrum(values, residuals=None, valid=None):
    values = jnp.asarray(values)
    residuals = jnp.zeros_like(values) if residuals is None else jnp.asarray(residuals)
    valid = jnp.ones(values.shape, bool) if valid is None else jnp.asarray(valid)
    return mi.Spectrum(values, residuals, valid, jnp.zeros((0, len(values))), jnp.zeros((0, len(values))))


def sweep(task, dampings, correlation, status):
    count = len(dampings)
    numbers = {name: jnp.zeros(count) for name in ("num_matvecs", "relative_residual", "min_curvature")}
    info = mi.SolveInfo(status=jnp.asarray(status), **numbers)
    task = jnp.asarray(task)
    none = jnp.zeros((*task.shape, 0))
    return mi.damping.Sweep(jnp.asarray(dampings), task, none, none, jnp.asarray(correlation), info)


def test_ranking_orders_the_bars():
    ax = plots.ranking(SCORES)
    assert heights(ax) == {1: -0.5, 2: -0.2, 3: 0.1, 4: 0.3, 5: 0.4}
    assert ax.get_xlim() == (0.5, 5.5)
    assert ax.get_legend() is None
    assert ax.get_xlabel() == "tasks, most harmful first"


def test_ranking_colours_what_is_known_to_be_bad():
    ax = plots.ranking(SCORES, harm=np.array([False, True, False, True, False]))
    red = {round(bar.get_x() + 0.5) for bar in ax.patches if bar.get_facecolor() == to_rgba("#d1495b")}
    assert red == {1, 2}
    assert texts(ax.get_legend()) == ["clean (3)", "known bad (2)"]


def test_ranking_tells_kinds_of_harm_apart():
    harm = np.array([fewshot.CLEAN, "mine", fewshot.CLEAN, fewshot.SHORTCUT, fewshot.CLEAN])
    ax = plots.ranking(SCORES, harm=harm)
    colors = {round(bar.get_x() + 0.5): bar.get_facecolor() for bar in ax.patches}
    assert colors[1] == to_rgba(plots.HARM_COLORS[fewshot.SHORTCUT])
    assert len({colors[1], colors[2], colors[3]}) == 3
    assert texts(ax.get_legend()) == ["clean (3)", "shortcut (1)", "mine (1)"]


@pytest.fixture
def images():
    """Each all of one brightness, by which it is known."""
    return np.arange(5.0)[:, None, None] / 5 * np.ones((5, 3, 4))


def test_examples_shows_the_most_harmful_above_the_most_helpful(images):
    axes = plots.examples(images, SCORES, labels=list("abcde"), harm=SCORES == -0.5)
    assert axes.shape == (2, 5)
    shown = [[round(float(ax.images[0].get_array()[0, 0]) * 5) for ax in row] for row in axes]
    assert shown == [[3, 1, 2, 0, 4], [4, 0, 2, 1, 3]]
    assert axes[0, 0].get_title() == "d\n-5.0e-01"
    assert axes[1, 0].get_title() == "e\n+4.0e-01"
    assert [row[0].get_ylabel() for row in axes] == ["most harmful", "most helpful"]
    framed = [[ax.spines["left"].get_visible() for ax in row] for row in axes]
    assert framed == [[True, False, False, False, False], [False, False, False, False, True]]


def test_examples_takes_axes(images):
    given = Figure().subplots(2, 3)
    axes = plots.examples(images, SCORES, axes=given)
    assert axes is given
    assert axes[0, 2].get_title() == "+1.0e-01"


def test_examples_takes_colours():
    axes = plots.examples(np.zeros((1, 2, 2, 3)), [0.5])
    assert axes.shape == (2, 1)
    assert axes[0, 0].images[0].get_array().shape == (2, 2, 3)


def test_detection_draws_each_method():
    damaged = np.array([False, True, False, True, False])
    ax = plots.detection({"good": SCORES, "two draws": np.stack([SCORES, -SCORES])}, damaged)
    np.testing.assert_allclose(line(ax, "good").get_xydata().T, [np.linspace(0, 1, 6), [0, 0.5, 1, 1, 1, 1]])
    np.testing.assert_allclose(line(ax, "two draws").get_ydata(), [0, 0.25, 0.5, 0.5, 0.75, 1])
    np.testing.assert_allclose(line(ax, "best possible").get_xdata(), [0, 0.4, 1])
    assert ax.get_xlim() == (0, 1)
    assert texts(ax.get_legend()) == ["best possible", "good", "two draws"]


def test_detection_takes_colours():
    ax = plots.detection({"a": SCORES, "b": SCORES}, SCORES < 0, colors={"b": "#ff0000"})
    assert line(ax, "b").get_color() == "#ff0000"


def test_predicted_and_retrained_tells_the_correlation():
    retrained = np.array([0.6, -0.4, 0.2, -1.0, 0.7])
    ax = plots.predicted_and_retrained(SCORES, retrained, harm=SCORES < -0.3)
    clean, bad = ax.collections
    np.testing.assert_array_equal(clean.get_offsets(), np.stack([SCORES, retrained], 1)[SCORES > -0.3])
    np.testing.assert_array_equal(bad.get_offsets(), [[-0.5, -1.0]])
    equal = line(ax, "equal")
    np.testing.assert_array_equal(equal.get_xdata(), equal.get_ydata())
    assert ax.get_xlim() == ax.get_ylim() == tuple(equal.get_xdata())
    assert ax.get_xlim()[0] < -1.0
    assert ax.get_xlim()[1] > 0.7
    pearson = np.corrcoef(SCORES, retrained)[0, 1]
    assert ax.get_title() == f"Pearson {pearson:.2f}, Spearman 1.00"


def test_spectrum_shows_residuals_and_damping():
    found = spectrum([-0.01, 0.1, 2.0, 0.0], [0.005, 0.01, 0.3, 0.0], [True, True, True, False])
    ax = plots.spectrum(found, damping=0.05)
    (bars,) = ax.containers
    points, _, (segments,) = bars.lines
    np.testing.assert_allclose(points.get_xydata(), [[1, -0.01], [2, 0.1], [3, 2.0]])
    ends = np.array([segment[:, 1] for segment in segments.get_segments()])
    np.testing.assert_allclose(ends, [[-0.015, -0.005], [0.09, 0.11], [1.7, 2.3]])
    np.testing.assert_allclose(line(ax, "damping 5.0e-02").get_ydata(), 0.05)
    (band,) = ax.patches
    np.testing.assert_allclose([band.get_y(), band.get_height()], [-0.05, 0.1])
    assert ax.get_yscale() == "symlog"


def test_spectrum_without_damping_has_no_line():
    ax = plots.spectrum(spectrum([0.1, 2.0]))
    assert not ax.patches
    assert texts(ax.get_legend()) == ["Ritz value, and its residual"]


def test_damping_sweep_draws_ranks_and_their_correlation():
    task = [[1.0, -1.0, 0.0], [0.1, -0.2, 0.3], [0.02, 0.01, 0.03]]
    status = [mi.SolveStatus.MAX_STEPS, mi.SolveStatus.CONVERGED, mi.SolveStatus.CONVERGED]
    ax = plots.damping_sweep(sweep(task, [0.0, 0.01, 0.1], [0.5, 1.0], status), harm=np.array([False, True, False]))
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines], [[3, 2, 2], [2, 3, 3], [1, 1, 1]])
    assert line(ax, "known bad").get_ydata().tolist() == [1, 1, 1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0e+00", "1e-02", "1e-01"]
    assert ax.yaxis_inverted()
    (crosses,) = ax.collections
    np.testing.assert_array_equal(crosses.get_offsets(), [[0, 0]])
    (twin,) = (other for other in ax.figure.axes if other is not ax)
    np.testing.assert_allclose(twin.lines[0].get_xydata(), [[0.5, 0.5], [1.5, 1.0]])


def test_error_against_products_takes_traces_and_pairs():
    trace = mi.solvers.Trace(jnp.array([1, 2, 3]), jnp.array([1.0, 0.1, 0.01]), None)
    ax = plots.error_against_products({"cg": trace}, tol=1e-2)
    np.testing.assert_allclose(line(ax, "cg").get_xydata(), [[1, 1.0], [2, 0.1], [3, 0.01]])
    np.testing.assert_allclose(line(ax, "tol 1e-02").get_ydata(), 1e-2)
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "relative residual"
    ax = plots.error_against_products({"cg": trace, "neumann": ([21, 22], [0.5, 0.4])})
    np.testing.assert_allclose(line(ax, "neumann").get_xydata(), [[21, 0.5], [22, 0.4]])
    assert ax.get_ylabel() == "relative error"


CALLS = {
    "ranking": partial(plots.ranking, SCORES),
    "detection": partial(plots.detection, {"a": SCORES}, SCORES < 0),
    "predicted_and_retrained": partial(plots.predicted_and_retrained, SCORES, SCORES),
    "spectrum": partial(plots.spectrum, spectrum([0.1, 1.0]), damping=0.1),
    "damping_sweep": partial(plots.damping_sweep, sweep([[0.0, 1.0]], [0.1], [], [0])),
    "error_against_products": partial(plots.error_against_products, {"a": ([1], [0.5])}),
}


@pytest.mark.parametrize("name", CALLS)
def test_draws_where_it_is_told_and_leaves_global_state_alone(name):
    before = plt.get_fignums(), mpl.get_backend(), dict(mpl.rcParams)
    given = Figure().subplots(1, 2)[1]
    assert CALLS[name](ax=given) is given
    own = CALLS[name]()
    assert own is not given
    own.figure.draw_without_rendering()
    assert (plt.get_fignums(), mpl.get_backend(), dict(mpl.rcParams)) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plots.ranking(SCORES[None]), ValueError, r"scores: expected .* got shape \(1, 5\)"),
        (lambda: plots.ranking([0.0, np.nan]), ValueError, "scores: expected finite"),
        (lambda: plots.ranking(SCORES, harm=[True]), ValueError, r"harm: expected shape \(5,\), got \(1,\)"),
        (lambda: plots.ranking(SCORES, harm=SCORES), ValueError, "harm: expected booleans or strings, got float64"),
        (lambda: plots.examples(np.zeros((4, 8, 8)), SCORES), ValueError, r"images: expected .*5, H, W.*\(4, 8, 8\)"),
        (lambda: plots.examples(np.zeros((5, 64)), SCORES), ValueError, r"images: .* got \(5, 64\)"),
        (lambda: plots.examples(np.zeros((5, 8, 8)), SCORES, labels=[1]), ValueError, r"labels: .*\(5,\), got \(1,\)"),
        (lambda: plots.examples(np.zeros((5, 8, 8)), SCORES, harm=[True]), ValueError, r"harm: expected shape \(5,\)"),
        (
            lambda: plots.examples(np.zeros((1, 8, 8)), [1.0], axes=Figure().subplots(2, 2)),
            ValueError,
            r"axes: expected shape \[2, m\] with m from 1 to 1.* got \(2, 2\)",
        ),
        (lambda: plots.examples(np.zeros((5, 8, 8)), SCORES, axes=Figure().subplots()), ValueError, "axes: expected"),
        (lambda: plots.detection({"a": SCORES}, SCORES), TypeError, "damaged: expected booleans"),
        (lambda: plots.detection({"a": SCORES}, [True, False]), ValueError, r"methods\['a'\]: expected 2 .* got 5"),
        (lambda: plots.predicted_and_retrained(SCORES, [1.0]), ValueError, r"retrained: expected shape \(5,\)"),
        (lambda: plots.predicted_and_retrained(SCORES, SCORES, harm=[True]), ValueError, "harm: expected shape"),
        (lambda: plots.spectrum(SCORES), TypeError, r"found: expected a metainfluence\.Spectrum, got ndarray"),
        (lambda: plots.spectrum(spectrum([1.0]), damping=-1.0), ValueError, "damping: expected a non-negative"),
        (lambda: plots.damping_sweep(SCORES), TypeError, r"found: expected a metainfluence\.damping\.Sweep"),
        (
            lambda: plots.damping_sweep(sweep([[0.0, 1.0]], [0.1], [], [0]), harm=[True]),
            ValueError,
            r"harm: expected shape \(2,\), got \(1,\)",
        ),
        (lambda: plots.error_against_products({}), ValueError, "curves: expected at least one"),
        (
            lambda: plots.error_against_products({"cg": ([1, 2], [0.1])}),
            ValueError,
            r"curves\['cg'\]: expected as many products as errors, got shapes \(2,\), \(1,\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
