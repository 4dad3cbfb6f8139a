"""What a prompt means in a trajectory: its next turn, one to go on with or to hand out again, a rewind, a stranger."""

import numpy as np
import pytest

import trajstore
from tests.core.logs import Log
from trajstore_verl import find_turn

PROMPT = [1, 2, 3, 4, 5]


def find(log, prompt):
    return find_turn(log.plan().history, np.array(log.token_ids, np.int32), np.array(prompt, np.int32))


def parts(turn):
    return (turn.base, turn.context.tolist(), turn.start, turn.stop, turn.finish_reason)


def one_turn(finish_reason="stop"):
    """The prompt, aborted after 10 and 11, gone on with 12."""
    log = Log()
    log.segment(0, PROMPT)
    log.tokens([10, 11])
    log.finish("abort")
    log.segment()
    log.tokens([12])
    if finish_reason:
        log.finish(finish_reason)
    return log


def two_turns(finish_reason="stop"):
    """And a tool's 20 and 21, and 30."""
    log = one_turn()
    log.segment(context=[20, 21])
    log.tokens([30])
    log.finish(finish_reason)
    return log


def test_the_first_prompt_begins_the_trajectory():
    assert parts(find(Log(), PROMPT)) == (0, PROMPT, 5, 5, "")


def test_a_prompt_that_goes_on_from_the_trajectory_opens_the_next_turn():
    assert parts(find(one_turn(), [*PROMPT, 10, 11, 12, 20])) == (8, [20], 9, 9, "")
    assert parts(find(one_turn(), [*PROMPT, 10, 11, 12])) == (8, [], 8, 8, "")


@pytest.mark.parametrize("finish_reason", ["abort", "error", ""])  # "": its writer died within it
def test_a_turn_without_an_end_goes_on_where_it_stopped(finish_reason):
    assert parts(find(one_turn(finish_reason), PROMPT)) == (8, [], 5, 8, "")


def test_a_turn_whose_segment_was_taken_over_goes_on():
    log = one_turn("")
    log.reward(1.0)
    assert log.load().finish_reason == "lost"
    assert parts(find(log, PROMPT)) == (8, [], 5, 8, "")


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_turn_that_ended_is_there_to_its_end(finish_reason):
    assert parts(find(one_turn(finish_reason), PROMPT)) == (8, [], 5, 8, finish_reason)


def test_an_earlier_turn_ends_where_the_next_context_begins():
    assert parts(find(two_turns(), PROMPT)) == (8, [], 5, 8, "stop")
    assert parts(find(two_turns("length"), [*PROMPT, 10, 11, 12, 20, 21])) == (11, [], 10, 11, "length")


def test_a_turn_that_an_agent_went_on_from_is_over_however_it_ended():
    log = one_turn("abort")
    log.segment(context=[20])
    log.finish("abort")
    assert parts(find(log, PROMPT)) == (8, [], 5, 8, "stop")


def test_a_prompt_within_a_turn_has_the_rest_of_it():
    assert parts(find(one_turn(), [*PROMPT, 10])) == (8, [], 6, 8, "stop")


def test_a_prompt_that_differs_after_the_first_rewinds():
    assert parts(find(two_turns(), [*PROMPT, 10, 11, 12, 20, 99, 98])) == (9, [99, 98], 11, 11, "")
    assert parts(find(two_turns(), [*PROMPT, 10, 99])) == (6, [99], 7, 7, "")


def test_a_prompt_that_ends_within_a_context_rewinds_to_there():
    assert parts(find(two_turns(), [*PROMPT, 10, 11, 12, 20])) == (9, [], 9, 9, "")
    assert parts(find(two_turns(), [*PROMPT, 10, 11, 12])) == (8, [], 8, 8, "")


@pytest.mark.parametrize("prompt", [[1, 2, 99, 4, 5], [1, 2, 99], [9], [1, 2, 3], []])
def test_a_prompt_that_is_not_the_first_one_belongs_to_another_rollout(prompt):
    """verl RFC #7579: recycled ids silently train on mislabeled data."""
    with pytest.raises(trajstore.Conflict, match="another rollout"):
        find(two_turns(), prompt)


def test_a_trajectory_that_died_before_its_first_token_begins_again():
    log = Log()
    log.segment(0, PROMPT)
    assert parts(find(log, PROMPT)) == (5, [], 5, 5, "")
