"""Declared layers: what they compute, and the mark that they leave in a program while curvature is captured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, PyTree

# Part of the key of JAX's caches, so that a function jitted by the user is traced anew for a capture, and its program
# with marks is not used outside of one.
capturing = jax.make_user_context(False)

mark_p = Primitive("ekfac_mark")
mark_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear map of features with a kernel and perhaps a bias; hashable, so static under jit.

    Attributes:
      kernel: name of the kernel in the parameters: a key, or keys joined by "/", as in "params/Dense_0/kernel".
      bias: name of the bias; None for a layer without.
      unsupported: why EK-FAC cannot treat the layer, for messages; None where it can.
    """

    kernel: str
    bias: str | None = None
    unsupported: str | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __call__(self, params: PyTree, inputs: Float[Array, "n *axes features"]) -> Array:
        """The layer's outputs; `params` is the pytree in which its names are looked up."""
        kernel = self._find(params, self.kernel)
        bias = None if self.bias is None else self._find(params, self.bias)
        outputs = self.linear(inputs, kernel)
        if bias is not None:
            outputs = outputs + jnp.reshape(bias, (1,) * (outputs.ndim - 1) + (-1,))
        return mark(self, outputs, inputs, kernel, bias)

    def _find(self, params: PyTree, name: str) -> Array:
        leaves = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        if name not in leaves:
            raise ValueError(f"{self}: expected a leaf {name!r} in its parameters, which are {sorted(leaves)}")
        return leaves[name]

    def linear(self, inputs: Array, kernel: Array) -> Array:
        """The outputs without the bias."""
        raise NotImplementedError

    def features(self, inputs: Array, kernel_shape: Sequence[int]) -> Float[Array, "n positions in"]:
        """What the kernel, as a matrix, multiplies at every position."""
        raise NotImplementedError

    def matrix(self, kernel: Array) -> Float[Array, "in out"]:
        """The kernel as the matrix that multiplies `features`."""
        raise NotImplementedError

    def from_matrix(self, matrix: Float[Array, "in out"], kernel_shape: Sequence[int]) -> Array:
        """Inverse of `matrix`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Dense(Layer):
    """A dense layer, x ↦ x W + b over the last axis: inputs `[n, ..., in]`, kernel W `[in, out]`, bias b `[out]`.

    Axes between the first, which holds the examples, and the last one share the weights.

    Examples:
      >>> layer = Dense(kernel="w", bias="b")
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> layer(params, jnp.ones((5, 3))).shape
      (5, 2)

    Raises:
      ValueError: when called, a name that is not in the parameters, or a kernel that is not a matrix.
    """

    def linear(self, inputs: Array, kernel: Array) -> Array:
        """The outputs without the bias."""
        if kernel.ndim != 2:
            raise ValueError(f"{self}: expected a kernel of shape [in, out], got shape {kernel.shape}")
        return jnp.matmul(inputs, kernel)

    def features(self, inputs: Array, kernel_shape: Sequence[int]) -> Float[Array, "n positions in"]:
        """The inputs, with the axes that share the weights merged."""
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])

    def matrix(self, kernel: Array) -> Float[Array, "in out"]:
        """The kernel."""
        return kernel

    def from_matrix(self, matrix: Float[Array, "in out"], kernel_shape: Sequence[int]) -> Array:
        """The kernel."""
        return matrix


@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    """A convolution: inputs `[n, *space, in]`, kernel `[*window, in, out]`, bias `[out]`, outputs `[n, *space, out]`.

    Attributes:
      strides: steps of the window, one for all axes or one for each.
      padding: "SAME", "SAME_LOWER", "VALID", or numbers: one for all axes, or for each axis one or a pair (low, high).
      kernel_dilation: distance between the kernel's entries, one for all axes or one for each.

    Raises:
      ValueError: another `padding`; when called, a name that is not in the parameters, or shapes that do not fit.
    """

    strides: int | tuple[int, ...] = 1
    padding: str | int | tuple[int | tuple[int, int], ...] = "SAME"
    kernel_dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        known = ("SAME", "SAME_LOWER", "VALID")
        if isinstance(self.padding, str) and self.padding not in known and self.unsupported is None:
            raise ValueError(f"padding: expected one of {known} or numbers, got {self.padding!r}")

    def linear(self, inputs: Array, kernel: Array) -> Array:
        """The outputs without the bias."""
        if kernel.ndim < 3 or inputs.ndim != kernel.ndim:
            raise ValueError(
                f"{self}: expected inputs [n, *space, in] and a kernel [*window, in, out] with as many axes, got "
                f"shapes {inputs.shape} and {kernel.shape}"
            )
        return jax.lax.conv_general_dilated(inputs, kernel, **self._window(kernel.shape))

    def _window(self, kernel_shape: Sequence[int]) -> dict[str, Any]:
        axes = len(kernel_shape) - 2
        space = "HWD"[:axes] if axes <= 3 else ""
        padding = (self.padding,) * axes if isinstance(self.padding, int) else self.padding
        return {
            "window_strides": _each(self.strides, axes),
            "padding": padding if isinstance(padding, str) else [_pair(width) for width in padding],
            "rhs_dilation": _each(self.kernel_dilation, axes),
            "dimension_numbers": (f"N{space}C", f"{space}IO", f"N{space}C"),
        }

    def features(self, inputs: Array, kernel_shape: Sequence[int]) -> Float[Array, "n positions in"]:
        """The patches of the inputs, channels first, under every position of the window."""
        flat = inputs.reshape(-1, *inputs.shape[1 - len(kernel_shape) :])
        patches = jax.lax.conv_general_dilated_patches(flat, tuple(kernel_shape[:-2]), **self._window(kernel_shape))
        return patches.reshape(inputs.shape[0], -1, patches.shape[-1])

    def matrix(self, kernel: Array) -> Float[Array, "in out"]:
        """The kernel, with rows ordered as the patches are."""
        return jnp.moveaxis(kernel, -2, 0).reshape(-1, kernel.shape[-1])

    def from_matrix(self, matrix: Float[Array, "in out"], kernel_shape: Sequence[int]) -> Array:
        """The kernel."""
        *window, channels, outputs = kernel_shape
        return jnp.moveaxis(matrix.reshape(channels, *window, outputs), 0, -2)


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _pair(width: Any) -> tuple[int, int]:
    return (width, width) if isinstance(width, int) else (width[0], width[1])


def outputs(tree: PyTree) -> PyTree:
    """Marks the model's outputs that the losses read, arrays `[n, ...]`, and returns them.

    The Gauss–Newton matrix that EK-FAC approximates uses the losses' Hessian in these outputs. Without the mark they
    are the outputs of the last layer that is called.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> layer, params = mi.ekfac.Dense(kernel="w"), {"w": jnp.ones((1, 1))}
      >>> def curvature(mark):
      ...     data, coefficients = jnp.ones((1, 1, 1)), jnp.ones((1, 1))
      ...     def loss(params, x):
      ...         return 0.5 * mark(layer(params, x)[:, 0] ** 2) ** 2
      ...     losses = mi.operators.Losses(loss, params, data, coefficients, regularizer=None)
      ...     return mi.ekfac.estimate(losses, mi.operators.Domain.of(params)).blocks[0].values
      >>> round(float(curvature(mi.ekfac.outputs)[0, 0]), 3)  # (2w)²
      4.0
      >>> round(float(curvature(lambda squares: squares)[0, 0]), 3)  # the Hessian of w⁴ / 2
      6.0
    """
    leaves, structure = jax.tree.flatten(tree)
    if not capturing.value or not leaves:
        return tree
    return jax.tree.unflatten(structure, mark_p.bind(*leaves, layer=None, count=len(leaves)))


def mark(layer: Layer, outputs: Array, inputs: Array, kernel: Array, bias: Array | None) -> Array:
    """The outputs, marked during a capture as the layer's for its inputs and parameters."""
    if not capturing.value:
        return outputs
    parameters = [kernel] if bias is None else [kernel, bias]
    marked: list[Array] = mark_p.bind(outputs, inputs, *parameters, layer=layer, count=1)
    return marked[0]


def leaf_path(path: Any) -> str:
    """Name of a pytree's leaf as declared layers spell it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def size(shape: Sequence[int]) -> int:
    """Number of entries of an array."""
    return math.prod(shape)


def _first(*operands: Any, layer: Layer | None, count: int) -> list[Any]:
    return list(operands[:count])


def _batched(operands: Any, axes: Any, *, layer: Layer | None, count: int) -> tuple[list[Any], list[int]]:
    """Brings the mapped axis to the front, where examples are expected."""
    length = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    data = count if layer is None else count + 1
    moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    for index in range(data):
        if axes[index] is None:
            moved[index] = jnp.broadcast_to(moved[index], (length, *moved[index].shape))
    return mark_p.bind(*moved, layer=layer, count=count), [0] * count


def _differentiated(primals: Any, tangents: Any, *, layer: Layer | None, count: int) -> tuple[list[Any], list[Any]]:
    return mark_p.bind(*primals, layer=layer, count=count), list(tangents[:count])


mark_p.def_impl(_first)
mark_p.def_abstract_eval(_first)
batching.primitive_batchers[mark_p] = _batched
ad.primitive_jvps[mark_p] = _differentiated
mlir.register_lowering(mark_p, lambda ctx, *operands, layer, count: operands[:count])
