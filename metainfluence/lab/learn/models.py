"""Flax models from images to features, and a problem that uses them."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.learn.convolution import ShiftedConv

NORMALIZATIONS = (None, "layer", "group", "instance")
NUM_GROUPS = 8
POOLINGS = ("max", "average", "stride")


class MLP(nn.Module):
    """A tanh MLP from images [..., *image] to features [..., widths[-1]].

    Its parameters take JAX's default float type, so they are float64 where x64 is enabled.

    Attributes:
      widths: widths of its layers.
      image_ndim: axes of an image: 2 for grey ones, 3 for those with channels, 1 for vectors.
      activation: applied after every layer.
      compute_dtype: "bfloat16" or "float16" for products in half precision, by `metainfluence.mixed`, if the network is
        called by `apply`; None for full precision.
    """

    widths: Sequence[int] = (32, 16)
    image_ndim: int = 2
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh
    compute_dtype: str | None = None

    @nn.compact
    def __call__(self, images):
        x = images.reshape(*images.shape[: images.ndim - self.image_ndim], -1)
        for width in self.widths:
            x = self.activation(nn.Dense(width, param_dtype=jnp.result_type(float))(x))
        return x


class Conv4(nn.Module):
    """The four-layer network of few-shot learning (Vinyals et al., NeurIPS 2016), from images to flat features.

    Each layer is a 3 × 3 convolution, a normalisation, an activation and 2 × 2 pooling. Unlike with batch
    normalisation, no layer sees more than one example: example weights are only meaningful if the loss is a sum over
    examples.

    Images are [n, H, W] or [n, H, W, C], features [n, ⌊H/2^depth⌋ · ⌊W/2^depth⌋ · width], rounded up with "stride".

    Attributes:
      width: channels of every layer.
      depth: number of layers.
      normalization: over an example's positions and all channels ("layer"), each of 8 groups of channels ("group"), or
        each channel ("instance"); None for none.
      pooling: "max", "average", or "stride" for convolutions that skip every other position, at a quarter of the cost.
      activation: with a smooth one, such as `jnp.tanh`, the total Hessian exists everywhere.
      impl: implementation of the convolutions, as in `ShiftedConv`.
      compute_dtype: as in `MLP`.
    """

    width: int = 32
    depth: int = 4
    normalization: str | None = None
    pooling: str = "max"
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    impl: str = "auto"
    compute_dtype: str | None = None

    @nn.compact
    def __call__(self, images):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if images.ndim not in (3, 4):
            raise ValueError(f"images: expected shape [n, H, W] or [n, H, W, C], got {images.shape}")
        x = images[..., None] if images.ndim == 3 else images
        for _ in range(self.depth):
            if self.pooling != "stride" and min(x.shape[1:3]) < 2:
                raise ValueError(f"images: expected at least {2**self.depth} pixels each way, got {images.shape}")
            x = ShiftedConv(self.width, stride=2 if self.pooling == "stride" else 1, impl=self.impl)(x)
            x = self.activation(self._normalized(x))
            if self.pooling != "stride":
                x = pooled(x, self.pooling)
        return x.reshape(x.shape[0], -1)

    def _normalized(self, x):
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization: expected one of {NORMALIZATIONS}, got {self.normalization!r}")
        if self.normalization is None:
            return x
        if self.normalization == "group" and self.width % NUM_GROUPS:
            raise ValueError(f"width: expected a multiple of {NUM_GROUPS} for groups of channels, got {self.width}")
        groups = {"layer": 1, "group": NUM_GROUPS, "instance": self.width}[self.normalization]
        return nn.GroupNorm(num_groups=groups, param_dtype=x.dtype)(x)


def pooled(x: jax.Array, kind: str) -> jax.Array:
    """2 × 2 pooling of [n, H, W, C], "max" or "average"; an odd row or column at the end is left out.

    It reshapes, since XLA's windowed maximum has slow derivatives under `vmap`.
    """
    n, height, width, channels = x.shape
    blocks = x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, channels)
    return blocks.max((2, 4)) if kind == "max" else blocks.mean((2, 4))


def check_penalty(name: str, value: float, *, above: bool = False) -> None:
    """Raises ValueError unless a penalty's weight is finite and at least 0 or, with `above`, above 0."""
    if not (np.isfinite(value) and (value > 0 or (value == 0 and not above))):
        raise ValueError(f"{name}: expected a number {'above' if above else 'of at least'} 0, got {value!r}")


def logistic_head_problem(
    model: nn.Module, ways: int, *, head_l2: float, meta_l2: float = 1e-3, tol: float = 1e-9
) -> mi.Bilevel:
    """A logistic-regression head, fitted per task on the features that the meta-parameters compute.

    The head's l2 term makes the inner problem strictly convex, so the implicit function theorem holds for every task.
    The head depends on the meta-parameters only through the support set's features. These are therefore computed once
    per task, not in every step of the inner solve.

    Args:
      model: maps images to features; its variables are the meta-parameters.
      ways: classes per task.
      head_l2: weight of ‖head‖² / 2 in the inner objective.
      meta_l2: weight of ‖λ‖² / 2 in the outer objective.
      tol: relative gradient norm of a fitted head, and relative residual of its implicit derivative.

    Returns:
      The problem; a task's support and query are `fewshot.Batch`es.

    Raises:
      ValueError: a penalty that is not positive, or a negative `meta_l2`.
    """
    check_penalty("head_l2", head_l2, above=True)
    check_penalty("meta_l2", meta_l2)

    def loss(head, features, labels):
        return cross_entropy(linear(head, features), labels)

    def zero_head(features, labels):
        del labels
        return zero_linear(features.shape[-1], ways, features.dtype)

    def penalty(head, features):
        del features
        return 0.5 * head_l2 * optax.tree.norm(head, squared=True)

    # The penalty keeps the inner Hessian well conditioned, so a few products are cheaper than a dense factorisation.
    fit = mi.adaptation.implicit(
        loss,
        zero_head,
        minimizer=mi.adaptation.newton_cg(tol=tol),
        linear_solver=mi.solvers.cg(tol=tol),
        regularizer=penalty,
    )

    def adapt(meta_params, support, coefficients):
        return fit(apply(model, meta_params, support.images), support.labels, coefficients)

    def gradient_norm(head, meta_params, support, coefficients):
        assert fit.inner_gradient_norm is not None
        return fit.inner_gradient_norm(head, apply(model, meta_params, support.images), support.labels, coefficients)

    def logits(head, meta_params, query):
        return linear(head, apply(model, meta_params, query.images))

    def query_loss(logits, query):
        return cross_entropy(logits, query.labels)

    adaptation = mi.adaptation.Adaptation(adapt, gradient_norm)
    return mi.bilevel(logits, adaptation, meta_regularizer=mi.l2(meta_l2), outer_head=query_loss)


def apply(model: nn.Module, variables: Any, inputs: jax.Array) -> jax.Array:
    """The outputs of a Flax model without mutable state, in the precision that it specifies."""
    dtype = getattr(model, "compute_dtype", None)
    network = model.apply if dtype is None else mi.mixed.compute_in(dtype)(model.apply)
    return cast(jax.Array, network(variables, inputs))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy of each example, [n], from logits [n, ways] and labels [n]."""
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Half the squared error of each example, [n], from outputs [n, 1] and targets [n]."""
    return jnp.square(outputs[:, 0] - targets) / 2


def linear(head: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Logits [n, ways] of a linear head on features [n, d]."""
    return features @ head["kernel"] + head["bias"][None]


def zero_linear(width: int, ways: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """A linear head of zeros."""
    return {"kernel": jnp.zeros((width, ways), dtype), "bias": jnp.zeros(ways, dtype)}
