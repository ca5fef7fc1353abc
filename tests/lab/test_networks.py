"""Programs of convolutional networks, lowered for an accelerator without one."""

import jax
import jax.numpy as jnp
import pytest

from metainfluence.lab.bench import networks
from metainfluence.lab.bench._counting import Count, count

SMALL = networks.Setting(size=16, width=8, queries=2, steps=5, num_tasks=16, batch_size=8)


@pytest.mark.parametrize("name", ["implicit head", pytest.param("MAML", marks=pytest.mark.slow)])
def test_the_bars_at_a_small_size(name):
    """Lines depend on no size. Of bytes the small images leave as large a share as the large ones."""
    with jax.enable_x64(False):
        row = networks._measured(name, SMALL)
    assert row.lines_ratio > 1.5
    # As elsewhere, lines are those of the newest JAX; older ones take more.
    assert row.lines_ratio <= networks.MOST_LINES or jax.__version_info__ < (0, 12)
    assert row.lean_bytes <= 0.35 * row.whole_bytes
    assert 1 < row.flops_ratio <= networks.MOST_FLOPS
    assert f"| {row.lines_ratio:.2f} | 3.0 |" in networks.markdown([row], SMALL)


def test_operations_are_counted():
    matrix, image, kernel = jnp.ones((3, 4)), jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 7))

    def scanned(x):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ x.T @ x), None), jnp.ones((6, 4)), length=10)[0]

    # Two products of 2 · 6 · 4 · 3 and 24 values of tanh, ten times.
    assert count(scanned, matrix) == Count(10 * (2 * 144 + 24), 2, 1, 2, 1)
    convolved = count(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        image,
        kernel,
    )
    assert convolved == Count(2.0 * 27 * 2 * 5 * 5 * 7, 1)
    nested = count(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + scanned(x)[:3], x), matrix)
    assert (nested.loops, nested.nesting, nested.looped_products) == (2, 2, 2)
    branches = count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x.T, lambda: x[:, :3] + 0), matrix)
    assert branches.products == 1


def test_a_dense_head_waits_for_fewer_loops():
    """The fit, and the rows of the matrix that is factorised; no loop in a loop, and none of LAPACK's."""
    iterative, dense = networks.heads(width=8, num_tasks=3)
    assert dense.loops <= 2 < iterative.loops
    assert "| newton, dense |" in networks.markdown_of_heads([dense])
