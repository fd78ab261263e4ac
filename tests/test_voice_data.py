"""Voice data: batches of like lengths, experiment folders of other programs, splits by recording, what a batch holds."""

import numpy as np
import pytest

from common.batches import EpochBatches, LengthBatches
from common.config import UserError


def flat(batches):
    return [index for batch in batches for index in batch]


# ---- batches of like lengths -----------------------------------------------------------------------------------------

VARIED = np.random.default_rng(0).integers(50, 500, 160).tolist()


def padding(batches, lengths):
    """The share of padded batches that is padding."""
    room = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for i in flat(batches)) / room


def test_batches_of_like_lengths_hold_little_padding():
    plain, sorted_ = (padding(kind.plan(1), VARIED) for kind in (EpochBatches(160, 4, 0), LengthBatches(VARIED, 4, 0)))
    assert plain > 0.3 and sorted_ < 0.05


@pytest.mark.parametrize(("length", "size"), [(160, 4), (67, 4), (5, 1), (3, 8)])
def test_every_clip_comes_at_most_once_and_at_least_one_batch_does(length, size):
    lengths, sampler = VARIED[:length], LengthBatches(VARIED[:length], size, 0)
    used = flat(sampler.plan(1))
    assert len(set(used)) == len(used) == min(length, len(sampler) * size) and set(used) <= set(range(length))
    assert len(sampler.plan(1)) == len(sampler) == max(1, length // size)
    epochs = [set(flat(LengthBatches(lengths, size, 0).plan(epoch))) for epoch in range(1, 40)]
    assert set().union(*epochs) == set(range(length)), "none is left out for good, as the longest would be"


def test_batches_come_in_another_order_and_make_up_each_epoch():
    sampler = LengthBatches(VARIED, 4, 0)
    one, other = sampler.plan(1), sampler.plan(2)
    assert one == LengthBatches(VARIED, 4, 0).plan(1) != LengthBatches(VARIED, 4, 1).plan(1)
    assert len({frozenset(batch) for batch in one} & {frozenset(batch) for batch in other}) < len(one) / 2
    means = [np.mean([VARIED[i] for i in batch]) for batch in one]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5, "short clips do not come first"


def test_two_processes_share_the_batches_of_one():
    whole = LengthBatches(VARIED, 4, 3).plan(5)
    parts = [LengthBatches(VARIED, 2, 3, rank=rank, world=2).plan(5) for rank in (0, 1)]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole


def test_an_epoch_goes_on_in_its_middle():
    sampler = LengthBatches(VARIED, 4, 0)
    whole = [[(2, index) for index in batch] for batch in sampler.plan(2)]
    sampler.set_range(2, 15, 40)
    assert list(sampler) == whole[15:] and len(whole[15:]) == 25


def test_no_clips_are_refused():
    with pytest.raises(UserError, match="no training sample"):
        LengthBatches([], 4, 0)
