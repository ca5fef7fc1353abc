"""What people would use instead of influence through the total Hessian, returning the same `Scores` and `Edit`.

Signs are the library's: a score is a predicted change of the target on removal, or ranks data as one does. Reports are
as honest as those of a solve: they hold the residual that a method's direction leaves with the Hessian, or NaN where
there is no such direction, so that `check` rejects what was not solved.
"""

from metainfluence.baselines._direct import direct_if as direct_if
from metainfluence.baselines._direct import ekfac_if as ekfac_if
from metainfluence.baselines._editing import fine_tune as fine_tune
from metainfluence.baselines._editing import gradient_ascent as gradient_ascent
from metainfluence.baselines._first_order import gradient_similarity as gradient_similarity
from metainfluence.baselines._first_order import tracin as tracin
from metainfluence.baselines._projected import tlxml as tlxml
from metainfluence.baselines._projected import trak as trak
from metainfluence.baselines._proxies import plain_loss as plain_loss
from metainfluence.baselines._proxies import random_scores as random_scores

__all__ = [
    "direct_if",
    "ekfac_if",
    "fine_tune",
    "gradient_ascent",
    "gradient_similarity",
    "plain_loss",
    "random_scores",
    "tlxml",
    "tracin",
    "trak",
]
