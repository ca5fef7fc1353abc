"""What tells one run from another on disk: digests of values, functions and strategies."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence import _disk

TREE = {"a": np.arange(6.0).reshape(2, 3), "b": None, "c": 3}
OTHERS = {
    "a value": {**TREE, "a": np.arange(6.0).reshape(2, 3) * (1 + 1e-9)},
    "a shape": {**TREE, "a": np.arange(6.0)},
    "a dtype": {**TREE, "a": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
    "a name": {"z": TREE["a"], "b": None, "c": 3},
    "a number": {**TREE, "c": 4},
    "a leaf": {**TREE, "b": 0},
}


@pytest.mark.parametrize("other", OTHERS)
def test_arrays_are_told_from_others(other):
    assert (
        _disk.of_arrays(TREE) == _disk.of_arrays(dict(TREE)) == _disk.of_arrays({**TREE, "a": jnp.asarray(TREE["a"])})
    )
    assert _disk.of_arrays(TREE) != _disk.of_arrays(OTHERS[other])


def test_keys_are_told_from_their_numbers():
    key = jax.random.key(3)
    assert _disk.of_arrays(key) == _disk.of_arrays(jax.random.key(3)) != _disk.of_arrays(jax.random.key_data(key))


def test_functions_are_told_by_what_they_compute():
    def scaled(factor):
        return lambda x: factor * x

    x = jnp.ones(3)
    assert _disk.of_function(scaled(2.0), x) == _disk.of_function(scaled(2.0), x) != _disk.of_function(scaled(3.0), x)
    array = np.arange(3.0)
    assert _disk.of_function(scaled(array), x) != _disk.of_function(scaled(array + 1), x)


def test_strategies_are_told_by_their_call():
    s = mi.solvers
    assert _disk.of_strategy(s.cg(tol=1e-3)) == "cg(tol=0.001)"
    assert _disk.of_strategy(s.cg(preconditioner=s.sampled(64, rank=50))) == "cg(preconditioner=sampled(64, rank=50))"
    assert repr(mi.curvature.exact()) == "exact()"


def test_a_user_s_strategy_is_told_by_name_or_by_what_it_closes_over():
    def scaled(factor, name=None):
        return mi.solvers.from_map(None, lambda operator, state, b: factor * b, name=name)

    assert _disk.of_strategy(scaled(2.0, "scaled(2.0)")) == "scaled(2.0)"
    told = _disk.of_strategy(scaled(2.0))
    assert told == _disk.of_strategy(scaled(2.0)) != _disk.of_strategy(scaled(3.0))
    assert _disk.difference(told, _disk.of_strategy(scaled(3.0))).endswith("this run has 2.0, that one 3.0")
    # Within another one, and where a part was replaced after the call.
    outer = mi.solvers.cg(preconditioner=scaled(2.0))
    assert _disk.of_strategy(outer) != _disk.of_strategy(mi.solvers.cg(preconditioner=scaled(3.0)))
    replaced = mi.solvers.identity()._replace(solve=functools.partial(np.multiply, 2.0))
    assert _disk.of_strategy(replaced) != _disk.of_strategy(mi.solvers.identity())
    json.dumps([told, _disk.of_strategy(outer), _disk.of_strategy(replaced)])


def test_the_same_text_is_the_same_strategy_whatever_bytecode_a_python_makes_of_it():
    def apply_of(optimize):
        scope = {}
        text = "def apply(operator, state, b):\n    assert b is not None\n    return 2 * b\n"
        exec(compile(text, "<user>", "exec", optimize=optimize), scope)
        return scope["apply"]

    plain, optimized = apply_of(0), apply_of(2)
    assert plain.__code__.co_code != optimized.__code__.co_code
    left, right = (_disk.of_strategy(mi.solvers.from_map(None, apply)) for apply in (plain, optimized))
    assert left == right
