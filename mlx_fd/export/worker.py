"""One engine in a process of its own: what it loads, prints or aborts stays there.

``python -m mlx_fd.export.worker`` reads a JSON request from standard input and writes JSON lines:
``{"done": 3, "total": 18}`` as it goes; at the end ``{"measures": ...}`` or ``{"failure": "why"}``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from mlx_fd.errors import UserError
from mlx_fd.models.backend import load_blas
from mlx_fd.problems import Problem


def _own_output() -> TextIO:
    """Standard output for this module alone; what libraries print there goes to standard error."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output


def main() -> None:
    """Run the request's engine on its bundle."""
    out = _own_output()

    def say(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    request = json.loads(sys.stdin.read())
    # Before anything imports MLX.
    load_blas()
    from mlx_fd.export.bundle_reading import read_bundle
    from mlx_fd.export.engines import ENGINES
    from mlx_fd.export.measures import measure

    problems = [
        Problem(**{**row, "choices": tuple(row["choices"]), "also_right": tuple(row["also_right"])})
        for row in request["asked"]
    ]
    try:
        bundle = read_bundle(Path(request["folder"]))
        engine = ENGINES[request["engine"]](request["target"], bundle)
        measures = measure(
            engine, bundle, problems, lambda done, total: say(done=done, total=total)
        )
    except UserError as error:
        say(failure=str(error))
    except Exception as error:
        say(failure=f"{request['engine']}: {type(error).__name__}: {error}")
        raise
    else:
        say(measures=measures)


if __name__ == "__main__":
    main()
