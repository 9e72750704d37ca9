"""pass@k, maj@k, diversity: closed forms and enumeration."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from lightning_vlm.metrics.pass_at_k import diversity, majority, pass_at_k, powers_of_two, vote_share


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c in range(n + 1):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_neither_the_first_k_nor_a_draw_with_replacement():
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 1, 2) != pytest.approx(1 - (3 / 4) ** 2)
    assert pass_at_k(16, 1, 16) == 1.0


def test_pass_at_k_of_many_answers_has_no_overflow():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert math.isfinite(pass_at_k(10_000, 5_000, 5_000))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_refuses_what_is_not_defined(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_powers_of_two():
    assert [powers_of_two(n) for n in (1, 2, 7, 16)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8, 16]]


def test_the_majority_wins_and_ties_go_to_the_first():
    assert majority(["a", "b", "b"]) == 1
    assert majority(["a", "b", "b", "a"]) == 0
    assert majority([None, None, "c"]) == 2
    assert majority([None, None]) is None
    assert vote_share(["a", "b", "b", None]) == 0.5
    assert vote_share([None]) == 0.0


def test_diversity():
    assert diversity(["a", "a", "b", None]) == 0.5
    assert diversity([None, None]) == 0.0
    assert diversity(["a"] * 4) == 0.25
