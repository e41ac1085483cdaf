import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd.evaluation.sampling import maj_at_k, pass_at_k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for right in range(n + 1):
            samples = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                assert pass_at_k(right, n, k) == pytest.approx(
                    sum(map(any, subsets)) / len(subsets)
                )


def test_pass_at_k_of_many_samples():
    """The worked values of a large n, where the factorials of floats overflow."""
    assert pass_at_k(1, 2000, 1) == pytest.approx(1 / 2000)
    assert pass_at_k(1000, 2000, 2) == pytest.approx(1 - (1000 * 999) / (2000 * 1999))
    assert pass_at_k(0, 2000, 2000) == 0.0
    assert pass_at_k(1, 2000, 2000) == 1.0


@pytest.mark.parametrize(("right", "n", "k"), [(-1, 4, 1), (5, 4, 1), (1, 4, 0), (1, 4, 5)])
def test_pass_at_k_that_is_not_defined(right, n, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(right, n, k)


@given(st.lists(st.sampled_from([None, "1", "2", "3"]), min_size=1, max_size=6))
def test_maj_at_k_is_a_vote_where_the_first_of_equals_wins_in_a_random_order(finals):
    won = Counter()
    orders = list(itertools.permutations(finals))
    for order in orders:
        votes = Counter(final for final in order if final is not None).most_common(1)
        won[votes[0][0] if votes else None] += 1
    for answer in ("1", "2", "4"):
        assert maj_at_k(finals, answer.__eq__) == pytest.approx(won[answer] / len(orders))


def test_no_sample_is_no_number():
    with pytest.raises(ValueError, match="needs a sample"):
        maj_at_k([], "1".__eq__)
