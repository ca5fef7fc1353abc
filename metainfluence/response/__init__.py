"""How trained meta-parameters answer the data weights: three responses under one interface."""

from metainfluence.response._checkpoints import Checkpoint as Checkpoint
from metainfluence.response._checkpoints import checkpoints as checkpoints
from metainfluence.response._segments import Segments as Segments
from metainfluence.response._segments import SegmentsInfo as SegmentsInfo
from metainfluence.response._segments import segments as segments
