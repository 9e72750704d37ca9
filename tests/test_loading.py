"""Which samples a step takes, and how items are cut into micro-batches."""

import itertools

import pytest
import torch

from lightning_vlm.algorithms.micro import micro_batches
from lightning_vlm.data.loading import RankShard, StepSampler, join
from lightning_vlm.data.schema import BadSample
from lightning_vlm.models.batch import ImageInput, Row


def row(id, length, image=None):
    ids = torch.zeros(length, dtype=torch.long)
    images = [] if image is None else [ImageInput(image, {}, 1)]
    return Row(id, ids, torch.ones(length, dtype=torch.bool), images=images)


def first(sampler, count):
    return list(itertools.islice(sampler, count))


def test_an_epoch_visits_every_sample_once_and_epochs_differ():
    batches = first(StepSampler(10, 4, seed=3), 6)
    assert [len(b) for b in batches] == [4, 4, 2] * 2
    epochs = [[i for b in batches[:3] for i in b], [i - 10 for b in batches[3:] for i in b]]
    assert sorted(epochs[0]) == list(range(10)) == sorted(epochs[1]) and epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_batchs_samples_do_not_depend_on_the_number_of_ranks(world):
    whole = [sorted(b) for b in first(StepSampler(11, 4, seed=1), 5)]
    ranks = [first(StepSampler(11, 4, seed=1, rank=r, world=world), 5) for r in range(world)]
    assert [sorted(i for rank in ranks for i in rank[k]) for k in range(5)] == whole


@pytest.mark.parametrize("done", [0, 2, 4, 5, 9])
def test_resuming_starts_at_the_batch_that_comes_next(done):
    """10 samples, 3 a batch: 4 batches an epoch; 4 lies on an epoch's edge."""
    assert first(StepSampler(10, 3, seed=2, start=lambda: done), 3) == first(StepSampler(10, 3, seed=2), 12)[done:][:3]


def test_without_shuffling_the_order_is_the_data_sets():
    assert first(StepSampler(5, 2, shuffle=False), 4) == [[0, 1], [2, 3], [4], [5, 6]]


@pytest.mark.parametrize("size, world", [(10, 2), (7, 3), (2, 4)])
def test_evaluation_shards_cover_each_sample_exactly_once(size, world):
    shards = [RankShard(size, 2, rank=r, world=world) for r in range(world)]
    seen = sorted(i for shard in shards for batch in shard for i in batch)
    assert seen == list(range(size))
    assert all(len(list(shard)) == len(shard) for shard in shards)


def test_bad_samples_are_listed_apart():
    batch = join([BadSample("a7", "missing_image", "no file pic.png")])
    assert batch.items == [] and batch.skipped == [("a7", "missing_image", "no file pic.png")]


def test_micro_batches_keep_the_budget_and_lose_nothing():
    items = [[row(str(i), 3 + (i * 7) % 11)] for i in range(40)]
    for budget in (13, 30, 64, 10_000):
        plan = micro_batches(items, budget)
        flat = sorted(r.id for micro in plan for item in micro for r in item)
        assert flat == sorted(r.id for item in items for r in item)
        for micro in plan:
            rows = [r for item in micro for r in item]
            assert len(rows) * max(len(r) for r in rows) <= budget
    assert len(micro_batches(items, 10_000)) == 1


def test_an_item_longer_than_the_budget_stands_alone_and_pairs_stay_together():
    pair = [row("a", 9), row("b", 4)]
    plan = micro_batches([pair, [row("c", 2)]], 5)
    assert sorted(len(m) for m in plan) == [1, 1] and pair in plan[0]


def test_rows_of_one_image_stay_side_by_side():
    items = [[row(f"{image}{q}", 5, image=image)] for q in range(2) for image in "abcd"]
    for micro in micro_batches(items, 10):
        assert len({r.images[0].key for item in micro for r in item}) == 1


def test_budget_below_one():
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        micro_batches([], 0)


def test_places_count_what_was_skipped():
    """Two steps of two samples each, the second and the third of which cannot be used."""
    bad = BadSample("b", "malformed", "broken")
    batch = join([("s0", ["r0"]), bad, bad, ("s3", ["r3"])], per_step=2)
    assert (batch.steps, batch.places, len(batch.skipped)) == ([0, 1], [0, 1], 2)
    whole = join([bad, ("s1", ["r1"])])
    assert (whole.steps, whole.places) == ([0], [1])
