"""A run's whole configuration: frozen dataclasses, TOML in and out, one place for every default.

Each field carries its help text and choices, so the command line's options, the TOML keys and the
reference page are all made from this file and cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
import re
import shlex
import tomllib
import typing
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from mlx_fd.errors import UserError
from mlx_fd.registry import CONTEXTS, KINDS, LOSSES, SOURCES
from mlx_fd.text import shown

MAX_COUNT = 2**31 - 1
"""No option that counts something is larger: indices of arrays are 32-bit integers."""
CONTINUOUS = "continuous"
"""The ``batching`` in which a problem does not wait for the others of its batch."""
MAX_SEED = 2**63 - 1
"""The largest integer that every reader of TOML takes."""
_MAX_FLOAT = 3e38  # float32, in which all that is computed with them is, has nothing larger
# Trust takes 58,000 verdicts there.
_MIN_DISAGREEMENT = 1e-4
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 16  # of tables in tables
_WARM_UP = re.compile(r"([a-z][a-z-]*):([1-9][0-9]{0,8})")

Words = Collection[str] | Callable[[], Collection[str]]
"""The words that an option takes, a registry for its names, or what gives them when asked."""


def names_of(words: Words) -> tuple[str, ...]:
    """The words as they are now."""
    return tuple(words() if callable(words) else words)


def _option(default: Any, help: str, *, choices: Words = (), **limits: Any) -> Any:
    """A field with its help text and its limits (``choices``, ``low``, ``high``).

    Choices that are names in a registry are looked up when they are asked for, so that what is
    registered later than this module is imported is among them.
    """
    metadata = {"help": help, "words": choices, **limits}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    """Which models, and which student weights to train."""

    expert: str = _option(
        "qwen2.5-7b-4bit",
        "Expert model: an alias, a hub name or an mlx-lm directory. tiny implies --preset tiny, "
        "and tiny-hard its own, unless another preset is given.",
    )
    student: str = _option(
        "",
        "Student model, likewise; NAME:layers=K keeps K of its layers. "
        "Empty: the expert's default student.",
    )
    train: str = _option(
        "lora",
        "Student weights to train: a LoRA adapter, a DoRA adapter (LoRA and each row's length, "
        "arXiv 2402.09353), or all of them.",
        choices=("lora", "dora", "full"),
    )
    lora_rank: int = _option(16, "Rank of the LoRA matrices.", low=1)
    lora_scale: float = _option(2.0, "LoRA scale (alpha / rank).", low=0)
    lora_layers: int = _option(0, "Number of last layers with LoRA; 0: all.", low=0)
    lora_keys: tuple[str, ...] = _option(
        (),
        "Modules with LoRA, by their names in a layer (self_attn.q_proj), separated by commas. "
        "Empty: all linear ones; in a mixture of experts all but the experts and their router.",
        free=True,
    )
    lora_dropout: float = _option(
        0.0, "Dropout of what the LoRA matrices read, in training.", low=0, high=0.99
    )
    score_at: str = _option(
        "own",
        "Position at which the student's score head reads: the end of the prompt, before the "
        "feedback is generated; or the end of the student's feedback, having learned on its own "
        "(own) or on the expert's (feedback; it then copies the score written in the text).",
        choices=("prompt", "own", "feedback"),
    )
    continue_from: str = _option(
        "",
        "A run of the loop whose student (its best checkpoint) this one goes on with; what is not "
        "given is as there. Empty: LoRA and heads begin anew.",
    )
    shard_expert: bool = _option(
        False,
        "Divide the expert's weights among the processes that mlx.launch started, for an expert "
        "that one machine cannot hold. Each process then goes through all of a batch.",
    )
    dequantize: str = _option(
        "auto",
        "Dequantise to float32: auto does so on the CPU backend where memory allows.",
        choices=("auto", "never"),
    )
    chat_template_kwargs: Mapping[str, Any] = _option(
        {},
        "Variables for the chat template, such as reasoning_effort: a table in a file, JSON on the "
        "command line. The template must know them.",
    )
    template_date: str = _option(
        "",
        "Day that a chat template prints where it asks for the date, YYYY-MM-DD. Empty: the day "
        "the run begins; outside of a run 2024-07-26.",
    )


@dataclass(frozen=True)
class ProblemOptions:
    """Which problems, how many, in which order."""

    problems: str = _option(
        "gsm8k",
        "Problem source: a name, a file (.jsonl, .json, .csv, .tsv, .parquet), or a hub dataset.",
        names=SOURCES,
    )
    split: str = _option("train", "Dataset split to train on.")
    train_on_test: bool = _option(False, "Allow training on the test split.")
    episodes: int = _option(400, "Number of problems to go through.", low=1)
    columns: str = _option(
        "", "Columns of a file or hub dataset by what they hold: question=NAME,answer=NAME,..."
    )
    answer_kind: str = _option(
        "auto",
        "Kind of answers in a file or hub dataset; auto: told by its rows.",
        choices=lambda: ("auto", *KINDS),
    )
    allow_code_execution: bool = _option(
        False,
        "Run programs that models write, to judge answers that are programs. A file with options "
        "does not suffice: it is asked for on the command line, of resume too.",
    )
    skip_bad_rows: bool = _option(
        False, "Skip problems that cannot be read or exceed a model's context length."
    )


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated. Temperatures of 0 are greedy."""

    batch_size: int = _option(8, "Problems per batch.", low=1)
    max_answer_tokens: int = _option(384, "Maximum tokens per answer or revision.", low=1)
    max_feedback_tokens: int = _option(192, "Maximum tokens per feedback.", low=1)
    max_merge_tokens: int = _option(
        128, "Maximum tokens of the merged feedback and of the critique.", low=1
    )
    answers_by: str = _option(
        "student",
        "Model that writes the first answers, which are judged. An expert that is always right "
        "leaves the student no errors to learn from. both: the expert's, at expert_temperature, go "
        "on to the final answers, and the student's are judged beside them, to learn from.",
        choices=("expert", "student", "both"),
    )
    answer_temperature: float = _option(
        0.7, "Sampling temperature of the first answers; higher values produce more errors.", low=0
    )
    max_answer_temperature: float = _option(
        0.0,
        "Temperature up to which answer_temperature rises by itself while the expert calls nearly "
        "all of those answers right; it falls back while nearly all are wrong. 0: never.",
        low=0,
    )
    expert_temperature: float = _option(
        0.0, "Sampling temperature of everything else the expert writes.", low=0
    )
    student_temperature: float = _option(0.0, "Sampling temperature of the student.", low=0)
    expert_repetition_penalty: float = _option(1.0, "Of the expert; 1: none.", low=1)
    student_repetition_penalty: float = _option(1.0, "Of the student; 1: none.", low=1)
    expert_thinking: str = _option(
        "off",
        "Whether the expert thinks before each text it writes, if it is a model that can; off "
        "closes a thought that its chat template opens.",
        choices=("off", "on"),
    )
    student_thinking: str = _option(
        "off", "Whether the student thinks, likewise.", choices=("off", "on")
    )
    max_thinking_tokens: int = _option(
        1024, "Maximum tokens per thought, which is closed there; the text comes on top.", low=1
    )
    answer_filter: str = _option(
        "auto",
        "How the final number is extracted: auto takes ####, then \\boxed{}, then the last number; "
        "strict and flexible are lm-evaluation-harness's filters for GSM8K.",
        choices=("auto", "strict", "flexible"),
    )
    sequential: bool = _option(
        False, "One problem at a time, without KV cache reuse (the reference implementation)."
    )
    batching: str = _option(
        "auto",
        "How a batch's turns are written. lockstep: each step's together, and the next step when "
        "all are done. continuous: each problem goes on as soon as its own turn ends, beside the "
        "beginning of the next batch. auto: continuous, but lockstep on the CPU, for several "
        "processes, and with sequential or speculate.",
        choices=("auto", "lockstep", "continuous"),
    )
    places: int = _option(
        0,
        "Texts that a model writes side by side with batching = continuous; 0: batch_size.",
        low=0,
    )
    speculate: int = _option(
        0,
        "Tokens that the student proposes at a time of what the expert writes, which the expert "
        "reads in one step (speculative decoding): the same texts in fewer steps of the expert. "
        "Needs sequential, or batch_size = 1. 0: none.",
        low=0,
        high=64,
    )

    @property
    def thought_tokens(self) -> int:
        """The most tokens of a thought of either model; 0 where neither thinks."""
        thinks = "on" in (self.expert_thinking, self.student_thinking)
        return self.max_thinking_tokens if thinks else 0


@dataclass(frozen=True)
class LossOptions:
    """The losses of a distillation step (docs/methods.md)."""

    losses: tuple[str, ...] = _option(
        ("lm", "hidden", "score", "logit"),
        "Losses to train with, separated by commas.",
        choices=LOSSES,
    )
    kl: str = _option(
        "forward",
        "Divergence of the logit and reasoning losses: forward is KL(expert || student).",
        choices=("forward", "reverse", "jsd"),
    )
    loss_temperature: float = _option(
        2.0, "Softmax temperature T of the logit and reasoning losses (scaled by T^2).", low=0.01
    )
    standardize_logits: bool = _option(
        False, "Standardise (z-score) both logit vectors first (arXiv 2403.01427)."
    )
    hidden_layers: str = _option(
        "all", "Layers whose hidden states and attention are aligned.", choices=("all", "last")
    )
    attention_heads: str = _option(
        "mean",
        "Attention to compare: the mean over each layer's heads, or head by head, for a student "
        "made from some of the expert's layers.",
        choices=("mean", "aligned"),
    )
    expert_verdicts: str = _option(
        "checked",
        "Expert feedback whose score the right answer contradicts (above 0 on a wrong answer, "
        "below 0 on a right one): checked leaves it out of the training, privileged asks the "
        "expert again with the right answer in its prompt, as-is trains on it.",
        choices=("checked", "privileged", "as-is"),
    )
    solutions: bool = _option(
        True,
        "Also train on the final answer of a distilled episode if it is known to be right. Always "
        "on with the losses answer and reasoning.",
    )
    teacher_top_k: int = _option(
        0,
        "Keep the expert's top k next tokens, in the teacher cache, instead of its hidden states; "
        "0: compare full distributions.",
        low=0,
    )
    teacher_cache: str = _option(
        "", "Directory of the teacher cache; runs may share one. Empty: in the run directory."
    )
    distil_thoughts: bool = _option(
        False,
        "Also train on the thought before each feedback. Needs expert_thinking and "
        "student_thinking, and score_at = own or feedback.",
    )
    on_policy_fraction: float = _option(
        0.0,
        "Fraction of samples distilled on the student's own feedback instead of the expert's.",
        low=0,
        high=1,
    )
    student_context: str = _option(
        "none",
        "Self-distillation on the student's own answers: match the student to itself reading the "
        "expert's feedback, or its revision (step-critique). Needs answers_by = student.",
        choices=lambda: ("none", *(name for name, c in CONTEXTS.items() if c.from_episode)),
    )
    student_context_weight: float = _option(
        1.0, "Weight of the student_context divergence relative to the other losses.", low=0.001
    )
    scales: tuple[float, ...] = _option(
        (), "Fixed scale of each loss, in the order of `losses`; empty: 1 / initial loss."
    )

    @property
    def learns_solutions(self) -> bool:
        """Whether right solutions are learned from."""
        return self.solutions or self.on_solutions

    @property
    def on_solutions(self) -> bool:
        """Whether a loss is on solutions only."""
        return any(LOSSES[name].on_solutions for name in self.losses)

    @property
    def trains_head(self) -> bool:
        """Whether a loss teaches the score head."""
        return any(LOSSES[name].trains_head for name in self.losses)

    @property
    def needs_attention(self) -> bool:
        """Whether a loss reads the attention of both models."""
        return any(LOSSES[name].needs_attention for name in self.losses)


@dataclass(frozen=True)
class GateOptions:
    """When the student is distilled, when that stops, and when it starts again."""

    gate: str = _option(
        "ema",
        "Gate that starts and stops distillation.",
        choices=("ema", "published", "always", "never"),
    )
    trigger: str = _option(
        "lag",
        "Samples to train on until the gate freezes the student: those on which it lags behind the "
        "expert, or all.",
        choices=("lag", "always"),
    )
    loss_weights: str = _option(
        "ema",
        "Loss weights. ema: more weight on losses that fell less (the published gate has its own "
        "rule); phases: correctness first, reasoning later; both: their product; fixed: equal.",
        choices=("ema", "phases", "both", "fixed"),
    )
    phase_begin: float = _option(
        0.25,
        "Fraction of the run after which weight shifts from answers to reasoning.",
        low=0,
        high=1,
    )
    phase_end: float = _option(
        0.75, "Fraction of the run at which the shift is complete.", low=0, high=1
    )
    ema_decay: float = _option(0.9, "Decay of the exponential moving averages.", low=0, high=0.9999)
    stop_threshold: float = _option(
        1.0,
        "A loss that has fallen by this fraction need not be on a plateau for the freeze; 1: it "
        "must.",
        low=0,
        high=1,
    )
    plateau_steps: int = _option(20, "Observations over which a loss must still improve.", low=2)
    plateau_gain: float = _option(
        0.01,
        "Minimum improvement over plateau_steps, as a fraction of the initial loss, where each "
        "observation costs as many of the expert's tokens as usual in the run.",
        low=0,
    )
    minimum_gain: float = _option(0.1, "Mean gain required before a plateau counts.", low=0, high=1)
    regression: float = _option(
        0.2, "Unfreeze when a loss exceeds its level at the freeze by this fraction.", low=0
    )
    score_gap: float = _option(
        0.25, "Distance from the expert's score at which the student lags.", low=0
    )
    max_disagreement: float = _option(
        0.1,
        "Largest fraction of the verdicts that the student gives alone that may differ from the "
        "expert's, kept with a probability of 95 %; 0: the expert is always asked. Half of it "
        "takes twice as many audited verdicts.",
        low=0,
        high=1,
    )
    own_solutions: int = _option(
        1,
        "How often the student also solves each problem that it judges, first greedily: the more "
        "its solutions contradict its verdict, the less that is trusted. Each costs an answer of "
        "the student; without effect where the expert is always asked, or where final answers "
        "cannot be compared.",
        low=0,
    )
    audit_fraction: float = _option(
        0.1,
        "Fraction of problems on which the expert gives feedback though the student could judge "
        "alone.",
        low=0,
        high=1,
    )
    audit_window: int = _option(
        0,
        "Verdicts, the last ones, that trust rests on; 0: 20 / max_disagreement.",
        low=0,
    )


@dataclass(frozen=True)
class TrainingOptions:
    """The optimiser and one distillation step."""

    lora_rate: float = _option(1e-4, "Learning rate of the student's weights.", low=0)
    score_rate: float = _option(1e-4, "Learning rate of the score head.", low=0)
    projection_rate: float = _option(1e-4, "Learning rate of the alignment projection.", low=0)
    weight_decay: float = _option(0.01, "AdamW weight decay.", low=0)
    max_grad_norm: float = _option(1.0, "Maximum gradient norm; 0: no clipping.", low=0)
    kd_steps: int = _option(2, "Optimiser steps per batch on which the student lags.", low=1)
    lr_schedule: str = _option(
        "linear",
        "Learning rates over the run: constant, or falling to 0 (linear).",
        choices=("constant", "linear"),
    )
    step_samples: int = _option(
        0,
        "Samples per optimiser step, new and earlier ones; 0: all new ones of the batch, and "
        "replay times as many earlier ones.",
        low=0,
    )
    replay: float = _option(
        1.0, "Earlier samples per new one in each optimiser step; 0: none.", low=0, high=100
    )
    replay_size: int = _option(128, "Maximum number of earlier samples to keep in memory.", low=1)
    replay_by: str = _option(
        "lag",
        "Which earlier samples to draw: those on which the student lagged more often (lag), or "
        "each as often (uniform).",
        choices=("lag", "uniform"),
    )
    replay_balance: bool = _option(
        False, "Draw feedback on wrong answers as often as on right ones."
    )
    measure_after: bool = _option(
        False, "Also measure each sample's losses after the update, for the log."
    )
    epochs: int = _option(
        1,
        "Passes over the training samples; after the first the expert generates nothing, and with "
        "teacher_top_k it is not run at all.",
        low=1,
    )
    micro_batch: int = _option(
        4, "Samples per forward pass; gradients accumulate over the batch.", low=1
    )
    grad_checkpoint: bool = _option(
        False, "Recompute activations in the backward pass to save memory."
    )


@dataclass(frozen=True)
class EpisodeOptions:
    """The episode and what surrounds it."""

    order: str = _option(
        "published",
        "Order of the steps. published: the student learns before both feedbacks are merged, and "
        "gives its feedback again; right solutions are learned from in the next update. "
        "learn-last: it learns at the end of the batch, as it always does with student_context.",
        choices=("published", "learn-last"),
    )
    target_score: float = _option(
        0.9, "Combined score at or above which an answer is not revised.", low=-1, high=1
    )
    check_alone: bool = _option(
        True,
        "Have the expert check every answer that the student judges alone. What the student finds "
        "right it solves itself, and criticises where that comes to another final answer, or it "
        "gave the answer; the rest it revises. Off: those that reach target_score stay unseen, "
        "which saves more of its tokens and lets pass what the student overlooks.",
    )
    student_weight: float = _option(
        0.65, "Weight of the student's score; the expert's is 1.", low=0
    )
    probe_size: int = _option(8, "Held-out problems for the gate and the headroom check.", low=1)
    exam_size: int = _option(
        100,
        "Answers with known errors that the student judges before and after the run; 0: no exam. "
        "Only with problems whose source knows the truth about any answer (arithmetic, "
        "arithmetic-hard).",
        low=0,
    )
    warm_up: str = _option(
        "",
        "Distil answers into the student before the first batch, METHOD:PROBLEMS: distil:200, or "
        "another method of mlx-fd distil (gkd:200). Its problems are of the same split as the "
        "loop's, and others than those and the probe set's. Empty: none.",
    )
    warm_up_rate: float = _option(0.0, "Learning rate of the warm-up; 0: as distil has it.", low=0)
    probe_every: int = _option(1, "Distilled batches between probe evaluations.", low=1)
    checkpoint_every: int = _option(4, "Batches between checkpoints.", low=1)
    keep_checkpoints: int = _option(3, "Checkpoints to keep besides the best one.", low=2)
    profile: bool = _option(
        False,
        "Count what is read, written and learned from beside the least there could be, and the "
        "seconds of each part of the work: in the summary, the report and metrics.jsonl.",
    )
    seed: int = _option(
        0, "Random seed; runs with the same seed are identical.", low=0, high=MAX_SEED
    )

    @property
    def warm_up_problems(self) -> int:
        """How many problems the warm-up has; 0: there is none."""
        return int(self.warm_up.partition(":")[2] or 0)

    @property
    def warm_up_method(self) -> str:
        """The warm-up's method, as it was named."""
        return self.warm_up.partition(":")[0]


@dataclass(frozen=True)
class Method:
    """A method of self-distillation: what the self-teacher sees, what is matched, and how.

    ``mlx_fd.training.selfdistill.methods`` has the published ones.
    """

    method: str = _option(
        "", "The published method this began as, or custom; empty: no self-distillation."
    )
    context: str = _option(
        "none",
        "What the self-teacher reads in addition to the problem.",
        choices=CONTEXTS,
    )
    objective: str = _option(
        "forward",
        "Training objective: a divergence of the next-token distributions (forward is KL(teacher "
        "|| student), reverse, jsd); a policy gradient with per-token advantages from the teacher "
        "(sampled) or group advantages (grpo, contrastive); EchoDistill's sum (echo); or the "
        "attempts' own likelihood (likelihood), for what an expert wrote.",
        choices=(
            *("forward", "reverse", "jsd", "sampled"),
            *("grpo", "contrastive", "echo", "likelihood"),
        ),
    )
    critic: str = _option(
        "",
        "Frozen model that writes critiques, feedback, reflections and rubrics; self: the "
        "self-teacher does; truth: the problem source's own, where it knows the truth about any "
        "answer. Empty: none.",
    )
    critic_sees: str = _option(
        "reference",
        "What the critic corrects an attempt with: the reference solution, or the problem alone, "
        "in the loop's roles (feedback, then revision), which the model tiny was trained on.",
        choices=("reference", "problem"),
    )
    reference_style: str = _option(
        "solution",
        "Style of the reference solutions of generated problems: solution, the style of the "
        "attempts, or prose, that of another author.",
        choices=("solution", "prose"),
    )
    noise: str = _option(
        "none",
        "Noise added to the question that the student reads.",
        choices=("none", "typed", "transcribed"),
    )
    noise_level: float = _option(0.3, "Fraction of the words with noise.", low=0, high=1)
    num_generations: int = _option(1, "Attempts per problem.", low=1)
    generation_batch_size: int = _option(64, "Attempts to generate in parallel.", low=1)
    temperature: float = _option(
        1.0, "Temperature of sampling and of the distributions in the loss.", low=0.01
    )
    top_p: float = _option(
        1.0,
        "Nucleus sampling: sample from the most likely tokens with this total probability.",
        low=0.01,
        high=1,
    )
    top_k: int = _option(0, "Sample from the k most likely tokens; 0: from all.", low=0)
    self_teacher: str = _option(
        "base",
        "Weights of the teacher: base, the student without its adapter; ema, the adapter's moving "
        "average; current; snapshot, the adapter of some updates ago; expert: the critic, another "
        "model (mlx-fd distil).",
        choices=("base", "ema", "current", "snapshot", "expert"),
    )
    teacher_decay: float = _option(
        0.95, "Decay of the self-teacher's moving average, per update.", low=0, high=1
    )
    teacher_sync_steps: int = _option(10, "Updates between snapshots of the self-teacher.", low=1)
    jsd_beta: float = _option(
        0.5, "Weight of the teacher in the mixture of jsd.", low=0.001, high=0.999
    )
    support: str = _option(
        "all",
        "Tokens to compare: the whole vocabulary, or the teacher's or student's top k.",
        choices=("all", "teacher", "student"),
    )
    loss_top_k: int = _option(100, "Number of tokens to compare if support is not all.", low=1)
    tail: bool = _option(
        True, "Compare the total probability of all other tokens too; off: renormalise without it."
    )
    token_clip: float = _option(
        0.0, "Maximum contribution of one vocabulary entry to a divergence; 0: no limit.", low=0
    )
    skip_tokens: int = _option(
        0, "First tokens of an attempt to leave out of the objective.", low=0
    )
    first_tokens: int = _option(
        0, "Learn from so many first tokens of an attempt only; 0: from all.", low=0
    )
    expert_answers: str = _option(
        "right",
        "Which answers that the expert wrote are learned from: right ones, or all.",
        choices=("right", "all"),
    )
    stale_cap: float = _option(
        0.0,
        "Cap of the importance weights current / sampling probability; 0: no weights.",
        low=0,
    )
    match_weight: float = _option(1.0, "Weight of the teacher-matching objective.", low=0)
    policy_weight: float = _option(
        0.0, "Weight of the GRPO loss added to it; grpo and contrastive consist of it alone.", low=0
    )
    scale_rewards: str = _option(
        "group",
        "Standard deviation to divide a group's advantages by: the group's, the batch's, or none "
        "(Dr. GRPO).",
        choices=("group", "batch", "none"),
    )
    reward_baseline: str = _option(
        "group",
        "What a reward is compared with: the mean of its group, or that of a right attempt; then "
        "wrong attempts alone count, each with the advantage -1, unscaled.",
        choices=("group", "right"),
    )
    epsilon: float = _option(0.2, "Clip the policy ratio below at 1 - epsilon.", low=0, high=1)
    epsilon_high: float = _option(0.2, "Clip the policy ratio above at 1 + epsilon_high.", low=0)
    delta: float = _option(
        0.0, "Maximum policy ratio where the advantage is negative; 0: no limit.", low=0
    )
    importance_sampling_level: str = _option(
        "token",
        "Policy ratio per token, or per attempt (GSPO).",
        choices=("token", "sequence"),
    )
    kl_coef: float = _option(
        0.0, "Weight of the KL to the base model in the policy loss (k3 estimator).", low=0
    )
    loss_type: str = _option(
        "dapo",
        "Averaging of the policy loss: grpo over attempts of their token means, dapo and bnpo over "
        "all tokens, dr_grpo over attempts times max_answer_tokens.",
        choices=("grpo", "bnpo", "dr_grpo", "dapo"),
    )
    mask_truncated_completions: bool = _option(
        False, "Leave attempts that hit the token limit out of the policy loss."
    )
    wrong_hints: int = _option(4, "Maximum number of wrong hints per attempt (contrastive).", low=1)
    contrast_tau: float = _option(0.02, "Temperature of the contrast (contrastive).", low=1e-6)
    contrast_scale: float = _option(
        0.5, "Scale of the contrast in the advantage (contrastive).", low=0
    )
    contrast_clip: float = _option(2.0, "Bound on the scaled contrast (contrastive).", low=0)
    contrast_gate: float = _option(
        0.02, "Minimum scaled contrast that selects a token (contrastive).", low=0
    )
    contrast_weight: float = _option(
        1.0, "Weight of the mean over the selected tokens (contrastive).", low=0
    )
    near_bonus: float = _option(
        0.5, "Extra reward for correct attempts close to the clean teacher (echo).", low=0
    )
    warmup_steps: int = _option(0, "Updates of linear learning-rate warmup.", low=0)


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does; saved with it as ``config.toml``."""

    models: ModelOptions = field(default_factory=ModelOptions)
    problems: ProblemOptions = field(default_factory=ProblemOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    losses: LossOptions = field(default_factory=LossOptions)
    gate: GateOptions = field(default_factory=GateOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    episode: EpisodeOptions = field(default_factory=EpisodeOptions)
    selfdistill: Method = field(default_factory=Method)

    @property
    def learns_last(self) -> bool:
        """Whether the student learns after the final answers: it needs what they came from."""
        return self.episode.order == "learn-last" or self.losses.student_context != "none"

    @property
    def self_distils(self) -> bool:
        """Whether this is a run of ``mlx-fd self-distill`` or ``mlx-fd distil``."""
        return bool(self.selfdistill.method)

    @property
    def command(self) -> str:
        """The command that makes such a run: ``loop``, ``distil`` or ``self-distill``."""
        if not self.self_distils:
            return "loop"
        return "distil" if self.selfdistill.self_teacher == "expert" else "self-distill"


@dataclass(frozen=True)
class Option:
    """One setting, as the command line, TOML files and the reference page see it.

    Attributes:
        section: TOML table, e.g. ``"gate"``.
        name: key within it, unique over all sections; ``--name-with-dashes`` on the command line.
        kind: ``bool``, ``int``, ``float``, ``str``, ``tuple`` or ``dict``.
        default: the default value.
        help: one sentence.
        words: the allowed words, or empty.
        names: a registry whose names are among the allowed words, or empty.
        low: smallest value, or ``None``.
        high: largest value, or ``None``.
        free: a list of names that only a model knows.
    """

    section: str
    name: str
    kind: type
    default: Any
    help: str
    words: Words = ()
    names: Collection[str] = ()
    low: float | None = None
    high: float | None = None
    free: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, or empty."""
        return names_of(self.words)


def _options() -> dict[str, Option]:
    found = {}
    largest = {int: MAX_COUNT, float: _MAX_FLOAT}
    sections = typing.get_type_hints(Config)
    for section in fields(Config):
        hints = typing.get_type_hints(sections[section.name])
        for item in fields(sections[section.name]):
            kind = typing.get_origin(hints[item.name]) or hints[item.name]
            kind = dict if kind is Mapping else kind
            limits = {"high": largest[kind]} if kind in largest else {}
            default = {} if kind is dict else item.default
            found[item.name] = Option(
                section.name, item.name, kind, default, **{**limits, **item.metadata}
            )
    return found


OPTIONS: dict[str, Option] = _options()

# The embedded pair: minutes on a CPU, and the truth of every answer is known (docs/log.md).
# It differs from the defaults in sizes and rates only.
_TINY: dict[str, Any] = {
    "expert": "tiny",
    "problems": "arithmetic",
    "episodes": 1600,
    "batch_size": 64,
    "max_answer_tokens": 64,
    "max_feedback_tokens": 112,
    "max_merge_tokens": 112,
    "kd_steps": 16,
    "step_samples": 32,
    "replay_size": 2048,
    "micro_batch": 8,
    "lora_rank": 64,
    "lora_rate": 3e-3,
    "score_rate": 3e-3,
    "projection_rate": 1e-3,
    "own_solutions": 3,
    "probe_size": 32,
    "ema_decay": 0.7,
    "exam_size": 200,
}
# What each preset changes against the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "episodes": 8,
        "batch_size": 4,
        "max_answer_tokens": 128,
        "max_feedback_tokens": 64,
        "max_merge_tokens": 48,
        "probe_size": 4,
        "checkpoint_every": 1,
        "lora_rank": 8,
        "lora_rate": 5e-4,
    },
    "tiny": _TINY,
    # The embedded pair whose expert is often wrong at first.
    "tiny-hard": {**_TINY, "expert": "tiny-hard", "problems": "arithmetic-hard"},
    # The hyperparameters of the published code (docs/methods.md), with its gate.
    "published": {
        "gate": "published",
        "answers_by": "expert",
        "answer_temperature": 0.0,
        "score_at": "prompt",
        "solutions": False,
        "replay": 0.0,
        "lr_schedule": "constant",
        # 5e-7 there, for all weights; LoRA starts from nothing and learns nothing at that rate.
        "lora_rate": 1e-4,
        "score_rate": 5e-5,
        "projection_rate": 1e-6,
        "weight_decay": 0.01,
        "kl": "forward",
        "loss_temperature": 4.0,
        "standardize_logits": True,
        "scales": (1.0, 1.0, 1.0, 0.03),
        "batch_size": 3,
        "micro_batch": 3,
        "kd_steps": 2,
        "max_answer_tokens": 500,
        "max_feedback_tokens": 200,
        "expert_repetition_penalty": 1.2,
        "student_repetition_penalty": 1.05,
        "student_weight": 0.65,
        "target_score": 1.0,
        "episodes": 200,
    },
    "overnight": {"episodes": 2000, "probe_size": 16, "probe_every": 2, "checkpoint_every": 8},
    "16gb": {
        "batch_size": 2,
        "micro_batch": 1,
        "max_answer_tokens": 256,
        "max_feedback_tokens": 128,
        "max_merge_tokens": 96,
        "lora_rank": 8,
        "grad_checkpoint": True,
    },
}


def _suggest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _checked(option: Option, value: Any, where: str) -> Any:
    """``value`` as the option's type, within its limits."""

    def wrong(expected: str) -> UserError:
        return UserError(f"{where}: {option.name} must be {expected}, not {shown(value)}.")

    if option.kind is tuple:
        value = _checked_list(option, value, wrong)
    elif option.kind is dict:
        if not isinstance(value, Mapping) or not _is_json(dict(value)):
            raise wrong("a table of numbers, texts, true, false, lists and tables")
        value = dict(value)
    elif option.kind is float:
        if not _is_number(value):
            raise wrong("a finite number")
        value = float(value)
    elif type(value) is not option.kind:
        kind = {bool: "true or false", int: "a whole number", str: "a text"}[option.kind]
        raise wrong(kind)
    elif isinstance(value, str) and not _is_plain(value):
        raise wrong("a text in UTF-8 without control characters")
    if option.choices:
        for word in value if option.kind is tuple else (value,):
            if word not in option.choices:
                hint = _suggest(str(word), list(option.choices))
                raise UserError(
                    f"{where}: {option.name} takes {', '.join(option.choices)}, not "
                    f"{shown(word)}{hint}"
                )
    if option.low is not None and value < option.low:
        raise wrong(f"at least {_limit(option.low)}")
    if option.high is not None and value > option.high:
        raise wrong(f"at most {_limit(option.high)}")
    return value


def _checked_list(option: Option, value: Any, wrong: Callable[[str], UserError]) -> tuple[Any, ...]:
    """A list of words, where the option has choices, or of positive numbers."""
    if not isinstance(value, (list, tuple)):
        raise wrong("a list")
    if option.free:
        if not all(isinstance(item, str) and item and _is_plain(item) for item in value):
            raise wrong("a list of names")
        if len(set(value)) != len(value):
            raise wrong("a list without repetitions")
        return tuple(value)
    if not option.choices:
        if not all(_is_number(item) and 0 < item <= _MAX_FLOAT for item in value):
            raise wrong("a list of positive numbers")
        return tuple(float(item) for item in value)
    if not value:
        raise wrong(f"a list with at least one of {', '.join(option.choices)}")
    if not all(isinstance(item, str) for item in value):
        raise wrong("a list of words")
    if len(set(value)) != len(value):
        raise wrong("a list without repetitions")
    return tuple(value)


def _is_json(value: Any, depth: int = 0) -> bool:
    """Whether TOML and JSON both have a value: JSON has no dates, and TOML no null."""
    if depth > _MAX_DEPTH:
        return False
    if isinstance(value, dict):
        items = [*value, *value.values()]
        return all(isinstance(key, str) for key in value) and _are_json(items, depth)
    if isinstance(value, list):
        return _are_json(value, depth)
    if isinstance(value, str):
        return not any(unicodedata.category(c) == "Cs" for c in value)
    return isinstance(value, bool) or _is_number(value)


def _are_json(values: list[Any], depth: int) -> bool:
    return all(_is_json(value, depth + 1) for value in values)


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _is_plain(text: str) -> bool:
    """Whether a text can stand in a file of a run: no part of a path or name has controls."""
    return not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


def _limit(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def override(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    """A configuration with some options changed.

    Args:
        config: what to start from.
        changes: option name to value.
        where: named in errors: a file, a preset, or the command line.

    Returns:
        The new configuration, checked.

    Raises:
        UserError: an unknown option (with a suggestion), a wrong type, a value out of range, or
            options that contradict each other.
    """
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in OPTIONS:
            raise UserError(
                f"{where}: there is no option {shown(name)}{_suggest(name, list(OPTIONS))}"
            )
        option = OPTIONS[name]
        by_section.setdefault(option.section, {})[name] = _checked(option, value, where)
    config = dataclasses.replace(
        config,
        **{
            section: dataclasses.replace(getattr(config, section), **values)
            for section, values in by_section.items()
        },
    )
    for why in _contradictions(config):
        raise UserError(f"{where}: {why}")
    return config


def _contradictions(config: Config) -> Iterator[str]:
    """Why options do not go together, each in one sentence."""
    models, generation, gate = config.models, config.generation, config.gate
    if generation.sequential and generation.batching == CONTINUOUS:
        yield (
            "sequential takes one problem at a time, and batching = continuous several: leave one "
            "of the two out."
        )
    if generation.places and generation.batching == "lockstep":
        yield (
            "places is for batching = continuous; in lockstep it is batch_size that says how many "
            "texts are written side by side."
        )
    if models.train == "full" and (models.lora_keys or models.lora_dropout):
        yield (
            "lora_keys and lora_dropout are of LoRA and DoRA; leave them out, or set train to lora "
            "or dora."
        )
    if models.template_date and not _is_date(models.template_date):
        yield f"template_date must be a day such as 2026-11-28, not {shown(models.template_date)}."
    if (warm_up := config.episode.warm_up) and not _WARM_UP.fullmatch(warm_up):
        yield (
            "warm_up must be a method and a number of problems, such as distil:200, not "
            f"{shown(warm_up)}."
        )
    if warm_up and config.self_distils:
        yield "warm_up is for mlx-fd loop; leave it out here."
    yield from _contradictions_of_losses(config)
    low, high = generation.answer_temperature, generation.max_answer_temperature
    if 0 < high < low:
        yield (
            f"max_answer_temperature is {high:g}, below answer_temperature, {low:g}, so that it "
            "never rises; set it to 0 if that is meant."
        )
    if 0 < gate.max_disagreement < _MIN_DISAGREEMENT:
        yield (
            f"max_disagreement is {gate.max_disagreement:g}, which takes more verdicts than a run "
            f"has; give at least {_MIN_DISAGREEMENT:g}, or 0, and the expert is always asked."
        )
    if gate.phase_begin > gate.phase_end:
        yield f"phase_begin is {gate.phase_begin:g}, after phase_end, {gate.phase_end:g}."
    names, scales = config.losses.losses, config.losses.scales
    if scales and len(scales) != len(names):
        yield (
            f"scales has {len(scales)} numbers for {len(names)} losses ({', '.join(names)}); give "
            "one for each, or none."
        )


def _contradictions_of_losses(config: Config) -> Iterator[str]:
    """Those about what is learned from."""
    losses, generation, method = config.losses, config.generation, config.selfdistill
    if losses.student_context != "none" and generation.answers_by != "student":
        yield (
            "student_context is about the student's own answers; set answers_by to student, or "
            "student_context to none."
        )
    thinking = generation.expert_thinking, generation.student_thinking
    if losses.distil_thoughts and (thinking != ("on", "on") or config.models.score_at == "prompt"):
        yield (
            "distil_thoughts needs both models to think and a score head that reads behind the "
            "thought: set expert_thinking and student_thinking to on and score_at to own or "
            "feedback, or leave distil_thoughts off."
        )
    if losses.expert_verdicts == "privileged" and generation.expert_thinking == "on":
        yield (
            "expert_verdicts = privileged would put the right answer into thoughts that the "
            "student reads; set expert_thinking to off, or expert_verdicts to checked."
        )
    if losses.expert_verdicts == "privileged" and losses.needs_attention:
        yield (
            "the attention loss compares what both models attend to in one prompt, and "
            "expert_verdicts = privileged gives the expert another one; leave attention out of "
            "losses, or set expert_verdicts to checked."
        )
    if losses.teacher_top_k and losses.standardize_logits:
        yield "standardize_logits needs whole distributions; set teacher_top_k to 0."
    of_experts = losses.losses == ("lm",) and losses.student_context == "none"
    if of_experts and losses.on_policy_fraction == 1 and not losses.learns_solutions:
        yield (
            "the lm loss learns from the expert's texts alone, and with on_policy_fraction = 1 and "
            "without solutions there are none; set on_policy_fraction below 1, or add a loss."
        )
    keeps_answers = method.self_teacher == "expert" and method.support == "teacher"
    if losses.teacher_cache and not (losses.teacher_top_k or keeps_answers):
        needed = "teacher_top_k only; set that (16, for instance)"
        if config.self_distils:
            needed = "an expert's likeliest tokens only; set support to teacher"
        yield f"teacher_cache is used with {needed}, or leave teacher_cache empty."
    if method.objective == "likelihood" and losses.on_policy_fraction == 1:
        yield (
            "objective = likelihood learns from the expert's answers alone, and with "
            "on_policy_fraction = 1 there are none; set on_policy_fraction to 0."
        )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def check_command(config: Config, command: str, file: Path | None) -> None:
    """Make sure that a configuration is of the command that it is given to.

    Args:
        config: as it was read.
        command: ``loop``, ``distil`` or ``self-distill``.
        file: where it was read.

    Raises:
        UserError: it is another command's.
    """
    if config.command != command:
        own = f"mlx-fd {config.command}"
        raise UserError(
            f"{file} is of a run of {own}, and not of mlx-fd {command}: {own} --config "
            f"{shlex.quote(str(file))}"
        )


def read(path: Path, config: Config | None = None) -> Config:
    """The configuration in a TOML file, over ``config`` (default: the defaults).

    Options stand in their table (``[gate]``) or at the top of the file, as one likes.

    Raises:
        UserError: the file cannot be read or parsed (with the line), or an option is wrong.
    """
    return override(config or Config(), options_in(path), str(path))


def options_in(path: Path) -> dict[str, Any]:
    """The options that stand in a TOML file: name to value, none of them checked.

    Raises:
        UserError: the file cannot be read or parsed, or something in it is no option.
    """
    sections = [item.name for item in fields(Config)]
    changes: dict[str, Any] = {}
    for key, value in _parsed(path).items():
        # At the top of the file, or in a table.
        table = isinstance(value, dict) and not (key in OPTIONS and OPTIONS[key].kind is dict)
        given = value if table else {key: value}
        if table:
            # Some names (gate, losses, problems) are an option's and a table's.
            if key not in sections and key in OPTIONS:
                raise UserError(f"{path}: {key} is an option, not a table: write {key} = ...")
            if key not in sections:
                raise UserError(
                    f"{path}: there is no table [{shown(key)[1:-1]}]{_suggest(key, sections)}"
                )
        elif key in sections and key not in OPTIONS:
            raise UserError(f"{path}: {key} is a table: write [{key}], and its options below it.")
        for name, setting in given.items():
            if table and name in OPTIONS and OPTIONS[name].section != key:
                raise UserError(
                    f"{path}: {name} belongs in [{OPTIONS[name].section}], not [{key}]."
                )
            if name in changes:
                raise UserError(
                    f"{path}: {shown(name)[1:-1]} is there twice, at the top and in its table."
                )
            changes[name] = setting
    return changes


def _parsed(path: Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        UserError: it cannot be read or parsed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"{path}: not a configuration: larger than {_MAX_BYTES >> 20} MiB")
        return tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path}: not a TOML file: nested too deeply") from error
    # TOMLDecodeError and UnicodeDecodeError are ValueErrors, as is what Python says of an integer
    # of thousands of digits.
    except ValueError as error:
        raise UserError(f"{path}: not a TOML file: {error}") from error


def to_toml(config: Config) -> str:
    """The configuration as TOML that :func:`read` gives back unchanged."""
    tables = dataclasses.asdict(config)
    if not config.models.chat_template_kwargs:  # a table without a line says nothing
        del tables["models"]["chat_template_kwargs"]
    if config.selfdistill == Method():
        del tables["selfdistill"]
    return tomli_w.dumps(tables)


def preset(name: str, config: Config | None = None) -> Config:
    """The preset ``name`` over ``config``.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(
            f"there is no preset {name!r}{_suggest(name, list(PRESETS))} "
            f"(there are: {', '.join(PRESETS)})"
        )
    return override(config or Config(), PRESETS[name], f"preset {name}")
