"""Fair timing: each library runs at its loosest setting that is accurate enough, and all take turns."""

import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metainfluence.lab.learn.timing import Compiled


class Candidate(NamedTuple):
    """One way to compute a quantity.

    Attributes:
      library: its name in the table.
      settings: settings to try, loose ones first.
      prepare: setting -> a call without arguments that returns the quantity once it is computed. Whatever may be
        compiled or kept between calls is made here or in the first call.
      named: setting -> its name in the table.
      ours: whether it is this library.
      needs: required packages, by their import names.
    """

    library: str
    settings: Sequence[Any]
    prepare: Callable[[Any], Callable[[], Any]]
    named: Callable[[Any], str] = "tolerance {:.0e}".format
    ours: bool = False
    needs: tuple[str, ...] = ()


class Row(NamedTuple):
    """One measurement.

    Attributes:
      quantity: what was computed.
      library: the library that computed it.
      ours: whether that is this library.
      seconds: the shortest run, without compiling, since other load only ever adds time; None where it could not be
        computed.
      error: relative to the reference.
      runs: number of timed runs.
      note: its setting, or why there is no number.
    """

    quantity: str
    library: str
    ours: bool
    seconds: float | None
    error: float | None
    runs: int
    note: str


class Settled(NamedTuple):
    """A candidate at its chosen setting."""

    call: Callable[[], Any]
    error: float
    note: str


_LOG = logging.getLogger(__name__)

# Errors that libraries raise if they cannot compute something, or lack a package; equinox's and PyTorch's own errors
# are RuntimeErrors.
_REFUSALS = (TypeError, ValueError, NotImplementedError, RuntimeError, ImportError)


def traced(function: Callable[..., Any], *args: Any) -> Callable[[float], Callable[[], Any]]:
    """`Candidate.prepare` for a JAX function (tolerance, *args), compiled once for all tolerances."""
    compiled = Compiled(function)
    return lambda tol: lambda: compiled(jnp.asarray(tol), *args)


def kept(
    linearize: Callable[..., Any], apply: Callable[..., Any], args: tuple[Any, ...], vector: Any
) -> Callable[[float], Callable[[], Any]]:
    """`Candidate.prepare` that calls linearize(tolerance, *args) once; only apply(its result, vector) is timed."""
    # Compiled ahead of time, a linear map that closes over arrays would be called with one argument too few.
    first, second = Compiled(linearize), jax.jit(apply)

    def prepare(tol: float) -> Callable[[], Any]:
        linear = first(jnp.asarray(tol), *args)
        return lambda: jax.block_until_ready(second(linear, vector))

    return prepare


def relative_error(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖ over all entries of two pytrees with the same leaves."""
    found, expected = (np.asarray(ravel_pytree(jax.tree.leaves(tree))[0]) for tree in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def settle(candidate: Candidate, expected: Any, target: float) -> Settled | str:
    """The candidate at its loosest setting within the target, else at its most accurate; or why it has none."""
    if missing := [name for name in candidate.needs if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(missing)}"
    best: Settled | None = None
    for setting in candidate.settings:
        try:
            call = candidate.prepare(setting)
            error = relative_error(call(), expected)
        except _REFUSALS as refusal:
            if candidate.ours:
                raise
            return f"refused: {(str(refusal).strip() or type(refusal).__name__).splitlines()[0][:100]}"
        found = Settled(call, error, candidate.named(setting))
        if error <= target:
            return found
        if best is None or not best.error <= error:
            best = found
    assert best is not None
    return best._replace(note=f"{best.note}; none of {len(candidate.settings)} settings reaches the target")


def race(
    quantity: str, candidates: Sequence[Candidate], expected: Any, *, target: float, repeats: int, budget: float
) -> list[Row]:
    """Rows of one quantity; the candidates take turns, so that other load on the machine slows them all.

    Args:
      quantity: what is computed.
      candidates: ways to compute it.
      expected: the reference, a pytree whose leaves have the same order as the candidates' results.
      target: relative error asked for.
      repeats: timed runs of each, at most.
      budget: seconds after which a candidate is not run again; each runs at least once.
    """
    settled = []
    for candidate in candidates:
        settled.append(settle(candidate, expected, target))
        _LOG.info("%s: %s: %s", quantity, candidate.library, settled[-1] if isinstance(settled[-1], str) else "ready")
    seconds: list[list[float]] = [[] for _ in candidates]
    for _ in range(repeats):
        for found, measured in zip(settled, seconds, strict=True):
            if isinstance(found, Settled) and (not measured or sum(measured) < budget):
                start = time.perf_counter()
                found.call()
                measured.append(time.perf_counter() - start)
    rows = []
    for candidate, found, measured in zip(candidates, settled, seconds, strict=True):
        if isinstance(found, str):
            rows.append(Row(quantity, candidate.library, candidate.ours, None, None, 0, found))
        else:
            shortest = min(measured)
            rows.append(
                Row(quantity, candidate.library, candidate.ours, shortest, found.error, len(measured), found.note)
            )
        _LOG.info("%s", rows[-1])
    return rows
