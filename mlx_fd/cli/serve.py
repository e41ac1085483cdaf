"""``mlx-fd serve``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fd.cli.options import (
    Count,
    Number,
    PathType,
    debug_option,
    given_on_command_line,
    json_option,
    quiet_option,
    thinking_options,
)
from mlx_fd.errors import UserError
from mlx_fd.evaluation.cascade.scores import SCORES

if TYPE_CHECKING:
    from mlx_fd.serve.service import Service

_KEY_VARIABLE = "MLX_FD_API_KEY"
_LARGEST_PORT = 65535


@click.command(
    short_help="Serve a student, and an expert behind it, to OpenAI's clients.",
    epilog="""\b
Examples:
  mlx-fd serve --student runs/20260101-120000
  mlx-fd serve --student runs/20260101-120000 --expert qwen2.5-7b-4bit
  mlx-fd serve --student runs/mine --expert tiny --keep kept.jsonl
  mlx-fd serve --student runs/mine --expert tiny --host 0.0.0.0 \\
      --api-key-file key.txt
\b
  curl http://127.0.0.1:8080/v1/chat/completions \\
      -H 'Content-Type: application/json' -d '{"model": "cascade",
      "messages": [{"role": "user", "content": "How much is 2 + 3?"}]}'
""",
)
@click.option(
    "--student",
    required=True,
    metavar="RUN",
    help="A run directory (its best checkpoint), one of its checkpoints, or a model's name.",
)
@click.option(
    "--expert",
    metavar="NAME",
    help="A model that is asked where the score of the student's answer is too low. "
    "[default: none; the student answers everything]",
)
@click.option(
    "--score",
    type=click.Choice(list(SCORES)),
    help="What that answer is scored by, as for mlx-fd cascade calibrate. [default: as the run was "
    "calibrated; not calibrated: answer]",
)
@click.option(
    "--threshold",
    type=Number(-1, 1),
    metavar="NUMBER",
    help="Least score of the student's answer with which it stands. [default: the run's "
    "calibrated threshold; not calibrated: none, and everything is passed on]",
)
@click.option(
    "--verbatim",
    is_flag=True,
    help="Send a chat of a single question as it is, not in the form that the student was trained "
    "with.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(0, _LARGEST_PORT),
    default=8080,
    show_default=True,
    help="Likewise; 0 is any free one.",
)
@click.option(
    "--api-key-file",
    type=PathType(),
    metavar="FILE",
    help="A file with the key that clients must send. Needed for any host but this machine's own. "
    f"[default: the variable {_KEY_VARIABLE}, where it is set]",
)
@click.option(
    "--batch-size",
    "places",
    type=Count(),
    default=16,
    show_default=True,
    help="Texts that each model writes side by side.",
)
@click.option(
    "--speculate",
    type=Count(0),
    default=0,
    show_default=True,
    metavar="TOKENS",
    help="Tokens that the student proposes at a time of what the expert writes, which the expert "
    "reads in one step: the same texts in fewer steps of it. It then writes one text at a time.",
)
@click.option(
    "--queue",
    type=Count(0),
    default=64,
    show_default=True,
    help="Requests that may wait beyond those; the next gets 429.",
)
@click.option(
    "--max-tokens",
    type=Count(),
    default=1024,
    show_default=True,
    help="The most tokens that a request may ask for.",
)
@click.option(
    "--max-prompt-tokens",
    type=Count(),
    default=4096,
    show_default=True,
    help="The most tokens that a request may be.",
)
@click.option(
    "--max-body",
    type=Count(),
    default=1 << 20,
    show_default=True,
    help="The most bytes of a request.",
)
@click.option(
    "--timeout",
    "seconds",
    type=Number(0.1),
    default=300.0,
    show_default=True,
    help="Seconds that a request may take, waiting included.",
)
@click.option(
    "--read-timeout",
    "read_seconds",
    type=Number(0.1),
    default=10.0,
    show_default=True,
    help="Seconds within which a request's headers, and then its body, must come.",
)
@click.option(
    "--log-texts", is_flag=True, help="Log what is asked and answered, too. It is never kept else."
)
@click.option(
    "--keep",
    type=PathType(),
    metavar="FILE",
    help="Keep problems that the expert had to answer, and corrections, in this .jsonl file, for "
    "mlx-fd loop --problems FILE --continue RUN. Lines of your own stay. [default: nothing is "
    "kept]",
)
@click.option(
    "--keep-most",
    type=Count(),
    default=1000,
    show_default=True,
    help="Problems that are kept in it; the oldest of them go first.",
)
@thinking_options
@click.option(
    "--expert-thinking",
    type=click.Choice(("off", "on")),
    help="Whether the expert thinks. [default: as in the run]",
)
@json_option
@quiet_option
@debug_option
def serve(
    student: str,
    expert: str | None,
    score: str | None,
    threshold: float | None,
    verbatim: bool,
    host: str,
    port: int,
    api_key_file: Path | None,
    places: int,
    speculate: int,
    queue: int,
    max_tokens: int,
    max_prompt_tokens: int,
    max_body: int,
    seconds: float,
    read_seconds: float,
    log_texts: bool,
    keep: Path | None,
    keep_most: int,
    thinking: str | None,
    expert_thinking: str | None,
    max_thinking_tokens: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Serve a student, and an expert behind it, as OpenAI's clients want it.

    The student answers, and its answer is scored; where the score is too low, the expert is asked.
    Each reply says who answered and why. Requests are logged as JSON lines on standard error,
    without their texts. Ctrl-C or SIGTERM lets running requests finish; SIGHUP takes the newest
    weights of the run.
    """
    from mlx_fd.models.backend import backend

    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'mlx-fd serve needs more packages: pip install "mlx-fd[serve]" ({error})'
        ) from error
    from mlx_fd.serve.limits import Limits, check_key

    key = _key(api_key_file)
    check_key(key, host)
    backend()
    from mlx_fd.serve.models import Thoughts
    from mlx_fd.serve.running import serve as run
    from mlx_fd.serve.service import Options

    limits = Limits(
        body_bytes=max_body,
        body_seconds=read_seconds,
        prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        seconds=seconds,
        places=places,
        queue=queue,
    )
    if keep is not None and keep.suffix.lower() != ".jsonl":
        raise UserError(f"--keep {keep}: the name must end in .jsonl, for mlx-fd loop to read it")
    if keep is None and given_on_command_line(("keep_most",)):
        raise UserError("--keep-most has no effect without --keep FILE; add it, or leave this out")
    options = Options(
        student=student,
        expert=expert,
        host=host,
        port=port,
        key=key,
        limits=limits,
        score=score,
        threshold=threshold,
        verbatim=verbatim,
        log_texts=log_texts,
        keep=keep,
        keep_most=keep_most,
        thoughts=Thoughts(thinking, expert_thinking, max_thinking_tokens),
        speculate=speculate,
    )

    def on_ready(service: Service, address: str) -> None:
        said = _said(service, address)
        if as_json:
            click.echo(json.dumps(said))
        elif not quiet:
            for name, value in said.items():
                shown = ", ".join(value) if isinstance(value, list) else value
                click.echo(f"{name.replace('_', ' ')}: {shown}", err=True)

    run(options, on_ready)


def _said(service: Service, address: str) -> dict[str, Any]:
    """What a user wants to know of a server that has just begun."""
    from mlx_fd.serve.models import CASCADE

    rule = service.rule
    said: dict[str, Any] = {"address": address, "models": list(service.served.names)}
    if CASCADE in service.served.names:
        said["score"] = rule.score.name
        said["threshold"] = rule.threshold
        said["threshold_by"] = rule.source
    said["api_key"] = "needed" if service.options.key else "none (this machine only)"
    said["kept"] = _kept(service)
    if service.served.judge.left_out:
        said["warning"] = service.served.judge.left_out
    return said


def _kept(service: Service) -> str:
    """What is kept, and where: not each server has problems that an expert has to answer."""
    if service.kept is None:
        return "nothing"
    what = "problems that the expert answers, and corrections"
    if service.served.expert is None:
        what = "corrections only (there is no expert)"
    elif service.served.form is None:
        what = "corrections only (the student is no run, so questions are sent as they are)"
    elif service.options.verbatim:
        what = "corrections, and problems that the expert answers where verbatim is false"
    return (
        f"{what}, in {service.kept.path} (now {len(service.kept.rows())}, at most "
        f"{service.options.keep_most})"
    )


def _key(file: Path | None) -> str | None:
    """The API key, from a file or the environment."""
    if file is None:
        return os.environ.get(_KEY_VARIABLE) or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: cannot be read: {error}") from error
