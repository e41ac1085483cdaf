"""The command line as a user meets it: first what goes wrong, then what goes right."""

import contextlib
import fcntl
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mlx_fd import cli, runs
from mlx_fd.cli.app import _message
from mlx_fd.config import OPTIONS, PRESETS, read
from mlx_fd.files import digest_of, write_json
from mlx_fd.problems import arithmetic
from mlx_fd.registry import FORMATS
from mlx_fd.runs.checked import read_checked, with_digest
from mlx_fd.runs.checkpoints import newest_checkpoint
from mlx_fd.text import strip_control_chars
from support import FIXTURES, ROOT
from support.draws import ALL
from support.shell import (
    SCRIPT,
    Done,
    Piped,
    failed,
    in_terminal,
    limit_file_size,
    piped,
    shell,
)
from support.tiny import make_model_dir, make_tokenizer
from support.trained import make_run

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
COMMANDS = sorted(cli.cli.commands)


@pytest.fixture
def mlx_fd(monkeypatch, capsys):
    """Run a command in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["mlx-fd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Done(ended.value.code, out, err)

    return call


def problems(path: Path, count: int) -> Path:
    rows = [
        {
            "question": f"Tom has {i} apples and buys {i + 1} more. How many?",
            "answer": str(2 * i + 1),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with two tiny models and a file of problems."""
    folder = tmp_path_factory.mktemp("home")
    sizes = {"heads": 2, "kv_heads": 1}
    make_model_dir(folder / "expert", hidden=32, intermediate=64, **sizes)
    make_model_dir(folder / "student", hidden=16, layers=1, intermediate=32, seed=1, **sizes)
    problems(folder / "problems.jsonl", 60)
    return folder


SMALL = shlex.split(
    "--episodes 4 --batch-size 2 --max-answer-tokens 4 --max-feedback-tokens 4 "
    "--max-merge-tokens 3 "
    "--answers-by expert --answer-temperature 0 --score-at prompt --replay 0 "
    "--lr-schedule constant --max-disagreement 0 "
    "--probe-size 2 --lora-rank 2 --checkpoint-every 1 --kd-steps 1"
)


def tiny(home: Path) -> list[str]:
    """Arguments of a run of a second."""
    return [
        *("--expert", str(home / "expert"), "--student", str(home / "student")),
        *("--problems", str(home / "problems.jsonl"), *SMALL),
    ]


@pytest.fixture(scope="session")
def finished(home) -> Path:
    """A run that is done; not to be written to."""
    done = shell("loop", *tiny(home), "--out", "finished", cwd=home)
    assert done.status == 0, done
    return home / "finished"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def episodes(folder: Path) -> list[dict]:
    """Rows of a run, but for how long things took."""
    rows = runs.read_lines(folder / runs.EPISODES)
    return [
        {key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows
    ]


# Help


def test_help_needs_nothing_heavy():
    code = (
        "import sys, mlx_fd.cli\n"
        "heavy = {'mlx', 'mlx_lm', 'numpy', 'rich', 'datasets', 'transformers', 'tokenizers',"
        " 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_shows_examples_that_work(command, mlx_fd):
    done = mlx_fd(*filter(None, [command]), "--help")
    assert done.status == 0 and done.err == ""
    assert "Examples:" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    lines = [re.sub(r"^ +", "", line) for line in re.sub(r"\\\n +", "", done.out).splitlines()]
    examples = [line.split("   ")[0] for line in lines if line.startswith("mlx-fd ")]
    calls = [shlex.split(example.split(" < ")[0])[1:] for example in examples]
    assert calls and (command is None or command in {name for name, *_ in calls})
    for name, *arguments in calls:
        with cli.cli.commands[name].make_context(name, arguments):
            pass


def test_help_that_nobody_reads_to_the_end(home):
    line = f"{shlex.quote(SCRIPT)} loop --help | head -1"
    done = subprocess.run(
        ["bash", "-c", line], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.stdout == "Usage: mlx-fd loop [OPTIONS]\n" and done.stderr == ""
    # What `head` does only sometimes: it is gone before anything is written.
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [SCRIPT, "loop", "--help"], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert done.returncode == 0 and done.stderr == b""


def test_reference_page_is_up_to_date():
    script = ROOT / "scripts" / "make_reference.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ("lop", ["No such command 'lop'", "loop"]),
        ("loop --expret x", ["--expret", "--expert"]),
        ("loop --batch_size 2", ["--batch_size", "--batch-size"]),
        ("loop --episodes many", ["--episodes", "'many' is not a valid integer"]),
        ("loop --episodes 1.5", ["--episodes", "'1.5' is not a valid integer"]),
        ("loop --episodes 0", ["episodes must be at least 1, not 0"]),
        ("loop --ema-decay nan", ["ema_decay must be a finite number"]),
        ("loop --stop-threshold 2", ["stop_threshold must be at most 1"]),
        ("loop --kl forwrd", ["'--kl'", "'forward', 'reverse', 'jsd'", 'did you mean "forward"?']),
        ("loop --losses lm,logits", ["'--losses'", 'did you mean "logit"?']),
        ("loop --losses ,", ["',' names nothing", "name at least one of 'lm'"]),
        ("loop --scales 1,2", ["scales has 2 numbers for 4 losses"]),
        ("loop --scales 1,b", ["'1,b' is not a list of numbers"]),
        ("loop --preset quik", ["'quik' is not one of", 'did you mean "quick"?', *PRESETS]),
        ("loop --config none.toml", ["none.toml: cannot be read: No such file"]),
        ("loop --config", ["--config", "requires an argument"]),
        ("loop --out=", ["--out", "the path is empty"]),
        ("loop --split test", ["test problems", "--train-on-test"]),
        ("loop --split trian", ["no split 'trian'", "did you mean 'train'?"]),
        ("loop --episodes 7500", ["7473 problems", "at most 7465 episodes"]),
        ("loop --problems gsm9k", ["unknown problems 'gsm9k'", "did you mean 'gsm8k'?"]),
        ("loop --problems none.jsonl", ["none.jsonl: there is no such file"]),
        ("loop --expert qwen2.5-7b-4bt", ["Did you mean qwen2.5-7b-4bit", "this machine"]),
        ("loop --expert ./none --student ./none", ["the directory ./none does not exist"]),
        ("loop --expert smollm2-135m:layer=3", ["layer= is unknown", ":layers=K"]),
        ("resume", ["Missing argument 'RUN'"]),
        ("resume none", ["none: this is not a run directory", "manifest.json"]),
        ("feedback --problem 1 --answer 1", ["Missing argument 'MODEL'"]),
        ("feedback none --problem 1", ["Missing option '--answer'"]),
        ("feedback none --problem 1 --answer 1", ["there is no model none", "this machine"]),
        ("feedback none --problem 1 --answer 1 --tokens 0", ["--tokens", "1<=x"]),
        ("feedback none --problem '  ' --answer 1", ["--problem: is empty"]),
        ("feedback none --problem 1 --answer ''", ["--answer: is empty"]),
        ("feedback none --problem @none.txt --answer 1", ["@none.txt: cannot be read: No such"]),
        ("feedback none --problem - --answer -", ["only one of them can be standard input"]),
        ("export --out x", ["Missing argument 'SOURCE'"]),
        ("export tiny", ["Missing option '--out'"]),
        ("export none --out x", ["there is no model none", "this machine"]),
        ("export tiny --out x --format safetensors", ["'mlx', 'hf', 'gguf'"]),
        ("export tiny --out x --q-bits 3", ["'4', '8'"]),
        ("export tiny --out x --format gguf --q-bits 8", ["for gguf choose --gguf-type q8_0"]),
        ("export tiny --out x --adapter", ["a plain model, which has no adapter"]),
        ("export tiny --out none/../..", ["there is something in this folder"]),
    ],
)
def test_mistakes_are_explained(arguments, texts, mlx_fd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed(mlx_fd(*shlex.split(arguments)), *texts)
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(mlx_fd):
    done = mlx_fd("resume", "none", "--debug")
    assert done.status == 2 and done.out == ""
    assert "Traceback" in done.err and "read_manifest" in done.err
    assert done.err.splitlines()[-1].startswith("error: none: this is not a run directory")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("episodes = [1,\nseed 2", ["not a TOML file", "line 2"]),
        ("[gate]\nema_decy = 0.5", ["no option 'ema_decy'", 'did you mean "ema_decay"?']),
        ("[gat]\nema_decay = 0.5", ["no table [gat]", 'did you mean "gate"?']),
        ("[models]\nema_decay = 0.5", ["ema_decay belongs in [gate]"]),
        ('episodes = "4"', ["episodes must be a whole number, not '4'"]),
        ("episodes = true", ["episodes must be a whole number, not True"]),
    ],
)
def test_configuration_files_are_checked(content, texts, mlx_fd, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(content)
    failed(mlx_fd("loop", "--config", file), str(file), *texts)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("", ["is empty"]),
        ('{"question": "1+1?", "answer": "2"}\n{"question": ', [":2: not JSON", "--skip-bad-rows"]),
        ('{"question": "1+1?", "answer": "2"}\n{"question": "1+1?"}\n', [":2: no 'answer'"]),
        ('{"question": "1+1?", "answer": ""}\n', [":1: no 'answer'"]),
        ('{"question": "1+1?", "answer": "2"}\n', ["has 1 problems"]),
    ],
)
def test_problem_files_are_checked(content, texts, home, mlx_fd, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    done = mlx_fd("loop", *tiny(home), "--problems", file, "--out", tmp_path / "out")
    failed(done, str(file), *texts)
    assert not (tmp_path / "out").exists()


def harmed_model(home: Path, path: Path, harm: str) -> Path:
    shutil.copytree(home / "expert", path)
    weights = path / "model.safetensors"
    if harm == "no weights":
        weights.unlink()
    elif harm == "cut weights":
        os.truncate(weights, weights.stat().st_size // 2)
    elif harm == "cut header":
        os.truncate(weights, 4)
    elif harm == "other weights":
        shutil.copy(home / "student" / "model.safetensors", weights)
    elif harm == "config":
        (path / "config.json").write_text('{"model_type": ')
    elif harm == "architecture":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "gpt9"}))
    elif harm == "tokenizer":
        (path / "tokenizer.json").write_text("{")
    return path


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        ("no weights", "has no model*.safetensors"),
        ("cut weights", "is damaged or incomplete"),
        ("cut header", "is damaged or incomplete"),
        ("other weights", "cannot be loaded"),
        ("config", "config.json: cannot be read as JSON"),
        ("architecture", "gpt9"),
        ("tokenizer", "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("command", ["loop", "feedback"])
def test_harmed_models_are_explained(command, harm, text, home, mlx_fd, tmp_path):
    model = harmed_model(home, tmp_path / "harmed", harm)
    if command == "feedback":
        failed(mlx_fd("feedback", model, "--problem", "1+1?", "--answer", "2"), str(model), text)
        return
    done = mlx_fd("loop", *tiny(home), "--expert", model, "--out", tmp_path / "out", "--quiet")
    failed(done, str(model), text)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_together(home, mlx_fd, tmp_path):
    sizes = {"hidden": 16, "layers": 1, "intermediate": 32, "heads": 2, "kv_heads": 1}
    other = make_model_dir(tmp_path / "other", tokenizer=make_tokenizer(380), **sizes)
    base = make_model_dir(tmp_path / "base", chat_template=None, **sizes)
    attention = ["--student", other, "--losses", "attention"]
    failed(mlx_fd("loop", *tiny(home), *attention), "different tokenizers", "attention")
    failed(mlx_fd("loop", *tiny(home), "--student", base), str(base), "no chat template")
    failed(mlx_fd("loop", *tiny(home), "--student", ""), "no default student", "--student")


def test_too_little_memory(home, mlx_fd, tmp_path):
    file = problems(tmp_path / "p.jsonl", 20000)
    large = ["--problems", file, "--episodes", 19000, "--batch-size", 19000]
    done = mlx_fd("loop", *tiny(home), *large, "--max-answer-tokens", 1500)
    failed(done, "this run needs up to", "GiB are free", "It fits with --batch-size")
    # No more problems go together than there are.
    done = mlx_fd("loop", *tiny(home), "--batch-size", 10**9, "--out", tmp_path / "out")
    assert done.status == 0, done


@pytest.mark.parametrize("command", ["loop", "self-distill", "eval", "advantage"])
def test_problems_longer_than_the_context(command, home, mlx_fd, tmp_path):
    file = tmp_path / "long.jsonl"
    rows = [json.loads(line) for line in (home / "problems.jsonl").read_text().splitlines()[:20]]
    if command == "advantage":
        solution = arithmetic.load("validation").problems
        rows = [{"question": p.question, "answer": p.solution} for p in solution[:20]]
    for place, words in ((3, 2500), (7, 5000)):
        rows[place]["question"] += " and 1" * words
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ["--out", tmp_path / "out"]
    generation = ["--max-answer-tokens", 20, "--max-feedback-tokens", 20]
    arguments = {
        "loop": ["loop", *tiny(home), *generation, "--episodes", 18 - 2 - 2],
        "self-distill": [
            *("self-distill", "--method", "grpo", "--model", home / "student"),
            *(*generation[:2], "--episodes", 14, "--probe-size", 2, "--num-generations", 2),
            *("--lora-rank", 2),
        ],
        "eval": ["eval", home / "student", "--limit", 14, "--cache", tmp_path / "cache"],
        "advantage": ["advantage", "tiny-base", "--limit", 10, "--samples", 1],
    }[command]
    arguments = [*arguments, "--problems", file, *out]
    failed(
        mlx_fd(*arguments),
        *(" problems are too long for ", "context is 2048 tokens", "--skip-bad-rows"),
        *(f"{file}: ", "the longest, long-00007, has "),
    )
    assert not (tmp_path / "out").exists()
    if command == "eval":
        arguments += ["--limit", 2]
    if command == "advantage":
        arguments += ["--limit", 2, "--max-answer-tokens", 8, "--contexts", "reference"]
    done = mlx_fd(*arguments, "--skip-bad-rows")
    assert done.status == 0, done
    assert "2 of 20 problems are too long for" in done.flat and "they are left out" in done.flat
    if command != "eval":
        done = mlx_fd(*arguments, "--out", tmp_path / "other", "--max-answer-tokens", 2048)
        failed(done, "leaves no room for a problem; take a smaller --max-answer-tokens")


def test_instructions_longer_than_the_context(home, mlx_fd, tmp_path):
    file = tmp_path / "alpaca.json"
    rows = [{"instruction": "Count", "input": "", "output": "1"} for _ in range(3)]
    rows[1]["input"] = "1 and " * 3000
    file.write_text(json.dumps(rows))
    full = ["--suite", "full", "--limit", 3, "--instructions", file, "--cache", tmp_path / "cache"]
    done = mlx_fd("eval", home / "student", *full, "--out", tmp_path / "out")
    failed(done, f"{file}: 1 of 3 problems are too long", "the longest, alpaca-00001, has")
    assert not (tmp_path / "out").exists()


def test_a_problem_longer_than_the_context_is_not_judged(home, mlx_fd):
    long = "1 + 1 " * 2000
    done = mlx_fd("feedback", home / "student", "--problem", long, "--answer", "2")
    failed(done, "problem and answer have", "do not fit into the 2048 of", "smaller --tokens")
    done = mlx_fd(
        "feedback", home / "student", "--problem", "1?", "--answer", "2", "--tokens", 2048
    )
    failed(done, "leaves no room")


LATIN = b"K\xf6ln"


@pytest.mark.parametrize(
    "arguments",
    [
        ["feedback", "tiny", "--problem", LATIN, "--answer", "1"],
        ["feedback", "tiny", b"--problem=" + LATIN, "--answer", "1"],
        ["feedback", "tiny", "--problem", "1?", "--answer", LATIN],
        ["loop", "--preset", "tiny", "--out", LATIN],
        ["loop", "--preset", "tiny", "--problems", LATIN + b".jsonl"],
        ["self-distill", "--method", "grpo", "--out", LATIN],
        ["eval", "tiny", "--out", LATIN],
        ["eval", "tiny", "--cache", LATIN],
        ["export", "tiny", "--out", LATIN],
        ["compare", "x", "--out", LATIN],
        ["report", LATIN],
        ["resume", LATIN],
        ["advantage", LATIN],
    ],
)
def test_arguments_that_are_not_utf8(arguments, tmp_path):
    done = shell(*map(os.fsdecode, arguments), cwd=tmp_path)
    failed(done, "'K\\udcf6ln", "is not UTF-8 text")
    place = next(k for k, value in enumerate(arguments) if LATIN in os.fsencode(value))
    for option in (arguments[place - 1], arguments[place]):
        if b"--" in os.fsencode(option):
            assert os.fsencode(option).partition(b"=")[0].decode() in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["file", "stdin"])
def test_texts_that_are_not_utf8(how, home, tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"In K\xf6ln, 1 + 1?")
    problem = f"@{file}" if how == "file" else "-"
    # A locale of another century says nothing about the text.
    for locale in ("C", "C.UTF-8"):
        done = subprocess.run(
            [SCRIPT, "feedback", home / "student", "--problem", problem, "--answer", "2"],
            input=file.read_bytes(),
            env={**os.environ, "LC_ALL": locale},
            capture_output=True,
            check=False,
        )
        done = Done(done.returncode, done.stdout.decode(), done.stderr.decode())
        failed(done, f"--problem {problem}: cannot be read: it is not UTF-8 text (at byte 4)")


def test_a_current_folder_that_is_not_utf8(home, tmp_path):
    folder = tmp_path / os.fsdecode(LATIN)
    folder.mkdir()
    done = subprocess.run(
        [SCRIPT, "loop", *tiny(home), "--teacher-top-k", "4", "--teacher-cache", "cache"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "this name is not UTF-8 text" in done.stderr, done
    assert "a bug in mlx-fd" not in done.stderr


@pytest.mark.parametrize("value", [2**64, -1, "1" * 5000, "nan"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["loop", "--preset", "tiny"],
        ["self-distill", "--method", "grpo"],
        ["eval", "tiny"],
        ["advantage", "tiny-base"],
    ],
)
def test_seeds_that_are_none(arguments, value, mlx_fd):
    done = mlx_fd(*arguments, "--seed", value)
    failed(done)
    assert "seed" in done.err and len(done.err) < 6000


def test_counts_and_numbers_have_bounds(mlx_fd):
    for name, option in OPTIONS.items():
        if option.kind in (int, float) and option.section != "selfdistill":
            flag = "--" + name.replace("_", "-")
            done = mlx_fd("loop", "--preset", "tiny", flag, "9" * 50)
            failed(done, f"command line: {name} must be at most ")
    for arguments in (
        ["eval", "tiny", "--limit", 2**31],
        ["eval", "tiny", "--temperature", "nan"],
        ["eval", "tiny", "--temperature", "inf"],
        ["advantage", "tiny", "--samples", 2**31],
        ["advantage", "tiny", "--noise-level", "nan"],
        ["feedback", "tiny", "--problem", "1", "--answer", "1", "--tokens", 2**31],
        ["report", ".", "--episodes", 2**31],
        ["export", "tiny", "--out", "x", "--parity-problems", 1001],
        ["compare", "x", "--limit", -1],
    ):
        failed(mlx_fd(*arguments), f"Invalid value for '{arguments[-2]}'")


def test_nobodys_home(mlx_fd):
    done = mlx_fd("feedback", "tiny", "--problem", "@~nobody-at-all/x", "--answer", "1")
    failed(done, "--problem @~nobody-at-all/x: cannot be read")
    for arguments in (["advantage", "~nobody-at-all"], ["eval", "~nobody-at-all/x"]):
        failed(mlx_fd(*arguments), "home directory")


def test_help_says_what_options_are_here(mlx_fd):
    text = " ".join(mlx_fd("self-distill", "--help").out.split())
    assert "--model NAME Model to train" in text and "[default: tiny-base]" in text
    assert "Empty: none. [default: the method's]" in text and "[default: empty]" in text
    assert "default student" not in text and "2147483647" not in text
    assert "student lags" not in text
    for command in ("eval", "advantage", "compare", "loop", "self-distill"):
        assert "--skip-bad-rows" in mlx_fd(command, "--help").out


def test_out_that_cannot_be_used(home, mlx_fd, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")

    def out(path: object) -> Done:
        return mlx_fd("loop", *tiny(home), "--out", path)

    failed(out(tmp_path / "file"), "is a file", "choose another --out")
    failed(out(tmp_path / "file" / "run"), "is a file", "choose another --out")
    failed(out(tmp_path / "folder"), "something in this folder", "choose another --out")
    failed(out(run), "is already a run", f"mlx-fd resume {run}")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody can write in")
def test_out_that_cannot_be_written(home, tmp_path, mlx_fd):
    done = mlx_fd("loop", *tiny(home), "--out", "/proc/run", "--quiet")
    failed(done, "/proc/run")
    if os.geteuid() != 0:
        (tmp_path / "mine").mkdir(mode=0o500)
        done = mlx_fd("loop", *tiny(home), "--out", tmp_path / "mine" / "run")
        failed(done, "cannot be written", "choose another --out")


# Resuming


def test_a_finished_run_can_be_resumed(run, mlx_fd):
    before = (run / runs.EPISODES).read_bytes()
    summary = (run / runs.SUMMARY).read_bytes()
    done = mlx_fd("resume", run)
    assert done.status == 0 and f"results: {run}" in done.out
    assert "nothing left to do" in done.out
    assert (run / runs.EPISODES).read_bytes() == before
    assert (run / runs.SUMMARY).read_bytes() == summary


def test_a_run_whose_checkpoints_are_gone_is_refused_before_anything_is_loaded(run, mlx_fd):
    shutil.rmtree(run / runs.CHECKPOINTS)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    failed(
        mlx_fd("resume", run),
        "the run is finished (summary.json is there), its logs have 2 batches",
        "there are no checkpoints in checkpoints/. Nothing was changed.",
        f"mlx-fd resume {run} --redo-from-checkpoint",
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_held_by_another_process(run, mlx_fd, home):
    with (run / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        failed(mlx_fd("resume", run), "another mlx-fd process is writing this run")
    assert mlx_fd("resume", run).status == 0


@pytest.mark.parametrize(
    ("harm", "texts"),
    [
        ("expert", ["began with another expert"]),
        ("student", ["began with another student"]),
        ("problems", ["began with another problems"]),
    ],
)
def test_a_run_whose_models_or_problems_changed(harm, texts, home, mlx_fd, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("expert", "student"):
        shutil.copytree(home / name, mine / name)
    shutil.copy(home / "problems.jsonl", mine)
    done = mlx_fd("loop", *tiny(mine), "--out", mine / "run", "--quiet")
    assert done.status == 0, done
    if harm == "problems":
        problems(mine / "problems.jsonl", 61)
    else:
        shutil.rmtree(mine / harm)
        sizes = {"layers": 1, "intermediate": 32, "heads": 2, "kv_heads": 1}
        make_model_dir(mine / harm, hidden=16, seed=9, **sizes)
    failed(mlx_fd("resume", mine / "run"), str(mine / "run"), *texts)
    feedback = mlx_fd("feedback", mine / "run", "--problem", "1?", "--answer", "1", "--tokens", 2)
    if harm == "student":
        failed(feedback, "is not the one that was trained")
    else:
        assert feedback.status == 0, feedback


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        ("batch_size = 2", "batch_size = 4", ["batch_size was 2", "is 4 now", "--config"]),
        ("seed = 0", "seed = 1", ["seed was 0", "is 1 now"]),
        ("lora_rank = 2", "lora_rank = 4", ["lora_rank was 2"]),
        ('split = "train"', 'split = "test"', ["--train-on-test"]),
        ("seed = 0", "seed = zero", ["not a TOML file"]),
        ("seed = 0", "sed = 0", ["no option 'sed'"]),
        ("seed = 0", "seed = -1", ["seed must be at least 0"]),
    ],
)
def test_a_run_whose_configuration_was_edited(old, new, texts, run, mlx_fd):
    config = run / runs.CONFIG
    text = config.read_text()
    assert text.count(old) == 1
    config.write_text(text.replace(old, new))
    before = (run / runs.EPISODES).read_bytes()
    failed(mlx_fd("resume", run), *texts)
    assert (run / runs.EPISODES).read_bytes() == before


def test_a_run_can_be_made_longer(run, home, mlx_fd, tmp_path):
    config = run / runs.CONFIG
    text = config.read_text().replace("episodes = 4", "episodes = 7")
    config.write_text(text.replace("micro_batch = 4", "micro_batch = 1"))
    before = (run / runs.EPISODES).read_bytes()
    assert mlx_fd("resume", run).status == 0
    assert (run / runs.EPISODES).read_bytes().startswith(before)
    longer = [row["id"] for row in episodes(run)]
    assert len(set(longer)) == 7
    config.write_text(config.read_text().replace("episodes = 7", "episodes = 9"))
    # The last batch had one problem only: nothing may be left out.
    failed(mlx_fd("resume", run), "episodes was 7", "is 9 now")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"expert": 3}'])
def test_a_manifest_that_was_harmed(content, run, mlx_fd):
    (run / runs.MANIFEST).write_text(content)
    failed(mlx_fd("resume", run), "manifest.json")


def test_relative_names_mean_the_same_elsewhere(home, mlx_fd, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    out = tmp_path / "run"
    names = ["--expert", "expert/", "--student", "./student", "--problems", "problems.jsonl"]
    assert mlx_fd("loop", *names, *SMALL, "--out", out, "--quiet").status == 0
    config = read(out / runs.CONFIG)
    assert config.models.expert == str(home / "expert")
    assert config.models.student == str(home / "student")
    assert config.problems.problems == str(home / "problems.jsonl")
    monkeypatch.chdir(tmp_path)
    assert mlx_fd("resume", "run", "--quiet").status == 0
    done = mlx_fd("feedback", "run/", "--problem", "1?", "--answer", "1", "--tokens", 2)
    assert done.status == 0


def test_a_tilde_is_the_home_directory(home, mlx_fd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(home)
    for name in ("expert", "student", "problems.jsonl"):
        (tmp_path / name).symlink_to(home / name)
    names = ["--expert=~/expert:layers=1", "--student=~/student", "--problems=~/problems.jsonl"]
    done = mlx_fd("loop", *names, *SMALL, "--out=~/run", "--quiet")
    assert done.status == 0, done
    assert read(tmp_path / "run" / runs.CONFIG).models.expert == f"{home}/expert:layers=1"
    assert mlx_fd("resume", "~/run", "--quiet").status == 0
    (tmp_path / "answer").write_text("2")
    asked = ["--problem", "1+1?", "--answer", "@~/answer", "--tokens", 2]
    assert mlx_fd("feedback", "~/run", *asked).status == 0
    assert not (home / "~").exists()


# No network, no backend


def test_without_a_network_it_fails_at_once(tmp_path):
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    begin = time.monotonic()
    done = shell("loop", "--expert", "qwen2.5-7b-4bit", cwd=tmp_path, env=env)
    assert time.monotonic() - begin < 5
    failed(done, "qwen2.5-7b-4bit", "hub cannot be reached", "this machine")


@pytest.fixture
def no_mlx(tmp_path) -> dict[str, str]:
    """An environment in which MLX has no backend."""
    package = tmp_path / "broken" / "mlx"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object')")
    return {"PYTHONPATH": str(package.parent)}


# compare runs engines that need no MLX, pareto and report read files; they have their own tests.
@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"compare", "pareto", "report"}))
def test_without_a_backend_every_command_says_what_to_install(command, no_mlx, finished, tmp_path):
    arguments = {
        "resume": [finished],
        "feedback": [finished, "--problem", "1", "--answer", "1"],
        "tutor": [finished, "--problem", "1", "--attempt", "1"],
        "serve": ["--student", finished],
        "cascade": ["calibrate", finished, "--risk", 0.1],
        "export": [finished, "--out", "exported"],
        "advantage": ["tiny-base"],
        "eval": ["tiny"],
        "self-distill": ["--method", "grpo"],
    }.get(command, [])
    done = shell(command, *arguments, cwd=tmp_path, env=no_mlx)
    assert done.status != 0 and "Traceback" not in done.err and "a bug in mlx-fd" not in done.err
    assert 'pip install "mlx-fd[cpu]"' in done.flat and '"mlx-fd[cuda]"' in done.flat
    assert "libmlx.so: cannot open shared object" in done.flat
    if ALL or command == "loop":
        done = shell(command, "--help", cwd=tmp_path, env=no_mlx)
        assert done.status == 0 and "Examples:" in done.out


# Exports


def test_export_of_a_run(home, finished, mlx_fd, tmp_path):
    out = tmp_path / "out"
    done = mlx_fd("export", finished, "--out", out, "--archive", "--parity-problems", 2)
    assert (done.status, done.err) == (0, "")
    assert re.search(r"compared on \d+ tokens: .* mean KL .*e-1\d, same top-1", done.out)
    assert re.search(rf"wrote \d+ files, .* MB, to {out}", done.out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert names == {
        *("config.json", "model.safetensors", "model.safetensors.index.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "score_head.safetensors"),
        *("parity/bundle.json", "parity/reference.safetensors"),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.tar"]
    again = mlx_fd("export", finished, "--out", out)
    failed(again, str(out), "something in this folder")
    failed(mlx_fd("export", finished, "--out", tmp_path / "out.tar"), "a link or a file")
    # An archive with this name at its top was written, and could not be opened.
    odd = mlx_fd("export", finished, "--out", tmp_path / "ex\u30001", "--archive")
    failed(odd, "is not for an archive")


def test_export_for_a_script(mlx_fd, tmp_path):
    # Random and strong: 8 bits keep it.
    run = make_run(tmp_path / "run", "tiny-student")
    arguments = ["--format", "gguf", "--gguf-type", "q8_0", "--no-parity", "--json"]
    done = mlx_fd("export", run, "--out", tmp_path / "out", *arguments)
    assert done.status == 0, done
    found = json.loads(done.out)
    assert found["gguf_types"].keys() == {"q8_0"} and found["gguf_carried_over"] == 0
    assert "model-q8_0.gguf" in found["files"] and found["positions"] > 100
    assert (found["source"], found["base"]) == ("run", "tiny-student")
    # What is exported is the student, far from its base, and not the base itself.
    assert 0 < found["mean_kl"] < found["mean_kl_of_base"] / 10


def test_export_to_a_full_disk(finished, tmp_path):
    full = partial(limit_file_size, 20000)
    for form in FORMATS:
        # All bits: fewer would lose the little that this run learned.
        bits = ("--gguf-type", "f32") if form == "gguf" else ("--dtype", "float32")
        command = ("export", finished, "--out", "x", "--format", form, *bits)
        done = shell(*command, cwd=tmp_path, before=full)
        assert done.status == 2 and done.out == ""
        assert f"error: {tmp_path / 'x'}: cannot be written" in done.err
        assert list(tmp_path.iterdir()) == []


# What a run prints


def test_json_is_all_that_standard_output_gets(home, run, mlx_fd, tmp_path):
    done = mlx_fd("loop", *tiny(home), "--out", tmp_path / "out", "--json")
    summary = json.loads(done.out)
    assert done.status == 0 and summary["done"] is True
    assert summary["run"] == str(tmp_path / "out") and summary["episodes"] == 4
    assert "run directory" in done.err
    saved, _ = read_checked(tmp_path / "out" / runs.SUMMARY)
    assert saved.items() <= summary.items()
    done = mlx_fd("loop", *tiny(home), "--out", tmp_path / "quiet", "--json", "--quiet")
    assert json.loads(done.out)["episodes"] == 4
    assert all(line.startswith("warning: ") for line in done.err.splitlines())
    assert json.loads(mlx_fd("resume", run, "--json").out)["episodes"] == 4
    rows = json.loads(mlx_fd("models", "--json").out)
    assert {"name", "source", "student", "here", "note"} == set(rows[0])
    rows = json.loads(mlx_fd("doctor", "--json").out)
    assert {"what", "state", "text"} == set(rows[0])


def test_quiet_prints_warnings_and_the_result(home, mlx_fd, tmp_path):
    done = mlx_fd("loop", *tiny(home), "--out", tmp_path / "out", "--quiet")
    warnings, _, result = done.out.partition("Summary")
    assert all(line.startswith("warning: ") for line in warnings.splitlines())
    assert "first answers right" in result and result.endswith(f"results: {tmp_path}/out\n")


def test_a_log_file_gets_plain_lines(home, tmp_path):
    # A folder with brackets: no markup of the terminal library, and whole however long it is.
    out = tmp_path / "[red]run[/red]" / ("long" * 30)
    done = shell("loop", *tiny(home), "--out", out, cwd=home)
    assert done.status == 0 and done.err == ""
    assert not CONTROL.search(done.out)
    lines = done.out.splitlines()
    assert lines[0] == f"run directory: {out}" and lines[-1] == f"results: {out}"
    batches = [line for line in lines if re.match(r"\d+/4 ", line)]
    assert [line.split()[0] for line in batches] == ["2/4", "4/4"]
    assert all("ETA" in line for line in batches)


def shown(*arguments: object, cwd: Path, **env: str) -> tuple[int, str]:
    """The command's exit status, and what it wrote to a terminal."""
    process, terminal = in_terminal(*arguments, cwd=cwd, env=env)
    seen = b""
    while select.select([terminal], [], [], 120)[0]:
        with contextlib.suppress(OSError):
            if block := os.read(terminal, 65536):
                seen += block
                continue
        break
    os.close(terminal)
    process.join(60)
    return process.exitcode, seen.decode()


def plain(seen: str) -> str:
    """What came to a terminal without its control sequences."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", seen)


def test_a_terminal_gets_a_live_panel(home, tmp_path):
    arguments = ["loop", *tiny(home), "--out"]
    status, seen = shown(*arguments, tmp_path / "a", cwd=home)
    assert status == 0
    for text in ("╭─ mlx-fd loop", "loss (held out)", "gate:", "episodes", "4/4"):
        assert text in plain(seen)
    assert "\x1b[36m" in seen  # the gate's state in colour
    # The cursor comes back, and the summary follows the panel.
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1
    end = seen.partition("\x1b[?25h")[2]
    assert "final answers right" in end and "\x1b[" not in end.partition("results:")[2]
    status, seen = shown(*arguments, tmp_path / "b", cwd=home, NO_COLOR="1")
    assert status == 0 and "╭─ mlx-fd loop" in plain(seen)
    assert not re.search(r"\x1b\[[\d;]*3\d[;m]", seen)
    status, seen = shown(*arguments, tmp_path / "c", cwd=home, TERM="dumb")
    assert status == 0 and not CONTROL.search(seen.replace("\r\n", "\n"))
    assert "2/4  right" in seen


# Stopping


def started(home: Path, *arguments: object, before: Callable[[], object] | None = None):
    """A run in a process of its own."""
    return piped("loop", *tiny(home), *arguments, cwd=home, before=before)


def read_until(text: str, run: Piped) -> str:
    """What a run writes up to a line with this text."""
    seen = []
    for line in run.out:
        seen.append(line)
        if text in line:
            return "".join(seen)
    return pytest.fail(f"{text!r} did not come: {seen} {run.err.read()}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_the_run_after_its_batch(number, status, home, mlx_fd, tmp_path):
    out = tmp_path / "the run"
    with started(home, "--out", out, "--episodes", 20, "--checkpoint-every", 1000) as run:
        read_until("2/20", run)
        run.send(number)
        done = run.rest()
    assert done.status == status
    assert done.err == f"stopped; continue with: mlx-fd resume '{out}'\n"
    assert "stopping after this batch" in done.out and "Summary" not in done.out
    batches = len(runs.read_lines(out / runs.METRICS))
    assert 1 <= batches < 10 and len(episodes(out)) == 2 * batches
    checkpoint, broken = newest_checkpoint(out)
    assert checkpoint.batch == batches and not broken
    done = mlx_fd("resume", out)
    assert done.status == 0 and f"resuming after batch {batches}\n" in done.out
    assert [row["episode"] for row in episodes(out)] == list(range(20))


@pytest.mark.parametrize("quiet", [False, True])
def test_the_second_signal_ends_the_process_at_once(quiet, home, mlx_fd, tmp_path):
    # The look at the held-out problems takes many seconds with answers of this length.
    out = tmp_path / "out"
    long = ["--max-answer-tokens", 1400, "--probe-size", 8]
    hint = f"mlx-fd resume {out}"
    with started(home, "--out", out, *long, *(["--quiet"] if quiet else [])) as run:
        if quiet:
            wait_until((out / runs.MANIFEST).exists)
            run.send(signal.SIGINT)
            assert hint in run.err.readline()
        else:
            read_until("first probe evaluation", run)
            run.send(signal.SIGINT)
            stopping = read_until("stopping after this batch; Ctrl-C again stops at once", run)
            assert hint in stopping.splitlines()[-1]
        begin = time.monotonic()
        run.send(signal.SIGINT)
        done = run.rest()
    # As a shell sees it: ended by the signal, status 130.
    assert done.status == -signal.SIGINT and done.err == ""
    assert time.monotonic() - begin < 5


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("which", ["run", "command"])
@pytest.mark.parametrize("call", ["lock", "mlx"])
def test_the_second_signal_ends_the_process_in_a_long_call_into_c(which, call):
    work = {
        # Never returns, whatever signals come.
        "lock": "import ctypes; lock = ctypes.CDLL(None).pthread_mutex_lock\n"
        "mutex = ctypes.create_string_buffer(64)\n"
        "ctypes.CDLL(None).pthread_mutex_init(mutex, None); lock(mutex)\n"
        "work = lambda: lock(mutex)\n",
        "mlx": "from mlx_fd.models.backend import backend; backend()\n"
        "import mlx.core as mx, functools\n"
        "a = mx.full((2000, 2000), 1e-3)\n"
        "x = functools.reduce(lambda x, _: x @ a, range(10_000), a)\n"
        "work = lambda: mx.eval(x)\n",
    }[call]
    stopping = "stopping_on_signals(say, '')" if which == "run" else "interruptible()"
    code = (
        "from mlx_fd.cli.signals import interruptible, stopping_on_signals\n"
        f"{work}say = lambda text: print(text, flush=True)\n"
        f"with {stopping}:\n    say('in C'); work()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in C\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first waits for the call's end
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT
    assert time.monotonic() - begin < 2


def ignore_signals() -> None:
    """As nohup and a shell's background do."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def test_signals_that_are_ignored_stay_ignored(home, tmp_path):
    with started(home, "--out", tmp_path / "out", before=ignore_signals) as run:
        read_until("first probe evaluation", run)
        run.send(signal.SIGINT)
        run.send(signal.SIGHUP)
        assert run.rest().status == 0
    assert (tmp_path / "out" / runs.SUMMARY).exists()


def own_terminal() -> None:
    """The terminal is this process's, and its end the process's."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_closed_terminal_ends_the_run_with_a_checkpoint(home, mlx_fd, tmp_path):
    out = tmp_path / "out"
    longer = ("--out", out, "--episodes", 20, "--checkpoint-every", 99)
    run, terminal = in_terminal("loop", *tiny(home), *longer, cwd=home, before=own_terminal)
    while not (out / runs.METRICS).exists() or not runs.read_lines(out / runs.METRICS):
        assert run.exitcode is None
        if select.select([terminal], [], [], 0.02)[0]:
            os.read(terminal, 65536)
    os.close(terminal)  # SIGHUP, and EIO for whatever is printed
    run.join(60)
    assert run.exitcode == 128 + signal.SIGHUP
    batches = len(runs.read_lines(out / runs.METRICS))
    checkpoint, broken = newest_checkpoint(out)
    assert checkpoint.batch == batches < 10 and not broken
    assert mlx_fd("resume", out, "--quiet").status == 0


def test_a_run_goes_on_when_nobody_reads_its_output(home, tmp_path):
    with started(home, "--out", tmp_path / "out", "--episodes", 8) as run:
        read_until("2/8", run)
        run.out.close()
        assert run.wait() == 0
        assert run.err.read() == ""
    assert (tmp_path / "out" / runs.SUMMARY).exists()


@pytest.mark.parametrize("arguments", ["models", "models --json", "doctor", "loop --help", "nope"])
def test_a_closed_pipe_is_no_error(arguments, tmp_path):
    for closed in ("stdout", "stderr"):
        reads, writes = os.pipe()
        os.close(reads)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writes}
        done = subprocess.run(
            [SCRIPT, *arguments.split()], cwd=tmp_path, text=True, check=False, **streams
        )
        os.close(writes)
        assert done.returncode == (2 if arguments == "nope" else 0), done
        assert not done.stderr or "nope" in done.stderr, done


def test_standard_streams_that_are_closed(tmp_path):
    """No error; and no file gets the number of one, to hold what a child process prints."""
    code = (
        "import subprocess; from pathlib import Path\n"
        "from mlx_fd.cli.output import lasting_output\n"
        "with lasting_output(), Path('file').open('w') as file:\n"
        "  print(file.fileno() > 2, file=file, flush=True)\n"
        "  subprocess.run(['echo', 'hello'], check=True)\n"
    )
    for line, closed in (
        ([SCRIPT, "--version"], ">&-"),
        ([sys.executable, "-c", code], "<&- >&- 2>&-"),
    ):
        command = f"exec {shlex.join(line)} {closed}"
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == "True\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_output_to_a_full_disk_is_an_error(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [SCRIPT, "models"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    message = "error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_a_stopped_run_prints_json_too(home, tmp_path):
    out = tmp_path / "out"
    with started(home, "--out", out, "--episodes", 40, "--json") as run:
        wait_until(lambda: runs.read_lines(out / runs.METRICS))
        run.send(signal.SIGTERM)
        done = run.rest()
    assert done.status == 143
    assert json.loads(done.out) == {"run": str(out), "done": False}


# What goes right


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(home, mlx_fd, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "episodes = 2\n[generation]\nmax_answer_tokens = 5\nbatch_size = 2\n"
        "max_feedback_tokens = 4\n[episode]\nprobe_size = 1\n"
    )
    out = tmp_path / "out"
    models = tiny(home)[:6]
    given = [
        "--preset",
        "quick",
        "--config",
        file,
        "--max-answer-tokens",
        3,
        "--max-merge-tokens",
        3,
    ]
    assert mlx_fd("loop", *models, *given, "--out", out, "--quiet").status == 0
    saved = tomllib.loads((out / runs.CONFIG).read_text())
    assert saved["generation"]["max_answer_tokens"] == 3  # command line, over file and preset
    assert saved["generation"]["batch_size"] == 2  # file, over preset
    assert saved["models"]["lora_rank"] == PRESETS["quick"]["lora_rank"]  # preset, over default
    assert saved["training"]["micro_batch"] == 4  # default
    rows = runs.read_lines(out / runs.EPISODES)
    assert len(rows) == 2 and max(row["tokens"]["answer"] for row in rows) <= 3


def test_a_run_can_be_repeated_from_its_configuration(finished, mlx_fd, tmp_path):
    out = tmp_path / "again"
    done = mlx_fd("loop", "--config", finished / runs.CONFIG, "--out", out, "--quiet")
    assert done.status == 0, done
    assert (out / runs.CONFIG).read_bytes() == (finished / runs.CONFIG).read_bytes()

    def lines(folder: Path) -> bytes:
        return re.sub(rb'"seconds": \{[^}]*\}', b"", (folder / runs.EPISODES).read_bytes())

    assert lines(out) == lines(finished)
    for name in ("adapters.safetensors", "heads.safetensors"):
        theirs = (finished / "checkpoints" / "last" / name).read_bytes()
        assert (out / "checkpoints" / "last" / name).read_bytes() == theirs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--batch-size", 3), "--batch-size has no effect without --problems"),
        (("--overwrite",), "--overwrite has no effect without --problems"),
        (("--max-thinking-tokens", 5), "nobody thinks; add --thinking on"),
        (("--thinking", "off", "--max-thinking-tokens", 5), "nobody thinks; add --thinking on"),
    ],
)
def test_feedback_takes_no_option_without_effect(options, says, mlx_fd):
    failed(mlx_fd("feedback", "tiny", "--problem", "1?", "--answer", "1", *options), says)


def test_runs_get_a_folder_of_their_own(home, mlx_fd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = [*tiny(home), "--episodes", 1, "--quiet"]
    named = [mlx_fd("loop", *short).out.split()[-1] for _ in range(2)]
    assert len(set(named)) == 2
    assert all(re.fullmatch(r"runs/\d{8}-\d{6}(-\d+)?", name) for name in named)
    assert all(runs.is_run(Path(name)) for name in named)


def test_feedback_of_a_run_a_checkpoint_and_a_model(home, finished, mlx_fd, tmp_path):
    file = tmp_path / "problem.txt"
    file.write_text("Tom has 3 apples.\nHe buys 5. How many?\n")
    asked = ["--problem", f"@{file}", "--answer", "3 + 5 = 8 #### 8", "--tokens", 5]
    best = finished / "checkpoints" / "best"
    of_run = json.loads(mlx_fd("feedback", finished, *asked, "--json").out)
    assert set(of_run) == {"head_score", "written_score", "readable", "feedback"}
    assert -1 < of_run["head_score"] < 1 and of_run["feedback"].startswith("Score:")
    assert json.loads(mlx_fd("feedback", best, *asked, "--json").out) == of_run
    first = finished / "checkpoints" / "000000"
    untrained = json.loads(mlx_fd("feedback", first, *asked, "--json").out)
    assert untrained["head_score"] == 0
    plain = json.loads(mlx_fd("feedback", home / "student", *asked, "--json").out)
    assert set(plain) == {"written_score", "readable", "feedback"}
    # LoRA begins as nothing: the untrained student says what its base model says.
    assert plain["feedback"] == untrained["feedback"]
    text = mlx_fd("feedback", finished, *asked).out
    assert text.startswith("head score: ") and "written score: none could be read\nScore:" in text
    assert not CONTROL.search(text)


def test_feedback_comes_from_the_best_checkpoint(run, mlx_fd):
    import mlx.core as mx

    asked = ["--problem", "1 + 1?", "--answer", "2", "--tokens", 4, "--json"]
    before = json.loads(mlx_fd("feedback", run, *asked).out)
    best = (run / "checkpoints" / "best").resolve()
    assert best.name != "000000"
    heads = dict(mx.load(str(best / "heads.safetensors")))
    heads["score_head.weight"] = mx.zeros_like(heads["score_head.weight"])
    heads["score_head.bias"] = mx.array([0.5])
    mx.save_safetensors(str(best / "heads.safetensors"), heads)
    adapter = dict(mx.load(str(best / "adapters.safetensors")))
    loud = {name: value + 1.0 for name, value in adapter.items()}
    mx.save_safetensors(str(best / "adapters.safetensors"), loud)
    failed(mlx_fd("feedback", run, *asked), "it was changed after the run wrote it")
    state, _ = read_checked(best / "state.json")
    state["files"] = {name: digest_of(best / name) for name in state["files"]}
    write_json(best / "state.json", with_digest(state))
    after = json.loads(mlx_fd("feedback", run, *asked).out)
    assert after["head_score"] == pytest.approx(math.tanh(0.5), abs=1e-4)
    assert after["feedback"] != before["feedback"]
    text = mlx_fd("feedback", run, *asked[:-1]).out
    assert text.startswith("head score: +0.46\n")


def test_feedback_reads_standard_input(home, finished):
    line = f"printf '1 + 1?' | {shlex.quote(SCRIPT)} feedback finished --problem - --answer 2"
    done = subprocess.run(
        ["bash", "-c", line + " --tokens 3 --json"], cwd=home, capture_output=True, check=True
    )
    assert "head_score" in json.loads(done.stdout)


def test_feedback_of_half_a_run(home, run, mlx_fd, tmp_path):
    asked = ["--problem", "1 + 1?", "--answer", "2", "--tokens", 3]
    alone = shutil.copytree(run / "checkpoints" / "best", tmp_path / "alone" / "best")
    failed(mlx_fd("feedback", alone, *asked), str(alone), "outside its run")
    best = (run / "checkpoints" / "best").resolve()
    heads = best / "heads.safetensors"
    whole = heads.read_bytes()
    for harmed in (whole[:20], whole[:-1] + bytes([whole[-1] ^ 1])):
        heads.write_bytes(harmed)
        failed(mlx_fd("feedback", run, *asked), "heads.safetensors: it was changed")
    (best / "heads.safetensors").unlink()
    failed(mlx_fd("feedback", run, *asked), "heads.safetensors: cannot be read: it is not there")
    shutil.rmtree(run / "checkpoints")
    failed(mlx_fd("feedback", run, *asked), "has no checkpoint yet", "mlx-fd resume")
    spaced = run.rename(tmp_path / "a run")
    failed(mlx_fd("feedback", spaced, *asked), f"mlx-fd resume '{spaced}'")


def test_memory_that_gives_out_is_no_bug():
    # As MLX says it on Metal, on a CPU and on CUDA; as Python does.
    for error in (
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than 8"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:...)"),
        RuntimeError("[malloc] Unable to allocate 9 bytes."),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        MemoryError(),
    ):
        text, status = _message(error)
        assert status == 2 and "Memory ran out" in text and "bug" not in text
    assert "This is a bug" in _message(RuntimeError("[matmul] Last dimension"))[0]


def test_a_configuration_of_another_command_names_it(mlx_fd, tmp_path):
    file = tmp_path / "my run.toml"
    file.write_text('[selfdistill]\nmethod = "grpo"\n')
    failed(mlx_fd("loop", "--config", file), f"mlx-fd self-distill --config '{file}'")


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    text = strip_control_chars("one\n\x1b[2Jtwo\r\x07 né 中文 🙂")
    assert text == "one\n�[2Jtwo�� né 中文 🙂"
    assert strip_control_chars("a\r\nb\rc\u202ed") == "a\r\nb\ufffdc\ufffdd"


def test_nothing_in_an_error_steers_the_terminal(mlx_fd, tmp_path):
    folder = tmp_path / "a\x1b[2J\x07"
    failed(mlx_fd("compare", folder), "a\ufffd[2J\ufffd: there is no such directory")
    done = mlx_fd("compare", folder)
    assert not CONTROL.search(done.err)


def test_a_password_in_an_address_is_not_said_back(mlx_fd, tmp_path):
    address = "openai:http://user:sk-S3CRET@host/v1?api_key=sk-S3CRET"
    done = mlx_fd("compare", tmp_path, "--engine", address)
    failed(done, "openai:http://***@host/v1?***: give the server's address as http://HOST:PORT")
    assert "S3CRET" not in done.err


def test_widths_of_qwen_that_differ_by_padding(mlx_fd, tmp_path, home):
    configs = json.loads((FIXTURES / "configs.json").read_text())
    kept = ("rms_norm_eps", "rope_theta", "max_position_embeddings", "max_window_layers")
    sizes = {"hidden": 16, "layers": 1, "intermediate": 32, "heads": 2, "kv_heads": 1}
    for name, published in (("expert", "qwen2.5-7b"), ("student", "qwen2.5-1.5b")):
        config = configs[published]
        make_model_dir(
            tmp_path / name,
            arch=config["model_type"],
            vocab_size=config["vocab_size"],
            tie=config["tie_word_embeddings"],
            **sizes,
            **{key: config[key] for key in kept},
        )
    given = ["--problems", home / "problems.jsonl", "--episodes", 2]
    done = mlx_fd("loop", *tiny(tmp_path), *given, "--out", tmp_path / "run", "--json")
    assert done.status == 0, done
    assert json.loads(done.out)["episodes"] == 2
    manifest = json.loads((tmp_path / "run" / runs.MANIFEST).read_text())
    assert manifest["shared_vocabulary"] == 400
    assert all(row["gate"]["losses_before"]["logit"] > 0 for row in episodes(tmp_path / "run"))


def test_models_can_be_read_at_80_columns(mlx_fd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = mlx_fd("models").out.splitlines()
    assert all(len(line) <= 80 and "…" not in line for line in lines)
    assert any(line.split()[:2] == ["qwen2.5-0.5b-4bit", ":layers=12"] for line in lines)
