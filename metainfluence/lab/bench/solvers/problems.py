"""The solver benchmark's problems: three trained kinds of adaptation on digits, and one with many meta-parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.data import coefficients, weighted_sum
from metainfluence.lab.bench.solvers.options import SolverBenchConfig
from metainfluence.lab.data import digits, fewshot, omniglot
from metainfluence.lab.experiments import demo
from metainfluence.lab.learn.models import MLP, logistic_head_problem
from metainfluence.lab.learn.train import meta_train

RANDOM_CLASSES, RANDOM_IMAGES, RANDOM_SIZE = 60, 20, 28


class Setting(NamedTuple):
    """A problem with a λ trained for it.

    Attributes:
      problem: with a head, so that every curvature is available.
      meta_params: trained λ.
      tasks: T training tasks.
      held_out: clean tasks on other images, for the target.
      without: weights that leave out the tasks with flipped labels.
      trained_on: λ after training on from `meta_params` with all tasks; None if not needed.
      retrained: the same under `without`.
    """

    problem: mi.Bilevel
    meta_params: Any
    tasks: mi.Task
    held_out: mi.Task
    without: mi.Weights
    trained_on: Any = None
    retrained: Any = None


def anil(config: SolverBenchConfig, image: Any) -> tuple[mi.Bilevel, Any]:
    """A logistic head on an MLP's features, fitted per task by implicit adaptation; only the head adapts."""
    model = MLP(config.anil.widths)
    problem = logistic_head_problem(
        model, config.tasks.ways, head_l2=config.anil.head_l2, meta_l2=config.training.meta_l2
    )

    def outputs(params, meta_params, task):
        return model.apply(meta_params, task.query.images) @ params["kernel"] + params["bias"][None]

    def head(outputs, task, weights):
        losses = _cross_entropy(outputs, task.query, config.tasks.ways)
        return weighted_sum(losses, coefficients(weights.query, task.query_mask))

    return problem._replace(outputs=outputs, head=head), model.init(jax.random.key(config.seed), image)


def imaml(config: SolverBenchConfig, image: Any) -> tuple[mi.Bilevel, Any]:
    """A copy of the whole network per task, held near λ by a proximal term and minimised (iMAML)."""

    def proximal(params, meta_params):
        distance = optax.tree.norm(optax.tree.sub(params, meta_params), squared=True)
        return 0.5 * config.imaml.proximal * distance

    def adaptation(loss):
        return mi.adaptation.implicit(
            loss,
            lambda meta_params, support: meta_params,
            minimizer=mi.adaptation.newton_cg(tol=1e-9),
            linear_solver=mi.solvers.cg(tol=1e-9),
            regularizer=proximal,
        )

    return _whole_network(config, config.imaml.hidden, image, adaptation)


def maml(config: SolverBenchConfig, image: Any) -> tuple[mi.Bilevel, Any]:
    """A few gradient steps of the whole network per task, from λ (MAML)."""

    def adaptation(loss):
        optimizer = optax.sgd(config.maml.learning_rate)
        return mi.adaptation.unrolled(loss, lambda meta_params, support: meta_params, optimizer, config.maml.num_steps)

    return _whole_network(config, config.maml.hidden, image, adaptation)


PROBLEMS = {"anil": anil, "imaml": imaml, "maml": maml}


def _cross_entropy(logits, batch, ways):
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch.labels, ways, dtype=logits.dtype))


def _whole_network(config: SolverBenchConfig, hidden: int, image: Any, adaptation: Any) -> tuple[mi.Bilevel, Any]:
    first, second = mi.ekfac.Dense("w1", "b1"), mi.ekfac.Dense("w2", "b2")

    def model(params, meta_params, batch):
        del meta_params  # The loss depends on λ only through θ.
        flat = batch.images.reshape(batch.images.shape[0], -1)
        return second(params, jnp.tanh(first(params, flat)))

    def head(outputs, batch):
        return _cross_entropy(outputs, batch, config.tasks.ways)

    def loss(params, meta_params, batch):
        return head(model(params, meta_params, batch), batch)

    problem = mi.bilevel(model, adaptation(loss), meta_regularizer=mi.l2(config.training.meta_l2), outer_head=head)
    pixels = int(np.prod(image.shape[1:]))
    keys = jax.random.split(jax.random.key(config.seed))
    return problem, {
        "w1": jax.random.normal(keys[0], (pixels, hidden)) / pixels**0.5,
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(keys[1], (hidden, config.tasks.ways)) / hidden**0.5,
        "b2": jnp.zeros(config.tasks.ways),
    }


def small(config: SolverBenchConfig, name: str) -> Setting:
    """One of `PROBLEMS` on digits tasks, some with flipped labels; trained, and trained on with and without these."""
    source = digits.load(seed=config.seed)

    def tasks(pool, count, seed):
        shape: dict[str, Any] = {
            "ways": config.tasks.ways,
            "shots": config.tasks.shots,
            "queries": config.tasks.queries,
        }
        return fewshot.sample_tasks(source.labels, num_tasks=count, seed=seed, pool=pool, **shape)

    flipped = np.arange(config.tasks.flipped)
    listed = fewshot.flip_labels(
        tasks(source.train_pool, config.tasks.count, config.seed), flipped, share=0.4, seed=config.seed
    )
    training = fewshot.materialize(listed, source.images)
    held_out = fewshot.materialize(tasks(source.held_out_pool, config.tasks.count, config.seed + 1), source.images)
    problem, initial = PROBLEMS[name](config, training.support.images[0])
    schedule = optax.cosine_decay_schedule(config.training.learning_rate, config.training.num_steps)
    train = meta_train(problem, optax.adam(schedule), config.training.num_steps, block_size=config.training.num_steps)
    trained = train(initial, training).meta_params
    without = mi.drop(mi.unit_weights(training), tasks=flipped)
    on, retrained = (train(trained, training, weights).meta_params for weights in (None, without))
    return Setting(problem, trained, training, held_out, without, on, retrained)


def of_demo(config: demo.DemoConfig) -> Setting:
    """The demo's problem at the demo's λ; `without` leaves out the tasks that the demo damaged."""
    data = demo.make_data(config)
    model = MLP(config.widths)
    problem = logistic_head_problem(model, config.ways, head_l2=config.head_l2, meta_l2=config.meta_l2)
    initial = model.init(jax.random.key(config.seed), data.tasks.support.images[0])
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))
    trained = meta_train(problem, optimizer, config.num_steps)(initial, data.tasks).meta_params
    damaged = np.flatnonzero(fewshot.harm(data.listed) != fewshot.CLEAN)
    without = mi.drop(mi.unit_weights(data.tasks), tasks=damaged)
    return Setting(problem, trained, data.tasks, data.held_out, without)


def large(config: SolverBenchConfig) -> tuple[Setting, str]:
    """A problem with many meta-parameters, and the name of its data: Omniglot if it is prepared, else random images."""
    try:
        images, labels = omniglot.load()
        name = "Omniglot"
    except (FileNotFoundError, ModuleNotFoundError):
        images, labels = random_images(config.seed)
        name = "random images labelled by a fixed random network"
    classes = np.unique(labels)
    pools = [np.flatnonzero(np.isin(labels, part)) for part in np.array_split(classes, 2)]
    shape: dict[str, Any] = {"ways": config.tasks.ways, "shots": config.tasks.shots, "queries": config.tasks.queries}
    training, held_out = (
        fewshot.materialize(
            fewshot.sample_tasks(labels, num_tasks=config.large.num_tasks, seed=config.seed + i, pool=pool, **shape),
            images,
        )
        for i, pool in enumerate(pools)
    )
    model = MLP(config.large.widths)
    problem = logistic_head_problem(
        model, config.tasks.ways, head_l2=config.anil.head_l2, meta_l2=config.training.meta_l2
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(config.large.learning_rate, config.large.num_steps))
    initial = model.init(jax.random.key(config.seed), training.support.images[0])
    trained = meta_train(problem, optimizer, config.large.num_steps)(initial, training).meta_params
    return Setting(problem, trained, training, held_out, mi.unit_weights(training)), name


def random_images(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images in the classes that a fixed random network gives them, with the same number in each class.

    Returns:
      images: float [N, 28, 28].
      labels: int [N].
    """
    rng = np.random.default_rng(seed)
    pixels = RANDOM_SIZE**2
    images = rng.random((4 * RANDOM_CLASSES * RANDOM_IMAGES, pixels))
    hidden = np.tanh((images - 0.5) @ rng.normal(size=(pixels, 64)) / 4)
    order = np.argsort(hidden @ rng.normal(size=64))
    # Neighbours along the network's output form one class; three of four images, those between classes, are left out.
    chosen = order.reshape(RANDOM_CLASSES, -1)[:, :RANDOM_IMAGES]
    return images[chosen.ravel()].reshape(-1, RANDOM_SIZE, RANDOM_SIZE), np.repeat(
        np.arange(RANDOM_CLASSES), RANDOM_IMAGES
    )
