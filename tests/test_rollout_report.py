"""What is told of a rollout, by hand: every mean, pass@k, and where the answer of a completion begins."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_vlm.algorithms.rollout import Rollout, Together, items_of, keep_first
from lightning_vlm.algorithms.rollout_report import answer_finder, rollout_sums
from lightning_vlm.data.schema import Sample
from lightning_vlm.models.batch import Row
from lightning_vlm.rollouts import Completion

MARKS = ["</think>", "<answer>", "\\boxed{"]


def written(text: str, finished=True, logprobs=(-1.0,), kept=1.0, entropies=()) -> Completion:
    """A completion of as many ids as log-probs, drawn from what bans and filters have kept: a share of the mass."""
    sampling = [logprob - math.log(kept) for logprob in logprobs]
    return Completion(list(range(len(logprobs))), text, finished, list(logprobs), sampling, list(entropies))


def rollout(completions: list[Completion], values: list[list[float]], weights=(1.0, 0.5)) -> Rollout:
    row = Row("q", torch.tensor([1, 2]), torch.zeros(2, dtype=torch.bool))
    table = torch.tensor(values, dtype=torch.float64)
    totals = (table.nan_to_num(0.0) * torch.tensor(weights, dtype=torch.float64)).sum(1)
    return Rollout(row, [], Sample(id="q", messages=[]), completions, (0, 0, 0), table, totals)


def two_groups() -> list[Rollout]:
    one = [
        written("a", logprobs=(-1.0, -2.0), kept=0.5, entropies=(1.0, 2.0)),
        written("a", finished=False, logprobs=(-1.0, -1.0, -1.0), kept=0.75, entropies=(3.0, 4.0, 5.0)),
        written("b", entropies=(0.5,)),
        written("c", entropies=(1.5,)),
    ]
    other = [written("x", finished=False) for _ in range(4)]
    nan = math.nan
    return [
        rollout(one, [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]]),
        rollout(other, [[0.5, nan], [0.5, nan], [0.5, nan], [0.5, nan]]),
    ]


def means(rollouts, judged="right", border=lambda ids, text: 1) -> dict[str, float]:
    sums = rollout_sums(rollouts, names=("right", "form"), judged=judged, group_size=4, answer_start=border)
    return {name: total / count for name, (total, count) in sums.items() if count}


def test_every_mean_by_hand():
    """Totals 1, 1, 0, 1 and four times ½; the second group has no entropies and no value of `form`."""
    got = means(two_groups())
    assert got == pytest.approx(
        {
            "completion_length": (2 + 3 + 1 + 1 + 4) / 8,
            "truncated": 5 / 8,
            "duplicates": (1 / 4 + 3 / 4) / 2,
            "removed_mass": (2 * 0.5 + 3 * 0.25) / 11,
            "entropy": 17 / 7,
            "entropy_thinking": (1 + 3 + 0.5 + 1.5) / 4,  # of each, the first token
            "entropy_answer": (2 + 4 + 5) / 3,
            "reward": (3 + 2) / 8,
            "reward_std": 0.5 / 2,  # of 1, 1, 0, 1: Σ(r − ¾)² = ¾, over n − 1 = 3
            "zero_spread": 1 / 2,
            "reward/right": (2 + 2) / 8,
            "reward/form": 2 / 4,
            "zero_spread/right": 1 / 2,
            "zero_spread/form": 1 / 2,
            # 2 of 4 right, and none, for ½ is not right: 1 − C(2, k)/C(4, k).
            "pass_at_1": 0.5 / 2,
            "pass_at_2": (1 - 1 / 6) / 2,
            "pass_at_4": 1 / 2,
        },
        rel=1e-6,
    )


def test_pass_at_k_counts_the_part_that_is_judged():
    """Of `form`, one of the first group's four is right: k/4."""
    got = means(two_groups(), judged="form")
    assert [got[f"pass_at_{k}"] for k in (1, 2, 4)] == pytest.approx([1 / 8, 2 / 8, 4 / 8])


def test_without_rewards_there_is_only_what_was_written():
    got = means(two_groups(), judged=None)
    assert set(got) == {
        "completion_length", "truncated", "duplicates", "removed_mass", "entropy", "entropy_thinking", "entropy_answer"
    }  # fmt: skip


@pytest.mark.parametrize("judged", ["right", None])
def test_a_rank_without_prompts_has_the_same_names_and_adds_nothing(judged):
    settings = {"names": ("right", "form"), "judged": judged, "group_size": 4, "answer_start": lambda ids, text: 0}
    some, none = rollout_sums(two_groups(), **settings), rollout_sums([], **settings)
    assert list(some) == list(none) and set(none.values()) == {(0.0, 0.0)}


def test_sums_of_ranks_add_up():
    both = two_groups()
    settings = {"names": ("right", "form"), "judged": "right", "group_size": 4, "answer_start": lambda ids, text: 1}
    whole, *parts = (rollout_sums(some, **settings) for some in (both, both[:1], both[1:]))
    for name, (total, count) in whole.items():
        assert (total, count) == pytest.approx([sum(part[name][i] for part in parts) for i in (0, 1)])


# --- thinking and answer ----------------------------------------------------------------------------------------------

PIECES = ["<think>", "so ", "</th", "ink>", "it is ", "\\boxed", "{", "4", "}", ""]  # the last is the end of turn


def decode(ids) -> str:
    return "".join(PIECES[i] for i in ids)


@pytest.mark.parametrize(
    "ids, border",
    [
        ([0, 1, 2, 3, 4, 9], 2),  # the mark begins with token 2, of which it needs two
        ([1, 4, 5, 6, 7, 8, 9], 2),  # \boxed{ begins with token 2
        ([1, 5, 6, 7, 8, 4, 5, 6, 7, 8], 6),  # the last of two
        ([0, 5, 6, 1, 2, 3, 4], 4),  # </think> comes first in the list of marks
        ([5, 6, 7, 8], 0),
        ([1, 4, 7, 9], 4),  # no mark: thinking to its end
        ([], 0),
    ],
)
def test_where_the_answer_begins(ids, border):
    assert answer_finder(decode, MARKS)(ids, decode(ids)) == border


def test_entropies_are_split_where_the_answer_begins():
    """Thinking has tokens 0 and 1, the answer 2 … 5."""
    ids = [0, 1, 2, 3, 4, 9]
    done = Completion(ids, decode(ids), True, [-1.0] * 6, [-1.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    sums = rollout_sums(
        [Rollout(None, [], Sample(id="q", messages=[]), [done], (0, 0, 0))],
        names=(),
        judged=None,
        group_size=1,
        answer_start=answer_finder(decode, MARKS),
    )
    assert sums["entropy_thinking"] == (3.0, 2) and sums["entropy_answer"] == (18.0, 4) and sums["entropy"] == (21.0, 6)


# --- rows and their places --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, completion, size, work",
    [
        # Width 1, 10 parameters: a token costs 20 + 4 (prompt + rows together × completion).
        (100, 1, 4, 104 * (20 + 4 * 104)),
        (1, 100, 1, 404 * (20 + 4 * 101)),
        (20, 10, 2, 80 * (20 + 4 * 40)),
    ],
)
def test_how_many_completions_share_a_prompt(prompt, completion, size, work):
    """The least work of 1, 2, 3 and 4 rows together, three of which need two copies of the prompt, too."""
    assert Together(most=4, hidden=1, layer=10)(prompt, completion) == size
    works = {
        n: (copies * prompt + 4 * completion) * (20 + 4 * (prompt + n * completion))
        for n, copies in ((1, 4), (2, 2), (3, 2), (4, 1))
    }
    assert works[size] == work == min(works.values())


def test_items_hold_rows_of_one_prompt():
    some, none = two_groups()
    for group in (some, none):
        group.make_rows(truncated=False)
    assert [row.info["completion"] for row in some.rows] == [0, 2, 3] and none.rows == []
    items = items_of([some, none], lambda prompt, completion: 2 if (prompt, completion) == (2, 4 / 3) else 1)
    assert [[row.info["completion"] for row in item] for item in items] == [[0, 2], [3]]


def test_advantages_go_to_the_rows_that_are_left():
    group = two_groups()[0]
    group.make_rows(truncated=False)
    group.advise(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert [row.info["advantages"].tolist() for row in group.rows] == [[1.0, 1.0], [3.0], [4.0]]


def test_the_first_rollouts_by_place_are_kept_whatever_rank_has_them():
    places = [[(0, 0, 0), (0, 1, 0), (1, 0, 2)], [(0, 0, 1), (1, 0, 1)]]
    want = {(0, 0, 0): 0, (0, 0, 1): 1, (0, 1, 0): 2, (1, 0, 1): 3}
    assert keep_first(places, 4) == keep_first(places[::-1], 4) == want
