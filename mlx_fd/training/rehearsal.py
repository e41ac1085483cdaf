"""A batch that is learned from once more, in a later epoch, from its log."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from mlx_fd.config import Config
from mlx_fd.feedback.asking import derive_seed
from mlx_fd.feedback.distill import Update
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.samples import Sample, gather_samples, read_both, read_text
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.models import ranks
from mlx_fd.models.conversation import Conversation
from mlx_fd.runs.records.episodes import SampleRow
from mlx_fd.training.batch import BatchResult, batch_metrics
from mlx_fd.training.checkpoint import RunState
from mlx_fd.training.learner import Learner
from mlx_fd.training.learning import after_updates, loss_weights, one_step
from mlx_fd.training.replay import Replay, choose


def rehearse_batch(state: RunState, rows: Sequence[SampleRow], learner: Learner) -> BatchResult:
    """Learn once more from what a batch of episodes gave.

    Args:
        state: where the run stands.
        rows: the batch's lines of ``samples.jsonl``.
        learner: the run's.
    """
    begin, number = time.perf_counter(), state.batch
    weights = loss_weights(state.gate, learner, number)
    updates: list[Update] = []
    if not state.gate.frozen:
        again = samples_again(rows, learner.pair, learner.config, learner.cache)
        samples = [sample.without_own() for sample in again]
        scaled = {name: weights[name] * state.scales[name] for name in weights}
        training, seed = learner.config.training, learner.config.episode.seed
        rng = np.random.default_rng(derive_seed(seed, number, "replay"))
        steps = choose(Replay(), range(len(samples)), training, rng) if samples else []
        for step, chosen in enumerate(steps):
            updates.append(one_step(learner, [samples[k] for k in chosen], scaled, (number, step)))
            learner.on_tokens(number)("distil", updates[-1].tokens)
    state, decision = after_updates(state, updates, learner, kept=True)
    metrics = batch_metrics(state, len(rows), weights, updates, decision, begin, 0)
    return BatchResult(state, [], metrics, [])


def samples_again(
    rows: Sequence[SampleRow], pair: Pair, config: Config, cache: TeacherCache | None
) -> list[Sample]:
    """Samples from their lines of ``samples.jsonl``: the expert reads them again."""
    return gather_samples([_again(row, pair, config, cache) for row in ranks.share(rows)])


def _again(row: SampleRow, pair: Pair, config: Config, cache: TeacherCache | None) -> Sample:
    prompt, target = tuple(row["prompt"]), tuple(row["target"])
    losses, begin = config.losses, Conversation()
    if pair.shared is None:
        reads = tuple(row.get("expert_prompt", prompt))
        outputs = read_text(pair, begin, reads, target, losses, cache)
    else:
        expert_text = tuple(row["expert_prompt"]), tuple(row["expert_target"])
        outputs, _ = read_both(pair, begin, *expert_text, target, losses, cache)
    return Sample.from_json(row, outputs)
