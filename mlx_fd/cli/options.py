"""What the commands' options have in common: types and flags."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlx_fd.config import OPTIONS, Option
from mlx_fd.config.fields import MAX_COUNT, MAX_SEED, Words, names_of
from mlx_fd.errors import UserError
from mlx_fd.registry import KINDS
from mlx_fd.runs.tracking import TRACKERS

_SECTIONS = {
    "models": "Models",
    "problems": "Problems",
    "generation": "Generation",
    "losses": "Losses",
    "gate": "Gate",
    "training": "Training",
    "episode": "Episode and run",
    "selfdistill": "Method",
}

# What stands for the value of an option in the help, where its type does not say it.
_METAVARS = {
    "expert": "NAME",
    "student": "NAME",
    "critic": "NAME",
    "problems": "SOURCE",
    "split": "NAME",
    "teacher_cache": "DIR",
    "chat_template_kwargs": "JSON",
    "template_date": "YYYY-MM-DD",
    "continue_from": "RUN",
}
# mlx-lm's name for it, beside ours.
_FLAGS = {
    "chat_template_kwargs": ("--chat-template-args", "--chat-template-kwargs"),
    "continue_from": ("--continue", "--continue-from"),
}
# Longer lists of choices stand in the help text: the first column does not wrap.
_CHOICES_WIDTH = 40


class Count(click.ParamType[int]):
    """A whole number within limits, which the help need not show."""

    name = "integer"

    def __init__(self, low: int = 1, high: int = MAX_COUNT):
        self._range = click.IntRange(low, high)

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """The number."""
        return int(self._range.convert(value, param, ctx))


SEED = Count(0, MAX_SEED)


class Number(click.FloatRange):
    """A finite number within limits; click's own type takes ``nan`` for one."""

    name = "float"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def _not_one_of(value: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f'; did you mean "{close[0]}"?' if close else "."
    return f"{value!r} is not one of {', '.join(map(repr, choices))}{hint}"


class Choice(click.Choice[str]):
    """One of some names, looked up late; a wrong one is told which may have been meant."""

    def __init__(self, words: Words):
        self._words = words
        super().__init__(())

    @property
    def choices(self) -> tuple[str, ...]:
        """The names."""
        return names_of(self._words)

    @choices.setter
    def choices(self, words: Iterable[str]) -> None:
        pass  # click's own, of which there are none

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The name."""
        if value not in self.choices:
            self.fail(_not_one_of(value, self.choices), param, ctx)
        return super().convert(value, param, ctx)


class NameList(click.ParamType[list[str]]):
    """Names separated by commas, each one of the choices, which are looked up late."""

    name = "NAME,..."

    def __init__(self, words: Words):
        self._words = words

    @property
    def choices(self) -> tuple[str, ...]:
        """The names."""
        return names_of(self._words)

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        """The names."""
        if not isinstance(value, str):
            return list(value)
        names = [name.strip() for name in value.split(",") if name.strip()]
        for name in names:
            if name not in self.choices:
                self.fail(_not_one_of(name, self.choices), param, ctx)
            if names.count(name) > 1:
                self.fail(f"{name!r} is there twice; name it once", param, ctx)
        if not names:
            among = ", ".join(map(repr, self.choices))
            self.fail(f"{value!r} names nothing; name at least one of {among}", param, ctx)
        return names

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """The names that can stand after the last comma."""
        before, comma, begun = incomplete.rpartition(",")
        given = before.split(",")
        return [
            CompletionItem(before + comma + name)
            for name in self.choices
            if name.startswith(begun) and name not in given
        ]


class FreeNameList(click.ParamType[list[str]]):
    """Names separated by commas, which only what they name can judge."""

    name = "NAME,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        """The names."""
        if not isinstance(value, str):
            return list(value)
        return [name.strip() for name in value.split(",") if name.strip()]


class NumberList(click.ParamType[list[float]]):
    """Numbers separated by commas."""

    name = "FLOAT,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> list[float]:
        """The numbers."""
        try:
            return [float(word) for word in value.split(",") if word.strip()]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,1,1,0.03")


class JsonTable(click.ParamType[dict[str, Any]]):
    """A JSON object."""

    name = "JSON"

    def convert(self, value: Any, param: Any, ctx: Any) -> dict[str, Any]:
        """The object."""
        if isinstance(value, dict):
            return value
        try:
            table = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value!r} is not JSON ({error}); write '{{\"name\": true}}'", param, ctx)
        if not isinstance(table, dict):
            self.fail(f"{value!r} is not a JSON object such as '{{\"name\": true}}'", param, ctx)
        return table


class PathType(click.ParamType[Path]):
    """A path; ``~`` is seen to here, because shells leave it alone in ``--out=~/runs``."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """The path, from the home directory where it begins with ``~``."""
        if not str(value).strip():
            self.fail("the path is empty")
        try:
            return Path(value).expanduser()
        except RuntimeError:  # ~NAME of nobody
            return Path(value)


class LateOption(click.Option):
    """An option whose help text is made when it is shown, after everything was registered."""

    def __init__(self, *args: Any, late_help: Callable[[], str], **kwargs: Any):
        self._late_help = late_help
        super().__init__(*args, **kwargs)

    @property
    def help(self) -> str:
        """The help text."""
        return self._late_help()

    @help.setter
    def help(self, text: str | None) -> None:
        pass  # click's own, which is empty


def click_option(
    option: Option,
    *,
    flags: tuple[str, ...] = (),
    default: str = "",
    help: str = "",
) -> click.Option:
    """An option of the configuration as one of the command line; not given, it is ``None``.

    Args:
        option: the option.
        flags: its spellings, where its name is not the only one.
        default: its default as the help shows it, where that is not the option's.
        help: its help text, where that is not the option's.
    """
    flags = flags or _FLAGS.get(option.name) or ("--" + option.name.replace("_", "-"),)
    words = option.words
    kind: click.ParamType[Any]
    metavar = _METAVARS.get(option.name)
    listed = bool(option.names)
    if option.kind is tuple:
        listed = words != ()
        kind = FreeNameList() if option.free else NumberList()
        if listed:
            kind = NameList(words)
        metavar = metavar or kind.name
    elif words != ():
        kind = Choice(words)
        # What is looked up late may be longer by then.
        listed = not isinstance(words, tuple) or len("|".join(words)) > _CHOICES_WIDTH
        metavar = "NAME" if listed else metavar
    else:
        kind = {
            bool: click.BOOL,
            int: click.INT,
            float: click.FLOAT,
            str: click.STRING,
            dict: JsonTable(),
        }[option.kind]

    def text() -> str:
        among = f" One of: {', '.join(names_of(words))}." if listed else ""
        if option.names:
            among = f" Names: {', '.join(option.names)}."
        return f"{help or option.help}{among} [default: {default or shown_default(option.default)}]"

    if option.kind is bool:
        return LateOption([f"{flags[0]}/--no-{flags[0][2:]}"], default=None, late_help=text)
    return LateOption(
        [*flags, option.name], type=kind, metavar=metavar, default=None, late_help=text
    )


def shown_default(value: Any) -> str:
    """A default as the help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "empty" if value == {} else shown or "empty"


class ConfiguredCommand(click.Command):
    """A command whose configuration options are shown by section, after its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
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


def with_configuration(command: click.Command) -> click.Command:
    """Give a command every option of the loop's configuration."""
    command.params.extend(
        click_option(option) for option in OPTIONS.values() if option.section != "selfdistill"
    )
    return command


def model_options(argument: str) -> Callable[[Any], Any]:
    """Give a command a model as mlx-lm's commands take one, beside the argument.

    Args:
        argument: the argument's name; the command gets it, ``model_option`` and ``adapter_path``,
            which :func:`chosen_model` reads.
    """

    def decorate(command: Any) -> Any:
        command = click.option(
            "--adapter-path",
            type=PathType(),
            metavar="DIR",
            help="An mlx-lm adapter, or a checkpoint of a run, to load on top of the model. "
            f"[default: none; without {argument.upper()}: on the model it was trained on]",
        )(command)
        command = click.option(
            "--model", "model_option", metavar="NAME", help=f"The same as {argument.upper()}."
        )(command)
        return click.argument(argument, required=False, metavar=f"[{argument.upper()}]")(command)

    return decorate


def chosen_model(
    argument: str | None, option: str | None, adapter: Path | None, name: str = "MODEL"
) -> str:
    """The model of a command that has :func:`model_options`; empty: the one the adapter names.

    Args:
        argument: the argument, if given.
        option: ``--model``, if given.
        adapter: ``--adapter-path``, if given.
        name: what the help calls the argument.

    Raises:
        click.UsageError: the model is given twice, or not at all.
    """
    if argument is not None and option is not None:
        raise click.UsageError(f"{name} and --model are the same; give one of them.")
    model = argument if argument is not None else option
    if model is None and adapter is None:
        raise click.UsageError(f"Missing argument '{name}' (or --model, or --adapter-path).")
    return model or ""


chat_template_option = click.option(
    "--chat-template-args",
    "template_kwargs",
    type=JsonTable(),
    metavar="JSON",
    help="Variables for the chat template as JSON, such as the reasoning_effort of gpt-oss. "
    "[default: the run's; none for a model]",
)


def thinking_options(command: Any) -> Any:
    """Give a command ``thinking`` and ``max_thinking_tokens``, of which neither has a default."""
    command = click.option(
        "--max-thinking-tokens",
        type=Count(),
        help="Maximum tokens per thought. [default: the run's; 1024 for a model]",
    )(command)
    return click.option(
        "--thinking",
        type=click.Choice(("off", "on")),
        help="Whether the model thinks before it writes. [default: as in its run; off for a model]",
    )(command)


def add_options(
    command: click.Command,
    defaults: Mapping[str, str],
    flags: Mapping[str, tuple[str, ...]],
    helps: Mapping[str, str],
) -> click.Command:
    """Give a command options of a configuration.

    Args:
        command: which; it is changed.
        defaults: what to show as each option's default, in the order of the help text.
        flags: all spellings of those that have more than one.
        helps: what those mean here that mean something else than elsewhere.
    """
    for name, default in defaults.items():
        command.params.append(
            click_option(
                OPTIONS[name],
                flags=flags.get(name, ()),
                default=default,
                help=helps.get(name, ""),
            )
        )
    return command


config_file_option = click.option(
    "--config",
    "config_file",
    type=PathType(),
    metavar="FILE",
    help="A TOML file with options, such as an earlier run's config.toml.",
)
out_option = click.option(
    "--out", type=PathType(), metavar="DIR", help="Run directory. [default: runs/DATE-TIME]"
)
columns_option = click.option("--columns", default="", metavar="LIST", help=OPTIONS["columns"].help)
answer_kind_option = click.option(
    "--answer-kind",
    type=Choice(lambda: ("auto", *KINDS)),
    default="auto",
    show_default=True,
    help=OPTIONS["answer_kind"].help,
)
code_execution_option = click.option(
    "--allow-code-execution", is_flag=True, help="Run programs that models write, to judge them."
)
skip_bad_rows_option = click.option(
    "--skip-bad-rows", is_flag=True, help=OPTIONS["skip_bad_rows"].help
)
debug_option = click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
quiet_option = click.option("--quiet", is_flag=True, help="Print only warnings and the result.")
track_option = click.option(
    "--track",
    "trackers",
    type=click.Choice(TRACKERS),
    multiple=True,
    help="Also log losses, weights, gate and accuracy to this tracker during the run; repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def given_on_command_line(names: Iterable[str]) -> list[str]:
    """Which of the current command's parameters were given, and are not their defaults."""
    context = click.get_current_context()
    by_hand = click.core.ParameterSource.COMMANDLINE
    return [name for name in names if context.get_parameter_source(name) is by_hand]


def text_of(value: str, option: str) -> str:
    """An option's text: itself, a file's after @, or standard input for -."""
    try:
        if value == "-":
            # As bytes: what they mean is not the locale's to say.
            stdin = getattr(sys.stdin, "buffer", None)
            text = sys.stdin.read() if stdin is None else stdin.read().decode("utf-8-sig")
        elif value.startswith("@"):
            text = Path(value[1:]).expanduser().read_text(encoding="utf-8-sig")
        else:
            text = value
    except (OSError, RuntimeError) as error:  # RuntimeError: ~NAME of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {value}: cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option} {value}: cannot be read: it is not UTF-8 text (at byte {error.start}); save "
            "it as UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{option}: is empty")
    return text.strip()
