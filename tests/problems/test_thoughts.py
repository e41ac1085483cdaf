"""What is thought and what is said, in texts as models of each family write them."""

from __future__ import annotations

import pytest

from mlx_fd.problems.thoughts import FAMILIES, split, without_thoughts

HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>"

OPEN_THOUGHTS = (
    "<|begin_of_thought|>\n\n{}\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\n{}\n\n<|end_of_solution|>"
)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_familys_thoughts(family):
    begin, end = family.open, family.close + family.reply
    found = split(f"{begin}It is 5.{end}It is 4.")
    assert (found.thought, found.reply) == ("It is 5.", "It is 4.")
    cut = split(f"{begin}It is 5")
    assert (cut.thought, cut.reply) == ("It is 5", "")
    nothing = split(f"{begin}{end}It is 4.")
    assert (nothing.thought, nothing.reply) == ("", "It is 4.")
    silent = split(f"{begin}It is 5.{end}")
    assert (silent.thought, silent.reply) == ("It is 5.", "")


@pytest.mark.parametrize(
    ("text", "thought", "reply"),
    [
        ("It is 4.", "", "It is 4."),
        ("It is 5.</think>It is 4.", "It is 5.", "It is 4."),
        ("<think>a</think>It is 3.<think>b</think>It is 4.", "a\nb", "It is 4."),
        ("It is 4.<think>Or 5?", "Or 5?", "It is 4."),
        ("It is 4.<think>Yes.</think>", "Yes.", "It is 4."),
        ("<think>a <think> b</think>It is 4.", "a\nb", "It is 4."),
        (HARMONY.format("It is 5.") + "It is 4.", "It is 5.", "It is 4."),
        (HARMONY.format("a").partition("<|message|>")[2] + "It is 4.", "a", "It is 4."),
        ("It is 4.<|end|><|start|>assistant<|channel|>analysis<|message|>b", "b", "It is 4."),
        ("<|start|>assistant" + HARMONY.format("a") + "It is 4.", "a", "It is 4."),
        ("<|start|>assistant<|channel|>analysis<|message|>a", "a", ""),
        (OPEN_THOUGHTS.format("It is 5.", "It is 4."), "It is 5.", "It is 4."),
        (OPEN_THOUGHTS.format("It is 5.", "It is 4.").partition(">")[2], "It is 5.", "It is 4."),
        (OPEN_THOUGHTS.format("a", "It is 4.").rpartition("<")[0], "a", "It is 4."),
        ("<|begin_of_thought|>a<|end_of_thought|>It is 4.", "a", "It is 4."),
        ("<|begin_of_solution|>It is 4.<|end_of_solution|>", "", "It is 4."),
        ("<|begin_of_thought|>a", "a", ""),
    ],
)
def test_a_texts_thoughts(text, thought, reply):
    found = split(text)
    assert (found.thought, found.reply) == (thought, reply)
    assert text[found.begin : found.end].strip() == reply


def test_a_text_without_thoughts_stays_as_it_is():
    assert without_thoughts(" It is 4.\n") == " It is 4.\n"
    assert without_thoughts("<think>a</think> It is 4.\n") == "It is 4."
