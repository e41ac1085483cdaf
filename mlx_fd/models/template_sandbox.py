"""Chat templates are programs of strangers: they get little time, little memory, and no more.

Jinja's sandbox keeps a template from files and Python's insides. It does not keep it from running
for ever, or from writing gigabytes. So every template is rendered first in a process of its own,
which the system stops at limits that hold inside a single operation too, and later renderings,
where what is said may lead a template elsewhere, have a deadline that is looked at on each line,
and bounds within one (:mod:`mlx_fd.models.template_bounds`).

Run as a program, this module is that process. It renders as the rest of the package does, in the
environment that transformers gives templates (``apply_chat_template``), but for the clock.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models.backend import BLAS_VARIABLE
from mlx_fd.models.directory import blaming

CLOCK = "strftime_now"
"""The function that templates ask for the date: its result is the run's, not the clock's."""
_ANY_DAY = "2024-07-26"
# Published templates take milliseconds and write as much as was said and some hundred characters.
_SECONDS = 5.0
_MAX_CHARS = 4 << 20
_MAX_TEMPLATE_CHARS = 1 << 20
_CHILD_BYTES = 1 << 30
# Exit statuses of the other process: beyond its limits, and any other fault of the template's.
_BEYOND, _FAULT = 3, 4
_TOO_MUCH = "takes more time or memory than any template needs"
# Tests and filters by which a template finds out whether it was given something.
_ASKS = ("defined", "undefined", "none", "default", "d")
_ADVICE = "take the model's published template"


class TooMuch(UserError):
    """A template wants more time, memory or output than it may have."""


def render(source: str, variables: Mapping[str, Any], date: str, where: str) -> str:
    """Render a template that :func:`check_limits` has tried, within a deadline.

    The deadline is looked at on each line of the template, which works in any thread and needs no
    signal. A single operation is not interrupted: :mod:`mlx_fd.models.template_bounds` keeps it
    small.

    Args:
        source: Jinja's source.
        variables: what it reads, JSON values.
        date: the day that it may print, as in ``"2026-11-28"``.
        where: the model, for errors.

    Raises:
        TooMuch: it takes too long or writes too much.
        UserError: it cannot be rendered.
    """
    deadline, written = time.monotonic() + _SECONDS, 0

    def trace(frame: Any, event: str, value: Any) -> Any:
        nonlocal written
        if frame.f_code.co_filename != "<template>":
            return None
        if event == "return" and isinstance(value, str):  # templates yield what they write
            written += len(value)
        if written > _MAX_CHARS or time.monotonic() > deadline:
            raise TooMuch(f"{where}: its chat template {_TOO_MUCH}; {_ADVICE}")
        return trace

    before = sys.gettrace()
    with blaming(f"{where}: its chat template cannot be rendered"):
        template = _compiled(source)
        sys.settrace(trace)
        try:
            return str(template.render({**variables, CLOCK: _clock(date)}))
        except MemoryError as error:
            raise TooMuch(f"{where}: its chat template {_TOO_MUCH}; {_ADVICE}") from error
        finally:
            sys.settrace(before)


def check_limits(
    source: str, variables: Sequence[Mapping[str, Any]], date: str, where: str
) -> None:
    """Make sure, in a process of its own, that a template keeps to its limits.

    Its other faults are not looked for here: :func:`render` tells them.

    Args:
        source: Jinja's source.
        variables: what it reads, once for each rendering to try.
        date: as for :func:`render`.
        where: the model, for errors.

    Raises:
        TooMuch: it is too long, or wants more time, memory or output than it may have.
    """
    if len(source) > _MAX_TEMPLATE_CHARS:
        raise TooMuch(f"{where}: its chat template has {len(source)} characters; {_ADVICE}")
    # Without a look at the clock a template is the same on every day, and tried once.
    day = date if CLOCK in source else _ANY_DAY
    task = {"source": source, "variables": list(variables), "date": day, "seconds": _SECONDS}
    if not _keeps_limits(json.dumps(task, sort_keys=True)):
        raise TooMuch(f"{where}: its chat template {_TOO_MUCH}; {_ADVICE}")


def variables_read(source: str, where: str) -> frozenset[str]:
    """Names of the variables that a template takes from outside.

    What it sets itself is none of them, unless it asks first whether it is there.

    Raises:
        UserError: it is no template.
    """
    with blaming(f"{where}: its chat template cannot be rendered"):
        return _variables_read(source)


@functools.lru_cache(maxsize=64)
def _variables_read(source: str) -> frozenset[str]:
    from jinja2 import meta, nodes

    tree = _environment().parse(source)
    read = meta.find_undeclared_variables(tree)
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = {
        node.node.name
        for node in tree.find_all((nodes.Test, nodes.Filter))
        if node.name in _ASKS and isinstance(node.node, nodes.Name)
    }
    return frozenset(read - (own - asked))


def _clock(date: str) -> Any:
    day = datetime.datetime.fromisoformat(date)
    return lambda form: day.strftime(str(form))


# ------------------------------------------------------------------------------------- environment


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


@functools.cache
def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.utils import Namespace

    from mlx_fd.models.template_bounds import BoundedEnvironment, bounded

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's own way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

        def written(self, caller: Any) -> str:
            return str(caller())

    class PlainNamespace(Namespace):
        """Keeps no attribute that Python itself would ask an object for."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a chat template may not set an attribute {name}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **kwargs: Any) -> Any:
        made = PlainNamespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def mapping(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)  # a function, since of the type there is more to be had

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = bounded("tojson", to_json)
    environment.globals["raise_exception"] = refuse
    environment.globals["namespace"] = namespace
    environment.globals["dict"] = mapping
    # Each rendering brings its own: here it says that there is such a thing.
    environment.globals[CLOCK] = _clock(_ANY_DAY)
    return environment


# ------------------------------------------------------------------------------- the other process


@functools.lru_cache(maxsize=64)
def _keeps_limits(task: str) -> bool:
    # -P: no module of the folder that the user is in; but the package itself must be found.
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mlx_fd.models.template_sandbox"],
            input=task,
            # A BLAS would take room for a thread on each processor, and nothing is computed here.
            env={**os.environ, "PYTHONPATH": search, BLAS_VARIABLE: "off"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=4 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, _BEYOND, _FAULT) and done.returncode > 0:
        # Untried it would run here, without limits.
        raise UserError(
            f"the process that tries chat templates ended with status {done.returncode}; run "
            f"{sys.executable} -P -m mlx_fd.models.template_sandbox < /dev/null to see why"
        )
    return done.returncode in (0, _FAULT)


def main() -> int:
    """Render the template on standard input within the limits.

    Returns:
        The exit status; :data:`_BEYOND` where they were too narrow, :data:`_FAULT` where the
        template fails otherwise.
    """
    import resource

    _environment()  # what that needs is no template's
    task = json.load(sys.stdin)
    seconds = math.ceil(task["seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
        resource.setrlimit(resource.RLIMIT_AS, (_CHILD_BYTES, _CHILD_BYTES))
    try:
        template = _compiled(task["source"])
        for variables in task["variables"]:
            written = 0
            for piece in template.generate({**variables, CLOCK: _clock(task["date"])}):
                written += len(piece)
                if written > _MAX_CHARS:
                    return _BEYOND
    except MemoryError:
        return _BEYOND
    except Exception:  # whatever a template may raise: who renders it tells
        return _FAULT
    return 0


if __name__ == "__main__":
    sys.exit(main())
