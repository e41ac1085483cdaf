"""Several processes that make one run: two ranks with MLX's ring on this machine."""

import json
import shutil

import mlx.core as mx
import pytest

from mlx_fd import runs
from mlx_fd.models import ranks
from support.launched import killed_after, launch
from support.loops import WEIGHTS, assert_same, rows
from support.pairs import make_home
from support.shell import failed, shell
from support.tiny import make_model_dir

# Four problems in batches of three: uneven shares, and of the last batch a rank has nothing.
LOOP = (
    *("loop", "--expert", "expert", "--student", "student", "--problems", "problems.jsonl"),
    *("--episodes", 4, "--batch-size", 3, "--probe-size", 2, "--checkpoint-every", 2),
    *("--max-answer-tokens", 8, "--max-feedback-tokens", 6, "--max-merge-tokens", 5),
    *("--lora-rank", 2, "--lora-rate", 1e-2, "--losses", "lm,logit,score,hidden,answer"),
    # Greedy: ranks draw other numbers than one process does.
    *("--answers-by", "both", "--expert-temperature", 0, "--student-temperature", 0),
    *("--answer-temperature", 0, "--max-answer-temperature", 0),
    *("--replay", 1, "--kd-steps", 2, "--micro-batch", 2),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_home(folder)
    return folder


@pytest.fixture(scope="module")
def alone(home):
    assert shell(*LOOP, "--out", "alone", cwd=home).status == 0
    return home / "alone"


@pytest.fixture(scope="module")
def two(home):
    done = launch(2, *LOOP, "--out", "two", cwd=home)
    assert [one.status for one in done] == [0, 0], done
    # Rank 0 shows the run; the other says nothing.
    assert "4/4" in done[0].out and not done[1].out
    return home / "two"


def close(one, other, path=""):
    """Where two rows differ: floats by more than 1e-5, anything else at all."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        names = [name for name in one if not name.endswith("seconds")]
        return [
            fault for name in names for fault in close(one[name], other[name], f"{path}.{name}")
        ]
    if isinstance(one, list) and len(one) == len(other):
        return [fault for pair in zip(one, other, strict=True) for fault in close(*pair, path)]
    if isinstance(one, float) and isinstance(other, float):
        return [] if abs(one - other) <= 1e-5 * max(1, abs(one)) else [(path, one, other)]
    return [] if one == other else [(path, one, other)]


def test_two_ranks_make_the_run_of_one_process(alone, two):
    for log in (runs.EPISODES, runs.METRICS, runs.SAMPLES):
        assert close(rows(alone, log), rows(two, log)) == [], log
    assert any(row["updates"] for row in rows(two, runs.METRICS))
    for name in WEIGHTS:
        one, other = (mx.load(str(run / "checkpoints" / "last" / name)) for run in (alone, two))
        for key, value in one.items():
            assert mx.allclose(value, other[key], rtol=0, atol=1e-5), (name, key)
    probes = [json.loads((run / "probe.json").read_text())["headroom"] for run in (alone, two)]
    assert probes[0] == probes[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_loses_nothing(home, two, tmp_path, rank):
    run = tmp_path / "run"
    before = {rank: killed_after(run / runs.METRICS, 1)}
    done = launch(2, *LOOP, "--out", run, cwd=home, before=before)
    assert done[rank].status == -9
    other = done[1 - rank]
    assert other.status == 2 and "another process of this run has ended" in other.flat
    if rank:
        assert f"mlx.launch -n 2 mlx-fd resume {run}" in other.flat
    assert not (run / runs.SUMMARY).exists()
    done = launch(2, "resume", run, cwd=home)
    assert [one.status for one in done] == [0, 0], done
    assert_same(run, two)


def test_a_run_goes_on_with_as_many_ranks_as_it_began_with(home, alone, two):
    done = shell("resume", two, cwd=home)
    failed(done, "began with 2 processes, and here are 1", "mlx.launch -n 2 mlx-fd resume")
    first, second = launch(2, "resume", alone, cwd=home)
    failed(first, "began with 1 process, and here are 2")
    assert second.status == 2 and not second.err


def test_what_only_one_process_can_do_is_refused(home, two):
    for one in launch(2, "eval", two, cwd=home):
        failed(one, "runs in one process: start it without mlx.launch")
    own = ("--student-context", "feedback", "--out", "own", "--answers-by", "student")
    first, second = launch(2, *LOOP, *own, "--order", "learn-last", cwd=home)
    failed(first, "student_context is for a run in one process")
    assert second.status == 2 and not (home / "own").exists()


def test_processes_that_cannot_meet_do_not_each_make_the_run(home):
    """MPI started them, and MLX finds none of its libraries."""
    done = shell(*LOOP, "--out", "apart", cwd=home, env={"OMPI_COMM_WORLD_SIZE": "2"})
    failed(done, "MLX here has no backend that connects them")
    assert not (home / "apart").exists()
    assert shell("models", cwd=home, env={"MLX_RANK": "0", "MLX_WORLD_SIZE": "1"}).status == 0


def test_machines_with_other_models_are_refused(home, tmp_path):
    """Folders of one name that hold other weights on two machines."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        shutil.copytree(home, folder, ignore=shutil.ignore_patterns("two", "alone", "hosts*"))
    path = folders[1] / "student" / "model.safetensors"
    arrays = mx.load(str(path))
    mx.save_safetensors(str(path), {name: 1.5 * array for name, array in arrays.items()})
    first, second = launch(2, *LOOP, "--out", "other", cwd=folders)
    failed(first, "the student is not the same on rank 1 as on rank 0")
    assert second.status == 2 and not second.err
    assert not any((folder / "other").exists() for folder in folders)


# One token is drawn from one, so that ranks and one process draw the same.
DISTIL = (
    *("distil", "--expert", "expert", "--student", "student", "--problems", "problems.jsonl"),
    *("--episodes", 4, "--batch-size", 3, "--probe-size", 1, "--probe-every", 1, "--top-k", 1),
    *("--max-answer-tokens", 6, "--lora-rank", 2, "--on-policy-fraction", 0.7),
)


def test_two_ranks_distil_answers_as_one_process_does(home, tmp_path):
    assert shell(*DISTIL, "--out", "answers", cwd=home).status == 0
    run = tmp_path / "run"
    before = {1: killed_after(run / runs.METRICS, 1)}
    assert launch(2, *DISTIL, "--out", run, cwd=home, before=before)[1].status == -9
    done = launch(2, "resume", run, cwd=home)
    assert [one.status for one in done] == [0, 0], done
    for log in (runs.ATTEMPTS, runs.METRICS):
        assert close(rows(home / "answers", log), rows(run, log)) == [], log
    assert all(row["updates"] for row in rows(run, runs.METRICS))
    one, other = (
        mx.load(str(folder / "checkpoints" / "last" / "adapters.safetensors"))
        for folder in (home / "answers", run)
    )
    # Adam makes steps of a size of gradients next to zero.
    assert all(mx.allclose(one[name], other[name], rtol=0, atol=1e-4) for name in one)


def test_an_expert_on_two_ranks_says_what_it_says_whole(home):
    """Each rank has half of it, and both go through the whole batch, with the same draws."""
    make_model_dir(home / "wide", hidden=32, intermediate=64, layers=1, seed=3)
    words = (
        *("loop", "--expert", "wide", "--student", "student", "--problems", "problems.jsonl"),
        *("--episodes", 2, "--batch-size", 2, "--probe-size", 1, "--lora-rank", 2),
        *("--max-answer-tokens", 4, "--max-feedback-tokens", 4, "--max-merge-tokens", 4),
        *("--answers-by", "expert", "--answer-temperature", 0.7),
    )
    whole = shell(*words, "--out", "whole", cwd=home)
    divided = launch(2, *words, "--shard-expert", "--out", "divided", cwd=home)
    assert [one.status for one in (whole, *divided)] == [0, 0, 0], (whole, divided)
    one, other = home / "whole", home / "divided"
    for log in (runs.EPISODES, runs.METRICS, runs.SAMPLES):
        assert close(rows(one, log), rows(other, log)) == [], log
    assert any(row["updates"] for row in rows(other, runs.METRICS))


# Seen wrong within ten rounds where the model wrote on a stream of its own.
WRITE_AND_EXCHANGE = """
import sys
from pathlib import Path

from mlx_fd.models import ranks
from mlx_fd.models.backend import backend

backend()
ranks.join()
ranks.share_batches(False)

from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt, generate
from mlx_fd.models.loading import load
from mlx_fd.models.writing import GenerateOptions, Sampling

expert = load(Path(sys.argv[1]), sharded=True)
prompts = [first_prompt(expert, f"{number} + 2?") for number in range(4)]
for turn in range(60):
    generate(expert, [Conversation()] * 4, prompts, Sampling(2), GenerateOptions(keep=False))
    texts = [f"{rank} in {turn}" * 100 for rank in range(2)]
    ranks.share_batches(True)
    assert ranks.gather([texts[ranks.rank()]]) == texts
    ranks.share_batches(False)
"""


def test_a_divided_model_has_written_before_anything_is_exchanged(tmp_path):
    """The generator computes one token ahead, whose sums must not go among other exchanges."""
    expert, program = tmp_path / "expert", tmp_path / "program.py"
    make_model_dir(expert, hidden=32, intermediate=64, layers=1, seed=3)
    program.write_text(WRITE_AND_EXCHANGE)
    done = launch(2, expert, cwd=tmp_path, program=program)
    assert [one.status for one in done] == [0, 0], done


def test_an_expert_that_cannot_be_divided_is_refused(home):
    first, second = launch(2, *LOOP, "--shard-expert", "--out", "divided-2", cwd=home)
    failed(first, "num_key_value_heads is 1, which 2 processes cannot divide among them")
    assert second.status == 2 and not (home / "divided-2").exists()
    failed(shell(*LOOP, "--shard-expert", cwd=home), "and this is one: start with mlx.launch")


def test_shares_are_whole_and_even():
    assert ranks.part(5) == range(5) and ranks.share([1, 2, 3]) == [1, 2, 3]
    assert ranks.deal([3, 1, 2]) == [0, 1, 2]
    here = ranks._here
    try:
        found = []
        for rank in range(3):
            ranks._here = ranks._Here(None, rank, 3)
            found.append((list(ranks.part(7)), ranks.deal([9, 1, 8, 2, 7, 3])))
        assert [part for part, _ in found] == [[0, 1], [2, 3], [4, 5, 6]]
        assert [dealt for _, dealt in found] == [[1, 4], [2, 3], [0, 5]]
    finally:
        ranks._here = here
