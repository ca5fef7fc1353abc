"""The solver benchmark's options, one group per subject."""

import dataclasses
from pathlib import Path

from metainfluence.lab.experiments.demo import DemoConfig
from metainfluence.lab.experiments.ranges import Count, NotNegative, OutFolder, Positive, Size, Ways

TABLES = ("grid", "budgets", "removals", "inner", "targets")
PROBLEMS = ("anil", "imaml", "maml")
CURVATURES = ("exact", "linearized", "gamma", "gauss_newton", "direct")
SOLVERS = (
    *("identity", "ekfac", "nystrom", "lanczos", "neumann", "cg", "cg + ekfac", "cg + nystrom", "cg + sampled"),
    *("minres", "block_cg", "auto", "dense"),
)


@dataclasses.dataclass(frozen=True)
class Solve:
    """How exact the solves are, and how much they may cost."""

    tol: Positive = 1e-6
    """Relative residual at which solves stop."""
    rank: Count = 50
    """Rank of nystrom and lanczos."""
    num_terms: Count = 50
    """Terms of the Neumann series."""
    budgets: tuple[Count, ...] = (5, 10, 20, 40, 80)
    """Steps at which accuracy is measured."""


@dataclasses.dataclass(frozen=True)
class Damping:
    """Dampings, as shares of the exact Hessian's largest eigenvalue."""

    grid: NotNegative = 0.01
    """Damping of the grid and the budgets; higher if H needs it."""
    removals: tuple[NotNegative, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Dampings of the removal steps."""


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Few-shot tasks of digits, on which the three problems are defined."""

    count: Count = 64
    """Tasks of each of the grid's problems."""
    flipped: Size = 8
    """How many of these have flipped query labels; these are removed."""
    ways: Ways = 5
    """Classes per task."""
    shots: Count = 2
    """Support examples per class."""
    queries: Count = 5
    """Query examples per class."""


@dataclasses.dataclass(frozen=True)
class Anil:
    """The problem in which only the head adapts."""

    widths: tuple[Count, ...] = (6, 6)
    """Layers of the feature extractor."""
    head_l2: Positive = 0.1
    """Penalty of the head, also in the problem with many meta-parameters."""


@dataclasses.dataclass(frozen=True)
class Imaml:
    """The problem that minimises the whole network near λ."""

    hidden: Count = 4
    """Hidden units of the network."""
    proximal: Positive = 1.0
    """Weight of the proximal term."""


@dataclasses.dataclass(frozen=True)
class Maml:
    """The problem in which the whole network takes a few gradient steps from λ."""

    hidden: Count = 4
    """Hidden units of the network."""
    learning_rate: Positive = 0.1
    """Length of the gradient steps."""
    num_steps: Count = 5
    """Number of gradient steps."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Meta-training of the three problems."""

    meta_l2: NotNegative = 1e-3
    """Penalty of the meta-parameters, also in the problem with many of them."""
    learning_rate: Positive = 0.02
    """Adam's learning rate, falling to 0 along a cosine."""
    num_steps: Count = 100
    """Meta-training steps."""


@dataclasses.dataclass(frozen=True)
class Inner:
    """Inner solvers against the condition number."""

    conditions: tuple[Positive, ...] = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8)
    """Condition numbers of the inner problems."""
    damping: NotNegative = 0.1
    """Damping of task-IF."""


@dataclasses.dataclass(frozen=True)
class Large:
    """The problem with many meta-parameters."""

    widths: tuple[Count, ...] = (120, 48)
    """Layers of its feature extractor, on 28 × 28 pixels."""
    num_tasks: Count = 64
    """Tasks."""
    num_steps: Count = 150
    """Meta-training steps."""
    learning_rate: Positive = 0.002
    """Adam's learning rate."""
    tol: Positive = 1e-3
    """Relative residual of its timed solve."""


@dataclasses.dataclass(frozen=True)
class SolverBenchConfig:
    """Solvers × curvatures on three problems on digits, inner solvers, and the solvers' targets; in float64."""

    tables: tuple[str, ...] = TABLES
    """What to measure: some of grid, budgets, removals, inner, targets."""
    problems: tuple[str, ...] = PROBLEMS
    """Some of anil (implicit head), imaml (whole network, proximal), maml (whole network, unrolled)."""
    curvatures: tuple[str, ...] = CURVATURES
    """Some of exact, linearized, gamma, gauss_newton, direct."""
    solvers: tuple[str, ...] = SOLVERS
    """Solvers in the grid, named as in the table."""
    together: tuple[str, ...] = ("anil",)
    """The problems on which task-IF of all tasks is solved."""
    repeats: Count = 3
    """Timed runs; the median is reported."""
    seed: Size = 0
    """Seed of tasks and initial parameters."""
    out: OutFolder = Path("bench-output")
    """Folder for solvers.md and solvers.json."""
    solve: Solve = dataclasses.field(default_factory=Solve)
    damping: Damping = dataclasses.field(default_factory=Damping)
    tasks: Tasks = dataclasses.field(default_factory=Tasks)
    anil: Anil = dataclasses.field(default_factory=Anil)
    imaml: Imaml = dataclasses.field(default_factory=Imaml)
    maml: Maml = dataclasses.field(default_factory=Maml)
    training: Training = dataclasses.field(default_factory=Training)
    inner: Inner = dataclasses.field(default_factory=Inner)
    large: Large = dataclasses.field(default_factory=Large)
    digits: DemoConfig = dataclasses.field(default_factory=DemoConfig)
    """The demo that supplies the meta-parameters for the targets."""


def check(config: SolverBenchConfig) -> None:
    """Raises ValueError for unknown names."""
    known = {
        "tables": TABLES,
        "problems": PROBLEMS,
        "curvatures": CURVATURES,
        "solvers": SOLVERS,
        "together": PROBLEMS,
    }
    for field, allowed in known.items():
        for name in getattr(config, field):
            if name not in allowed:
                raise ValueError(f"{field}: expected some of {', '.join(allowed)}; got {name!r}")
