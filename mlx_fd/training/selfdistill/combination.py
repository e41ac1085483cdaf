"""Options of a run that contradict each other, which are refused before anything is loaded."""

from __future__ import annotations

from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.problems.sources import names_with_truth, truth_of
from mlx_fd.training.selfdistill.contexts import CONTEXTS

TRUTH, SELF, EXPERT = "truth", "self", "expert"

# What a critic may be that is no model of its own.
NO_MODEL = ("", TRUTH, SELF)


def check_combination(config: Config) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UserError: options that contradict each other; the message says which.
    """
    options = config.selfdistill
    if options.self_teacher == EXPERT and options.critic in NO_MODEL:
        raise UserError("a teacher that is an expert needs one: mlx-fd distil --expert NAME")
    if options.self_teacher != EXPERT and options.objective == "likelihood":
        raise UserError("--objective likelihood is for what an expert wrote: mlx-fd distil")
    own = config.losses.on_policy_fraction
    if options.objective == "likelihood" and own and not options.policy_weight:
        raise UserError(
            "--objective likelihood learns from the expert's answers alone, and with "
            f"--on-policy-fraction {own:g} the student would answer that part of the problems for "
            "nothing: set it to 0."
        )
    if options.self_teacher == EXPERT and options.objective in ("grpo", "contrastive", "echo"):
        raise UserError(
            f"--objective {options.objective} has no expert; take forward, reverse, jsd, sampled "
            "or likelihood"
        )
    if config.models.train != "lora":
        raise UserError(
            "self-distill trains LoRA (--train lora): its teacher needs the base weights as they "
            "were, and there is one copy of them."
        )
    if config.models.lora_dropout:
        raise UserError(
            "self-distill compares the student with what it was when it wrote, and dropout makes "
            "it another one; set lora_dropout to 0."
        )
    if config.training.epochs != 1 and config.generation.expert_thinking == "on":
        raise UserError(
            "the expert's thoughts are not kept for a second epoch; set epochs to 1, or "
            "expert_thinking to off."
        )
    if config.gate.gate == "published":
        raise UserError("--gate published is for the loop; take always, ema or never.")
    alone = options.num_generations < 2 and options.reward_baseline == "group"
    if alone and (options.objective == "grpo" or options.policy_weight):
        named = "--objective grpo" if options.objective == "grpo" else "--policy-weight"
        raise UserError(
            f"{named} compares attempts at one problem: set --num-generations to 8 (or "
            "--reward-baseline to right)."
        )
    if reason := _reads_the_same(config):
        raise UserError(
            f"{reason}, so that --objective {options.objective} has nothing to match: choose "
            "another --context, or --objective grpo."
        )
    context = CONTEXTS[options.context]
    if options.objective == "contrastive" and not context.gives_wrong_hints:
        names = [name for name, other in CONTEXTS.items() if other.gives_wrong_hints]
        raise UserError(
            f"--objective contrastive needs right and wrong hints: --context {' or '.join(names)}."
        )
    if context.needs_siblings and options.num_generations < 2:
        raise UserError(
            f"--context {options.context} shows other attempts at the same problem: set "
            "--num-generations to 8."
        )
    if context.needs_critic and not options.critic:
        raise UserError(
            f"--context {context.name} needs a critic: name one with --critic, or take the truth "
            "about generated problems with --critic truth."
        )
    if options.critic == TRUTH and truth_of(config.problems.problems) is None:
        raise UserError(f"--critic truth is known for --problems {names_with_truth()} only.")


def _reads_the_same(config: Config) -> str:
    """Why the self-teacher reads what the student does, where nothing else is learned from.

    Two equal models that read the same say the same, and stay equal. Empty: it reads more, or there
    is a reward.
    """
    options = config.selfdistill
    rewarded = options.objective in ("grpo", "contrastive", "echo") or options.policy_weight
    if options.self_teacher == EXPERT or rewarded:
        return ""
    if options.context == "none":
        return "--context none shows the self-teacher no more than the student"
    if options.context == "clean" and options.noise == "none":
        return "--context clean shows the question without its noise, and --noise is none"
    return ""
