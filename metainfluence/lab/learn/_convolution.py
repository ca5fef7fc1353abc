"""A 3 × 3 convolution as nine shifted matrix products, which stays fast under `vmap` over kernels.

Adapted networks have one kernel per task. Under `vmap` a convolution with such kernels becomes a grouped one, which XLA
runs badly on CPUs; matrix products become batched ones, which it runs well.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import metainfluence as mi

WINDOW = 3
IMPLEMENTATIONS = ("shifted", "lax", "auto")


def shifted_convolution(inputs: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves with zero padding as "SAME": out[y, x] = Σ_ij inputs[s·y + i - low, s·x + j - low] kernel[i, j].

    Args:
      inputs: [..., H, W, in].
      kernel: [3, 3, in, out].
      stride: s, steps of the window along both axes.

    Returns:
      [..., ⌈H/s⌉, ⌈W/s⌉, out], equal to `jax.lax.conv_general_dilated` up to rounding.
    """
    sizes = [-(-length // stride) for length in inputs.shape[-3:-1]]
    missing = [
        max((size - 1) * stride + WINDOW - length, 0) for size, length in zip(sizes, inputs.shape[-3:-1], strict=True)
    ]
    around = [(total // 2, total - total // 2) for total in missing]
    padded = jnp.pad(inputs, [(0, 0)] * (inputs.ndim - 3) + [*around, (0, 0)])
    rows, columns = (stride * (size - 1) + 1 for size in sizes)
    shifts = [
        (padded[..., i : i + rows : stride, j : j + columns : stride, :], kernel[i, j])
        for i in range(WINDOW)
        for j in range(WINDOW)
    ]
    first, *rest = (jnp.matmul(window, matrix) for window, matrix in shifts)
    return sum(rest, first)


@dataclasses.dataclass(frozen=True)
class _Shifted(mi.ekfac.Conv):
    """The layer as EK-FAC knows it."""

    def linear(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        assert isinstance(self.strides, int)
        return shifted_convolution(inputs, kernel, self.strides)


class ShiftedConv(nn.Module):
    """A 3 × 3 convolution with zero padding, inputs [n, H, W, in], with the parameters of `flax.linen.Conv`.

    Attributes:
      features: output channels.
      stride: steps of the window along both axes.
      impl: "shifted" for nine matrix products, "lax" for XLA's convolution, "auto" for the faster one under `vmap` over
        kernels on the backend at hand.
    """

    features: int
    stride: int = 1
    impl: str = "auto"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {self.impl!r}")
        if inputs.ndim != 4:
            raise ValueError(f"inputs: expected images [n, H, W, channels], got shape {inputs.shape}")
        shape = (WINDOW, WINDOW, inputs.shape[-1], self.features)
        dtype = jnp.result_type(float)
        params: dict[str, Any] = {
            "kernel": self.param("kernel", nn.initializers.lecun_normal(), shape, dtype),
            "bias": self.param("bias", nn.initializers.zeros_init(), (self.features,), dtype),
        }
        shifted = self.impl == "shifted" or (self.impl == "auto" and jax.default_backend() == "cpu")
        layer = (_Shifted if shifted else mi.ekfac.Conv)("kernel", "bias", strides=self.stride)
        return layer(params, inputs)
