"""Strategies for solving H x = b, each a `Solver(init, solve)`; `from_map` and `from_steps` build new ones."""

from metainfluence.solvers._anytime import Trace as Trace
from metainfluence.solvers._anytime import anytime as anytime
from metainfluence.solvers._auto import auto as auto
from metainfluence.solvers._base import REMEDIES as REMEDIES
from metainfluence.solvers._base import Choice as Choice
from metainfluence.solvers._base import Iteration as Iteration
from metainfluence.solvers._base import Outcome as Outcome
from metainfluence.solvers._base import SolveInfo as SolveInfo
from metainfluence.solvers._base import Solver as Solver
from metainfluence.solvers._base import SolveStatus as SolveStatus
from metainfluence.solvers._block_cg import block_cg as block_cg
from metainfluence.solvers._block_cg import grown as grown
from metainfluence.solvers._cg import cg as cg
from metainfluence.solvers._dense import dense as dense
from metainfluence.solvers._ekfac import ekfac as ekfac
from metainfluence.solvers._identity import identity as identity
from metainfluence.solvers._kit import Preconditioner as Preconditioner
from metainfluence.solvers._kit import from_map as from_map
from metainfluence.solvers._kit import from_steps as from_steps
from metainfluence.solvers._kit import reachable as reachable
from metainfluence.solvers._kit import solution_of as solution_of
from metainfluence.solvers._low_rank import lanczos as lanczos
from metainfluence.solvers._low_rank import nystrom as nystrom
from metainfluence.solvers._minres import minres as minres
from metainfluence.solvers._neumann import neumann as neumann
from metainfluence.solvers._sampled import sampled as sampled

__all__ = [
    "REMEDIES",
    "Choice",
    "Iteration",
    "Outcome",
    "SolveInfo",
    "SolveStatus",
    "Solver",
    "Trace",
    "anytime",
    "auto",
    "block_cg",
    "cg",
    "dense",
    "ekfac",
    "from_map",
    "from_steps",
    "identity",
    "lanczos",
    "minres",
    "neumann",
    "nystrom",
    "sampled",
    "solution_of",
]
