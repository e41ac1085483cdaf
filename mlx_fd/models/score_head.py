"""A student's score head outside of its run: in a file of its own, and in a GGUF file's metadata.

Beside the weights stands all that whoever reads the head there has to know: where it reads, and the
text of the chat around a problem and an answer.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_fd.errors import UserError
from mlx_fd.models.directory import blaming
from mlx_fd.models.gguf_reading import GgufFile
from mlx_fd.models.student import read_trained

SCORE_HEAD = "score_head.safetensors"
KEY = "mlx_fd.score_head"
# What is said beside the weights, all texts.
AROUND = ("before", "between", "after")
ABOUT = ("score_at", *AROUND, "date", "template_kwargs", "max_tokens", "repetition_penalty")


@dataclass(frozen=True, eq=False)
class ScoreHead:
    """A linear head on the last hidden state, after the final norm; its tanh is the score.

    Attributes:
        weight: [1, d], float32.
        bias: [1], float32.
        about: of :data:`ABOUT`: ``score_at``, where it reads (``prompt``: at the prompt's last
            token; ``own``, ``feedback``: where the feedback's last token is predicted);
            ``before``, ``between`` and ``after``, the text of the prompt around problem and answer,
            missing where no such three texts make it; ``date``, the day in them, ``YYYY-MM-DD``,
            missing where the chat template prints none; ``template_kwargs``, its further variables
            as JSON, missing where there were none; ``max_tokens``, the most of a feedback;
            ``repetition_penalty``, with which it is written, missing where that is 1.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    about: Mapping[str, str]

    @property
    def max_tokens(self) -> int:
        """The most tokens of a feedback."""
        return int(self.about["max_tokens"])

    @property
    def repetition_penalty(self) -> float:
        """With which a feedback is written."""
        return float(self.about.get("repetition_penalty", 1))

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Further variables of the chat template."""
        found: dict[str, Any] = json.loads(self.about.get("template_kwargs", "{}"))
        return found

    @property
    def around(self) -> dict[str, str]:
        """The text of the prompt around problem and answer; empty where it is not known."""
        return {name: self.about[name] for name in AROUND if name in self.about}

    def write(self, file: Path) -> None:
        """Write ``weight`` and ``bias`` as safetensors, the rest into their metadata."""
        arrays = {"weight": mx.array(self.weight), "bias": mx.array(self.bias)}
        mx.save_safetensors(str(file), arrays, metadata={"format": "mlx", **self.about})

    def metadata(self) -> dict[str, Any]:
        """GGUF metadata: ``weight`` an array of d numbers, ``bias`` one, texts as they are."""
        return {
            f"{KEY}.weight": self.weight[0].tolist(),
            f"{KEY}.bias": float(self.bias[0]),
            **{f"{KEY}.{name}": value for name, value in self.about.items()},
        }


def from_file(file: Path) -> ScoreHead:
    """The score head that :meth:`ScoreHead.write` wrote.

    Raises:
        UserError: it cannot be read, or is no such head.
    """
    arrays = read_trained(file)
    with blaming(f"{file}: cannot be read"):
        read: Any = mx.load(str(file), format="safetensors", return_metadata=True)
    about = {name: read[1][name] for name in ABOUT if name in read[1]}
    weight, bias = (arrays.get(name, mx.zeros(())) for name in ("weight", "bias"))
    if len(weight.shape) != 2 or len(weight) != 1 or bias.shape != (1,) or not _whole(about):
        raise UserError(f"{file}: is no score head of mlx-fd; export the student again")
    return ScoreHead(np.array(weight, dtype=np.float32), np.array(bias, dtype=np.float32), about)


def _whole(about: Mapping[str, str]) -> bool:
    """Whether it is said where a head reads, and behind what."""
    most, penalty = about.get("max_tokens", ""), about.get("repetition_penalty", "1")
    try:
        usable = int(most) > 0 and 0 < float(penalty) < math.inf
        datetime.date.fromisoformat(about.get("date", "2000-01-01"))
        usable &= isinstance(json.loads(about.get("template_kwargs", "{}")), dict)
    except ValueError:
        return False
    return usable and about.get("score_at") in ("prompt", "own", "feedback")


def from_gguf(file: GgufFile, width: int) -> ScoreHead | None:
    """The score head in a GGUF file; ``None`` where it has none.

    Args:
        file: the file.
        width: size of the model's hidden states.

    Raises:
        UserError: it is none of this model, or its numbers are not finite.
    """
    values = file.get(f"{KEY}.weight", list)
    if values is None:
        return None
    try:
        weight = np.array(values, dtype=np.float32)
    except (TypeError, ValueError):
        weight = np.array([])
    bias = np.array([file.need(f"{KEY}.bias", float)], dtype=np.float32)
    if weight.shape != (width,) or not np.isfinite([*weight, *bias]).all():
        raise file.bad(
            f"the metadata entry {KEY}.weight is no head of this model: {width} finite numbers"
        )
    about = {name: file.get(f"{KEY}.{name}", str) for name in ABOUT}
    known = {name: value for name, value in about.items() if value is not None}
    return ScoreHead(weight[None], bias, known)
