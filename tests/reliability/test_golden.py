"""The stored answers of three fixed problems; `python tests/reliability/golden.py` writes them anew."""

import numpy as np
import pytest

from reliability import cases, golden


@pytest.mark.parametrize("structure", cases.STRUCTURES, ids=str)
def test_scores_are_the_stored_ones(structure):
    kept = golden.stored()
    found, expected = golden.scores(structure, kept["inputs"]), kept["scores"][str(structure)]
    assert kept["tolerance"]["rtol"] <= 1e-9
    for name in ("task", "support", "query"):
        assert np.max(np.abs(expected[name])) > 1e-4
        np.testing.assert_allclose(found[name], expected[name], **kept["tolerance"], err_msg=name)


def test_every_stored_problem_is_compared():
    assert set(golden.stored()["scores"]) == set(map(str, cases.STRUCTURES))
