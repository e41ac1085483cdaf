"""The scripts as modules, for the tests of their functions."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from support import ROOT

SCRIPTS = ROOT / "scripts"


def script(name: str) -> ModuleType:
    """The module of ``scripts/NAME.py``, which may import others from there."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module
