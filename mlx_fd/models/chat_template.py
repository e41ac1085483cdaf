"""Chat templates are programs of strangers: they get little time, little memory, and no more.

Jinja's sandbox keeps a template from files and Python's insides. It does not keep it from running
for ever, or from writing gigabytes. So every template is rendered first in a process of its own,
which the system stops at limits that hold inside a single operation too, and later renderings,
where what is said may lead a template elsewhere, have a deadline that is looked at on each line.

Run as a program, this module is that process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models.directory import blaming

# Llama's templates print the day; a run must not change with it.
ARGUMENTS = {"add_generation_prompt": True, "date_string": "26 Jul 2024"}
# Published templates take milliseconds and write as much as was said and some hundred characters.
_SECONDS = 5.0
_MAX_CHARS = 4 << 20
_MAX_TEMPLATE_CHARS = 1 << 20
_CHILD_BYTES = 1 << 30
_BEYOND = 3
_TOO_MUCH = "takes more time or memory than any template needs"
_ADVICE = "take the model's published template"
_TURNS = ("What is 1 + 2?", "It is 3.", "Is that right?")


def check(tokenizer: Any, path: Path) -> None:
    """Make sure that a tokenizer's chat template can be rendered, where it has one.

    Args:
        tokenizer: mlx-lm's wrapper.
        path: the model's directory.

    Raises:
        UserError: the template is damaged, or wants more time or memory than it may have.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if isinstance(template, str):
        check_source(template, tokenizer.special_tokens_map, path)
    if tokenizer.has_chat_template:
        for turns in (_TURNS[:1], _TURNS):
            with rendering(tokenizer):
                tokenizer.apply_chat_template(_messages(turns), tokenize=False, **ARGUMENTS)


def check_source(template: str, special_tokens: Mapping[str, Any], path: Path) -> None:
    """Make sure, in a process of its own, that a template keeps to its limits.

    Its other faults are not looked for here: what a template may use is transformers' to say.

    Args:
        template: Jinja's source.
        special_tokens: by name, as in ``{"eos_token": "<|im_end|>"}``.
        path: the model's directory.

    Raises:
        UserError: it is too long, or wants more time, memory or output than it may have.
    """
    if len(template) > _MAX_TEMPLATE_CHARS:
        raise UserError(f"{path}: its chat template has {len(template)} characters; {_ADVICE}")
    tokens = {name: str(token) for name, token in special_tokens.items()}
    if not _keeps_limits(template, json.dumps(tokens, sort_keys=True)):
        raise UserError(f"{path}: its chat template {_TOO_MUCH}; {_ADVICE}")


@contextlib.contextmanager
def rendering(tokenizer: Any) -> Iterator[None]:
    """Give a block that renders a tokenizer's chat template a deadline, and name its errors.

    The deadline is looked at on each line of the template, which works in any thread and needs no
    signal. (A single operation is not interrupted; :func:`check` has tried those.)

    Raises:
        UserError: the template cannot be rendered, or takes too long or writes too much.
    """
    where = getattr(tokenizer, "name_or_path", None) or "the model"
    deadline, written = time.monotonic() + _SECONDS, 0

    def trace(frame: Any, event: str, value: Any) -> Any:
        nonlocal written
        if frame.f_code.co_filename != "<template>":
            return None
        if event == "return" and isinstance(value, str):  # templates yield what they write
            written += len(value)
        if written > _MAX_CHARS or time.monotonic() > deadline:
            raise UserError(f"{where}: its chat template {_TOO_MUCH}; {_ADVICE}")
        return trace

    before = sys.gettrace()
    with blaming(f"{where}: its chat template cannot be rendered"):
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


def _messages(turns: tuple[str, ...]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[k % 2], "content": text} for k, text in enumerate(turns)]


# ------------------------------------------------------------------------------- the other process


@functools.lru_cache(maxsize=64)
def _keeps_limits(template: str, tokens: str) -> bool:
    # -P: no module of the folder that the user is in; but the package itself must be found.
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mlx_fd.models.chat_template"],
            input=json.dumps({"template": template, "tokens": json.loads(tokens)}),
            env={**os.environ, "PYTHONPATH": search},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=4 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    # Anything but a signal or its own word is the template's other faults, for transformers to say.
    return 0 <= done.returncode != _BEYOND


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's own way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

        def written(self, caller: Any) -> str:
            return str(caller())

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = json.dumps
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    return environment


def main() -> int:
    """Render the template on standard input within the limits.

    Returns:
        The exit status; :data:`_BEYOND` where they were too narrow.
    """
    import resource

    given = json.load(sys.stdin)
    seconds = int(_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
        resource.setrlimit(resource.RLIMIT_AS, (_CHILD_BYTES, _CHILD_BYTES))
    try:
        template = _environment().from_string(given["template"])
        for turns in (_TURNS[:1], _TURNS):
            written = 0
            variables = {"messages": _messages(turns), **ARGUMENTS, **given["tokens"]}
            for piece in template.generate(variables):
                written += len(piece)
                if written > _MAX_CHARS:
                    return _BEYOND
    except MemoryError:
        return _BEYOND
    return 0


if __name__ == "__main__":
    sys.exit(main())
