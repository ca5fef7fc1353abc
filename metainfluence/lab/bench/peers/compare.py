"""Fair timing: each library at its loosest setting that is accurate enough, all of them taking turns."""

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
      settings: to be tried, loose ones first.
      prepare: setting -> a call without arguments that returns the quantity when it is there; what may be compiled or
        kept from one call to the next is done here or in the first call.
      named: setting -> how it is said in the table.
      ours: whether it is this library.
      needs: packages, by the names that they are imported by.
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
      library: by what.
      ours: whether by this library.
      seconds: the shortest run, without compiling, since other load only ever adds time; None where it could not be
        computed.
      error: relative to the reference.
      runs: that were timed.
      note: how it was set, or why there is no number.
    """

    quantity: str
    library: str
    ours: bool
    seconds: float | None
    error: float | None
    runs: int
    note: str


class Settled(NamedTuple):
    """A candidate at its setting."""

    call: Callable[[], Any]
    error: float
    note: str


_LOG = logging.getLogger(__name__)

# What libraries raise where they cannot compute something, or lack a package; equinox's and PyTorch's own errors are
# RuntimeErrors.
_REFUSALS = (TypeError, ValueError, NotImplementedError, RuntimeError, ImportError)


def traced(function: Callable[..., Any], *args: Any) -> Callable[[float], Callable[[], Any]]:
    """`Candidate.prepare` of a JAX function (tolerance, *args), which is compiled once for all tolerances."""
    compiled = Compiled(function)
    return lambda tol: lambda: compiled(jnp.asarray(tol), *args)


def kept(
    linearize: Callable[..., Any], apply: Callable[..., Any], args: tuple[Any, ...], vector: Any
) -> Callable[[float], Callable[[], Any]]:
    """`Candidate.prepare` where linearize(tolerance, *args) is done once and apply(it, vector) is what is timed."""
    # Compiled ahead of time, a linear map that closes over arrays would be called with one argument too few.
    first, second = Compiled(linearize), jax.jit(apply)

    def prepare(tol: float) -> Callable[[], Any]:
        linear = first(jnp.asarray(tol), *args)
        return lambda: jax.block_until_ready(second(linear, vector))

    return prepare


def relative_error(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖ over all entries of two pytrees of the same leaves."""
    found, expected = (np.asarray(ravel_pytree(jax.tree.leaves(tree))[0]) for tree in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def settle(candidate: Candidate, expected: Any, target: float) -> Settled | str:
    """The candidate at its loosest setting within the target, else at its most accurate one; or why it has none."""
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
    """Rows of one quantity, the candidates taking turns, so that other load on the machine slows all.

    Args:
      quantity: what is computed.
      candidates: ways to compute it.
      expected: the reference, a pytree whose leaves are in the order of the candidates' results.
      target: relative error asked for.
      repeats: timed runs of each, at most.
      budget: seconds after which a candidate is not run again; each is run once.
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
