"""The benchmark of runs: its ratios, and the whole at sizes that mean nothing."""

import json

import pytest

from metainfluence.lab.bench import runs


@pytest.mark.slow
def test_each_part_stands_beside_what_it_is_a_ratio_of(tmp_path):
    config = runs.RunsBenchConfig(
        num_tasks=2, examples=7, width=1, inner_steps=1, num_steps=2, num_targets=3, repeats=1, out=tmp_path
    )
    runs.run(config)
    rows = [runs.Row(**row) for row in json.loads((tmp_path / "runs.json").read_text())["rows"]]
    assert len(rows) == 8
    for training, *sweeps in (rows[:4], rows[4:]):
        assert training.ratio == 1.0
        _, root, together = sweeps
        assert all(row.ratio == row.seconds / training.seconds for row in sweeps[:2])
        assert together.ratio == together.seconds / root.seconds
    table = (tmp_path / "runs.md").read_text()
    assert table.count("| 0.25 | ") == 2
    assert table.count("| 3.00 | ") == 2
