"""How good scores are: ground truth by retraining, and metrics against it."""

from metainfluence.evaluation._agreement import Correlation as Correlation
from metainfluence.evaluation._agreement import DatamodelingScore as DatamodelingScore
from metainfluence.evaluation._agreement import StepAgreement as StepAgreement
from metainfluence.evaluation._agreement import linear_datamodeling_score as linear_datamodeling_score
from metainfluence.evaluation._agreement import loo_correlation as loo_correlation
from metainfluence.evaluation._agreement import seed_agreement as seed_agreement
from metainfluence.evaluation._agreement import step_agreement as step_agreement
from metainfluence.evaluation._bootstrap import Estimate as Estimate
from metainfluence.evaluation._bootstrap import bootstrap as bootstrap
from metainfluence.evaluation._bootstrap import flags as flags
from metainfluence.evaluation._bootstrap import numbers as numbers
from metainfluence.evaluation._detection import detection_curve as detection_curve
from metainfluence.evaluation._detection import found_at as found_at
from metainfluence.evaluation._detection import roc_auc as roc_auc
from metainfluence.evaluation._detection import roc_auc_difference as roc_auc_difference
from metainfluence.evaluation._interventions import Brittleness as Brittleness
from metainfluence.evaluation._interventions import brittleness as brittleness
from metainfluence.evaluation._interventions import leave_groups_out as leave_groups_out
from metainfluence.evaluation._interventions import leave_one_out as leave_one_out
from metainfluence.evaluation._interventions import random_subsets as random_subsets
from metainfluence.evaluation._retrain import retrain as retrain

__all__ = [
    "Brittleness",
    "Correlation",
    "DatamodelingScore",
    "Estimate",
    "StepAgreement",
    "bootstrap",
    "brittleness",
    "detection_curve",
    "found_at",
    "leave_groups_out",
    "leave_one_out",
    "linear_datamodeling_score",
    "loo_correlation",
    "random_subsets",
    "retrain",
    "roc_auc",
    "roc_auc_difference",
    "seed_agreement",
    "step_agreement",
]
