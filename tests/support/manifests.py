"""A manifest as a run writes it."""

from mlx_fd.config import Config, override
from mlx_fd.runs.manifest import flat_options
from mlx_fd.runs.records.manifest import SCHEMA_VERSION


def config(**changes) -> Config:
    return override(Config(), changes, "test")


def manifest(**changes) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {"mlx": "0.32.4", "python": "3.12"},
        "backend": {"device": "cpu", "threads": "1"},
        "expert": {"name": "e", "sha256": "1"},
        "student": {"name": "s", "sha256": "2"},
        "problems": {"name": "p", "sha256": "3"},
        "options": flat_options(config(**changes)),
    }
