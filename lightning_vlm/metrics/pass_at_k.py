"""What several answers to one problem say: pass@k, the majority's answer, diversity. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k answers, drawn without replacement from n of which c are right, is right.

    1 − C(n−c, k) / C(n, k), the unbiased estimate for one problem (Chen et al. 2021, eq. 1); its mean over problems is
    pass@k. It is neither "any of the first k" nor a draw with replacement.

    Args:
        n: answers to the problem. c: how many of them are right. k: size of the subset.

    Raises:
        ValueError: n < k (the estimate does not exist), k < 1, or c outside 0…n.
    """
    if k < 1 or not 0 <= c <= n:
        raise ValueError(f"pass@k needs k >= 1 and 0 <= c <= n; got n={n}, c={c}, k={k}")
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} answers per problem, got {n}; draw more or choose a smaller k")
    return 1.0 - comb(n - c, k) / comb(n, k)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, … up to n: the k at which pass@k is reported for n answers."""
    return [2**i for i in range(n.bit_length())]


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Index of the first answer that has the most votes; None where nobody voted.

    Args:
        answers: normalised answers of one problem; None (nothing was extracted) does not vote. Ties go to the answer
            that came first.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    # Counter keeps the order of first occurrence, and max returns the first of equals.
    winner = max(votes, key=votes.__getitem__)
    return answers.index(winner)


def vote_share(answers: Sequence[Hashable | None]) -> float:
    """Share of all answers that agree with the majority's; 0 where nobody voted. The confidence of a vote."""
    index = majority(answers)
    return 0.0 if index is None else answers.count(answers[index]) / len(answers)


def diversity(answers: Sequence[Hashable | None]) -> float:
    """Distinct normalised answers / number of answers; what was not extracted is no answer, but counts below."""
    return len({answer for answer in answers if answer is not None}) / len(answers)
