"""Options as a user meets them: choices, completion, mlx-lm's spellings, a help that fits."""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_fd.cli import cli
from mlx_fd.cli.options import NameList
from mlx_fd.config import OPTIONS
from mlx_fd.errors import UserError
from mlx_fd.feedback.judge import locate_model
from mlx_fd.models.backend import backend
from support.trained import make_run

backend()

import mlx.core as mx  # noqa: E402

SCRIPT = str(Path(sysconfig.get_path("scripts")) / "mlx-fd")


def invoke(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == status, done.output
    return done.output


def test_every_command_is_a_line_of_the_help():
    text = CliRunner().invoke(cli, ["--help"], terminal_width=80, max_content_width=80).output
    lines = text.splitlines()
    listed = lines[lines.index("Commands:") + 1 :]
    listed = listed[: listed.index("")]
    assert [line.split()[0] for line in listed] == sorted(cli.commands)
    assert max(map(len, lines)) <= 80 and "..." not in "".join(listed)


@pytest.mark.parametrize("command", ["loop", "self-distill"])
def test_options_of_a_run_take_their_choices(command):
    seen = 0
    for param in cli.commands[command].params:
        option = OPTIONS.get(param.name or "")
        if option is None or not option.choices or param.is_flag:  # a short form
            continue
        seen += 1
        assert isinstance(param.type, NameList if option.kind is tuple else click.Choice)
        wrong = invoke(command, param.opts[0], "nothing", status=2)
        assert param.opts[0] in wrong and "'nothing' is not one of" in wrong
        for choice in option.choices:
            assert f"'{choice}'" in wrong.replace("\n", " ")
    assert seen > 5


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("self-distill", "--method", "grpp"), "grpo"),
        (("self-distill", "--preset", "tinny"), "tiny"),
        (("advantage", "tiny-base", "--contexts", "feedbak"), "feedback"),
        (("pareto", "run", "--objectives", "lm,solvd"), "solved"),
    ],
)
def test_a_wrong_name_is_told_which_was_meant(arguments, hint):
    assert f'did you mean "{hint}"?' in " ".join(invoke(*arguments, status=2).split())


def completions(*words: str) -> list[str]:
    line = " ".join(("mlx-fd", *words))
    env = {
        **os.environ,
        "_MLX_FD_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([SCRIPT], env=env, capture_output=True, text=True, check=True, timeout=60)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_a_shell_completes_commands_options_and_choices():
    env = {**os.environ, "_MLX_FD_COMPLETE": "bash_source"}
    done = subprocess.run([SCRIPT], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert "complete -o nosort -F _mlx_fd_completion mlx-fd" in done.stdout
    assert completions("re") == ["report", "resume"]
    assert "--gate" in completions("loop", "--ga")
    assert completions("loop", "--gate", "a") == ["always"]
    assert completions("loop", "--losses", "lm,h") == ["lm,hidden"]
    assert completions("export", "tiny", "--format", "g") == ["gguf"]


# --- what mlx-lm's commands take ---

PROBLEM = "Tom has 8 apples. Tom buys 5 more. How many apples does Tom have now?"
ANSWER = "Step 1: <<8+5=13>>13\n#### 13"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_run(folder, "tiny-student", strength=0.3, max_answer_tokens=8)


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory) -> Path:
    """The run's adapter as mlx-lm knows it, outside the run."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    return shutil.copytree(run / "checkpoints" / "best", folder)


def feedback(*arguments: object) -> dict:
    text = ("--problem", PROBLEM, "--answer", ANSWER, "--json")
    return json.loads(invoke("feedback", *arguments, *text))


def test_feedback_takes_a_model_as_mlx_lm_does(run, adapter):
    plain = feedback("tiny-student", "--tokens", 20)
    assert feedback("--model", "tiny-student", "--max-tokens", 20, "--temp", 0) == plain
    distilled = feedback("--model", run, "--max-tokens", 20)
    assert distilled["feedback"] != plain["feedback"] and "head_score" in distilled
    # A checkpoint keeps its score head; an adapter has none that is known to be trained.
    assert feedback("--adapter-path", run / "checkpoints" / "best", "--max-tokens", 20) == distilled
    for chosen in ((), ("tiny-student",), ("--model", "tiny-student")):
        found = feedback(*chosen, "--adapter-path", adapter, "--max-tokens", 20)
        assert found["feedback"] == distilled["feedback"] and "score" not in found


def test_feedback_samples_at_a_temperature():
    options = ("tiny-student", "--tokens", 30)
    assert feedback(*options, "--temp", 2) != feedback(*options)
    assert feedback(*options, "--temp", 2) == feedback(*options, "--temperature", 2)


@pytest.mark.parametrize("command", ["eval", "feedback", "export"])
def test_a_model_is_named_once(command, tmp_path):
    text = {
        "eval": (),
        "feedback": ("--problem", "1", "--answer", "1"),
        "export": ("--out", str(tmp_path / "out")),
    }[command]
    name = "SOURCE" if command == "export" else "MODEL"
    assert f"{name} and --model are the same" in invoke(
        command, "tiny", "--model", "tiny", *text, status=2
    )
    assert f"Missing argument '{name}'" in invoke(command, *text, status=2)
    assert "[MODEL]" in invoke(command, "--help") or command == "export"


def test_an_adapter_that_is_none_or_anothers_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"there is no adapters\.safetensors"):
        locate_model("tiny-student", tmp_path)
    with pytest.raises(UserError, match=r"a checkpoint of a run whose student is .*tiny/student"):
        locate_model("tiny-base", run / "checkpoints" / "best")


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_an_adapter_whose_numbers_are_not_finite_is_refused_everywhere(adapter, tmp_path, number):
    """mlx-lm loads it like any other, and the model then answers the same to everything."""
    bad = shutil.copytree(adapter, tmp_path / "bad")
    arrays = mx.load(str(bad / "adapters.safetensors"))
    name = sorted(arrays)[-1]
    arrays[name] = mx.full(arrays[name].shape, number)
    mx.save_safetensors(str(bad / "adapters.safetensors"), arrays)
    text = ("--problem", PROBLEM, "--answer", ANSWER)
    for command in (
        ("feedback", "--adapter-path", bad, *text),
        ("eval", "--adapter-path", bad, "--limit", 1, "--out", tmp_path / "eval", "--quiet"),
        ("export", "--adapter-path", bad, "--out", tmp_path / "out"),
    ):
        error = CliRunner().invoke(cli, list(map(str, command))).exception
        assert isinstance(error, UserError), command
        assert f"{name} has numbers that are not finite" in str(error), command


def test_eval_takes_a_model_as_mlx_lm_does(run, adapter, tmp_path):
    def accuracy(name: str, *arguments: object) -> dict:
        options = ("--limit", 3, "--cache", tmp_path / "cache", "--out", tmp_path / name, "--json")
        options += ("--quiet",)
        done = CliRunner().invoke(cli, list(map(str, ("eval", *arguments, *options))))
        assert done.exit_code == 0, done.output
        json.loads(done.stdout)
        rows = (tmp_path / name / "outputs.jsonl").read_text().splitlines()
        return [
            row["turns"]["answer"]
            for row in map(json.loads, rows)
            if row["set"] == "arithmetic/test" and row["system"] == "student"
        ]

    plain = accuracy("plain", "tiny-student", "--temp", 0, "--max-tokens", 8)
    option = accuracy("option", "--model", "tiny-student", "--temp", 0, "--max-tokens", 8)
    assert option == plain
    longer = accuracy("longer", "tiny-student", "--temp", 0, "--max-tokens", 12)
    assert all(len(a) < len(b) and b.startswith(a) for a, b in zip(plain, longer, strict=True))
    adapted = accuracy(
        "adapted",
        *("--model", "tiny-student", "--adapter-path", adapter, "--temp", 0, "--max-tokens", 8),
    )
    alone = accuracy("alone", "--adapter-path", adapter, "--temp", 0, "--max-tokens", 8)
    assert adapted == alone != plain


@pytest.mark.parametrize("form", [("--format", "mlx"), ("--format", "mlx", "--adapter")])
def test_export_takes_an_adapter(form, adapter, tmp_path):
    out = tmp_path / "out"
    model = ("--model", "tiny-student", "--adapter-path", adapter)
    invoke("export", *model, "--out", out, *form, "--no-parity", "--quiet")
    assert "with the mlx-lm adapter `mine`" in (out / "README.md").read_text()
    wanted = feedback("tiny-student", "--adapter-path", adapter, "--tokens", 20)
    chosen = ("tiny-student", "--adapter-path", out) if "--adapter" in form else (out,)
    assert feedback(*chosen, "--tokens", 20) == wanted


def test_self_distill_takes_mlx_lms_spellings():
    options = {opt: p.name for p in cli.commands["self-distill"].params for opt in p.opts}
    assert options["--model"] == "student"
    assert options["--max-tokens"] == options["--max-answer-tokens"] == "max_answer_tokens"
    assert options["--temp"] == options["--temperature"] == "temperature"
