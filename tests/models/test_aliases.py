"""The aliases and what the guide says of them."""

from __future__ import annotations

from mlx_fd.models.aliases import ALIASES, alias_of
from mlx_fd.models.resolve import parse_name
from support import ROOT


def test_the_guide_has_every_alias() -> None:
    """Each with its repository and its student; bf16 ones share a line."""
    page = (ROOT / "docs" / "models.md").read_text()
    rows = {}
    for line in page.partition("## Aliases")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells[1:]
    for name, alias in ALIASES.items():
        if not alias.repo or name.endswith("-bf16"):
            continue
        repository, student = rows.pop(name)
        assert alias.repo == f"mlx-community/{repository}"
        parsed = parse_name(alias.student)
        if parsed.base == name:
            assert student.startswith(f"itself with {parsed.layers} of its")
        else:
            assert student.split()[0] == f"`{alias.student}`"
    assert len(rows) == 1  # bf16


def test_a_repository_has_one_alias() -> None:
    assert alias_of("mlx-community/qwen3-8B-4bit") == "qwen3-8b-4bit"
    assert alias_of("someone/qwen3-8b-4bit") is None
    assert alias_of("") is None
    for name, alias in ALIASES.items():
        if alias.repo:
            assert alias_of(alias.repo) == name
