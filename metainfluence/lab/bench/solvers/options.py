"""The solver benchmark's options, a group for each thing that they are about."""

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
    """How exactly, and with how much, solves are made."""

    tol: Positive = 1e-6
    """Relative residual at which solves stop."""
    rank: Count = 50
    """Of nystrom and lanczos."""
    num_terms: Count = 50
    """Of the Neumann series."""
    budgets: tuple[Count, ...] = (5, 10, 20, 40, 80)
    """Steps at which accuracy is measured."""


@dataclasses.dataclass(frozen=True)
class Damping:
    """As shares of the exact Hessian's largest eigenvalue."""

    grid: NotNegative = 0.01
    """Of the grid and the budgets; more where H needs it."""
    removals: tuple[NotNegative, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Of the removal steps."""


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Few-shot tasks of digits, on which the three problems are."""

    count: Count = 64
    """Of the grid's problems."""
    flipped: Size = 8
    """Of these, with flipped query labels; they are what is removed."""
    ways: Ways = 5
    """Classes per task."""
    shots: Count = 2
    """Support examples per class."""
    queries: Count = 5
    """Query examples per class."""


@dataclasses.dataclass(frozen=True)
class Anil:
    """The problem whose head alone adapts."""

    widths: tuple[Count, ...] = (6, 6)
    """Layers of the feature extractor."""
    head_l2: Positive = 0.1
    """Penalty of the head; of the problem with many meta-parameters, too."""


@dataclasses.dataclass(frozen=True)
class Imaml:
    """The problem whose whole network is minimised near λ."""

    hidden: Count = 4
    """Hidden units of the network."""
    proximal: Positive = 1.0
    """Weight of the proximal term."""


@dataclasses.dataclass(frozen=True)
class Maml:
    """The problem whose whole network takes a few gradient steps from λ."""

    hidden: Count = 4
    """Hidden units of the network."""
    learning_rate: Positive = 0.1
    """Of the gradient steps."""
    num_steps: Count = 5
    """Their number."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Meta-training of the three problems."""

    meta_l2: NotNegative = 1e-3
    """Penalty of the meta-parameters; of the problem with many of them, too."""
    learning_rate: Positive = 0.02
    """Adam's, falling to 0 along a cosine."""
    num_steps: Count = 100
    """Meta-training steps."""


@dataclasses.dataclass(frozen=True)
class Inner:
    """Inner solvers against the condition number."""

    conditions: tuple[Positive, ...] = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8)
    """Condition numbers of the inner problems."""
    damping: NotNegative = 0.1
    """Of task-IF."""


@dataclasses.dataclass(frozen=True)
class Large:
    """The problem with many meta-parameters."""

    widths: tuple[Count, ...] = (120, 48)
    """Layers of its feature extractor, on 28 × 28 pixels."""
    num_tasks: Count = 64
    """Its tasks."""
    num_steps: Count = 150
    """Its meta-training steps."""
    learning_rate: Positive = 0.002
    """Adam's there."""
    tol: Positive = 1e-3
    """Relative residual of its timed solve."""


@dataclasses.dataclass(frozen=True)
class SolverBenchConfig:
    """Solvers × curvatures on three problems on digits, inner solvers, and the solvers' targets; in float64."""

    tables: tuple[str, ...] = TABLES
    """What to measure: of grid, budgets, removals, inner, targets."""
    problems: tuple[str, ...] = PROBLEMS
    """Of anil (implicit head), imaml (whole network, proximal), maml (whole network, unrolled)."""
    curvatures: tuple[str, ...] = CURVATURES
    """Of exact, linearized, gamma, gauss_newton, direct."""
    solvers: tuple[str, ...] = SOLVERS
    """In the grid; names as in the table."""
    together: tuple[str, ...] = ("anil",)
    """Of the problems, those on which task-IF of all tasks is solved."""
    repeats: Count = 3
    """Timed runs; the median is reported."""
    seed: Size = 0
    """Of tasks and initial parameters."""
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
    """The demo at whose meta-parameters the targets are measured."""


def check(config: SolverBenchConfig) -> None:
    """Raises ValueError for names that there are not."""
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
