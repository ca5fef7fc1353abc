"""The response: how trained meta-parameters answer the data weights."""

from metainfluence.response._trajectory import RunInfo as RunInfo
from metainfluence.response._trajectory import Trajectory as Trajectory
from metainfluence.response._trajectory import problems_of as problems_of
from metainfluence.response._trajectory import trajectory as trajectory
