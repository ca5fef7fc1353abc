"""Scores for runs that outgrow one call: streamed, sharded, resumable, written to a file."""

from metainfluence._progress import Progress as Progress
from metainfluence._source import Source as Source
from metainfluence._source import SourceError as SourceError
from metainfluence._source import ids_of as ids_of
from metainfluence.scoring._engine import Result as Result
from metainfluence.scoring._engine import score as score
from metainfluence.scoring._table import ScoreTable as ScoreTable
from metainfluence.scoring._table import info_of as info_of
from metainfluence.scoring._table import read_dense as read_dense
from metainfluence.scoring._table import read_scores as read_scores
from metainfluence.scoring._table import write_scores as write_scores

__all__ = [
    "Progress",
    "Result",
    "ScoreTable",
    "Source",
    "SourceError",
    "read_scores",
    "score",
    "write_scores",
]
