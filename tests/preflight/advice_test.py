"""The search for what fits, on a made-up device whose memory follows a formula."""

import dataclasses

import pytest

from llama_jax.errors import InputError
from llama_jax.preflight.advice import Attempt, Bounds, Knobs, find_fit

BOUNDS = Bounds(batch_size=64, parts=4, seq_len=1024, logit_bytes=40)
START = Knobs(remat='none', num_microbatches=1, loss_chunks=1, data=1, fsdp=4)
KEPT = {'none': 100, 'projections': 50, 'attention': 10, 'full': 5, 'full_offload': 2}  # bytes a row


def device(available: int, state: int = 300, gradients: int = 100):
    """A compiler for it: what is kept for 16 rows a device, gradients, two when there are microbatches, and logits."""

    def attempt(knobs: Knobs) -> Attempt:
        rows = 16 // knobs.num_microbatches
        copies = 1 if knobs.num_microbatches == 1 else 2
        held = state * 4 // knobs.fsdp
        temporaries = (
            gradients * copies + rows * KEPT[knobs.remat] + 2 * rows * BOUNDS.logit_bytes // knobs.loss_chunks
        )
        return Attempt(knobs, held + temporaries <= available, held, gradients, temporaries, available)

    return attempt


def search(available, *, start=START, max_tries=8, **sizes):
    attempt = device(available, **sizes)
    assert not attempt(start).fits
    return find_fit(attempt(start), BOUNDS, attempt, max_tries)


def test_the_cheapest_change_comes_first():
    tried, found = search(1450)
    assert found is not None and found.knobs == dataclasses.replace(
        START, loss_chunks=16, remat='projections'
    )
    assert tried == [found]


def test_rows_are_taken_apart_when_recomputing_is_not_enough():
    tried, found = search(380, gradients=20)
    assert found is not None and found.fits and found.knobs.remat == 'full'
    assert found.knobs.num_microbatches == 4
    assert [one.fits for one in tried] == [False] * (len(tried) - 1) + [True]
    assert len({one.knobs for one in tried}) == len(tried)


def test_copies_of_the_weights_are_given_up_first():
    start = dataclasses.replace(START, data=4, fsdp=1, remat='full')
    _, found = search(1000, start=start)
    assert found is not None and (found.knobs.data, found.knobs.fsdp) == (1, 4)


# One row of 65,536 tokens a device, everything recomputed.
LONG = Bounds(batch_size=4, parts=4, seq_len=65_536, logit_bytes=0)
ROW = Knobs(remat='full', num_microbatches=1, loss_chunks=1, data=1, fsdp=4)


def long_rows(available: int, state: int = 10):
    """A compiler for them: 40 for a row's layer inputs where they are not on the host, 60 for what else it needs."""

    def attempt(knobs: Knobs) -> Attempt:
        temporaries = 1 + (60 if 'offload' in knobs.remat else 100) // knobs.num_microbatches
        held = state // 2 if 'dcn_data' in knobs.axis_rules else state
        held = held * 4 // (knobs.fsdp * knobs.context)
        return Attempt(knobs, held + temporaries <= available, held, 1, temporaries, available)

    return attempt


def test_a_layers_input_waits_on_the_host_before_rows_are_split():
    attempt = long_rows(80)
    tried, found = find_fit(attempt(ROW), LONG, attempt, 6)
    assert found is not None and found.knobs == dataclasses.replace(ROW, remat='full_offload')
    assert tried == [found]


@pytest.mark.parametrize(('available', 'context'), [(45, 2), (30, 4)])
def test_rows_are_split_over_devices_and_come_in_more_microbatches(available, context):
    attempt = long_rows(available)
    tried, found = find_fit(attempt(ROW), LONG, attempt, 6)
    assert found is not None and found.knobs == Knobs('full_offload', context, 1, 1, 4 // context, context)
    assert len(tried) == 2


def test_rows_are_split_no_further_than_they_divide():
    """Two chunks of a row for each device."""
    attempt = long_rows(30)
    _, found = find_fit(attempt(ROW), dataclasses.replace(LONG, seq_len=65_540), attempt, 6)
    assert found is None


@pytest.mark.parametrize(('state', 'available', 'tries'), [(1000, 700, 1), (60, 70, 3)])
def test_weights_are_split_over_slices(state, available, tries):
    """At once where state alone is too large, last where it is not."""
    rules = 'embed=dcn_data+fsdp+context'
    bounds = dataclasses.replace(LONG, rules_over_slices=rules)
    attempt = long_rows(available, state)
    tried, found = find_fit(attempt(ROW), bounds, attempt, 6)
    assert found is not None and found.knobs.axis_rules == rules and len(tried) == tries


def test_copies_of_the_weights_are_given_up_where_state_leaves_little():
    start = dataclasses.replace(ROW, data=4, fsdp=1)
    attempt = long_rows(150, state=25)
    tried, found = find_fit(attempt(start), LONG, attempt, 6)
    assert found is not None and found.knobs == dataclasses.replace(ROW, fsdp=4) and tried == [found]


def test_nothing_is_tried_where_the_state_alone_is_too_large():
    assert search(350) == ([], None)


def test_the_number_of_tries_is_bounded():
    tried, found = search(505, max_tries=2)
    assert found is None and len(tried) == 2


def test_impossible_settings_are_passed_over():
    attempt = device(395, gradients=20)
    assert search(395, gradients=20)[1].knobs.num_microbatches == 2

    def picky(knobs):
        if knobs.num_microbatches == 2:
            raise InputError('not with these rows')
        return attempt(knobs)

    _, found = find_fit(attempt(START), BOUNDS, picky, 8)
    assert found is not None and found.knobs.num_microbatches == 4
