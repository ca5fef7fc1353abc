"""LAPACK's factorisations, one matrix at a time under vmap.

XLA's batched calls of LAPACK on CPU (jaxlib 0.10.2, 64 matrices, 2 cores) were seen to wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_one_by_one: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.custom_batching.sequential_vmap

eigh = _one_by_one(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
cholesky = _one_by_one(jnp.linalg.cholesky)
cho_solve = _one_by_one(lambda factor, rhs: jax.scipy.linalg.cho_solve((factor, True), rhs))
