"""What can be added in one file: losses, contexts, baselines, formats, sources, model families.

Each kind has a registry here and a package of small files, one for each thing. A file makes one
entry and registers it; everything that lists the kind (an option's choices and help, the checks of
a configuration, docs/reference.md, the tests) reads the registry::

    from mlx_fd.feedback.loss_terms import Loss, register_loss

    register_loss(Loss(name="mine", help="...", ...))

A file from outside the package does the same before it asks mlx-fd for anything, and then calls
``mlx_fd.cli.main()``, ``make_plan`` or whatever else it wants (CONTRIBUTING.md, "Adding one
thing").

This module is below the configuration, which needs the names, and so imports nothing of what is
registered. A registry reads its package's files when it is first asked for a name. Those files, in
turn, import MLX inside their functions only: names and help texts are there at once.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What every kind of thing has.

    Attributes:
        name: what it is called on the command line and in files.
        help: a few words, without a full stop, for help texts and docs/reference.md.
        order: its place in lists, ascending; where it is the same, the names decide.

    Raises:
        ValueError: the name has other characters than a-z, 0-9, "-" and "_".
    """

    name: str
    help: str
    order: int = 1000

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a name is made of a-z, 0-9, - and _, not {self.name!r}")


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """Entries by name, in their order, whichever was registered first."""

    def __init__(self, kind: str, package: str):
        """An empty registry.

        Args:
            kind: one word or two for messages.
            package: its modules register what mlx-fd itself has.
        """
        self.kind = kind
        self._package = package
        self._entries: dict[str, E] = {}
        self._complete = False

    def register(self, entry: E) -> E:
        """Add an entry.

        Raises:
            ValueError: there is another one of that name.
        """
        self._read_package()
        if entry.name in self._entries:
            raise ValueError(f"there are two entries {entry.name!r} of the kind {self.kind}")
        entries = [*self._entries.values(), entry]
        self._entries = {e.name: e for e in sorted(entries, key=lambda e: (e.order, e.name))}
        return entry

    def unregister(self, name: str) -> None:
        """Take an entry out again, as tests and notebooks want to.

        Raises:
            KeyError: there is none of that name.
        """
        del self._entries[name]

    def _read_package(self) -> None:
        if self._complete:
            return
        # Set first: the modules that are imported here register their entries.
        self._complete = True
        try:
            package = importlib.import_module(self._package)
            for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self._package}.{module}")
        except BaseException:
            self._complete = False  # the next one who asks is told, too
            raise

    def __getitem__(self, name: str) -> E:
        self._read_package()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._read_package()
        return iter(self._entries)

    def __len__(self) -> int:
        self._read_package()
        return len(self._entries)

    def described(self) -> str:
        """All entries in one line: ``name: help; name: help``."""
        return "; ".join(f"{entry.name}: {entry.help}" for entry in self.values())


# What the entries are is said where their kind is defined, in the package named here.
LOSSES: Registry[Any] = Registry("loss", "mlx_fd.feedback.loss_terms")
SOURCES: Registry[Any] = Registry("problem source", "mlx_fd.problems.sources")
KINDS: Registry[Any] = Registry("kind of answer", "mlx_fd.problems.kinds")
CONTEXTS: Registry[Any] = Registry("self-teacher context", "mlx_fd.training.selfdistill.contexts")
SYSTEMS: Registry[Any] = Registry("baseline", "mlx_fd.evaluation.baselines")
FORMATS: Registry[Any] = Registry("export format", "mlx_fd.export.formats")
FAMILIES: Registry[Any] = Registry("model family", "mlx_fd.models.families")

REGISTRIES: dict[str, Registry[Any]] = {
    "Losses": LOSSES,
    "Problem sources": SOURCES,
    "Kinds of answers": KINDS,
    "Self-teacher contexts": CONTEXTS,
    "Systems of an evaluation": SYSTEMS,
    "Export formats": FORMATS,
    "Model families of hf, PEFT and GGUF": FAMILIES,
}
"""All of them, by the title that docs/reference.md gives them."""
