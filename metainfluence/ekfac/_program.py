"""The losses' program, as JAX traces it: finds the layers called, and checks that EK-FAC sees all their parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

from metainfluence.ekfac import _flax
from metainfluence.ekfac._layers import Layer, capturing, leaf_path, mark_p, size
from metainfluence.operators import Losses

# Calls that change nothing about what is computed; marks inside of them are seen.
_TRANSPARENT = {"jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call"}

Shapes = tuple[jax.ShapeDtypeStruct, ...]


class Call(NamedTuple):
    """One execution of a layer: its parameters, as indices of leaves, and its outputs `[n, ..., out]`."""

    layer: Layer
    kernel: int
    bias: int | None
    outputs: jax.ShapeDtypeStruct


class Program(NamedTuple):
    """The losses of one group as a jaxpr of (leaves of the point, leaves of the data).

    Attributes:
      jaxpr: the program.
      calls: by the position of their marks among all marks, in the order of execution.
      out: the position of the mark on the model's outputs.
      outputs: their shapes, `[n, ...]` each.
    """

    jaxpr: ClosedJaxpr
    calls: dict[int, Call]
    out: int
    outputs: Shapes

    @property
    def num_outputs(self) -> int:
        """Scalars among the model's outputs for one example."""
        return sum(size(shape.shape[1:]) for shape in self.outputs)


class _Origin(NamedTuple):
    """What a value of the program depends on.

    Attributes:
      leaf: the parameter that it is, unchanged.
      params: parameters on which it depends other than through marked layers.
      calls: layers on whose outputs it depends other than through the model's outputs.
    """

    leaf: int | None = None
    params: frozenset[int] = frozenset()
    calls: frozenset[int] = frozenset()


def trace(losses: Losses) -> Program:
    """Traces the losses of one group and checks that layers cover the parameters.

    Raises:
      ValueError: a parameter that no layer covers, or that the losses also use in another way; a layer whose parameters
        or examples cannot be identified; losses that use a layer's outputs other than through the model's.
    """
    point = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), losses.point)
    data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), losses.data)
    examples = losses.coefficients.shape[1]

    with capturing(True), _flax.intercepted():
        # A new function each time: a program that was traced outside of a capture has no marks.
        jaxpr = jax.make_jaxpr(lambda *arguments: losses.function(*arguments))(point, data)
    if [aval.shape for aval in jaxpr.out_avals] != [(examples,)]:
        shapes = [aval.shape for aval in jaxpr.out_avals]
        raise ValueError(f"losses: expected one loss per example, shape ({examples},), got {shapes}")

    names = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(point)]
    calls, marks = _find_calls(jaxpr, names)
    _check_coverage(calls, names)
    explicit = [position for position, (layer, _) in enumerate(marks) if layer is None]
    if len(explicit) > 1:
        raise ValueError(f"outputs: expected one mark on the model's outputs, got {len(explicit)}")
    out = explicit[0] if explicit else max(calls)
    _check_examples(calls, marks, out, examples)
    _check_paths(jaxpr, names, calls, out)
    return Program(jaxpr, calls, out, marks[out][1][:1] if marks[out][0] is not None else marks[out][1])


def run(program: Program, arguments: Sequence[Any], at_mark: Callable[[int, list[Any]], list[Any]]) -> Array:
    """Runs the program.

    Args:
      program: the program.
      arguments: leaves of the point, then leaves of one group's data.
      at_mark: (position of the mark, its operands) -> the values that take the place of those marked.
    """
    positions = itertools.count()

    def apply(eqn: Any, operands: list[Any]) -> list[Any]:
        if eqn.primitive is mark_p:
            return at_mark(next(positions), operands)
        bound = eqn.primitive.get_bind_params(eqn.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        with eqn.ctx.manager:
            results = eqn.primitive.bind(*functions, *operands, **params)
        return results if eqn.primitive.multiple_results else [results]

    return _walk(program.jaxpr.jaxpr, program.jaxpr.consts, arguments, apply)[0]


def _walk(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], apply: Callable[..., list[Any]]) -> list[Any]:
    """Interprets a jaxpr over any kind of value, going into transparent calls that hold marks."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in _TRANSPARENT and _marked_inside(eqn):
            inner = next(_jaxprs(eqn))
            closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            results = _walk(closed.jaxpr, closed.consts, operands, apply)
        else:
            results = apply(eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, (ClosedJaxpr, Jaxpr)):
                yield item


def _marked_inside(eqn: Any) -> list[Layer]:
    """Layers called in the functions that an equation calls."""
    found: list[Layer] = []
    for inner in _jaxprs(eqn):
        for nested in (inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner).eqns:
            if nested.primitive is mark_p:
                found.append(nested.params["layer"])
            else:
                found.extend(_marked_inside(nested))
    return found


def _origins(jaxpr: ClosedJaxpr, num_params: int, at_mark: Callable[..., list[_Origin]]) -> _Origin:
    """What the losses depend on, with `at_mark(eqn, origins of its operands)` at the marks."""

    def apply(eqn: Any, operands: list[Any]) -> list[_Origin]:
        known = [operand if isinstance(operand, _Origin) else _Origin() for operand in operands]
        if eqn.primitive is mark_p:
            return at_mark(eqn, known)
        if eqn.primitive.name == "stop_gradient":
            return [_Origin()]
        params = frozenset[int]().union(*(origin.params for origin in known))
        hidden = _marked_inside(eqn)
        if hidden and params:
            raise ValueError(
                f"{hidden[0]}: called inside {eqn.primitive.name}, where EK-FAC cannot see its inputs; expected calls "
                "outside of loops, branches and custom derivatives"
            )
        calls = frozenset[int]().union(*(origin.calls for origin in known))
        return [_Origin(None, params, calls)] * len(eqn.outvars)

    leaves = [_Origin(index, frozenset([index])) for index in range(num_params)]
    data = [_Origin()] * (len(jaxpr.jaxpr.invars) - num_params)
    losses: _Origin = _walk(jaxpr.jaxpr, [_Origin()] * len(jaxpr.consts), [*leaves, *data], apply)[0]
    return losses if isinstance(losses, _Origin) else _Origin()


def _find_calls(jaxpr: ClosedJaxpr, names: list[str]) -> tuple[dict[int, Call], list[tuple[Layer | None, Shapes]]]:
    """Calls of layers with these parameters, and all marks: layer, shapes of the operands."""
    calls: dict[int, Call] = {}
    marks: list[tuple[Layer | None, Shapes]] = []

    def at_mark(eqn: Any, operands: list[_Origin]) -> list[_Origin]:
        layer, position = eqn.params["layer"], len(marks)
        shapes = tuple(jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars)
        marks.append((layer, shapes))
        if layer is None:
            return operands
        outputs, inputs, *parameters = operands
        # Layers of other parameters, such as those of the other level, are constants here.
        if not any(origin.params for origin in parameters):
            return [outputs]
        if layer.unsupported is not None:
            raise ValueError(f"{layer}: {layer.unsupported}")
        kernel, bias = [*(_leaf_of(layer, origin, names) for origin in parameters), None][:2]
        if kernel is None:
            raise ValueError(f"{layer}: its bias is among the parameters, but its kernel is not")
        calls[position] = Call(layer, kernel, bias, shapes[0])
        return [inputs._replace(leaf=None)]

    _origins(jaxpr, len(names), at_mark)
    return calls, marks


def _leaf_of(layer: Layer, origin: _Origin, names: list[str]) -> int | None:
    if origin.params and origin.leaf is None:
        raise ValueError(
            f"{layer}: expected its kernel and bias to be leaves of the pytree that the operator acts on, unchanged, "
            f"got a value computed from {_listed(origin.params, names)}"
        )
    return origin.leaf


def _listed(indices: frozenset[int], names: list[str]) -> str:
    return ", ".join(repr(names[index]) for index in sorted(indices))


def _check_coverage(calls: dict[int, Call], names: list[str]) -> None:
    """Raises unless every leaf belongs to one kernel and bias, however often these are used."""
    owners: dict[int, tuple[int, int | None]] = {}
    for call in calls.values():
        for index in (call.kernel, call.bias):
            pair = (call.kernel, call.bias)
            if index is not None and owners.setdefault(index, pair) != pair:
                raise ValueError(f"{names[index]!r}: expected it in one layer, got another with {call.layer}")
    missing = frozenset(range(len(names))) - frozenset(owners)
    if missing:
        layers = sorted({str(call.layer) for call in calls.values()})
        raise ValueError(
            f"{_listed(missing, names)}: covered by no layer; EK-FAC expected every leaf of the pytree that the "
            "operator acts on to be the kernel or the bias of a metainfluence.ekfac.Dense or Conv, or of Flax's Dense, "
            f"Linear or Conv; the layers seen are {layers}"
        )


def _check_examples(calls: dict[int, Call], marks: list[tuple[Layer | None, Shapes]], out: int, examples: int) -> None:
    for position in (*calls, out):
        layer, shapes = marks[position]
        for shape in shapes if layer is None else shapes[:2]:
            if shape.shape[:1] != (examples,):
                raise ValueError(
                    f"{'outputs' if layer is None else layer}: expected the {examples} examples on the leading axis, "
                    f"got shape {shape.shape}"
                )


def _check_paths(jaxpr: ClosedJaxpr, names: list[str], calls: dict[int, Call], out: int) -> None:
    """Raises unless parameters reach the losses through their layers only, and layers through the outputs only."""
    positions = itertools.count()

    def at_mark(eqn: Any, operands: list[_Origin]) -> list[_Origin]:
        position = next(positions)
        marked = operands if eqn.params["layer"] is None else operands[:1]
        if position in calls:
            marked = [_Origin(None, operands[1].params, operands[0].calls | {position})]
        if position == out:
            marked = [origin._replace(calls=frozenset()) for origin in marked]
        return marked

    losses = _origins(jaxpr, len(names), at_mark)
    if losses.params:
        raise ValueError(
            f"{_listed(losses.params, names)}: the losses depend on it other than through its layer, which EK-FAC does "
            "not see"
        )
    if losses.calls:
        layers = ", ".join(sorted({str(calls[position].layer) for position in losses.calls}))
        raise ValueError(
            f"{layers}: the losses depend on its outputs other than through those of the model; pass all that they "
            "read of the model through metainfluence.ekfac.outputs"
        )
