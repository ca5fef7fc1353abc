"""`metainfluence train`: meta-trains a learner; called again, it continues where it stopped."""

import logging
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import metainfluence as mi
from metainfluence._disk import missing, remove_empty, write_atomically
from metainfluence.lab.commands import _parameters as parameters
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands._runs import CHECKPOINTS, CONFIG, TRAINED, TrainConfig
from metainfluence.lab.commands.config_files import as_toml
from metainfluence.lab.data import fewshot
from metainfluence.lab.data.sources import FewShotSource
from metainfluence.lab.experiments import results
from metainfluence.lab.experiments.trainings import optimizer_of
from metainfluence.lab.learn.train import TrainingError, meta_train, training_steps
from metainfluence.lab.show.printing import progress_console, say

__all__ = ["TrainConfig", "plan", "run"]


def run(config: TrainConfig) -> None:
    """Trains and writes the folder.

    Raises:
      ValueError: the folder belongs to another configuration, with the differences named; and whatever the parts raise.
      TrainingError: training ended in NaN or infinity; nothing of it is kept.
    """
    jax.config.update("jax_enable_x64", config.float64)
    config = runs.settled(config)
    folder = config.out
    refuse_others(folder, config)
    if (folder / TRAINED).exists():
        say(f"Already trained, in {folder}")
        return
    listed = runs.lists(config)
    learner, initial = runs.learner(config, listed)
    steps = config.training
    optimizer = optimizer_of(steps)
    kept = runs.kept_steps(steps.num_steps)

    def keep(done: int, state: tuple[Any, Any]) -> None:
        if done in kept:
            parameters.save(runs.state_path(folder, done), state)

    train = meta_train(
        learner.problem,
        optimizer,
        steps.num_steps,
        tasks_per_step=steps.tasks_per_step,
        seed=config.seed,
        block_size=runs.BLOCK,
        on_block=keep,
        console=progress_console(),
        checkpoints=folder / CHECKPOINTS,
        save_every=steps.save_every,
    )
    # Orbax warns if writing a checkpoint takes longer than computing the next block of steps.
    logging.getLogger("absl").setLevel(logging.ERROR)
    tasks = fewshot.materialize(listed.training, listed.dataset.images)
    # Everything that can be refused is refused before anything is written, since a configuration claims its folder.
    one_step = training_steps(learner.problem, optimizer, 1, tasks_per_step=steps.tasks_per_step)
    jax.eval_shape(one_step, initial, optimizer.init(initial), tasks, mi.unit_weights(tasks))
    made = missing(folder)
    claim(folder, config)
    try:
        trained = train(initial, tasks)
    except TrainingError as error:
        release(folder, made)
        raise error.by("--training.learning-rate", steps.learning_rate) from error
    except Exception:
        if not kept_anything(folder):
            release(folder, made)
        raise
    parameters.save(folder / TRAINED, trained.meta_params)
    damaged = int((fewshot.harm(listed.training) != fewshot.CLEAN).sum())
    say(
        f"Trained {config.learner.kind} on {config.data.num_tasks} tasks of {config.data.dataset}, {damaged} of them "
        f"damaged: F from {trained.losses[0]:.4f} to {trained.losses[-1]:.4f} in {steps.num_steps} steps"
    )
    say(f"Wrote {folder / TRAINED}; next: metainfluence score {shlex.quote(str(folder))}")


def refuse_others(folder: Path, config: TrainConfig) -> None:
    """Raises ValueError if the folder belongs to another configuration, or has parts of unknown origin."""
    if not (folder / CONFIG).exists():
        for part in (CHECKPOINTS, runs.STATES, TRAINED):
            if (folder / part).exists():
                raise ValueError(
                    f"out: expected a new folder or one with {CONFIG}, got {folder}, which has {part} without it; name "
                    "another --out"
                )
        return
    found = results.differences(results.plain(runs.read(folder)), results.plain(config))
    if found:
        raise ValueError(
            f"out: expected a new folder or one of this configuration, got {folder}: {'; '.join(found)}; name another "
            "--out, or remove that folder"
        )


def claim(folder: Path, config: TrainConfig) -> None:
    """Makes the folder this configuration's, unless it already is."""
    if not (folder / CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Without the folder's name, so that the folder may be moved.
        write_atomically(folder / CONFIG, as_toml(config, leave_out=["out"]).encode())


def kept_anything(folder: Path) -> bool:
    """Whether there is a step of this training from which another call could continue."""
    return any(path.name.isdigit() for path in (folder / CHECKPOINTS).glob("*"))


def release(folder: Path, made: Sequence[Path]) -> None:
    """Undoes `claim`, which made some folders, so that another training may use them."""
    (folder / CONFIG).unlink()
    for part in (CHECKPOINTS, runs.STATES):
        shutil.rmtree(folder / part, ignore_errors=True)
    remove_empty(made)


def plan(config: TrainConfig) -> mi.Plan:
    """What scoring will cost once training is done."""
    jax.config.update("jax_enable_x64", config.float64)
    listed = runs.lists(config)
    learner, initial = runs.learner(config, listed)
    return mi.preflight(learner.problem)(initial, FewShotSource(listed.training, listed.dataset.images))
