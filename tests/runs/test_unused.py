"""Options that have no effect beside others are refused where they are given, and only there."""

import pytest

from mlx_fd.config import OPTIONS, Config, override, to_toml
from mlx_fd.errors import UserError
from mlx_fd.registry import CONTEXTS
from mlx_fd.runs import plan
from mlx_fd.runs.unused import _needs, check_used
from mlx_fd.training.selfdistill.methods import EXPERT_METHODS, METHODS, configured

# An option that does nothing, beside what, and what would make it do something.
LOOP = [
    ({"lora_rank": 4}, {"train": "full"}, {"train": "dora"}),
    ({"replay_balance": True}, {"replay": 0.0}, {"replay": 0.5}),
    ({"own_solutions": 2}, {"max_disagreement": 0.0}, {"max_disagreement": 0.1}),
    ({"check_alone": False}, {"gate": "always"}, {}),
    ({"max_disagreement": 0.2}, {"gate": "always"}, {"gate": "published"}),
    ({"stop_threshold": 0.5}, {"gate": "always"}, {"gate": "ema"}),
    ({"trigger": "always"}, {"gate": "never"}, {"gate": "always"}),
    ({"plateau_steps": 4}, {"gate": "published"}, {"gate": "always"}),
    ({"score_gap": 0.3}, {"trigger": "always"}, {}),
    ({"ema_decay": 0.5}, {"gate": "never", "loss_weights": "fixed"}, {"gate": "never"}),
    ({"phase_end": 0.9}, {}, {"loss_weights": "both"}),
    ({"kl": "jsd"}, {"losses": ["lm", "score"]}, {"losses": ["reasoning"]}),
    ({"attention_heads": "aligned"}, {}, {"losses": ["lm", "attention"]}),
    ({"score_rate": 1e-3}, {"losses": ["lm"]}, {}),
    ({"student_context_weight": 2.0}, {}, {"student_context": "feedback"}),
    ({"warm_up_rate": 1e-3}, {}, {"warm_up": "distil:8"}),
    ({"exam_size": 40}, {"problems": "gsm8k"}, {"problems": "arithmetic"}),
    ({"max_thinking_tokens": 64}, {}, {"expert_thinking": "on"}),
]
METHOD = [
    ("grpo", {"critic": "tiny"}, {"objective": "forward", "context": "feedback"}),
    ("sdft", {"critic": "truth"}, {"context": "sibling"}),
    ("grpo", {"context": "feedback"}, {"objective": "jsd"}),
    ("step-critique", {"critic_sees": "problem", "critic": "truth"}, {"critic": "tiny"}),
    ("step-critique", {"max_feedback_tokens": 9, "critic": "truth"}, {"critic": "self"}),
    ("sdft", {"reference_style": "prose"}, {"context": "reference"}),
    ("sdpo", {"wrong_hints": 2}, {"context": "contrast"}),
    ("grpo", {"noise_level": 0.2}, {"noise": "typed"}),
    ("sdft", {"teacher_sync_steps": 3}, {"self_teacher": "snapshot"}),
    ("sdft", {"jsd_beta": 0.3}, {"objective": "jsd"}),
    ("sdft", {"tail": False}, {"support": "student"}),
    ("sdft", {"epsilon": 0.1}, {"policy_weight": 0.5}),
    ("rlcsd", {"loss_type": "grpo"}, {"objective": "grpo"}),
    ("rlcsd", {"policy_weight": 0.5}, {"objective": "echo"}),
    ("sdft", {"plateau_steps": 4}, {"gate": "ema"}),
    ("on-policy", {"expert_answers": "all"}, {"on_policy_fraction": 0.5}),
    ("sft", {"jsd_beta": 0.3}, {"objective": "jsd"}),
]


@pytest.mark.parametrize(("idle", "beside", "with_effect"), LOOP)
def test_an_option_of_the_loop_that_does_nothing_is_refused(idle, beside, with_effect, tmp_path):
    (name,) = idle
    with pytest.raises(UserError, match=f"here: {name} has no effect without .*; leave it out"):
        plan.configuration(None, None, {**beside, **idle}, "here")
    plan.configuration(None, None, {**with_effect, **idle}, "here")
    # A file has all options.
    file = tmp_path / "run.toml"
    file.write_text(to_toml(override(Config(), {**beside, **idle}, "test")))
    plan.configuration(None, file, {"seed": 3}, "here")


@pytest.mark.parametrize(("method", "idle", "with_effect"), METHOD)
def test_an_option_that_a_method_never_reads_is_refused(method, idle, with_effect):
    name = next(iter(idle))
    with pytest.raises(UserError, match=f"here: {name} has no effect without "):
        check_used(configured(method, idle), idle, "here")
    given = {**idle, **with_effect}
    check_used(configured(method, given), given, "here")


def test_what_switches_something_off_may_be_given():
    off = {"critic": "", "noise_level": 0.0, "max_disagreement": 0.0, "expert_thinking": "off"}
    check_used(configured("grpo", off), off, "here")


@pytest.mark.parametrize("method", [*METHODS, *EXPERT_METHODS])
def test_what_a_published_method_sets_has_an_effect_there(method):
    options = {**METHODS, **EXPERT_METHODS}[method]
    critic = {"critic": "tiny"} if method == "step-critique" else {}
    check_used(configured(method, critic), options, "here")


def test_the_table_names_options_and_contexts_say_what_they_read():
    assert set(_needs()) <= set(OPTIONS)
    for context in CONTEXTS.values():
        assert context.options <= set(OPTIONS)
        assert not context.needs_critic or "critic" in context.options
