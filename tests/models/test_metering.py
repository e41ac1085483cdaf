"""Tokens that models read and write, by the part of the work."""

import mlx.core as mx
import pytest

from mlx_fd.feedback.pair import load_pair
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import generate
from mlx_fd.models.metering import OTHER, READING, WRITING, counted, metered, part
from mlx_fd.models.writing import GenerateOptions, Sampling
from support import sweep
from support.pairs import make_dirs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    expert, student = make_dirs(tmp_path_factory.mktemp("pair"))
    return load_pair(str(expert), str(student))


def test_a_call_counts_for_its_model_and_its_part(pair):
    @counted(READING)
    def read(view, rows, length):
        mx.eval(view.forward(mx.zeros((rows, length), mx.int32)).final)

    expert, student = pair.expert.view, pair.student.view
    with metered({"expert": expert, "student": student}) as meter:
        read(expert, 2, 5)
        with part(WRITING):
            read(student, 3, 4)
            mx.eval(expert.forward(mx.zeros((7, 1), mx.int32)).final)
        student.forward(mx.zeros((1, 9), mx.int32))
    read(expert, 2, 5)
    assert meter.read == {
        (READING, "expert"): 10,
        (READING, "student"): 12,
        (OTHER, "student"): 9,
    }
    assert meter.written == {(WRITING, "expert"): 7}
    assert meter.steps == {(WRITING, "expert"): 1}
    assert set(meter.seconds) == {READING, WRITING, OTHER}
    assert all(seconds >= 0 for seconds in meter.seconds.values())


def test_writing_reads_a_prompt_but_for_its_last_token_and_has_a_step_for_each_token(pair):
    loaded, prompts = pair.student_lm, [sweep.tokens_of(12, 1), sweep.tokens_of(12, 2)]
    with metered({"student": pair.student.view}) as meter:
        turns = generate(
            *(loaded, [Conversation()] * 2, prompts, Sampling(6), GenerateOptions(keep=False))
        )
    tokens = sum(len(turn.tokens) for turn in turns)
    longest = max(len(turn.tokens) for turn in turns)
    assert meter.read[WRITING, "student"] == 2 * 11
    # mlx-lm's generator is one step ahead of what it gives.
    assert meter.steps[WRITING, "student"] == longest + 1
    assert tokens < meter.written[WRITING, "student"] <= tokens + 2
