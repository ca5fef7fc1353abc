"""Flax models, and meta-learning problems built on them in a few lines each."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import metainfluence as mi


class MLP(nn.Module):
    """A tanh MLP from images [..., *image] to features [..., widths[-1]].

    Its parameters take JAX's default float type, so they are float64 where x64 is enabled.
    """

    widths: Sequence[int] = (32, 16)
    image_ndim: int = 2

    @nn.compact
    def __call__(self, images):
        x = images.reshape(*images.shape[: images.ndim - self.image_ndim], -1)
        for width in self.widths:
            x = jnp.tanh(nn.Dense(width, param_dtype=jnp.result_type(float))(x))
        return x


def logistic_head_problem(
    model: nn.Module, ways: int, *, head_l2: float, meta_l2: float = 1e-3, tol: float = 1e-9
) -> mi.Bilevel:
    """A logistic-regression head, fitted per task on the features that the meta-parameters compute.

    The head's l2 term makes the inner problem strictly convex, so the implicit function theorem holds for every task.
    The head sees the meta-parameters through the support set's features only, so these are what it is adapted to: they
    are computed once per task and not in every step of the inner solve.

    Args:
      model: maps images to features; its variables are the meta-parameters.
      ways: classes per task.
      head_l2: weight of ‖head‖² / 2 in the inner objective.
      meta_l2: weight of ‖λ‖² / 2 in the outer objective.
      tol: relative gradient norm of a fitted head, and relative residual of its implicit derivative.

    Returns:
      The problem; a task's support and query are `fewshot.Batch`es.
    """

    def loss(head, features, labels):
        logits = features @ head["kernel"] + head["bias"][None]
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, ways, dtype=logits.dtype))

    def zero_head(features, labels):
        del labels
        return {
            "kernel": jnp.zeros((features.shape[-1], ways), features.dtype),
            "bias": jnp.zeros(ways, features.dtype),
        }

    def penalty(head, features):
        del features
        return 0.5 * head_l2 * optax.tree.norm(head, squared=True)

    # The penalty keeps the inner Hessian well conditioned, so a few products are cheaper than its dense factorisation.
    fit = mi.adaptation.implicit(
        loss,
        zero_head,
        minimizer=mi.adaptation.newton_cg(tol=tol),
        linear_solver=mi.solvers.cg(tol=tol),
        regularizer=penalty,
    )

    def adapt(meta_params, support, coefficients):
        return fit(model.apply(meta_params, support.images), support.labels, coefficients)

    def gradient_norm(head, meta_params, support, coefficients):
        assert fit.inner_gradient_norm is not None
        return fit.inner_gradient_norm(head, model.apply(meta_params, support.images), support.labels, coefficients)

    def query_loss(head, meta_params, query):
        return loss(head, model.apply(meta_params, query.images), query.labels)

    adaptation = mi.adaptation.Adaptation(adapt, gradient_norm)
    return mi.bilevel(query_loss, adaptation, meta_regularizer=mi.l2(meta_l2))
