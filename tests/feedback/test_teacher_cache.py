"""The teacher cache: entries found by what is in them, never damaged ones, and no teacher asked."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_fd import runs
from mlx_fd.config import Config, LossOptions
from mlx_fd.errors import UserError
from mlx_fd.feedback import samples
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.samples import cache_fingerprint, read_text
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.models.backend import backend
from mlx_fd.models.conversation import Conversation, prefill
from mlx_fd.models.loading import load
from mlx_fd.runs.events import BatchDone, Warned
from mlx_fd.runs.manifest import check_same, flat_options
from support.draws import ALL
from support.loops import Killed, assert_same, count_syncs, rows, start
from support.pairs import make_dirs, make_plan
from support.tiny import make_model_dir

OPTIONS = LossOptions(teacher_top_k=7)
PROMPT, TARGET = (5, 6, 7), (8, 9, 10, 11)
EPOCHS = {"teacher_top_k": 16, "epochs": 3, "episodes": 4, "checkpoint_every": 1, "gate": "always"}


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    return make_dirs(tmp_path_factory.mktemp("pair"), layers=(2, 1))


@pytest.fixture(scope="module")
def pair(dirs):
    return open_pair(make_plan(*dirs))


def cache_of(folder, pair, options=OPTIONS):
    warnings = []
    return TeacherCache(folder, cache_fingerprint(pair, options), warnings.append), warnings


def entry(cache, pair, prompt=PROMPT, target=TARGET, options=OPTIONS):
    return read_text(pair, Conversation(), prompt, target, options, cache).arrays()


def same(one, two):
    assert one.keys() == two.keys()
    return all(mx.array_equal(one[name], two[name]) for name in one)


@pytest.fixture
def no_expert(monkeypatch):
    """From here on the expert must not read."""

    def read(*args, **options):
        raise AssertionError("the expert was asked")

    return lambda: monkeypatch.setattr(samples, "forward", read)


def test_an_entry_comes_back_to_the_last_bit_without_the_expert(tmp_path, pair, no_expert):
    options = dataclasses.replace(OPTIONS, losses=("hidden", "logit", "attention"))
    cache, warnings = cache_of(tmp_path, pair, options)
    first = entry(cache, pair, options=options)
    assert {"top_k.values", "pooled.0", "attention.0"} <= first.keys()
    no_expert()
    again, _ = cache_of(tmp_path, pair, options)
    assert same(entry(again, pair, options=options), first)
    with pytest.raises(AssertionError, match="was asked"):
        entry(cache, pair, target=TARGET[:-1], options=options)
    with pytest.raises(AssertionError, match="was asked"):
        entry(cache, pair, prompt=PROMPT[1:], options=options)
    assert not warnings
    [path] = tmp_path.iterdir()
    assert path.stat().st_size < 20_000


def test_a_token_moved_from_prompt_to_text_is_another_entry(tmp_path, pair):
    cache, _ = cache_of(tmp_path, pair)
    entry(cache, pair)
    entry(cache, pair, (*PROMPT, TARGET[0]), TARGET[1:])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_top_k": 8},
        {"loss_temperature": 1.0},
        {"hidden_layers": "last"},
        {"losses": ("logit", "attention")},
    ],
)
def test_other_options_are_other_entries(pair, change):
    assert cache_fingerprint(pair, dataclasses.replace(OPTIONS, **change)) != cache_fingerprint(
        pair, OPTIONS
    )


def test_another_expert_or_quantisation_is_another_teacher(tmp_path, pair):
    known = cache_fingerprint(pair, OPTIONS)

    def teacher(**changes):
        path = make_model_dir(tmp_path / f"m{len(changes)}{changes.get('seed')}", **changes)
        expert = load(path, dequantize="never")
        return cache_fingerprint(dataclasses.replace(pair, expert=expert), OPTIONS)

    one = teacher(hidden=64)
    seeded = teacher(hidden=64, seed=1)
    quantised = teacher(hidden=64, quantize=(4, 32), dtype="float16")
    assert len({json.dumps(t) for t in (known, one, seeded, quantised)}) == 4
    assert quantised["quantized"] and not one["quantized"]


def test_outputs_of_other_exponentials_are_other_entries():
    code = (
        "import json; from mlx_fd.models.backend import backend; backend();"
        "from mlx_fd.feedback.samples import reader_fingerprint;"
        "from mlx_fd.models.loading import load; from mlx_fd.models.resolve import resolve;"
        "print(json.dumps(reader_fingerprint(load(resolve('tiny-student')))))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MLX_FD_CPU_MATH": value},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for value in ("on", "off")
    ]
    assert (said[0] != said[1]) is backend().on_cpu


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "foreign", "text", "renamed"])
def test_a_harmed_entry_is_passed_over_and_made_again(tmp_path, pair, harm):
    cache, warnings = cache_of(tmp_path, pair)
    first = entry(cache, pair)
    [path] = tmp_path.iterdir()
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[:-9])
    elif harm == "bit":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "foreign":
        mx.save_safetensors(str(path), {"top_k.values": mx.ones((4, 7))})
    elif harm == "text":
        path.write_text("not a tensor in sight")
    else:
        entry(cache, pair, PROMPT, (1, 2, 3))
        [other] = set(tmp_path.iterdir()) - {path}
        shutil.copy(other, path)
    assert same(entry(cache, pair), first)
    [warning] = warnings
    assert str(path) in warning and "reads this text again" in warning
    assert same(entry(cache, pair), first)
    assert len(warnings) == 1


def test_no_bit_of_an_entry_can_change_unseen(tmp_path):
    warnings = []
    cache = TeacherCache(tmp_path, {"teacher": 1}, warnings.append)
    arrays = {"top_k.values": mx.arange(12.0).reshape(3, 4), "pooled.0": mx.ones((4,))}
    cache.save(PROMPT, TARGET, arrays)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    harmed = [
        *(
            whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
            for at in range(len(whole))
        ),
        *(whole[:at] for at in range(0, len(whole), 7)),
    ]
    for number, content in enumerate(harmed, 1):
        path.write_bytes(content)
        assert cache.load(PROMPT, TARGET) is None
        assert len(warnings) == number
    path.write_bytes(whole)
    assert same(cache.load(PROMPT, TARGET), arrays)


def test_dying_while_an_entry_is_written_leaves_none_or_a_whole_one(tmp_path, pair, monkeypatch):
    seen = []
    for limit in (1, 2, 3):
        folder = tmp_path / str(limit)
        cache, warnings = cache_of(folder, pair)
        with monkeypatch.context() as patch:
            count_syncs(patch, limit)
            try:
                entry(cache, pair)
            except Killed:
                seen.append(limit)
        entry(cache, pair)
        assert not warnings
    assert seen == [1, 2]


def test_two_processes_write_the_same_entry(tmp_path, pair):
    """At once, many times: neither fails, and what is left is whole."""
    cache, warnings = cache_of(tmp_path, pair)
    arrays = entry(cache, pair)
    code = (
        "import sys, json, mlx.core as mx\n"
        "from pathlib import Path\n"
        "from mlx_fd.feedback.teacher_cache import TeacherCache\n"
        "arrays = mx.load(sys.argv[2])\n"
        "cache = TeacherCache(Path(sys.argv[1]), json.loads(sys.argv[3]), print)\n"
        "for _ in range(200):\n"
        "    cache.save((5, 6, 7), (8, 9, 10, 11), arrays)\n"
    )
    mx.save_safetensors(str(tmp_path / "arrays.safetensors"), arrays)
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    command += [str(tmp_path / "arrays.safetensors"), json.dumps(cache.teacher)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    shared = dataclasses.replace(cache, folder=tmp_path / "cache")
    assert same(shared.load(PROMPT, TARGET), arrays) and not warnings
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, pair):
    (tmp_path / "file").write_text("")
    cache, _ = cache_of(tmp_path / "file" / "cache", pair)
    with pytest.raises(UserError, match=r"cannot be written.*--teacher-cache") as error:
        entry(cache, pair)
    # The cache is no run.
    assert f"resume {cache.folder}" not in str(error.value)


def test_an_entry_does_not_depend_on_the_conversation_it_was_read_in(tmp_path, pair):
    """Other bits before a text are other last digits after it; the tokens are the same."""
    prompt = tuple(range(5, 60))
    _, after = prefill(pair.expert, Conversation(), prompt)
    for layer in after.cache:
        layer.keys = layer.keys * 1.001
    alone, _ = cache_of(tmp_path / "alone", pair)
    within, _ = cache_of(tmp_path / "within", pair)
    read = read_text(pair, after, prompt, TARGET, OPTIONS, within).arrays()
    assert same(read, entry(alone, pair, prompt))
    # Without a cache there is no second reading, and the conversation saves the first its prompt.
    assert not same(read_text(pair, after, prompt, TARGET, OPTIONS).arrays(), read)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, pair, monkeypatch):
    cache, _ = cache_of(tmp_path, pair)

    def full(path, arrays, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        with pytest.raises(UserError, match="No space left"):
            entry(cache, pair)
    assert list(tmp_path.iterdir()) == []


# --- epochs ---


@pytest.fixture(scope="module")
def whole(dirs, tmp_path_factory):
    """A run of three epochs, uninterrupted, what it told, and how often it flushed to the disk."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    events = []
    with pytest.MonkeyPatch.context() as patch:
        seen = count_syncs(patch, limit=0)
        summary = start(folder, make_plan(*dirs, **EPOCHS), events.append)
    return folder, summary, events, seen()


def test_later_epochs_learn_from_the_same_and_need_no_expert(whole, dirs, tmp_path, monkeypatch):
    folder, summary, events, _ = whole
    metrics = rows(folder, runs.METRICS)
    assert [row["batch"] for row in metrics] == list(range(6))
    assert [len(row["updates"]) for row in metrics] == [2] * 6
    assert len(rows(folder)) == 4 and summary["episodes"] == 4
    assert (summary["updates"]["batches"], summary["updates"]["steps"]) == (6, 12)
    done = [event for event in events if isinstance(event, BatchDone)]
    assert [(event.done, event.total) for event in done] == [(n, 12) for n in (2, 4, 6, 8, 10, 12)]
    assert not any(event.rows for event in done[2:])
    assert len({p.name for p in (folder / "teacher").iterdir()}) == 4
    error = summary["top_k"]
    assert error["k"] == 16 and 0 < error["tail_mass"] < 1 and error["missing_at_most"] > 0
    # The first epoch alone, then the others with an expert that must not read.
    target = tmp_path / "run"
    answers = iter([False, False, True])
    plan = make_plan(*dirs, **EPOCHS)
    assert start(target, plan, stop=lambda: next(answers)) is None

    def read(*args, **options):
        raise AssertionError("the expert was asked")

    monkeypatch.setattr(samples, "forward", read)
    assert start(target, plan) is not None
    assert_same(folder, target)


def test_a_later_epoch_without_a_cache_reads_again(dirs, tmp_path):
    """Whole distributions are not kept on the disk; what they teach is nearly the same."""
    kept = start(tmp_path / "kept", make_plan(*dirs, **{**EPOCHS, "teacher_top_k": 400}))
    read = start(tmp_path / "read", make_plan(*dirs, **{**EPOCHS, "teacher_top_k": 0}))
    assert not (tmp_path / "read" / "teacher").exists() and "top_k" not in read
    for name, value in kept["probe"]["after"].items():
        assert read["probe"]["after"][name] == pytest.approx(value, rel=1e-3)


def test_dying_at_any_flush_of_a_run_with_a_cache_changes_nothing(
    whole, dirs, tmp_path, monkeypatch
):
    plan, total = make_plan(*dirs, **EPOCHS), whole[3]
    for limit in range(3, total, total // (6 if ALL else 3)):
        target = tmp_path / f"died{limit}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            count_syncs(patch, limit)
            start(target, plan)
        start(target, plan)
        assert_same(whole[0], target)


def test_a_harmed_entry_does_not_end_a_run(whole, dirs, tmp_path):
    target = tmp_path / "run"
    answers = iter([False, False, True])
    plan = make_plan(*dirs, **EPOCHS)
    start(target, plan, stop=lambda: next(answers))
    path = sorted((target / "teacher").iterdir())[0]
    os.truncate(path, path.stat().st_size // 2)
    events = []
    start(target, plan, events.append)
    assert sum(path.name in e.text for e in events if isinstance(e, Warned)) == 1
    # What is read again is the same to the last bit.
    assert_same(whole[0], target)


def test_a_run_whose_cache_is_gone_is_the_same_run(whole, dirs, tmp_path):
    """It stops in its second epoch, and goes on without anything that the expert said."""
    target = tmp_path / "run"
    answers = iter([False, False, False, True])
    plan = make_plan(*dirs, **EPOCHS)
    assert start(target, plan, stop=lambda: next(answers)) is None
    for path in (target / "teacher").iterdir():
        path.unlink()
    left = target / "teacher" / ".tmp-0123456789abcdef.safetensors"
    left.write_bytes(b"half")
    assert start(target, plan) is not None
    assert_same(whole[0], target)
    assert not left.exists() and list((target / "teacher").iterdir())


def test_runs_share_a_cache(dirs, tmp_path, monkeypatch):
    shared = {**EPOCHS, "teacher_cache": str(tmp_path / "cache"), "epochs": 1}
    start(tmp_path / "one", make_plan(*dirs, **shared))
    count = len(list((tmp_path / "cache").iterdir()))
    assert count == 4 and not (tmp_path / "one" / "teacher").exists()
    start(tmp_path / "two", make_plan(*dirs, **shared))
    assert_same(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "cache").iterdir())) == count


def test_a_run_of_epochs_cannot_be_made_longer(dirs):
    options = {
        **flat_options(Config()),
        **{"episodes": 8, "batch_size": 2, "epochs": 2, "loss_weights": "ema"},
        **{"lr_schedule": "constant", "gate": "always"},
    }
    part = {"sha256": "", "name": ""}
    old = dict.fromkeys(("expert", "student", "problems"), part)
    old |= {"options": options, "versions": {}, "backend": {}}
    longer = {**old, "options": {**options, "episodes": 16}}
    with pytest.raises(UserError, match="episodes was 8"):
        check_same(old, longer, dirs[0])
    for change in ({"epochs": 1}, {"epochs": 1, "loss_weights": "phases"}):
        changed = {**old, "options": {**options, **change}}
        longer = {**old, "options": {**options, **change, "episodes": 16}}
        if "loss_weights" in change:
            with pytest.raises(UserError, match="episodes was 8"):
                check_same(changed, longer, dirs[0])
        else:
            assert check_same(changed, longer, dirs[0]) == []
