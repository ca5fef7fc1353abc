"""A ridge regression in closed form with one meta-parameter, for what depends on no problem in particular."""

import jax
import jax.numpy as jnp

import metainfluence as mi


def ridge(meta_params, support, coefficients):
    x = support["x"] * meta_params["scale"]
    gram = jnp.einsum("n,nd,ne->de", coefficients, x, x) + jnp.eye(2)
    return jnp.linalg.solve(gram, jnp.einsum("n,nd,n->d", coefficients, x, support["y"]))


def predict(params, meta_params, batch):
    return (batch["x"] * meta_params["scale"]) @ params


def square(outputs, batch):
    return (outputs - batch["y"]) ** 2


def outer_loss(params, meta_params, batch):
    return square(predict(params, meta_params, batch), batch)


def target(meta_params):
    return jnp.sum(meta_params["scale"])


TASKS = mi.Task(
    {"x": jnp.ones((3, 4, 2)), "y": jnp.ones((3, 4))},
    {"x": jnp.ones((3, 5, 2)), "y": jnp.ones((3, 5))},
)
TASK = jax.tree.map(lambda leaf: leaf[0], TASKS)
LAMBDA = {"scale": jnp.asarray(0.5)}
WEIGHTS = mi.unit_weights(TASKS)
PROBLEM = mi.bilevel(outer_loss, mi.adaptation.closed_form(ridge), meta_regularizer=mi.l2(1.0))
BLACK_BOX = mi.from_task_loss(lambda meta_params, task, weights: jnp.sum(meta_params["scale"] ** 2))
