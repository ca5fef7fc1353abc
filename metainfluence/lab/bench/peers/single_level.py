"""Single-level influence, as dattri and pyDVL compute it: each training example on each test example's loss.

The score of training example i for test example j is ∇ℓ_jᵀ (H + δI)⁻¹ ∇ℓ_i / N, with H the Hessian of the mean training
loss: to first order, the increase of the test loss when the example is removed.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import metainfluence as mi
from metainfluence.lab.bench.peers.problem import features, losses

Examples = tuple[jax.Array, jax.Array]


class SingleLevel(NamedTuple):
    """A tanh MLP on images.

    Attributes:
      layers: the parameters, a tuple of (kernel `[n, m]`, bias `[m]`).
      train, test: (images `[n, pixels]`, labels `[n]`).
      damping: δ.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    train: Examples
    test: Examples
    damping: float


def example_losses(layers: Any, examples: Examples) -> jax.Array:
    """Cross entropies `[n]` of the MLP."""
    *hidden, (kernel, bias) = layers
    head = jnp.concatenate((kernel, bias[None]))
    return losses(head, features(hidden, examples[0]), examples[1])


def trained(
    sizes: tuple[int, ...], train: Examples, test: Examples, damping: float, num_steps: int = 200
) -> SingleLevel:
    """The MLP after some steps of Adam from random kernels."""
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    layers = tuple(
        (jax.random.normal(key, (n, m)) / n**0.5, jnp.zeros(m))
        for key, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    )
    fit = mi.adaptation.optax_minimizer(optax.adam(0.01), num_steps)
    layers = jax.jit(lambda layers, train: fit(lambda x: jnp.mean(example_losses(x, train)), layers))(layers, train)
    return SingleLevel(layers, train, test, damping)


def dense_scores(problem: SingleLevel) -> jax.Array:
    """The oracle, `[test, train]`, by the dense Hessian.

    Raises:
      ValueError: the damped Hessian is not positive definite, so conjugate gradients do not apply.
    """
    flat, unravel = ravel_pytree(problem.layers)

    @jax.jit
    def run(train: Examples, test: Examples) -> tuple[jax.Array, jax.Array]:
        hessian = jax.hessian(lambda x: jnp.mean(example_losses(unravel(x), train)))(flat)
        values, vectors = jnp.linalg.eigh(hessian + problem.damping * jnp.eye(flat.size))
        rows = jax.jacrev(lambda x: example_losses(unravel(x), test))(flat) @ vectors
        columns = jax.jacrev(lambda x: example_losses(unravel(x), train))(flat) @ vectors
        return values[0], (rows / values[None]) @ columns.T / train[1].size

    smallest, scores = run(problem.train, problem.test)
    if not smallest > 0:
        raise ValueError(f"damping: expected more than makes H + damping · I positive, got eigenvalue {smallest:.3g}")
    return scores


def our_scores(problem: SingleLevel, tol: Any) -> jax.Array:
    """Scores by this library: one task whose query set is all training examples, and parameters that do not adapt."""
    bilevel = mi.bilevel(
        lambda params, layers, query: example_losses(layers, query),
        mi.adaptation.closed_form(lambda layers, support, coefficients: ()),
    )
    scores = mi.influence_scores(
        bilevel,
        lambda layers, example: example_losses(layers, jax.tree.map(lambda leaf: leaf[None], example))[0],
        solver=mi.solvers.cg(tol=tol),
        damping=problem.damping,
    )
    # The support set is not used.
    train = problem.train
    tasks = jax.tree.map(lambda leaf: leaf[None], mi.Task((train[0][:1], train[1][:1]), train))
    return jax.vmap(lambda example: scores(problem.layers, tasks, example).query[0])(problem.test)


def torch_model(problem: SingleLevel) -> Any:
    """The MLP as a torch.nn.Sequential."""
    import torch

    from metainfluence.lab.bench.peers.with_torch import tensors

    modules: list[Any] = []
    for kernel, bias in tensors(problem.layers):
        linear = torch.nn.Linear(*kernel.shape, dtype=kernel.dtype)
        linear.weight.data, linear.bias.data = kernel.T.contiguous(), bias
        modules += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*modules[:-1]).eval()


def dattri_scores(problem: SingleLevel, make: Callable[[Any], Any]) -> Callable[[], jax.Array]:
    """Scores by a dattri attributor, `make(task)`, with each set in one batch, as its documentation asks."""
    import torch
    from dattri.task import AttributionTask

    from metainfluence.lab.bench.peers.with_torch import arrays, tensors

    model = torch_model(problem)

    def loss(params: Any, data: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, params, (data[0],)), data[1])

    def loader(examples: Examples) -> Any:
        dataset = torch.utils.data.TensorDataset(*tensors(examples))
        return torch.utils.data.DataLoader(dataset, batch_size=len(dataset))

    attributor = make(AttributionTask(loss, model, model.state_dict()))
    train, test = loader(problem.train), loader(problem.test)
    attributor.cache(train)

    def call() -> Any:
        # dattri collects its scores in PyTorch's default precision, and draws progress bars.
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found = attributor.attribute(train, test)
        finally:
            torch.set_default_dtype(before)
        return arrays(found.T) / len(train.dataset)

    return call


def pydvl_scores(problem: SingleLevel, make: Callable[[Any, Any], Any]) -> Callable[[], jax.Array]:
    """Scores by a pyDVL influence model, `make(model, loss)`, fitted anew in each call, since the fit solves."""
    import torch

    from metainfluence.lab.bench.peers.with_torch import arrays, tensors

    model = torch_model(problem)
    train, test = tensors(problem.train), tensors(problem.test)
    dataset = torch.utils.data.TensorDataset(*train)

    def call() -> Any:
        influence = make(model, torch.nn.functional.cross_entropy)
        fitted = influence.fit(torch.utils.data.DataLoader(dataset, batch_size=len(dataset)))
        return arrays(fitted.influences(*test, *train, mode="up")) / len(dataset)

    return call
