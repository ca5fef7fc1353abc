import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax raises a float to the power of its int32 step count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
