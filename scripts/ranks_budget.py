"""What several ranks send each other in a batch, and from how many on it is more than it gains.

    python scripts/ranks_budget.py                          # Qwen2.5-0.5B beside a 7B expert
    python scripts/ranks_budget.py --seconds 20 --problems 4

Computed, not measured. The bytes are those of MLX's ring: a sum of S bytes has each rank send
2 (N - 1) / N of S, and a gathering has it pass on what the N - 1 others have. Seconds of work and
the links' speeds are given, not measured: put your own in.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from mlx_fd.models.backend import backend

backend()

from edge_budget import MODELS  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_fd.config import Config  # noqa: E402
from mlx_fd.models.outline import build  # noqa: E402
from mlx_fd.models.student import prepare  # noqa: E402

# Bytes a second that a link carries, and seconds that a message takes on its way.
LINKS = {
    "Thunderbolt 4": (2.5e9, 1e-4),
    "10 Gb Ethernet": (1.1e9, 1e-4),
    "1 Gb Ethernet": (1.1e8, 2e-4),
}
RANKS = (2, 8, 64)
# Exchanges of a batch beside its gradients: small rows, each after their lengths.
EXCHANGES = 50
_EXPERT_WIDTH = 3584  # of Qwen2.5-7B


@dataclass(frozen=True)
class Batch:
    """What a batch has each rank do and send.

    Attributes:
        seconds: of a rank's own work on its share.
        steps: optimiser steps.
        gradient: bytes of a gradient.
        samples: bytes of what the expert says of the samples of one rank's share.
    """

    seconds: float
    steps: int
    gradient: float
    samples: float

    def exchange(self, ranks: int, link: tuple[float, float]) -> float:
        """Seconds that so many ranks exchange something in, one batch long."""
        speed, delay = link
        others = ranks - 1
        sums = self.steps * 2 * others / ranks * self.gradient
        messages = EXCHANGES * others + self.steps * 2 * others
        return (sums + others * self.samples) / speed + messages * delay

    def rate(self, ranks: int, link: tuple[float, float]) -> float:
        """Times the episodes a minute of one rank, where each has a share of the same size."""
        return ranks * self.seconds / (self.seconds + self.exchange(ranks, link))

    def even(self, link: tuple[float, float]) -> int:
        """From how many ranks on the exchange takes longer than the work."""
        ranks = 1
        while self.exchange(ranks + 1, link) <= self.seconds:
            ranks += 1
        return ranks + 1

    def divided(self, ranks: int, link: tuple[float, float]) -> float:
        """Times the episodes a minute of one rank, where all divide what was one rank's share."""
        one = Batch(self.seconds / ranks, self.steps, self.gradient, self.samples / ranks)
        return self.seconds / (one.seconds + one.exchange(ranks, link))

    def most(self, link: tuple[float, float]) -> int:
        """How many ranks are fastest at what was one rank's share; one more is slower."""
        ranks = 1
        while self.divided(ranks + 1, link) > self.divided(ranks, link):
            ranks += 1
        return ranks


def gradient_bytes(student: dict[str, Any], expert_width: int, config: Config) -> int:
    """Bytes of a gradient: LoRA's matrices, the projection and the score head, in float32."""
    model = build(student)
    prepare(model, config.models)
    width = student["hidden_size"]
    trained = sum(math.prod(v.shape) for _, v in tree_flatten(model.trainable_parameters()))
    return 4 * int(trained + width * expert_width + width + 1)


def sample_bytes(student: dict[str, Any], expert_width: int, tokens: int) -> int:
    """Bytes of what the expert says of a text: a 16-bit state for each token and each layer."""
    return 2 * expert_width * int(tokens + student["num_hidden_layers"] + 1)


def main() -> None:
    """Print two tables in Markdown."""
    config = Config()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--student", choices=MODELS, default="Qwen2.5-0.5B")
    parser.add_argument("--expert-width", type=int, default=_EXPERT_WIDTH)
    parser.add_argument("--problems", type=int, default=config.generation.batch_size)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    student = MODELS[args.student]
    batch = Batch(
        args.seconds,
        config.training.kd_steps,
        gradient_bytes(student, args.expert_width, config),
        args.problems
        * sample_bytes(student, args.expert_width, config.generation.max_feedback_tokens),
    )
    print(
        f"gradient {batch.gradient / 1e6:.1f} MB, {batch.steps} steps a batch; samples of "
        f"{args.problems} problems {batch.samples / 1e6:.1f} MB; work {args.seconds:g} s a batch\n"
    )
    for title, seconds_of, rate, end, last in (
        ("a share of the same size each", batch.exchange, batch.rate, batch.even, "half lost from"),
        ("one share, divided", None, batch.divided, batch.most, "fastest with"),
    ):
        print(f"| {title} | " + " | ".join(f"{n} ranks" for n in RANKS) + f" | {last} |")
        print("|---|" + "--:|" * (len(RANKS) + 1))
        for name, link in LINKS.items():
            cells = [f"{rate(n, link):.1f} times" for n in RANKS]
            if seconds_of is not None:
                cells = [
                    f"{seconds_of(n, link):.2g} s, {cell}"
                    for n, cell in zip(RANKS, cells, strict=True)
                ]
            print(f"| {name} | " + " | ".join(cells) + f" | {end(link)} ranks |")
        print()


if __name__ == "__main__":
    main()
