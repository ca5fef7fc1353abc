"""The response: how trained meta-parameters λ respond to the data weights w, as an object.

Every influence is a derivative of one map, w ↦ λ(w). A response offers two linear maps: `jvp`, from a direction in w to
the change of λ, and `vjp`, from the slope of a target to dφ/dw of all data at once.
"""

from metainfluence.response._by_datum import DatumScores as DatumScores
from metainfluence.response._by_datum import by_datum as by_datum
from metainfluence.response._checkpoints import Checkpoint as Checkpoint
from metainfluence.response._checkpoints import checkpoints as checkpoints
from metainfluence.response._choice import CACHE_BYTES as CACHE_BYTES
from metainfluence.response._choice import DEVICE_SHARE as DEVICE_SHARE
from metainfluence.response._choice import LEAST_CHUNK as LEAST_CHUNK
from metainfluence.response._choice import evenly as evenly
from metainfluence.response._choice import linearised_bytes as linearised_bytes
from metainfluence.response._choice import tree_bytes as tree_bytes
from metainfluence.response._damping import RANK as RANK
from metainfluence.response._damping import Damping as Damping
from metainfluence.response._damping import rule as rule
from metainfluence.response._direct import DirectEffectWarning as DirectEffectWarning
from metainfluence.response._direct import check_total_effect as check_total_effect
from metainfluence.response._direct import shares_support as shares_support
from metainfluence.response._direct import warn_of_direct_effect as warn_of_direct_effect
from metainfluence.response._hessian import total_hessian as total_hessian
from metainfluence.response._optimum import Optimum as Optimum
from metainfluence.response._optimum import OptimumInfo as OptimumInfo
from metainfluence.response._optimum import checked as checked
from metainfluence.response._optimum import optimum as optimum
from metainfluence.response._optimum import optimum_at as optimum_at
from metainfluence.response._optimum import solve_alone as solve_alone
from metainfluence.response._optimum import solve_once as solve_once
from metainfluence.response._options import Options as Options
from metainfluence.response._response import Influence as Influence
from metainfluence.response._response import Response as Response
from metainfluence.response._response import Scores as Scores
from metainfluence.response._response import check_target as check_target
from metainfluence.response._response import scores as scores
from metainfluence.response._run_info import RunInfo as RunInfo
from metainfluence.response._run_info import problems_of_run as problems_of_run
from metainfluence.response._segments import Segments as Segments
from metainfluence.response._segments import SegmentsInfo as SegmentsInfo
from metainfluence.response._segments import problems_of_segments as problems_of_segments
from metainfluence.response._segments import segments as segments
from metainfluence.response._streamed import Streamed as Streamed
from metainfluence.response._sums import Expansion as Expansion
from metainfluence.response._sums import Pull as Pull
from metainfluence.response._sums import Seen as Seen
from metainfluence.response._sums import Sums as Sums
from metainfluence.response._sums import batch_gradient as batch_gradient
from metainfluence.response._sums import batch_pull as batch_pull
from metainfluence.response._sums import batch_sensitivities as batch_sensitivities
from metainfluence.response._sums import batch_shift as batch_shift
from metainfluence.response._sums import expand as expand
from metainfluence.response._sums import gradient_map as gradient_map
from metainfluence.response._sums import mean as mean
from metainfluence.response._sums import regularizer_gradient as regularizer_gradient
from metainfluence.response._sums import regularizer_product as regularizer_product
from metainfluence.response._target import check_target_slope as check_target_slope
from metainfluence.response._target import name_target_not_finite as name_target_not_finite
from metainfluence.response._target import slopes_of as slopes_of
from metainfluence.response._target import target_gradient as target_gradient
from metainfluence.response._trajectory import Trajectory as Trajectory
from metainfluence.response._trajectory import trajectory as trajectory

__all__ = [
    "Checkpoint",
    "Influence",
    "Optimum",
    "OptimumInfo",
    "Response",
    "RunInfo",
    "Scores",
    "Segments",
    "SegmentsInfo",
    "Streamed",
    "Trajectory",
    "checkpoints",
    "optimum",
    "scores",
    "segments",
    "total_hessian",
    "trajectory",
]
