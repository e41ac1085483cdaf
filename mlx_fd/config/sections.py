"""The options of a run, a dataclass for each table of its TOML file.

Each field carries its help text and choices, so the command line's options, the TOML keys and the
reference page are all made from it and cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_fd.config.fields import MAX_SEED, option
from mlx_fd.registry import CONTEXTS, KINDS, LOSSES, SOURCES


@dataclass(frozen=True)
class ModelOptions:
    """Which models, and which student weights to train."""

    expert: str = option(
        "qwen2.5-7b-4bit",
        "Expert model: an alias, a hub name or an mlx-lm directory. tiny implies --preset tiny, "
        "and tiny-hard its own, unless another preset is given.",
    )
    student: str = option(
        "",
        "Student model, likewise; NAME:layers=K keeps K of its layers. "
        "Empty: the expert's default student.",
    )
    train: str = option(
        "lora",
        "Student weights to train: a LoRA adapter, a DoRA adapter (LoRA and each row's length, "
        "arXiv 2402.09353), or all of them.",
        choices=("lora", "dora", "full"),
    )
    lora_rank: int = option(16, "Rank of the LoRA matrices.", low=1)
    lora_scale: float = option(2.0, "LoRA scale (alpha / rank).", low=0)
    lora_layers: int = option(0, "Number of last layers with LoRA; 0: all.", low=0)
    lora_keys: tuple[str, ...] = option(
        (),
        "Modules with LoRA, by their names in a layer (self_attn.q_proj), separated by commas. "
        "Empty: all linear ones; in a mixture of experts all but the experts and their router.",
        free=True,
    )
    lora_dropout: float = option(
        0.0, "Dropout of what the LoRA matrices read, in training.", low=0, high=0.99
    )
    score_at: str = option(
        "own",
        "Position at which the student's score head reads: the end of the prompt, before the "
        "feedback is generated; or the end of the student's feedback, having learned on its own "
        "(own) or on the expert's (feedback; it then copies the score written in the text).",
        choices=("prompt", "own", "feedback"),
    )
    continue_from: str = option(
        "",
        "A run of the loop whose student (its best checkpoint) this one goes on with; what is not "
        "given is as there. Empty: LoRA and heads begin anew.",
    )
    shard_expert: bool = option(
        False,
        "Divide the expert's weights among the processes that mlx.launch started, for an expert "
        "that one machine cannot hold. Each process then goes through all of a batch.",
    )
    dequantize: str = option(
        "auto",
        "Dequantise to float32: auto does so on the CPU backend where memory allows.",
        choices=("auto", "never"),
    )
    chat_template_kwargs: Mapping[str, Any] = option(
        {},
        "Variables for the chat template, such as reasoning_effort: a table in a file, JSON on the "
        "command line. The template must know them.",
    )
    template_date: str = option(
        "",
        "Day that a chat template prints where it asks for the date, YYYY-MM-DD. Empty: the day "
        "the run begins; outside of a run 2024-07-26.",
    )


@dataclass(frozen=True)
class ProblemOptions:
    """Which problems, how many, in which order."""

    problems: str = option(
        "gsm8k",
        "Problem source: a name, a file (.jsonl, .json, .csv, .tsv, .parquet), or a hub dataset.",
        names=SOURCES,
    )
    split: str = option("train", "Dataset split to train on.")
    train_on_test: bool = option(False, "Allow training on the test split.")
    episodes: int = option(400, "Number of problems to go through.", low=1)
    columns: str = option(
        "", "Columns of a file or hub dataset by what they hold: question=NAME,answer=NAME,..."
    )
    answer_kind: str = option(
        "auto",
        "Kind of answers in a file or hub dataset; auto: told by its rows.",
        choices=lambda: ("auto", *KINDS),
    )
    allow_code_execution: bool = option(
        False,
        "Run programs that models write, to judge answers that are programs. A file with options "
        "does not suffice: it is asked for on the command line, of resume too.",
    )
    skip_bad_rows: bool = option(
        False, "Skip problems that cannot be read or exceed a model's context length."
    )


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated. Temperatures of 0 are greedy."""

    batch_size: int = option(8, "Problems per batch.", low=1)
    max_answer_tokens: int = option(384, "Maximum tokens per answer or revision.", low=1)
    max_feedback_tokens: int = option(192, "Maximum tokens per feedback.", low=1)
    max_merge_tokens: int = option(
        128, "Maximum tokens of the merged feedback and of the critique.", low=1
    )
    answers_by: str = option(
        "student",
        "Model that writes the first answers, which are judged. An expert that is always right "
        "leaves the student no errors to learn from. both: the expert's, at expert_temperature, go "
        "on to the final answers, and the student's are judged beside them, to learn from.",
        choices=("expert", "student", "both"),
    )
    answer_temperature: float = option(
        0.7, "Sampling temperature of the first answers; higher values produce more errors.", low=0
    )
    max_answer_temperature: float = option(
        0.0,
        "Temperature up to which answer_temperature rises by itself while the expert calls nearly "
        "all of those answers right; it falls back while nearly all are wrong. 0: never.",
        low=0,
    )
    expert_temperature: float = option(
        0.0, "Sampling temperature of everything else the expert writes.", low=0
    )
    student_temperature: float = option(0.0, "Sampling temperature of the student.", low=0)
    expert_repetition_penalty: float = option(1.0, "Of the expert; 1: none.", low=1)
    student_repetition_penalty: float = option(1.0, "Of the student; 1: none.", low=1)
    expert_thinking: str = option(
        "off",
        "Whether the expert thinks before each text it writes, if it is a model that can; off "
        "closes a thought that its chat template opens.",
        choices=("off", "on"),
    )
    student_thinking: str = option(
        "off", "Whether the student thinks, likewise.", choices=("off", "on")
    )
    max_thinking_tokens: int = option(
        1024, "Maximum tokens per thought, which is closed there; the text comes on top.", low=1
    )
    answer_filter: str = option(
        "auto",
        "How the final number is extracted: auto takes ####, then \\boxed{}, then the last number; "
        "strict and flexible are lm-evaluation-harness's filters for GSM8K.",
        choices=("auto", "strict", "flexible"),
    )
    sequential: bool = option(
        False, "One problem at a time, without KV cache reuse (the reference implementation)."
    )
    batching: str = option(
        "auto",
        "How a batch's turns are written. lockstep: each step's together, and the next step when "
        "all are done. continuous: each problem goes on as soon as its own turn ends, beside the "
        "beginning of the next batch. auto: continuous, but lockstep on the CPU, for several "
        "processes, and with sequential or speculate.",
        choices=("auto", "lockstep", "continuous"),
    )
    places: int = option(
        0,
        "Texts that a model writes side by side with batching = continuous; 0: batch_size.",
        low=0,
    )
    speculate: int = option(
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

    losses: tuple[str, ...] = option(
        ("lm", "hidden", "score", "logit"),
        "Losses to train with, separated by commas.",
        choices=LOSSES,
    )
    kl: str = option(
        "forward",
        "Divergence of the logit and reasoning losses: forward is KL(expert || student).",
        choices=("forward", "reverse", "jsd"),
    )
    loss_temperature: float = option(
        2.0, "Softmax temperature T of the logit and reasoning losses (scaled by T^2).", low=0.01
    )
    standardize_logits: bool = option(
        False, "Standardise (z-score) both logit vectors first (arXiv 2403.01427)."
    )
    hidden_layers: str = option(
        "all", "Layers whose hidden states and attention are aligned.", choices=("all", "last")
    )
    attention_heads: str = option(
        "mean",
        "Attention to compare: the mean over each layer's heads, or head by head, for a student "
        "made from some of the expert's layers.",
        choices=("mean", "aligned"),
    )
    expert_verdicts: str = option(
        "checked",
        "Expert feedback whose score the right answer contradicts (above 0 on a wrong answer, "
        "below 0 on a right one): checked leaves it out of the training, privileged asks the "
        "expert again with the right answer in its prompt, as-is trains on it.",
        choices=("checked", "privileged", "as-is"),
    )
    solutions: bool = option(
        True,
        "Also train on the final answer of a distilled episode if it is known to be right. Always "
        "on with the losses answer and reasoning.",
    )
    teacher_top_k: int = option(
        0,
        "Keep the expert's top k next tokens, in the teacher cache, instead of its hidden states; "
        "0: compare full distributions.",
        low=0,
    )
    teacher_cache: str = option(
        "", "Directory of the teacher cache; runs may share one. Empty: in the run directory."
    )
    distil_thoughts: bool = option(
        False,
        "Also train on the thought before each feedback. Needs expert_thinking and "
        "student_thinking, and score_at = own or feedback.",
    )
    on_policy_fraction: float = option(
        0.0,
        "Fraction of samples distilled on the student's own feedback instead of the expert's.",
        low=0,
        high=1,
    )
    student_context: str = option(
        "none",
        "Self-distillation on the student's own answers: match the student to itself reading the "
        "expert's feedback, or its revision (step-critique). Needs answers_by = student.",
        choices=lambda: ("none", *(name for name, c in CONTEXTS.items() if c.from_episode)),
    )
    student_context_weight: float = option(
        1.0, "Weight of the student_context divergence relative to the other losses.", low=0.001
    )
    scales: tuple[float, ...] = option(
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

    gate: str = option(
        "ema",
        "Gate that starts and stops distillation.",
        choices=("ema", "published", "always", "never"),
    )
    trigger: str = option(
        "lag",
        "Samples to train on until the gate freezes the student: those on which it lags behind the "
        "expert, or all.",
        choices=("lag", "always"),
    )
    loss_weights: str = option(
        "ema",
        "Loss weights. ema: more weight on losses that fell less (the published gate has its own "
        "rule); phases: correctness first, reasoning later; both: their product; fixed: equal.",
        choices=("ema", "phases", "both", "fixed"),
    )
    phase_begin: float = option(
        0.25,
        "Fraction of the run after which weight shifts from answers to reasoning.",
        low=0,
        high=1,
    )
    phase_end: float = option(
        0.75, "Fraction of the run at which the shift is complete.", low=0, high=1
    )
    ema_decay: float = option(0.9, "Decay of the exponential moving averages.", low=0, high=0.9999)
    stop_threshold: float = option(
        1.0,
        "A loss that has fallen by this fraction need not be on a plateau for the freeze; 1: it "
        "must.",
        low=0,
        high=1,
    )
    plateau_steps: int = option(20, "Observations over which a loss must still improve.", low=2)
    plateau_gain: float = option(
        0.01,
        "Minimum improvement over plateau_steps, as a fraction of the initial loss, where each "
        "observation costs as many of the expert's tokens as usual in the run.",
        low=0,
    )
    minimum_gain: float = option(0.1, "Mean gain required before a plateau counts.", low=0, high=1)
    regression: float = option(
        0.2, "Unfreeze when a loss exceeds its level at the freeze by this fraction.", low=0
    )
    score_gap: float = option(
        0.25, "Distance from the expert's score at which the student lags.", low=0
    )
    max_disagreement: float = option(
        0.1,
        "Largest fraction of the verdicts that the student gives alone that may differ from the "
        "expert's, kept with a probability of 95 %; 0: the expert is always asked. Half of it "
        "takes twice as many audited verdicts.",
        low=0,
        high=1,
    )
    own_solutions: int = option(
        1,
        "How often the student also solves each problem that it judges, first greedily: the more "
        "its solutions contradict its verdict, the less that is trusted. Each costs an answer of "
        "the student; without effect where the expert is always asked, or where final answers "
        "cannot be compared.",
        low=0,
    )
    audit_fraction: float = option(
        0.1,
        "Fraction of problems on which the expert gives feedback though the student could judge "
        "alone.",
        low=0,
        high=1,
    )
    audit_window: int = option(
        0,
        "Verdicts, the last ones, that trust rests on; 0: 20 / max_disagreement.",
        low=0,
    )


@dataclass(frozen=True)
class TrainingOptions:
    """The optimiser and one distillation step."""

    lora_rate: float = option(1e-4, "Learning rate of the student's weights.", low=0)
    score_rate: float = option(1e-4, "Learning rate of the score head.", low=0)
    projection_rate: float = option(1e-4, "Learning rate of the alignment projection.", low=0)
    weight_decay: float = option(0.01, "AdamW weight decay.", low=0)
    max_grad_norm: float = option(1.0, "Maximum gradient norm; 0: no clipping.", low=0)
    kd_steps: int = option(2, "Optimiser steps per batch on which the student lags.", low=1)
    lr_schedule: str = option(
        "linear",
        "Learning rates over the run: constant, or falling to 0 (linear).",
        choices=("constant", "linear"),
    )
    step_samples: int = option(
        0,
        "Samples per optimiser step, new and earlier ones; 0: all new ones of the batch, and "
        "replay times as many earlier ones.",
        low=0,
    )
    replay: float = option(
        1.0, "Earlier samples per new one in each optimiser step; 0: none.", low=0, high=100
    )
    replay_size: int = option(128, "Maximum number of earlier samples to keep in memory.", low=1)
    replay_by: str = option(
        "lag",
        "Which earlier samples to draw: those on which the student lagged more often (lag), or "
        "each as often (uniform).",
        choices=("lag", "uniform"),
    )
    replay_balance: bool = option(
        False, "Draw feedback on wrong answers as often as on right ones."
    )
    measure_after: bool = option(
        False, "Also measure each sample's losses after the update, for the log."
    )
    epochs: int = option(
        1,
        "Passes over the training samples; after the first the expert generates nothing, and with "
        "teacher_top_k it is not run at all.",
        low=1,
    )
    micro_batch: int = option(
        4, "Samples per forward pass; gradients accumulate over the batch.", low=1
    )
    grad_checkpoint: bool = option(
        False, "Recompute activations in the backward pass to save memory."
    )


@dataclass(frozen=True)
class EpisodeOptions:
    """The episode and what surrounds it."""

    order: str = option(
        "published",
        "Order of the steps. published: the student learns before both feedbacks are merged, and "
        "gives its feedback again; right solutions are learned from in the next update. "
        "learn-last: it learns at the end of the batch, as it always does with student_context.",
        choices=("published", "learn-last"),
    )
    target_score: float = option(
        0.9, "Combined score at or above which an answer is not revised.", low=-1, high=1
    )
    check_alone: bool = option(
        True,
        "Have the expert check every answer that the student judges alone. What the student finds "
        "right it solves itself, and criticises where that comes to another final answer, or it "
        "gave the answer; the rest it revises. Off: those that reach target_score stay unseen, "
        "which saves more of its tokens and lets pass what the student overlooks.",
    )
    student_weight: float = option(0.65, "Weight of the student's score; the expert's is 1.", low=0)
    probe_size: int = option(8, "Held-out problems for the gate and the headroom check.", low=1)
    exam_size: int = option(
        100,
        "Answers with known errors that the student judges before and after the run; 0: no exam. "
        "Only with problems whose source knows the truth about any answer (arithmetic, "
        "arithmetic-hard).",
        low=0,
    )
    warm_up: str = option(
        "",
        "Distil answers into the student before the first batch, METHOD:PROBLEMS: distil:200, or "
        "another method of mlx-fd distil (gkd:200). Its problems are of the same split as the "
        "loop's, and others than those and the probe set's. Empty: none.",
    )
    warm_up_rate: float = option(0.0, "Learning rate of the warm-up; 0: as distil has it.", low=0)
    probe_every: int = option(1, "Distilled batches between probe evaluations.", low=1)
    checkpoint_every: int = option(4, "Batches between checkpoints.", low=1)
    keep_checkpoints: int = option(3, "Checkpoints to keep besides the best one.", low=2)
    profile: bool = option(
        False,
        "Count what is read, written and learned from beside the least there could be, and the "
        "seconds of each part of the work: in the summary, the report and metrics.jsonl.",
    )
    seed: int = option(
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
