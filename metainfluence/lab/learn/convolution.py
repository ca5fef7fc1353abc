"""A 3 × 3 convolution as matrix products, which stays fast under `vmap` over kernels.

Adapted networks have one kernel per task. Under `vmap` a convolution with such kernels becomes a grouped convolution,
which XLA runs slowly. Matrix products become batched products, which XLA runs fast.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import metainfluence as mi

WINDOW = 3
IMPLEMENTATIONS = ("windows", "shifted", "lax", "auto")
FULL = ("highest", "float32", "F32_F32_F32")


def shifted_convolution(inputs: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves with zero padding as "SAME": out[y, x] = Σ_ij inputs[s·y + i - low, s·x + j - low] kernel[i, j].

    It uses nine products, one for each position in the window.

    Args:
      inputs: [..., H, W, in].
      kernel: [3, 3, in, out].
      stride: s, steps of the window along both axes.

    Returns:
      [..., ⌈H/s⌉, ⌈W/s⌉, out], equal to `jax.lax.conv_general_dilated` up to rounding.
    """
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    first, *rest = (jnp.matmul(each, matrices[k]) for k, each in enumerate(_shifts(inputs, stride)))
    return sum(rest, first)


def windowed_convolution(inputs: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The same by one product with the windows, which hold nine numbers for each number of the image."""
    windows = jnp.concatenate(_shifts(inputs, stride), axis=-1)
    return jnp.matmul(windows, kernel.reshape(-1, kernel.shape[-1]))


def _shifts(inputs: jax.Array, stride: int) -> list[jax.Array]:
    """The padded images, shifted to each of the nine positions in the window."""
    sizes = [-(-length // stride) for length in inputs.shape[-3:-1]]
    missing = [
        max((size - 1) * stride + WINDOW - length, 0) for size, length in zip(sizes, inputs.shape[-3:-1], strict=True)
    ]
    around = [(total // 2, total - total // 2) for total in missing]
    padded = jnp.pad(inputs, [(0, 0)] * (inputs.ndim - 3) + [*around, (0, 0)])
    rows, columns = (stride * (size - 1) + 1 for size in sizes)
    return [
        padded[..., i : i + rows : stride, j : j + columns : stride, :] for i in range(WINDOW) for j in range(WINDOW)
    ]


@dataclasses.dataclass(frozen=True)
class _Windowed(mi.ekfac.Conv):
    """The layer in the form that EK-FAC recognises."""

    def linear(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        assert isinstance(self.strides, int)
        return windowed_convolution(inputs, kernel, self.strides)


@dataclasses.dataclass(frozen=True)
class _Shifted(mi.ekfac.Conv):
    """The layer in the form that EK-FAC recognises."""

    def linear(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        assert isinstance(self.strides, int)
        return shifted_convolution(inputs, kernel, self.strides)


class ShiftedConv(nn.Module):
    """A 3 × 3 convolution with zero padding, inputs [n, H, W, in], with the parameters of `flax.linen.Conv`.

    Attributes:
      features: output channels.
      stride: steps of the window along both axes.
      impl: "windows" for one matrix product with the windows, "shifted" for nine, "lax" for XLA's convolution; "auto"
        for the faster one under `vmap` over kernels: windows, or XLA's on accelerators whose matrix products run at
        less than full precision.
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
        impl = fastest(jax.default_backend(), inputs.dtype) if self.impl == "auto" else self.impl
        kind = {"windows": _Windowed, "shifted": _Shifted, "lax": mi.ekfac.Conv}[impl]
        return kind("kernel", "bias", strides=self.stride)(params, inputs)


def fastest(backend: str, dtype: jax.typing.DTypeLike) -> str:
    """The implementation that "auto" selects at the current precision of matrix products, from measurements."""
    full = dtype == jnp.float64 or jax.config.jax_default_matmul_precision in FULL
    return "windows" if backend == "cpu" or (backend in ("gpu", "cuda", "rocm") and full) else "lax"
