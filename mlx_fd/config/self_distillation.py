"""The options of a method by which a model teaches itself."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_fd.config.fields import option
from mlx_fd.registry import CONTEXTS


@dataclass(frozen=True)
class Method:
    """A method of self-distillation: what the self-teacher sees, what is matched, and how.

    ``mlx_fd.training.selfdistill.methods`` has the published ones.
    """

    method: str = option(
        "", "The published method this began as, or custom; empty: no self-distillation."
    )
    context: str = option(
        "none",
        "What the self-teacher reads in addition to the problem.",
        choices=CONTEXTS,
    )
    objective: str = option(
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
    critic: str = option(
        "",
        "Frozen model that writes critiques, feedback, reflections and rubrics; self: the "
        "self-teacher does; truth: the problem source's own, where it knows the truth about any "
        "answer. Empty: none.",
    )
    critic_sees: str = option(
        "reference",
        "What the critic corrects an attempt with: the reference solution, or the problem alone, "
        "in the loop's roles (feedback, then revision), which the model tiny was trained on.",
        choices=("reference", "problem"),
    )
    reference_style: str = option(
        "solution",
        "Style of the reference solutions of generated problems: solution, the style of the "
        "attempts, or prose, that of another author.",
        choices=("solution", "prose"),
    )
    noise: str = option(
        "none",
        "Noise added to the question that the student reads.",
        choices=("none", "typed", "transcribed"),
    )
    noise_level: float = option(0.3, "Fraction of the words with noise.", low=0, high=1)
    num_generations: int = option(1, "Attempts per problem.", low=1)
    generation_batch_size: int = option(64, "Attempts to generate in parallel.", low=1)
    temperature: float = option(
        1.0, "Temperature of sampling and of the distributions in the loss.", low=0.01
    )
    top_p: float = option(
        1.0,
        "Nucleus sampling: sample from the most likely tokens with this total probability.",
        low=0.01,
        high=1,
    )
    top_k: int = option(0, "Sample from the k most likely tokens; 0: from all.", low=0)
    self_teacher: str = option(
        "base",
        "Weights of the teacher: base, the student without its adapter; ema, the adapter's moving "
        "average; current; snapshot, the adapter of some updates ago; expert: the critic, another "
        "model (mlx-fd distil).",
        choices=("base", "ema", "current", "snapshot", "expert"),
    )
    teacher_decay: float = option(
        0.95, "Decay of the self-teacher's moving average, per update.", low=0, high=1
    )
    teacher_sync_steps: int = option(10, "Updates between snapshots of the self-teacher.", low=1)
    jsd_beta: float = option(
        0.5, "Weight of the teacher in the mixture of jsd.", low=0.001, high=0.999
    )
    support: str = option(
        "all",
        "Tokens to compare: the whole vocabulary, or the teacher's or student's top k.",
        choices=("all", "teacher", "student"),
    )
    loss_top_k: int = option(100, "Number of tokens to compare if support is not all.", low=1)
    tail: bool = option(
        True, "Compare the total probability of all other tokens too; off: renormalise without it."
    )
    token_clip: float = option(
        0.0, "Maximum contribution of one vocabulary entry to a divergence; 0: no limit.", low=0
    )
    skip_tokens: int = option(0, "First tokens of an attempt to leave out of the objective.", low=0)
    first_tokens: int = option(
        0, "Learn from so many first tokens of an attempt only; 0: from all.", low=0
    )
    expert_answers: str = option(
        "right",
        "Which answers that the expert wrote are learned from: right ones, or all.",
        choices=("right", "all"),
    )
    stale_cap: float = option(
        0.0,
        "Cap of the importance weights current / sampling probability; 0: no weights.",
        low=0,
    )
    match_weight: float = option(1.0, "Weight of the teacher-matching objective.", low=0)
    policy_weight: float = option(
        0.0, "Weight of the GRPO loss added to it; grpo and contrastive consist of it alone.", low=0
    )
    scale_rewards: str = option(
        "group",
        "Standard deviation to divide a group's advantages by: the group's, the batch's, or none "
        "(Dr. GRPO).",
        choices=("group", "batch", "none"),
    )
    reward_baseline: str = option(
        "group",
        "What a reward is compared with: the mean of its group, or that of a right attempt; then "
        "wrong attempts alone count, each with the advantage -1, unscaled.",
        choices=("group", "right"),
    )
    epsilon: float = option(0.2, "Clip the policy ratio below at 1 - epsilon.", low=0, high=1)
    epsilon_high: float = option(0.2, "Clip the policy ratio above at 1 + epsilon_high.", low=0)
    delta: float = option(
        0.0, "Maximum policy ratio where the advantage is negative; 0: no limit.", low=0
    )
    importance_sampling_level: str = option(
        "token",
        "Policy ratio per token, or per attempt (GSPO).",
        choices=("token", "sequence"),
    )
    kl_coef: float = option(
        0.0, "Weight of the KL to the base model in the policy loss (k3 estimator).", low=0
    )
    loss_type: str = option(
        "dapo",
        "Averaging of the policy loss: grpo over attempts of their token means, dapo and bnpo over "
        "all tokens, dr_grpo over attempts times max_answer_tokens.",
        choices=("grpo", "bnpo", "dr_grpo", "dapo"),
    )
    mask_truncated_completions: bool = option(
        False, "Leave attempts that hit the token limit out of the policy loss."
    )
    wrong_hints: int = option(4, "Maximum number of wrong hints per attempt (contrastive).", low=1)
    contrast_tau: float = option(0.02, "Temperature of the contrast (contrastive).", low=1e-6)
    contrast_scale: float = option(
        0.5, "Scale of the contrast in the advantage (contrastive).", low=0
    )
    contrast_clip: float = option(2.0, "Bound on the scaled contrast (contrastive).", low=0)
    contrast_gate: float = option(
        0.02, "Minimum scaled contrast that selects a token (contrastive).", low=0
    )
    contrast_weight: float = option(
        1.0, "Weight of the mean over the selected tokens (contrastive).", low=0
    )
    near_bonus: float = option(
        0.5, "Extra reward for correct attempts close to the clean teacher (echo).", low=0
    )
    warmup_steps: int = option(0, "Updates of linear learning-rate warmup.", low=0)
