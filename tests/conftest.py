"""Float64 and strict promotion for every test: a value that JAX had to guess about fails here, not at a user's."""

import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run and in every order of tests."""
    return np.random.default_rng(20240607)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of one problem next to each other, so that a worker compiles a problem once, and not all of them."""

    def problem(item: pytest.Item) -> tuple[bool, str]:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return "problem_name" not in parameters, str(parameters.get("problem_name", ""))

    items.sort(key=problem)
