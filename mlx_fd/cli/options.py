"""What the commands' options have in common: types, flags, and a run's configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mlx_fd.config import MAX_COUNT, MAX_SEED, OPTIONS, Config, Option, override, preset, read
from mlx_fd.models.aliases import TINY
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


class Count(click.ParamType):
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

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Words(click.ParamType):
    """A comma-separated list."""

    name = "list"

    def __init__(self, numbers: bool):
        self._numbers = numbers

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Any]:
        """The words, or the numbers."""
        words = [word.strip() for word in value.split(",") if word.strip()]
        if not self._numbers:
            return words
        try:
            return [float(word) for word in words]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,1,1,0.03")


class PathType(click.ParamType):
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


class NameOf(click.Choice):
    """A name in a registry, looked up when it is asked for."""

    def __init__(self, registry: Mapping[str, Any]):
        self._registry = registry
        super().__init__(())

    @property
    def choices(self) -> tuple[str, ...]:
        """The names."""
        return tuple(self._registry)

    @choices.setter
    def choices(self, words: tuple[str, ...]) -> None:
        pass  # click's own, of which there are none


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
    option: Option, *, flag: str = "", default: str = "", help: str = ""
) -> click.Option:
    """An option of the configuration as one of the command line; not given, it is ``None``.

    Args:
        option: the option.
        flag: its flag, where that is not its name.
        default: what is said of its default, where that is not the option's.
        help: what is said of it, where it means something else there.
    """
    flag = flag or "--" + option.name.replace("_", "-")

    def text() -> str:
        words = f" One of: {', '.join(option.choices)}." if option.choices else ""
        if option.names:
            words = f" Names: {', '.join(option.names)}."
        shown = default or shown_default(option.default)
        return f"{help or option.help}{words} [default: {shown}]"

    if option.kind is bool:
        return LateOption([f"{flag}/--no-{flag[2:]}"], default=None, late_help=text)
    if option.kind is tuple:
        kind: Any = Words(numbers=option.words == ())
    else:
        kind = {int: click.INT, float: click.FLOAT, str: click.STRING}[option.kind]
    return LateOption([flag, option.name], type=kind, default=None, late_help=text)


def shown_default(value: Any) -> str:
    """A default as the help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return shown or "empty"


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


skip_bad_rows_option = click.option(
    "--skip-bad-rows", is_flag=True, help=OPTIONS["skip_bad_rows"].help
)
debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
quiet_option = click.option("--quiet", is_flag=True, help="Print warnings and the result only.")
track_option = click.option(
    "--track",
    "trackers",
    type=click.Choice(TRACKERS),
    multiple=True,
    help="Send losses, weights, gains, gate and accuracy there too, while it goes; repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def configuration(preset_name: str | None, file: Path | None, given: dict[str, Any]) -> Config:
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
