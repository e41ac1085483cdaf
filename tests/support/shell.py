"""The installed command in a process of its own."""

import os
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SCRIPT = str(Path(sysconfig.get_path("scripts")) / "mlx-fd")


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        """What standard error says, on one line, however a table was wrapped."""
        return " ".join((self.out + self.err).split())


def shell(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> Done:
    """Run the installed console script in a process of its own."""
    done = subprocess.run(
        [SCRIPT, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def failed(done: Done, *texts: str, status: int = 2) -> None:
    """The command said what was wrong, on standard error only, without a traceback."""
    assert done.status == status, done
    assert done.out == ""
    assert "Traceback" not in done.err and "a bug in mlx-fd" not in done.err
    for text in texts:
        assert text in done.err
