"""What is matched: the objectives on a batch of attempts, as pure functions on arrays.

An attempt is a row of at most T tokens y_t; what belongs to its tokens is padded to T, with a mask
[B, T] that is 1 (true) where there is a token. ``now`` is log pi(y_t) of the student that learns,
the only thing a gradient flows into; all else is a constant, whatever it was made from. Under a 0
of the mask anything may stand, NaN too.

The divergences of whole distributions are not here: they are
:func:`mlx_fd.losses.divergence.fused_linear_divergences`, which never makes their logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

# What matches whole distributions, and what rewards right attempts.
DIVERGENCES = ("forward", "reverse", "jsd")
POLICIES = ("grpo", "contrastive", "echo")
# Against a group whose rewards are all the same (TRL's).
_MIN_SPREAD = 1e-4
# Log-ratios beyond are no ratios any more (SDPO's).
_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Clipping:
    """How far a policy may move on one batch of attempts.

    Attributes:
        low: a ratio below 1 - low gives no gradient where the advantage is negative.
        high: one above 1 + high none where it is positive (DAPO's is larger than ``low``).
        cap: the largest ratio that counts where the advantage is negative, too (TRL's ``delta``).
        level: ``"token"``: a ratio for each token; ``"sequence"``: exp of the mean of the attempt's
            log-ratios, for all of its tokens (GSPO, arXiv 2507.18071).
    """

    low: float = 0.2
    high: float = 0.2
    cap: float = math.inf
    level: str = "token"


def group_advantages(rewards: mx.array, scale: str = "group", baseline: str = "group") -> mx.array:
    """Each attempt's reward against its group's (GRPO, arXiv 2402.03300; as TRL computes it).

    A_i = (r_i - mean of the group) / (s + 1e-4), s the standard deviation with n - 1.

    Args:
        rewards: [P, G], of G attempts at each of P problems.
        scale: s is that of the ``"group"``, or of the whole ``"batch"``; ``"none"``: A_i is the
            difference (Dr. GRPO, arXiv 2503.20783).
        baseline: the ``"group"``'s mean; ``"right"``: A_i = r_i - 1, so -1 for a wrong attempt and
            0 for a right one, whatever the group (negative reinforcement, arXiv 2506.01347).

    Returns:
        [P, G], float32; 0 in a group of one whose mean is the baseline.
    """
    rewards = rewards.astype(mx.float32)
    if baseline == "right":
        return rewards - 1
    difference = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return difference
    if scale == "batch":
        spread = mx.std(rewards, ddof=1) if rewards.size > 1 else mx.array(0.0)
    elif rewards.shape[1] > 1:
        spread = mx.std(rewards, axis=1, keepdims=True, ddof=1)
    else:
        spread = mx.zeros_like(difference)
    return difference / (spread + _MIN_SPREAD)


def token_advantages(teacher: mx.array, student: mx.array) -> mx.array:
    """A_t = log pi_T(y_t) - log pi_S(y_t): what the self-teacher thinks of each token, a constant.

    Args:
        teacher: [...], the self-teacher's log-probabilities.
        student: [...], the student's.
    """
    return mx.stop_gradient(teacher - student)


def truncated_ratio(now: mx.array, old: mx.array, cap: float) -> mx.array:
    """min(pi(y_t) / pi_old(y_t), cap), a constant: how much likelier a token has become.

    Weighs the tokens of stale attempts (SDPO's importance ratio). Infinite ``cap``: 1.
    """
    if not math.isfinite(cap):
        return mx.ones(now.shape)
    limit = _LARGEST_LOG_RATIO
    return mx.stop_gradient(mx.minimum(mx.exp(mx.clip(now - old, -limit, limit)), cap))


def sampled_loss(now: mx.array, teacher: mx.array, weights: mx.array, mask: mx.array) -> mx.array:
    """Reverse KL on the tokens that were drawn: the policy gradient with the per-token advantage.

    -sum_t w_t A_t log pi_S(y_t), A_t = log pi_T(y_t) - log pi_S(y_t) held constant. Its gradient
    is, in expectation over y drawn from the student, that of sum_t KL(pi_S || pi_T), each token
    taken for what it does itself and not for what follows (Thinking Machines' on-policy
    distillation; SDPO's and OPSD's sampled-token form).

    Args:
        now: [B, T], the student's log-probabilities.
        teacher: [B, T], the self-teacher's log-probabilities.
        weights: [B, T], what each token counts; for a mean, 1 / tokens.
        mask: [B, T], true where there is a token.
    """
    valid = mask.astype(mx.bool_)
    advantages = token_advantages(mx.where(valid, teacher, 0), mx.where(valid, now, 0))
    weights = mx.stop_gradient(mx.where(valid, weights, 0))
    return -(weights * advantages * mx.where(valid, now, 0)).sum()


def aggregation_weights(mask: mx.array, how: str, max_tokens: int) -> mx.array:
    """What each token counts in a policy's loss: [B, T], float32.

    Args:
        mask: [B, T], true where there is a token.
        how: ``"grpo"``: mean over attempts of the mean over tokens; ``"bnpo"`` and ``"dapo"``: mean
            over all tokens (of one update they are the same); ``"dr_grpo"``: sum over tokens / (B
            ``max_tokens``), so that long wrong attempts are not spared.
        max_tokens: the most tokens an attempt may have.
    """
    valid = mask.astype(mx.float32)
    if how == "grpo":
        lengths = mx.maximum(valid.sum(axis=1, keepdims=True), 1)
        return valid / (lengths * mask.shape[0])
    if how == "dr_grpo":
        return valid / (mask.shape[0] * max_tokens)
    return valid / mx.maximum(valid.sum(), 1)


def policy_loss(  # noqa: PLR0913
    now: mx.array,
    old: mx.array,
    advantages: mx.array,
    weights: mx.array,
    mask: mx.array,
    clipping: Clipping,
    *,
    reference: mx.array | None = None,
    kl_weight: float = 0.0,
) -> tuple[mx.array, mx.array]:
    """The clipped policy-gradient loss of PPO and GRPO (as TRL computes it).

    sum_t w_t (-min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) + kl_weight k3_t), with rho = exp(now
    - old) and k3 = exp(reference - now) - (reference - now) - 1, Schulman's estimate of KL(pi ||
    reference).

    Args:
        now: [B, T], the student's log-probabilities.
        old: [B, T], log pi of the policy that the ratio is against: the one that drew the tokens.
        advantages: [B] or [B, T].
        weights: [B, T], of :func:`aggregation_weights`.
        mask: [B, T], true where there is a token.
        clipping: bounds of the ratio.
        reference: [B, T], the untrained model's log-probabilities; needed with ``kl_weight``.
        kl_weight: beta, of the KL to the untrained model; 0: none.

    Returns:
        The loss, and the share of tokens whose ratio is cut where that takes their gradient.
    """
    valid = mask.astype(mx.bool_)
    now, old = mx.where(valid, now, 0), mx.stop_gradient(mx.where(valid, old, 0))
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    advantages = mx.stop_gradient(mx.where(valid, advantages, 0))
    log_ratio = now - old
    if clipping.level == "sequence":
        lengths = mx.maximum(valid.sum(axis=1, keepdims=True), 1)
        log_ratio = mx.broadcast_to(log_ratio.sum(axis=1, keepdims=True) / lengths, now.shape)
    ratio = mx.exp(log_ratio)
    free = mx.minimum(ratio, clipping.cap) if math.isfinite(clipping.cap) else ratio
    cut = mx.clip(ratio, 1 - clipping.low, 1 + clipping.high)
    losses = -mx.minimum(free * advantages, cut * advantages)
    if kl_weight:
        assert reference is not None
        ahead = mx.stop_gradient(mx.where(valid, reference, 0)) - now
        losses = losses + kl_weight * (mx.exp(ahead) - ahead - 1)
    clipped = ((advantages > 0) & (ratio > 1 + clipping.high)) | (
        (advantages < 0) & (ratio < 1 - clipping.low)
    )
    share = (clipped & valid).sum() / mx.maximum(valid.sum(), 1)
    weights = mx.stop_gradient(mx.where(valid, weights, 0))
    return (weights * losses).sum(), mx.stop_gradient(share)


def contrast(correct: mx.array, wrong: mx.array, hints: mx.array) -> mx.array:
    """How much more a right hint speaks for each token than wrong hints in the same words (RLCSD).

    e_t = log p(y_t | right) - (logsumexp_k log p(y_t | wrong_k) - log K). What any hint does to the
    style cancels; what is left is what the hint says of the answer (arXiv 2606.11709).

    Args:
        correct: [B, T], the teacher's log-probabilities with the right hint.
        wrong: [B, K, T], with each wrong one.
        hints: [B, K], 1 (true) where there is such a hint.

    Returns:
        [B, T], a constant; 0 for an attempt without a wrong hint.
    """
    there = hints.astype(mx.bool_)[..., None]
    count = there.sum(axis=1)
    scores = mx.where(there, wrong, -math.inf)
    of_wrong = mx.logsumexp(scores, axis=1) - mx.log(mx.maximum(count, 1))
    return mx.stop_gradient(mx.where(count > 0, correct - of_wrong, 0))


def modulated(
    advantages: mx.array, contrasts: mx.array, *, tau: float, scale: float, clip: float, gate: float
) -> tuple[mx.array, mx.array]:
    """The verifier's advantage, moved token by token by the contrast, never across 0 (RLCSD).

    r_t = clip(scale tanh(e_t / tau), -clip, clip); a token is selected where abs(r_t) > gate, and
    there A'_t is A + r_t, or 0 where that has the other sign than A.

    Args:
        advantages: [B], of the verifier's reward.
        contrasts: [B, T], of :func:`contrast`.
        tau: softness of the tanh.
        scale: beta times lambda in the paper's words.
        clip: bound of r_t.
        gate: delta, the least move that selects a token.

    Returns:
        A' and which tokens are selected, [B, T] each.
    """
    moved = mx.clip(scale * mx.tanh(contrasts / tau), -clip, clip)
    selected = mx.abs(moved) > gate
    base = mx.broadcast_to(advantages[:, None], contrasts.shape)
    total = base + mx.where(selected, moved, 0)
    kept = mx.where(base > 0, mx.maximum(total, 0), mx.where(base < 0, mx.minimum(total, 0), 0))
    return mx.stop_gradient(kept), selected


def contrastive_weights(selected: mx.array, mask: mx.array, selected_weight: float) -> mx.array:
    """What each token counts in RLCSD's loss: the mean of the selected, and that of the others.

    Each of the two is divided by its own number of tokens, so that few selected tokens are not lost
    among many others.

    Args:
        selected: [B, T], of :func:`modulated`.
        mask: [B, T], true where there is a token.
        selected_weight: eta, of the selected tokens' mean.
    """
    valid = mask.astype(mx.bool_)
    chosen, others = selected & valid, ~selected & valid
    return selected_weight * chosen / mx.maximum(chosen.sum(), 1) + others / mx.maximum(
        others.sum(), 1
    )


def shaped_rewards(rewards: mx.array, divergences: mx.array, bonus: float) -> mx.array:
    """Rewards with EchoDistill's bonus for being near the teacher (arXiv 2605.23954).

    clip(r + bonus 1[r > 0] exp(-L), -1, 2), L the divergence on the teacher's own answer: one
    number for all attempts of a group.

    Args:
        rewards: [P, G], of G attempts at each of P problems.
        divergences: [P], mean per token.
        bonus: beta, the most that a right attempt can gain.
    """
    near = mx.exp(-divergences)[:, None]
    return mx.clip(rewards + bonus * (rewards > 0) * near, -1, 2)
