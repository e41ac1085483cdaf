import dataclasses
import functools
import json
import math
import random
import shutil
import signal
import time

import mlx.core as mx
import pytest

from mlx_fd import runs
from mlx_fd.config import Config, override, preset
from mlx_fd.errors import UserError
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.stages import combined_score
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt, generate
from mlx_fd.models.writing import GenerateOptions, Sampling
from mlx_fd.runs.checked import with_digest
from mlx_fd.runs.checkpoints import newest_checkpoint
from mlx_fd.runs.events import BatchDone, Probed, Step, Warned
from mlx_fd.runs.plan import make_plan as plan_of
from mlx_fd.training.checkpoint import first_state, with_probe
from support.draws import ALL
from support.loops import Killed, assert_same, count_syncs, rows, start, weights
from support.pairs import SMALL, make_dirs, make_plan
from support.shell import launch, limit_file_size, shell
from support.tiny import make_model_dir


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    return make_dirs(tmp_path_factory.mktemp("pair"), layers=(2, 1))


@pytest.fixture(scope="module")
def finished(dirs, tmp_path_factory):
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    plan = make_plan(*dirs)
    events = []
    summary = start(folder, plan, events.append)
    return folder, plan, summary, events


@pytest.fixture(scope="module")
def begun(finished, tmp_path_factory):
    """The same run, stopped after each of its first two batches of four."""
    folder, plan = tmp_path_factory.mktemp("runs") / "begun", finished[1]
    for _ in range(2):
        answers = iter([False, True])
        start(folder, plan, stop=lambda answers=answers: next(answers))
    return folder


@pytest.fixture
def stopped(begun, tmp_path):
    """A copy of it."""
    return shutil.copytree(begun, tmp_path / "stopped", symlinks=True)


# Where there are two feedbacks to merge, and where the student finds an answer right.
SOMETIMES = ("merge", "student_solution")


def test_the_steps_run_in_the_order_of_the_text(finished):
    """That of README's diagram and docs/methods.md: it learns before both feedbacks are merged."""
    steps = steps_of(finished[3])
    assert [step for step in dict.fromkeys(steps) if step not in SOMETIMES] == [
        *("answer", "student_feedback", "expert_feedback", "distil", "student_feedback_again"),
        *("revise", "critique", "final"),
    ]
    folder, _, summary, _ = finished
    learned = [row for row in rows(folder) if row["gate"]["distilled"]]
    assert learned and all(row["student_feedback_again"] for row in learned)
    assert all(row["tokens"]["student_feedback_again"] for row in learned)
    assert summary["tokens"]["student_feedback_again"] > 0


def test_a_profiled_run_says_what_it_did_beside_the_least(dirs, tmp_path):
    options = {"profile": True, "episodes": 2, "gate": "always", "trigger": "always"}
    found = {}
    for sequential in (False, True):
        folder = tmp_path / f"run{sequential}"
        plan = make_plan(*dirs, sequential=sequential, answer_temperature=0.0, **options)
        summary = start(folder, plan)
        (metrics,) = runs.read_lines(folder / runs.METRICS)
        work = metrics["work"]
        assert summary["work"]["counts"] == work["counts"]
        assert [n for n, one in work["counts"].items() if one["done"] < one["least"]] == []
        written = sum(sum(row["tokens"].values()) for row in rows(folder))
        assert work["counts"]["written"]["least"] == written
        learned = sum(update["tokens"] for update in metrics["updates"])
        assert learned <= work["counts"]["learned"]["least"] <= 2 * learned
        assert set(work["seconds"]) == {"writing", "reading", "measuring", "learning", "other"}
        assert sum(work["seconds"].values()) == pytest.approx(metrics["seconds"], abs=0.5)
        found[sequential] = work["counts"]
    together, alone = found[False], found[True]
    # What there is to be read is the same, whoever reads it again and again.
    for name in ("expert_prompts", "student_prompts", "steps", "written"):
        assert together[name]["least"] == alone[name]["least"]
    assert alone["expert_prompts"]["done"] > 2 * together["expert_prompts"]["done"]


def test_learning_may_come_last(dirs, tmp_path):
    events = []
    start(tmp_path / "run", make_plan(*dirs, order="learn-last", episodes=2), events.append)
    steps = steps_of(events)
    assert [step for step in dict.fromkeys(steps) if step not in SOMETIMES] == [
        *("answer", "student_feedback", "expert_feedback"),
        *("revise", "critique", "final", "distil"),
    ]
    assert all(row["student_feedback_again"] is None for row in rows(tmp_path / "run"))


def steps_of(events):
    """The steps of the first batch, each time some of it was done."""
    begin, end = (
        next(place for place, event in enumerate(events) if isinstance(event, kind))
        for kind in (Probed, BatchDone)
    )
    return [event.step for event in events[begin:end] if isinstance(event, Step)]


def test_a_run_leaves_what_it_says(finished):
    folder, plan, summary, events = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md",
        "config.toml",
        "manifest.json",
        "episodes.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "summary.json",
    }
    found = runs.read_lines(folder / runs.EPISODES)
    assert [row["episode"] for row in found] == list(range(8))
    assert [row["id"] for row in found] == [problem.id for problem in plan.problems]
    assert not {problem.id for problem in plan.probe} & {row["id"] for row in found}
    assert summary["episodes"] == 8
    assert summary["updates"]["steps"] > 0
    assert json.loads((folder / "summary.json").read_text()) == with_digest(summary)
    done = [event for event in events if isinstance(event, BatchDone)]
    assert [event.done for event in done] == [2, 4, 6, 8]
    metrics = runs.read_lines(folder / runs.METRICS)
    assert all(abs(sum(row["weights"].values()) - 1) < 1e-9 for row in metrics)


def test_the_best_batch_is_the_least_on_the_probe_set_or_the_newest():
    def best_batches(first, looks):
        progress = first_state(Config(), first)
        found = []
        for batch, losses in enumerate(looks, 1):
            progress = with_probe(dataclasses.replace(progress, batch=batch), losses)
            assert progress.probe_last == losses
            found.append(progress.best_batch)
        return found, progress.best

    levels = [(5.0, 2.0), (3.0, 1.0), (2.0, 1.5), (1.0, 1.0)]
    looks = [{"lm": lm, "score": score, "answer": 9.0} for lm, score in levels]
    # Relative to the start: 1.125, 0.625, 0.625, 0.375.
    assert best_batches({"lm": 4.0, "score": 2.0}, looks) == ([0, 2, 3, 4], 0.375)
    assert best_batches({"lm": 4.0}, [{"lm": math.inf}, {"lm": 1.0}]) == ([0, 2], 0.25)
    # Where nothing is known of any loss, the last look is as good as any.
    assert best_batches({}, [{}, {}, {"lm": 1.0}]) == ([1, 2, 3], 1.0)
    # Of what was right at first, none may go wrong: the share of wrong attempts rises, and falls.
    wrong = [{"wrong": share} for share in (0.0, 0.0, 0.5, 0.25)]
    assert best_batches({"wrong": 0.0}, wrong) == ([1, 2, 2, 2], 1.0)


def test_one_seed_is_one_run_and_another_is_another(finished, dirs, tmp_path):
    folder, plan, _, _ = finished
    start(tmp_path / "again", plan)
    assert_same(folder, tmp_path / "again")
    start(tmp_path / "other", make_plan(*dirs, seed=1, episodes=2))
    assert rows(tmp_path / "other") != rows(folder)[:2]


def test_sequential_is_the_same_run_without_batches_and_caches(finished, dirs, tmp_path):
    folder = finished[0]
    start(tmp_path / "naive", make_plan(*dirs, sequential=True))
    batched, naive = rows(folder), rows(tmp_path / "naive")
    for one, two in zip(batched, naive, strict=True):
        for key in ("answer", "merged", "revised", "critique", "final", "tokens"):
            assert one[key] == two[key], key
        assert one["student_feedback"]["text"] == two["student_feedback"]["text"]
        assert sum(one["prefilled"].values()) < sum(two["prefilled"].values())
        assert one["gate"]["losses_before"] == pytest.approx(
            two["gate"]["losses_before"], rel=1e-3, abs=1e-4
        )


def without(rows, *columns):
    return [{name: row[name] for name in row if name not in columns} for row in rows]


@pytest.mark.parametrize("one_by_one", [{"sequential": True}, {"batch_size": 1}])
def test_with_a_draft_it_is_the_same_run_and_the_rows_say_what_was_proposed(
    dirs, tmp_path, one_by_one
):
    """Where the expert draws by lot, too: and stopped and resumed it is the same again."""
    options = {"episodes": 3, "expert_temperature": 0.8, "answer_temperature": 0.8, **one_by_one}
    plain, drafted, stopped = (tmp_path / name for name in ("plain", "drafted", "stopped"))
    start(plain, make_plan(*dirs, **options))
    plan = make_plan(*dirs, speculate=3, **options)
    summary = start(drafted, plan)
    assert without(rows(drafted), "accepted", "gate") == without(rows(plain), "gate")
    metrics = rows(drafted, runs.METRICS)
    if "sequential" in one_by_one:
        # With caches the expert's states were computed in other blocks, and their last digits vary.
        assert without(rows(drafted), "accepted") == rows(plain)
        assert without(metrics, "accepted") == rows(plain, runs.METRICS)
        one, two = weights(plain), weights(drafted)
        assert all(mx.array_equal(mx.array(one[name]), mx.array(two[name])) for name in one)
    for row in rows(drafted):
        # All that the expert writes, and nothing that the student does.
        assert set(row["accepted"]) == {step for step in row["tokens"] if "student" not in step}
        assert all(count <= row["tokens"][step] for step, count in row["accepted"].items())
    found = summary["acceptance"]["all"]["whole"]
    count = sum(sum(row["accepted"].values()) for row in rows(drafted))
    n = sum(row["tokens"][step] for row in rows(drafted) for step in row["accepted"])
    assert found["value"] == pytest.approx(count / n, abs=1e-4) and found["n"] == 3
    assert sum(row["accepted"]["count"] for row in metrics) == count
    answers = iter([False, True])
    assert start(stopped, plan, stop=lambda: next(answers)) is None
    start(stopped, plan)
    assert_same(drafted, stopped)


def test_stopping_after_any_batch_and_resuming_changes_nothing(finished, tmp_path):
    folder, plan, _, _ = finished
    stopped = tmp_path / "stopped"
    for done in range(1, 4):
        # Asked once before the first batch, then after each.
        answers = iter([False, True])
        assert start(stopped, plan, stop=lambda answers=answers: next(answers)) is None
        assert len(rows(stopped)) == 2 * done
    assert start(stopped, plan) is not None
    assert_same(folder, stopped)
    assert start(stopped, plan)["episodes"] == 8
    assert_same(folder, stopped)


def test_dying_at_any_flush_and_resuming_changes_nothing(dirs, tmp_path, monkeypatch):
    """Every boundary between two writes is a place to die, and many are tried."""
    plan, folder = make_plan(*dirs, episodes=4, checkpoint_every=1), tmp_path / "whole"
    with monkeypatch.context() as patch:
        seen = count_syncs(patch, limit=0)
        start(folder, plan)
        total = seen()
    assert total > 40
    for limit in range(1, total, 9 if ALL else 22):
        target = tmp_path / f"died{limit}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            count_syncs(patch, limit)
            start(target, plan)
        start(target, plan)
        assert_same(folder, target)
        shutil.rmtree(target)


@pytest.mark.parametrize("harm", ["cut a weight", "flip a bit", "half a log line", "no state"])
def test_a_harmed_last_checkpoint_is_passed_over(finished, stopped, harm):
    (folder, plan, _, _), target = finished, stopped
    last = (target / "checkpoints" / "last").resolve()
    weights_file = last / "adapters.safetensors"
    data = weights_file.read_bytes()
    if harm == "cut a weight":
        weights_file.write_bytes(data[: len(data) // 2])
    elif harm == "flip a bit":
        weights_file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "half a log line":
        with (target / runs.EPISODES).open("a") as file:
            file.write('{"episode": 99, "answ')
    else:
        (last / "state.json").unlink()
    events = []
    start(target, plan, events.append)
    assert_same(folder, target)
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert any("not whole" in text for text in warned) == (harm != "half a log line")


def test_a_full_disk_ends_in_a_message_and_a_true_resume(dirs, tmp_path):
    """The file-size limit of the process plays the disk that is full."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    loop = ("loop", "--expert", dirs[0], "--student", dirs[1], *options, "--episodes=4", "--out")
    folder = tmp_path / "whole"
    assert shell(*loop, folder, cwd=tmp_path).status == 0
    sizes = sorted(path.stat().st_size for path in (folder / "checkpoints" / "last").iterdir())
    log = (folder / runs.EPISODES).stat().st_size
    for limit in (log - 100, sizes[-1] - 100):
        target = tmp_path / f"full{limit}"
        full = functools.partial(limit_file_size, limit)
        done = shell(*loop, target, cwd=tmp_path, before=full)
        assert done.status == 2, done.flat
        assert "cannot be written" in done.flat and "mlx-fd resume" in done.flat
        done = shell("resume", target, cwd=tmp_path)
        assert done.status == 0, done.flat
        assert_same(folder, target)


def test_sigkills_at_random_moments_change_nothing(dirs, tmp_path):
    """The command line, killed and resumed until it is through; bit for bit one whole run."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    options += [f"--episodes={24 if ALL else 10}", "--checkpoint-every=3"]
    loop = ("loop", "--expert", dirs[0], "--student", dirs[1], *options, "--out")
    whole, target = tmp_path / "whole", tmp_path / "killed"

    begin = time.monotonic()
    running = launch(*loop, whole, cwd=tmp_path)
    while running.process.exitcode is None and not (whole / runs.EPISODES).exists():
        time.sleep(0.01)
    until_episodes = time.monotonic() - begin
    done = running.wait()
    assert done.status == 0, done.flat
    working = time.monotonic() - begin - until_episodes

    def go_on():
        if runs.is_run(target):
            return launch("resume", target, cwd=tmp_path)
        shutil.rmtree(target, ignore_errors=True)
        return launch(*loop, target, cwd=tmp_path)

    draw = random.Random(0)
    kills = 0
    while kills < (4 if ALL else 2):
        running = go_on()
        # Mostly while episodes are made and checkpoints written, now and then while loading.
        delay = until_episodes * draw.uniform(0.8, 1.0) + draw.uniform(0, working / 4)
        running.process.join(delay)
        running.process.kill()
        done = running.wait()
        assert done.status in (0, -signal.SIGKILL), done.flat
        kills += done.status == -signal.SIGKILL
        if done.status == 0:
            # Through before its kill: begin another one, as far as it takes.
            assert_same(whole, target)
            shutil.rmtree(target)
    done = go_on().wait()
    assert done.status == 0, done.flat
    assert_same(whole, target)


def test_a_trusted_student_is_asked_alone_and_goes_on_learning(dirs, tmp_path):
    """With any disagreement allowed, the student is trusted from the first look on."""
    plan = make_plan(*dirs, max_disagreement=1.0, audit_fraction=0.0, episodes=4, batch_size=2)
    summary = start(tmp_path / "run", plan)
    assert summary["expert_feedback"]["asked"] == summary["expert_feedback"]["not_asked"] == 2
    assert summary["expert_feedback"]["share_saved_second_half"] == 1.0
    first, then = rows(tmp_path / "run")[:2], rows(tmp_path / "run")[2:]
    assert all(row["expert_feedback"] and not row["gate"]["trusted"] for row in first)
    for row in then:
        assert row["gate"]["trusted"] and row["expert_feedback"] is None
        assert row["gate"]["reason"] == "the student stands alone"
        assert row["merged"] == row["student_feedback"]["text"]
        assert "expert_feedback" not in row["tokens"] and "merge" not in row["tokens"]
    audited = make_plan(*dirs, max_disagreement=1.0, audit_fraction=1.0, episodes=4, batch_size=2)
    summary = start(tmp_path / "audited", audited)
    assert summary["expert_feedback"]["asked"] == 4
    assert [row["gate"]["trusted"] for row in rows(tmp_path / "audited")] == [False] * 2 + [
        True
    ] * 2
    assert summary["updates"]["batches"] == 2, "it learns from audits"
    never = make_plan(*dirs, max_disagreement=0.0, audit_fraction=0.0, episodes=4, batch_size=2)
    assert start(tmp_path / "never", never)["expert_feedback"]["asked"] == 4


@pytest.mark.parametrize("mode", ["never", "always", "published"])
def test_other_gates(dirs, tmp_path, mode):
    summary = start(tmp_path / mode, make_plan(*dirs, gate=mode, episodes=4))
    steps = {"never": 0, "always": 4}.get(mode)
    if steps is None:
        assert summary["updates"]["steps"] >= 1
    else:
        assert summary["updates"]["steps"] == steps
    first, last = summary["probe"]["before"], summary["probe"]["after"]
    assert (first == last) == (mode == "never")


def test_good_answers_are_left_as_they_are(dirs, tmp_path):
    summary = start(tmp_path / "run", make_plan(*dirs, target_score=-1.0, episodes=2))
    for row in rows(tmp_path / "run"):
        if row["score"] is None:
            assert row["revised"]
        else:
            assert row["final"]["text"] == row["answer"]["text"] and not row["revised"]
    assert summary["episodes"] == 2


def test_combined_score():
    assert combined_score(1.0, 0.0, 0.65) == pytest.approx(1 / 1.65)
    assert combined_score(-1.0, 1.0, 0.65) == pytest.approx(-0.35 / 1.65)
    assert combined_score(None, 0.3, 0.65) == 0.3
    assert combined_score(0.4, None, 0.65) == 0.4
    assert combined_score(None, None, 0.65) is None


def test_on_policy_fraction(dirs, tmp_path):
    start(tmp_path / "run", make_plan(*dirs, on_policy_fraction=1.0, gate="always", episodes=4))
    found = rows(tmp_path / "run")
    assert all(row["gate"]["on_policy"] for row in found)
    assert all("lm" not in row["gate"]["losses_before"] for row in found)


def test_a_student_that_diverges_ends_the_run_with_a_message(dirs, tmp_path):
    plan = make_plan(*dirs, lora_rate=1e9, max_grad_norm=0.0)
    with pytest.raises(UserError, match=r"diverged in batch 1.*--lora-rate 1e\+09"):
        start(tmp_path / "run", plan)
    assert newest_checkpoint(tmp_path / "run")[0].batch == 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        pytest.param({}, "log-probabilities", id="before a text's row"),
        pytest.param({"order": "learn-last"}, "loss", id="before a checkpoint"),
        pytest.param(
            {"order": "learn-last", "checkpoint_every": 4}, "log-probabilities", id="in a batch"
        ),
        pytest.param(
            {"order": "learn-last", "checkpoint_every": 4, "episodes": 1}, "loss", id="at the end"
        ),
    ],
)
def test_a_student_that_diverges_between_probe_evaluations(dirs, tmp_path, options, what):
    plan = make_plan(
        *dirs,
        **{"episodes": 3, "checkpoint_every": 1, **options},
        lora_rate=1e30,
        max_grad_norm=0.0,
        batch_size=1,
        kd_steps=1,
        probe_every=2,
        gate="always",
    )
    for _ in range(2):  # a resume ends as the run did
        with pytest.raises(UserError, match=f"diverged in batch 1: its .*{what}.* not finite"):
            start(tmp_path / "run", plan)
        assert newest_checkpoint(tmp_path / "run")[0].batch == 0


def test_looking_at_the_student_before_each_checkpoint_changes_nothing(dirs, tmp_path):
    found = []
    for every in (1, 2):
        plan = make_plan(
            *dirs,
            episodes=4,
            probe_every=8,
            checkpoint_every=every,
            lora_dropout=0.2,
            gate="always",
        )
        start(tmp_path / str(every), plan)
        found.append(tmp_path / str(every))
    for name in (runs.EPISODES, runs.METRICS):
        assert rows(found[0], name) == rows(found[1], name)
    one, other = map(weights, found)
    assert all((one[name] == other[name]).all() for name in one)


def test_stopping_before_the_first_batch(finished, tmp_path):
    folder, plan, _, _ = finished
    answers = iter([True])
    assert start(tmp_path / "run", plan, stop=lambda: next(answers)) is None
    assert rows(tmp_path / "run") == []
    start(tmp_path / "run", plan)
    assert_same(folder, tmp_path / "run")


def test_a_harmed_probe_set_is_made_again(finished, stopped):
    (folder, plan, _, _), target = finished, stopped
    arrays = target / "probe.safetensors"
    data = bytearray(arrays.read_bytes())
    data[-400:] = bytes(400)
    arrays.write_bytes(data)
    start(target, plan)
    assert_same(folder, target)


def test_the_adapter_may_be_pointed_to_another_base(finished, stopped):
    (folder, plan, _, _), target = finished, stopped
    config = target / "checkpoints" / "last" / "adapter_config.json"
    config.write_text(config.read_text().replace("student", "elsewhere"))
    start(target, plan)
    assert_same(folder, target)


def test_conversations_of_different_lengths_hold_their_own_caches_only(dirs, tmp_path):
    """What mlx-lm hands out is a lazy slice of a whole batch; kept so, it would hold all of it."""
    pair = open_pair(make_plan(*dirs))
    tokenizer = pair.expert.tokenizer
    # A third of all tokens end a turn, so the turns end at many different steps.
    tokenizer._eos_token_ids = set(range(0, 400, 25))
    prompts = [first_prompt(pair.expert, f"How many {word}?") for word in "abcdefgh"]
    mx.clear_cache()
    before = mx.get_active_memory()
    turns = generate(
        pair.expert, [Conversation()] * 8, prompts, Sampling(60, temperature=1.0, seed=3)
    )
    held = mx.get_active_memory() - before
    needed = sum(c.keys.nbytes + c.values.nbytes for t in turns for c in t.conversation.cache)
    assert len({len(turn.tokens) for turn in turns}) > 3
    assert held < 1.5 * needed + 1e5
    turns = generate(
        pair.expert, [Conversation()] * 8, prompts, Sampling(60), GenerateOptions(keep=False)
    )
    assert all(turn.conversation.cache is None for turn in turns)


def test_padding_of_the_vocabulary_is_never_written(dirs, tmp_path):
    """The expert has rows that the student has not; they mean nothing and must not be drawn."""
    wide = make_model_dir(tmp_path / "wide", arch="qwen2", hidden=32, layers=2, vocab_size=1600)
    narrow = make_model_dir(
        tmp_path / "narrow", arch="qwen2", hidden=16, layers=2, vocab_size=448, seed=1
    )
    plan = make_plan(wide, narrow, answer_temperature=1.0, student_temperature=1.0, episodes=4)
    pair = open_pair(plan)
    assert pair.expert.vocab == pair.student_lm.vocab == 400
    prompts = [first_prompt(pair.expert, "Hi")] * 4
    turns = generate(pair.expert, [Conversation()] * 4, prompts, Sampling(40, 1.0))
    assert max(max(turn.tokens) for turn in turns) < 400
    start(tmp_path / "one", plan)
    start(tmp_path / "two", plan)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_log_changed_by_something_else_is_refused(finished, tmp_path):
    folder, plan, _, _ = finished
    target = tmp_path / "run"
    shutil.copytree(folder, target, symlinks=True)
    (target / runs.EPISODES).write_text("")
    with pytest.raises(UserError, match="no checkpoint can be gone back to"):
        start(target, plan)


def test_the_answer_filter_decides_what_counts(dirs, tmp_path):
    """More tokens, drawn at random, hold digits; without #### the strict way reads no answer."""
    options = {"episodes": 4, "max_answer_tokens": 40, "answer_temperature": 2.0}
    for how in ("auto", "strict"):
        start(tmp_path / how, make_plan(*dirs, answer_filter=how, **options))
    auto, strict = rows(tmp_path / "auto"), rows(tmp_path / "strict")
    assert [row["answer"]["text"] for row in auto] == [row["answer"]["text"] for row in strict]
    assert any(row["answer"]["final"] for row in auto)
    assert not any(row["answer"]["final"] for row in strict)


def test_phases_move_the_weight_and_a_resumed_run_moves_it_alike(dirs, tmp_path):
    """Batches 0 to 3 of 4, the move from 1/4 to 3/4: 1, 1, 0.55 and 0.1 against 0.1, 0.1, ..."""
    losses = ["lm", "answer", "reasoning", "attention"]
    plan = make_plan(*dirs, losses=losses, loss_weights="phases", gate="always")
    start(tmp_path / "whole", plan)
    found = [row["weights"] for row in rows(tmp_path / "whole", runs.METRICS)]
    for weights_then, (first, later) in zip(
        found, [(1, 0.1), (1, 0.1), (0.55, 0.55), (0.1, 1)], strict=True
    ):
        total = 1 + first + 2 * later
        expected = {"lm": 1, "answer": first, "reasoning": later, "attention": later}
        assert weights_then == pytest.approx({n: v / total for n, v in expected.items()})
    # Amid the move.
    answers = iter([False, False, False, True])
    start(tmp_path / "stopped", plan, stop=lambda: next(answers))
    start(tmp_path / "stopped", plan)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_what_each_loss_counts_can_be_chosen(dirs, tmp_path):
    options = {"episodes": 4, "losses": ["lm", "score", "attention"]}
    found = {}
    for how in ("fixed", "ema", "phases", "both"):
        start(tmp_path / how, make_plan(*dirs, loss_weights=how, **options))
        found[how] = [row["weights"] for row in rows(tmp_path / how, runs.METRICS)]
    assert all(w == dict.fromkeys(w, 1 / 3) for w in found["fixed"])
    assert found["ema"][0] == dict.fromkeys(found["ema"][0], 1 / 3)
    assert found["ema"][-1] != found["ema"][0]
    assert found["both"][0] == pytest.approx(found["phases"][0])
    assert found["both"][-1] != pytest.approx(found["phases"][-1], rel=1e-6)


def test_the_losses_on_solutions_learn_from_right_answers(tmp_path):
    """Of what the trained pair answers, right and wrong, only the right is learned from."""
    losses = {"losses": ["logit", "reasoning"], "gate": "always", "kd_steps": 1}
    # Hot enough for the expert to err.
    answers = {"answers_by": "expert", "answer_temperature": 2.0}
    sizes = {"episodes": 8, "batch_size": 4, "probe_size": 8, "exam_size": 0}
    sizes |= {"max_feedback_tokens": 88, "max_merge_tokens": 16}
    plan = plan_of(override(preset("tiny"), losses | answers | sizes, "test"))
    summary = start(tmp_path / "run", plan)
    found = rows(tmp_path / "run")
    assert sum(row["correct_after"] for row in found) > len(found) / 2
    assert set(summary["probe"]["before"]) == {"logit", "reasoning"}
    updates = [u for row in rows(tmp_path / "run", runs.METRICS) for u in row["updates"]]
    # Those of a batch are learned from in the next one's update.
    assert "reasoning" not in updates[0]["losses"] and updates[1]["losses"]["reasoning"] > 0
    samples = json.loads((tmp_path / "run" / "probe.json").read_text())["samples"]
    solved = summary["headroom"]["expert_right"]
    # Each problem's feedback, and the solution where it is right.
    assert 0 < solved < 8
    assert sorted(bool(sample["steps"]) for sample in samples) == [False] * 8 + [True] * solved
    again = start(tmp_path / "run", plan)
    assert again["probe"] == summary["probe"]
