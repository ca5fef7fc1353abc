"""How far a result's numbers can be trusted, read off a response, a result, or a problem."""

from metainfluence.trust._budget import ErrorBudget as ErrorBudget
from metainfluence.trust._budget import error_budget as error_budget
from metainfluence.trust._check import BudgetWarning as BudgetWarning
from metainfluence.trust._check import SlopeWarning as SlopeWarning
from metainfluence.trust._check import SolveError as SolveError
from metainfluence.trust._check import check as check
from metainfluence.trust._check import remedy as remedy
from metainfluence.trust._choose import Chosen as Chosen
from metainfluence.trust._choose import choose as choose
from metainfluence.trust._coupling import Coupling as Coupling
from metainfluence.trust._coupling import CouplingWarning as CouplingWarning
from metainfluence.trust._coupling import coupling as coupling
from metainfluence.trust._preflight import FREE_SHARE as FREE_SHARE
from metainfluence.trust._preflight import Plan as Plan
from metainfluence.trust._preflight import free_memory as free_memory
from metainfluence.trust._preflight import halving as halving
from metainfluence.trust._preflight import in_words as in_words
from metainfluence.trust._preflight import preflight as preflight
from metainfluence.trust._smoothness import Smoothness as Smoothness
from metainfluence.trust._smoothness import smoothness as smoothness
from metainfluence.trust._spectrum import spectrum as spectrum

__all__ = [
    "BudgetWarning",
    "Chosen",
    "Coupling",
    "CouplingWarning",
    "ErrorBudget",
    "Plan",
    "SlopeWarning",
    "Smoothness",
    "SolveError",
    "check",
    "choose",
    "coupling",
    "error_budget",
    "preflight",
    "smoothness",
    "spectrum",
]
