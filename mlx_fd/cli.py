"""The command line: parsing, calling, printing.

Heavy imports are made inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from mlx_fd import __version__
from mlx_fd.config import OPTIONS, PRESETS, Config, Option, override, preset, read
from mlx_fd.errors import UserError
from mlx_fd.models.aliases import TINY

_SECTIONS = {
    "models": "Models",
    "problems": "Problems",
    "generation": "Generation",
    "losses": "Losses",
    "gate": "Gate",
    "training": "Training",
    "episode": "Episode and run",
}


class _Words(click.ParamType):
    """A comma-separated list."""

    name = "list"

    def __init__(self, numbers: bool):
        self._numbers = numbers

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Any]:
        words = [word.strip() for word in value.split(",") if word.strip()]
        if not self._numbers:
            return words
        try:
            return [float(word) for word in words]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,1,1,0.03")


class _Path(click.ParamType):
    """A path; ``~`` is seen to here, because shells leave it alone in ``--out=~/runs``."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        if not str(value).strip():
            self.fail("the path is empty")
        return Path(value).expanduser()


def _click_option(option: Option) -> click.Option:
    flag = "--" + option.name.replace("_", "-")
    text = option.help
    if option.choices:
        text += f" One of: {', '.join(option.choices)}."
    default = option.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if option.kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    text += f" [default: {shown or 'empty'}]"
    if option.kind is tuple:
        kind: Any = _Words(numbers=not option.choices)
    else:
        kind = {int: click.INT, float: click.FLOAT, str: click.STRING}[option.kind]
    return click.Option([flag], type=kind, default=None, help=text)


class _Command(click.Command):
    """A command whose configuration options are shown by section, after its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                option = OPTIONS.get(param.name or "")
                title = _SECTIONS[option.section] if option else "Options"
                sections.setdefault(title, []).append(record)
        for title in ["Options", *_SECTIONS.values()]:
            if title in sections:
                with formatter.section(title):
                    formatter.write_dl(sections[title])


def _with_configuration(command: click.Command) -> click.Command:
    command.params.extend(_click_option(option) for option in OPTIONS.values())
    return command


_debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
_quiet = click.option("--quiet", is_flag=True, help="Print warnings and the result only.")
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  mlx-fd doctor                                   what this machine can do
  mlx-fd loop --expert qwen2.5-7b-4bit            the main job
  mlx-fd loop --expert smollm2-135m --preset quick
  mlx-fd resume runs/20260101-120000              goes on where it stopped
""",
)
@click.version_option(__version__, prog_name="mlx-fd")
def cli() -> None:
    """Online Feedback Distillation with MLX.

    A large expert solves problems and criticises its own solutions; a small student learns, while
    that goes on, to give the same feedback.
    """


def _configuration(preset_name: str | None, file: Path | None, given: dict[str, Any]) -> Config:
    """Defaults, then the preset, then the file, then what was given on the command line."""
    changes = {name: value for name, value in given.items() if value is not None}

    def over(config: Config) -> Config:
        if file is not None:
            config = read(file, config)
        return override(config, changes, "command line")

    config = over(preset(preset_name) if preset_name else Config())
    if config.models.expert == TINY and not preset_name:
        # It knows no other problems than those of its preset.
        return over(preset(TINY))
    return config


@_with_configuration
@cli.command(
    cls=_Command,
    epilog="""\b
Examples:
  mlx-fd loop --expert qwen2.5-7b-4bit
  mlx-fd loop --expert llama-3.1-8b-4bit --episodes 1000 --preset 16gb
  mlx-fd loop --preset tiny
  mlx-fd loop --preset tiny --losses lm,logit,score,answer,reasoning --loss-weights phases
  mlx-fd loop --expert qwen2.5-7b-4bit --teacher-top-k 64 --epochs 3
  mlx-fd loop --expert smollm2-135m --student smollm2-135m:layers=15 --preset quick
  mlx-fd loop --config runs/mine/config.toml --seed 1 --out runs/seed1
""",
)
@click.option("--preset", "preset_name", metavar="NAME", help=f"One of: {', '.join(PRESETS)}.")
@click.option(
    "--config",
    "config_file",
    type=_Path(),
    metavar="FILE",
    help="A TOML file with options, for instance an earlier run's config.toml.",
)
@click.option(
    "--out",
    type=_Path(),
    metavar="DIR",
    help="The run directory. [default: runs/DATE-TIME]",
)
@_json
@_quiet
@_debug
def loop(
    preset_name: str | None,
    config_file: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **given: Any,
) -> None:
    """Distil the expert's feedback into the student while the expert solves problems.

    Options given here win over --config, which wins over --preset. Ctrl-C ends the run after the
    batch under way, twice at once; either way `mlx-fd resume` goes on exactly there.

    Exits with 0 when the run is done, with 130 after Ctrl-C (143 after SIGTERM), with 2 when
    something has to be mended first.
    """
    from mlx_fd.backend import backend

    config = _configuration(preset_name, config_file, given)
    backend()
    from mlx_fd.session import check_out, make_plan

    folder = out or _new_folder()
    check_out(folder)
    _run(folder, make_plan(config), [], as_json, quiet, new=True)


def _new_folder() -> Path:
    """A run directory of this second that is not there yet."""
    name = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = Path("runs", name), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{name}-{number}")
    return folder


@cli.command(
    epilog="""\b
Examples:
  mlx-fd resume runs/20260101-120000
""",
)
@click.argument("run", type=_Path())
@_json
@_quiet
@_debug
def resume(run: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Go on with a run exactly where it stopped.

    RUN is its directory. Exits as `mlx-fd loop` does.
    """
    from mlx_fd.backend import backend

    backend()
    from mlx_fd import runs
    from mlx_fd.session import check_same, make_plan

    manifest = runs.read_manifest(run)
    with runs.locked(run):
        plan = make_plan(read(run / runs.CONFIG))
        worries = check_same(manifest, plan.manifest, run)
        with runs.explained(run):
            # A run that was made longer is compared with its new length next time.
            manifest["options"] = plan.manifest["options"]
            runs.write_json(run / runs.MANIFEST, manifest)
        _run(run, plan, worries, as_json, quiet, new=False)


def _run(
    folder: Path, plan: Any, worries: list[str], as_json: bool, quiet: bool, *, new: bool
) -> None:
    from rich.console import Console

    from mlx_fd import runs
    from mlx_fd.backend import backend
    from mlx_fd.config import to_toml
    from mlx_fd.display import Display, summary_table
    from mlx_fd.events import Note, Warned
    from mlx_fd.loop import run
    from mlx_fd.session import open_pair

    # With --json, standard output belongs to the script that reads it.
    console = Console(stderr=as_json)
    with contextlib.ExitStack() as held:
        display = held.enter_context(Display(console, quiet=quiet))
        display(Note(f"run directory: {folder}"))
        models = plan.config.models
        display(Note(f"expert {models.expert}, student {models.student}, {backend().device}"))
        for text in (*plan.notes, *worries):
            display(Warned(text))
        if backend().device == "metal":
            display(
                Note("a sleeping Mac stops the run: `caffeinate -is mlx-fd ...` keeps it awake")
            )
        pair = open_pair(plan)
        if new:
            # Only now: models that cannot be loaded leave no run behind.
            held.enter_context(runs.locked(folder))
            with runs.explained(folder):
                runs.create(folder, to_toml(plan.config), plan.manifest)
        stopped = held.enter_context(_stopping_on_signals(lambda text: display(Note(text))))
        try:
            summary = run(
                folder,
                plan.config,
                pair,
                plan.probe,
                plan.problems,
                display,
                lambda: bool(stopped),
                plan.exam(),
            )
        except RuntimeError as error:
            raise _explained(error, folder) from error
        except KeyboardInterrupt:
            raise _Stopped(folder, "stopped at once", stopped) from None
    if as_json:
        result = {"run": str(folder), "done": summary is not None, **(summary or {})}
        click.echo(json.dumps(result, indent=2))
    if summary is None:
        raise _Stopped(folder, "stopped", stopped)
    if not as_json:
        console.print(summary_table(summary))
        click.echo(f"everything is in {folder}")


class _Stopped(Exception):
    """A run that a signal ended before its end, and that can go on."""

    def __init__(self, folder: Path, how: str, signals: list[int]):
        super().__init__(f"{how}; go on with: mlx-fd resume {shlex.quote(str(folder))}")
        # What a shell reports of a process that such a signal ended.
        self.status = 128 + signals[0]


def _explained(error: RuntimeError, folder: Path) -> Exception:
    """What MLX says when the GPU or the memory gives out, with what to do about it."""
    text = str(error)
    signs = ("kIOGPUCommandBuffer", "Command buffer execution failed", "allocate")
    if not any(sign in text for sign in signs):
        return error
    return UserError(
        f"a computation was too large ({text.splitlines()[0]}). Memory ran out, or macOS ended a "
        "long one because a display was on (let it sleep). Set micro_batch = 1 and "
        f"checkpoint_layers = true in {folder}/config.toml, then: mlx-fd resume {folder}; or begin "
        "a new run with a smaller --batch-size."
    )


@contextlib.contextmanager
def _stopping_on_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Let the first Ctrl-C (or SIGTERM) ask for a stop, and the second stop at once.

    Yields:
        The signals that came so far; it grows.
    """
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        # From a thread: the signal may have come in the middle of another print.
        text = "stopping after this batch; press Ctrl-C again to stop at once"
        threading.Thread(target=say, args=(text,)).start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@cli.command(
    epilog="""\b
Examples:
  mlx-fd feedback runs/20260101-120000 --problem "Tom has 3 apples and buys 5. How many?" \\
      --answer "3 + 5 = 9. #### 9"
  mlx-fd feedback qwen2.5-1.5b-4bit --problem @problem.txt --answer - < answer.txt
""",
)
@click.argument("model")
@click.option("--problem", required=True, help="The problem; @FILE reads a file, - standard input.")
@click.option("--answer", required=True, help="The answer to judge; likewise.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=192,
    show_default=True,
    help="Most tokens of the feedback.",
)
@_json
@_debug
def feedback(
    model: str, problem: str, answer: str, tokens: int, as_json: bool, debug: bool
) -> None:
    """Score and criticise an answer with a distilled student.

    MODEL is a run directory (its best checkpoint), one of its checkpoints, or any model.
    """
    from mlx_fd.backend import backend

    backend()
    if problem == answer == "-":
        raise UserError("--problem - and --answer -: only one of them can be standard input")
    question, text = _text(problem, "--problem"), _text(answer, "--answer")
    from mlx_fd.feedback import give_feedback

    found = give_feedback(model, question, text, tokens)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name in ("score", "written_score"):
        if name in found:
            value = "none could be read" if found[name] is None else f"{found[name]:+.2f}"
            click.echo(f"{name.replace('_', ' ')}: {value}")
    click.echo(_harmless(found["feedback"]))


def _harmless(text: str) -> str:
    """A model's text without the control characters that would steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _text(value: str, option: str) -> str:
    """An option's text: itself, a file's after @, or standard input for -."""
    try:
        if value == "-":
            text = sys.stdin.read()
        elif value.startswith("@"):
            text = Path(value[1:]).expanduser().read_text(encoding="utf-8")
        else:
            text = value
    except OSError as error:
        raise UserError(f"{option} {value}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {value}: cannot be read: it is not UTF-8 text") from error
    if not text.strip():
        raise UserError(f"{option}: is empty")
    return text.strip()


@cli.command(
    epilog="""\b
Examples:
  mlx-fd export runs/mine --out student                          for mlx-lm, in its base's type
  mlx-fd export runs/mine --q-bits 8 --out student-8bit
  mlx-fd export runs/mine --format hf --out student-hf           for transformers, vLLM, SGLang
  mlx-fd export runs/mine --format gguf --out student-gguf       for llama.cpp
  mlx-fd export runs/mine --format gguf --gguf-type q8_0 --out student-q8 --archive
  mlx-fd export runs/mine --format hf --adapter --out adapter    for PEFT
  mlx-fd export runs/mine/checkpoints/000100 --adapter --out adapter
""",
)
@click.argument("source")
@click.option(
    "--format",
    "form",
    type=click.Choice(["mlx", "hf", "gguf"]),
    default="mlx",
    show_default=True,
    help="mlx: for mlx-lm; hf: for Hugging Face transformers; gguf: for llama.cpp.",
)
@click.option(
    "--out",
    type=_Path(),
    metavar="DIR",
    required=True,
    help="The directory to make.",
)
@click.option(
    "--adapter/--fuse",
    default=False,
    help="Write the adapter alone (mlx: as mlx-lm does; hf: as PEFT does), or the whole model with "
    "the adapter fused into it. [default: fuse]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type of the weights. [default: mlx: the base's own; hf: bfloat16]",
)
@click.option(
    "--q-bits",
    type=click.Choice(["4", "8"]),
    help="mlx: quantise to so many bits. Refused where that would lose what was learned. "
    "[default: leave the weights dequantised]",
)
@click.option(
    "--q-group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share a scale. [default: 64]",
)
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"]),
    help="Type of the matrices in a GGUF file. With a quantised one, matrices that the training "
    "left alone keep their quantised numbers where they fit exactly. [default: f16]",
)
@click.option(
    "--base-model",
    metavar="NAME",
    help="hf --adapter: what the adapter calls its base model. [default: as it was trained]",
)
@click.option(
    "--parity-problems",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    help="Problems in the parity bundle, which mlx-fd compare reads.",
)
@click.option("--parity/--no-parity", default=True, help="Write the parity bundle or leave it out.")
@click.option("--archive", is_flag=True, help="Write DIR.tar too.")
@_json
@_quiet
@_debug
def export(
    source: str,
    form: str,
    out: Path,
    adapter: bool,
    dtype: str | None,
    q_bits: str | None,
    q_group_size: str | None,
    gguf_type: str | None,
    base_model: str | None,
    parity_problems: int,
    parity: bool,
    archive: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write a student, or any model, for the tool that shall run it.

    SOURCE is a run directory (its best checkpoint), one of its checkpoints, or a model. What was
    written is read back and its logits are compared with the live student's before the directory
    appears. It holds a model card, the score head and, for `mlx-fd compare`, a parity bundle.
    """
    from mlx_fd.backend import backend

    backend()
    from rich.console import Console

    from mlx_fd.display import Steps
    from mlx_fd.export.exporter import Form, as_json_value
    from mlx_fd.export.exporter import export as write

    wanted = Form(
        format=form,
        adapter=adapter,
        dtype=dtype,
        q_bits=int(q_bits) if q_bits else None,
        q_group_size=int(q_group_size) if q_group_size else None,
        gguf_type=gguf_type,
        base_model=base_model,
        parity_problems=parity_problems if parity else 0,
    )
    with Steps(Console(stderr=True), quiet=quiet) as steps:
        done = write(source, out, wanted, with_archive=archive, progress=steps)
    for text in done.warnings:
        click.echo(f"warning: {text}", err=True)
    if as_json:
        click.echo(json.dumps(as_json_value(done), indent=2))
        return
    found = done.agreement
    click.echo(
        f"read back and compared on {found.positions} tokens: largest difference of two logits "
        f"{found.largest_difference:.3g}, mean KL {found.mean_kl:.3g}, same likeliest token at "
        f"{found.top1:.1%}"
    )
    if done.gguf is not None and done.gguf.carried:
        matrices = sum(done.gguf.kinds.values())
        click.echo(f"{done.gguf.carried} of {matrices} matrices carried over without rounding")
    click.echo(f"{sum(done.files.values()) / 1e6:.1f} MB in {len(done.files)} files are in {out}")


@cli.command(
    epilog="""\b
Examples:
  mlx-fd compare student-gguf                                    with what can open it here
  mlx-fd compare student student-gguf.tar --engine mlx --engine llama.cpp
  mlx-fd compare student-hf --engine openai:http://gpu-box:8000  a server: vLLM, SGLang, ...
  mlx-fd compare student --problems gsm8k --limit 200 --out comparison
""",
)
@click.argument("exports", nargs=-1, required=True, type=_Path())
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="ENGINE",
    help="mlx, llama.cpp or openai:URL (openai:URL#MODEL where it serves several); can be given "
    "several times. [default: mlx and llama.cpp, where they find something to open]",
)
@click.option(
    "--problems",
    metavar="SOURCE",
    help="Answer problems of gsm8k, arithmetic, a file or a hub data set. [default: the bundle's, "
    "which the reference answered too]",
)
@click.option(
    "--limit",
    type=click.IntRange(0),
    metavar="N",
    help="Answer the first N problems. [default: all of the bundle's, 100 of a source]",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "float", "quantized"]),
    default="auto",
    show_default=True,
    help="Whose tolerances hold. auto: as the file says; a server's count as float.",
)
@click.option("--out", type=_Path(), metavar="DIR", help="Write compare.json and compare.html.")
@_json
@_quiet
@_debug
def compare(
    exports: tuple[Path, ...],
    engines: tuple[str, ...],
    problems: str | None,
    limit: int | None,
    weights: str,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Hold engines against what an exported model said where it was exported.

    EXPORTS are directories of `mlx-fd export` with a parity bundle, or their .tar archives. Each
    engine runs the bundle in a process of its own. Exits with 1 where one is not the same model.
    """
    from rich.console import Console

    from mlx_fd.display import Steps
    from mlx_fd.export import compare as comparison
    from mlx_fd.export.page import make_folder, write_report
    from mlx_fd.export.table import print_comparison

    with contextlib.ExitStack() as held:
        folders = [held.enter_context(comparison.opened(path)) for path in exports]
        jobs = comparison.plan(folders, engines)
        asked = comparison.questions(problems, limit)
        if out is not None:
            make_folder(out)
        steps = held.enter_context(Steps(Console(stderr=True), quiet=quiet))
        rows = [
            comparison.judged(job, comparison.run(job, asked(job), steps, debug=debug), weights)
            for job in jobs
        ]
        found = comparison.report(jobs, rows)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_comparison(rows, Console())
    if out is not None:
        write_report(found, out)
        if not as_json:
            click.echo(f"the comparison is in {out / 'compare.html'} and compare.json")
    if not found["parity"]:
        sys.exit(1)


@cli.command(
    epilog="""\b
Examples:
  mlx-fd models
  mlx-fd models --json
""",
)
@_json
@_debug
def models(as_json: bool, debug: bool) -> None:
    """List the models that can be used here."""
    from mlx_fd.backend import backend

    backend()
    from mlx_fd.doctor import model_rows, models_table

    rows = model_rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console

    Console().print(models_table(rows))


@cli.command(
    epilog="""\b
Examples:
  mlx-fd doctor
  mlx-fd doctor --json
  mlx-fd doctor --kernels                         first thing on a new Mac or GPU
""",
)
@click.option(
    "--kernels",
    "of_kernels",
    is_flag=True,
    help="Run the Metal or CUDA kernels and their twins on small input, and print their errors.",
)
@_json
@_debug
def doctor(of_kernels: bool, as_json: bool, debug: bool) -> None:
    """Say what this machine has, and what to install. Exits with 1 where something is amiss."""
    from mlx_fd.doctor import checks, checks_table, kernel_rows

    rows = kernel_rows() if of_kernels else checks()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        from rich.console import Console

        Console().print(checks_table(rows))
    if any(row["state"] == "bad" for row in rows):
        sys.exit(1)


def main() -> None:
    """Run the command line; a user sees messages, and tracebacks only with ``--debug``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character is no reason to end a run.
            stream.reconfigure(errors="replace")
    try:
        cli(standalone_mode=False)
        status = 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except _Stopped as error:
        click.echo(str(error), err=True)
        status = error.status
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        text, status = _message(error)
        click.echo(f"error: {text}", err=True)
    sys.exit(status)


def _message(error: Exception) -> tuple[str, int]:
    """What the user is told of an error, and the exit status."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 2
    return (
        f"{type(error).__name__}: {error}\nThis is a defect of mlx-fd; run it again with --debug "
        "and report what it prints."
    ), 1
