"""The two-level quantities by torch.func: Newton's method, with its steps differentiated at the minimum.

See `metainfluence.lab.bench.peers.problem.dense_fit` for why one step gives the first derivative and two steps the
second.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch.func import grad, hessian, jvp, vjp, vmap

from metainfluence.lab.bench.peers.problem import Problem


def tensors(tree: Any) -> Any:
    """Arrays as tensors of the same precision."""
    return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), tree)


def arrays(tree: Any) -> Any:
    """Tensors as arrays."""
    return jax.tree.map(lambda leaf: leaf.detach().numpy(), tree)


def _features(layers: Any, images: torch.Tensor) -> torch.Tensor:
    for kernel, bias in layers:
        images = torch.tanh(images @ kernel + bias)
    return images


def _losses(head: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = features @ head[:-1] + head[-1]
    return torch.logsumexp(logits, -1) - torch.gather(logits, -1, labels[:, None])[:, 0]


class Peer:
    """The problem in PyTorch.

    Args:
      problem: the problem.
      num_steps: steps of Newton's method from zero.
      batched: whether tasks are mapped by vmap or processed one by one.
    """

    def __init__(self, problem: Problem, num_steps: int, *, batched: bool):
        self.layers, self.tasks, self.direction = tensors(
            (problem.layers, (problem.tasks.support, problem.tasks.query), problem.direction)
        )
        self.head_l2, self.num_steps, self.batched = problem.head_l2, num_steps, batched
        self.shape = problem.zero_head.shape
        self.zero = torch.zeros(self.shape[0] * self.shape[1], dtype=self.layers[0][0].dtype)
        self.support_weights = torch.ones_like(self.tasks[0][1][0], dtype=self.zero.dtype)
        self.query_weights = torch.ones_like(self.tasks[1][1][0], dtype=self.zero.dtype)

    def _step(
        self, head: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        def objective(head: torch.Tensor) -> torch.Tensor:
            value = (_losses(head.reshape(self.shape), features, labels) * weights).mean()
            return value + 0.5 * self.head_l2 * (head**2).sum()

        return head - torch.linalg.solve(hessian(objective)(head), grad(objective)(head))

    def _head(self, support: Any) -> torch.Tensor:
        head, features = self.zero, _features(self.layers, support[0])
        for _ in range(self.num_steps):
            head = self._step(head, features, support[1], self.support_weights)
        return head

    def _loss(
        self, layers: Any, task: Any, head: torch.Tensor, steps: int, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        support, query = task
        weights = self.support_weights if weights is None else weights
        features = _features(layers, support[0])
        for _ in range(steps):
            head = self._step(head, features, support[1], weights)
        return _losses(head.reshape(self.shape), _features(layers, query[0]), query[1]).mean()

    def _each(self, function: Callable[..., Any], *data: Any) -> Any:
        """Applies a function of a task to all tasks."""
        if self.batched:
            return vmap(function)(*data)
        leaves, structure = jax.tree.flatten(data)
        found = [function(*jax.tree.unflatten(structure, rows)) for rows in zip(*leaves, strict=True)]
        return jax.tree.map(lambda *rows: torch.stack(rows), *found)

    def gradients(self) -> Any:
        """Total gradients of all tasks."""
        return self._each(lambda task: grad(self._loss)(self.layers, task, self._head(task[0]), 1), self.tasks)

    def slope(self) -> Callable[[Any], Any]:
        """The gradient of the mean loss, to be differentiated once more."""
        heads = self._each(lambda task: self._head(task[0]), self.tasks)

        def mean(layers: Any) -> torch.Tensor:
            return self._each(lambda task, head: self._loss(layers, task, head, 2), self.tasks, heads).mean()

        return grad(mean)

    def linear(self) -> Callable[[], Any]:
        """The Hessian product of the mean loss, reverse over reverse, after everything else has been computed."""
        back = vjp(self.slope(), self.layers)[1]
        return lambda: back(self.direction)[0]

    def product(self, *, forward: bool) -> Any:
        """The same product, computed from λ."""
        if forward:
            return jvp(self.slope(), (self.layers,), (self.direction,))[1]
        return self.linear()()

    def scores(self) -> Any:
        """∂_w ⟨D_λL_k, direction⟩ of all examples, by one gradient in λ per example."""

        def dot(gradient: Any) -> torch.Tensor:
            pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(self.direction), strict=True)
            return torch.stack([(a * b).sum() for a, b in pairs]).sum()

        def single(task: Any) -> tuple[torch.Tensor, torch.Tensor]:
            support, query = task
            head = self._head(support)

            def of_query(*example: torch.Tensor) -> torch.Tensor:
                alone = (support, tuple(leaf[None] for leaf in example))
                return dot(grad(self._loss)(self.layers, alone, head, 1)) / len(self.query_weights)

            def by_support(layers: Any) -> torch.Tensor:
                return grad(lambda w: self._loss(layers, task, head, 2, w))(self.support_weights)

            back = vjp(by_support, self.layers)[1]
            rows = torch.eye(len(self.support_weights), dtype=self.zero.dtype)
            return vmap(lambda row: dot(back(row)[0]))(rows), vmap(of_query)(*query)

        return self._each(single, self.tasks)
