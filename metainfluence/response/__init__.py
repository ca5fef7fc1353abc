"""The response: how trained meta-parameters answer the data weights."""

from metainfluence.response._checkpoints import Checkpoint as Checkpoint
from metainfluence.response._checkpoints import checkpoints as checkpoints
from metainfluence.response._segments import Segments as Segments
from metainfluence.response._segments import SegmentsInfo as SegmentsInfo
from metainfluence.response._segments import segments as segments
from metainfluence.response._trajectory import RunInfo as RunInfo
from metainfluence.response._trajectory import Trajectory as Trajectory
from metainfluence.response._trajectory import problems_of as problems_of
from metainfluence.response._trajectory import trajectory as trajectory
