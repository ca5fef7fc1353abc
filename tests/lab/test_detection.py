import numpy as np
import pytest

from metainfluence.lab.detection import detection_curve, found_at, roc_auc

SCORES = np.array([0.3, -2.0, 0.1, -1.0, 0.2])
DAMAGED = np.array([False, True, False, False, True])


def test_detection_curve_counts_from_the_most_harmful():
    np.testing.assert_array_equal(detection_curve(SCORES, DAMAGED), [0, 0.5, 0.5, 0.5, 1, 1])


@pytest.mark.parametrize(("share", "found"), [(0, 0), (0.2, 0.5), (0.6, 0.5), (0.8, 1), (1, 1)])
def test_found_at(share, found):
    assert found_at(SCORES, DAMAGED, share) == found


def test_roc_auc_is_the_share_of_pairs_in_the_right_order():
    """Damaged -2.0 is below all three others, damaged 0.2 below 0.3 only."""
    assert roc_auc(SCORES, DAMAGED) == pytest.approx(4 / 6)
    assert roc_auc(-SCORES, DAMAGED) == pytest.approx(2 / 6)
