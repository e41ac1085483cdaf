"""A thought is told from the reply, is limited, and leaves no trace in the conversation."""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers import AddedToken

from mlx_fd.errors import UserError
from mlx_fd.models.conversation import Conversation, rewind_to, without_repeated_eos
from mlx_fd.models.generation import (
    chat_text,
    first_prompt,
    followup_prompt,
    generate,
    without_thoughts,
)
from mlx_fd.models.loading import load, with_thinking
from mlx_fd.models.tokenizer import open_template
from mlx_fd.models.writing import GenerateOptions, Sampling, Turn
from support.architectures import make_architecture
from support.thinkers import TEMPLATES, Line, scripted, tokens_in
from support.tiny import make_model_dir, make_tokenizer, write_tokenizer

ASK, AGAIN = "What is 1 + 2?", "Sure?"
FAMILIES = sorted(name for name, kind in TEMPLATES.items() if not kind.odd)
PLAIN = GenerateOptions()


def marked(name, thought):
    """A thought as a model of the family writes it within a reply."""
    loaded_family = {
        "mistral": ("[THINK]", "[/THINK]"),
        "gemma4": ("<|channel>thought\n", "<channel|>"),
        "exaone_deep": ("<thought>\n", "\n</thought>\n\n"),
        "kimi_vl": ("\u25c1think\u25b7\n", "\n\u25c1/think\u25b7\n\n"),
        "harmony": (
            "<|end|><|start|>assistant<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
    }.get(name, ("<think>\n", "\n</think>\n\n"))
    return thought.join(loaded_family)


def two_turns(loaded, script, options=PLAIN, most=40):
    """The first turn to ``ASK``, and the second to ``AGAIN``."""
    prompt = first_prompt(loaded, ASK)
    [first] = generate(loaded, [Conversation()], [prompt], Sampling(most), options)
    request = without_repeated_eos(first.conversation, followup_prompt(loaded, AGAIN))
    [second] = generate(loaded, [first.conversation], [request], Sampling(most), options)
    return first, second


def checked(loaded, *said):
    """Conversations are the template's chat without any thought, and so are their caches.

    Args:
        loaded: whose they are.
        *said: each turn, with all that was said up to its end.
    """
    for turn, turns in said:
        goes_on = without_repeated_eos(turn.conversation, followup_prompt(loaded, "And?"))
        whole = chat_text(loaded, [*turns, "And?"])
        wanted = loaded.tokenizer.encode(whole, add_special_tokens=False)
        assert [*turn.conversation.tokens, *goes_on] == wanted
        assert tokens_in(turn.conversation.cache) == list(turn.conversation.tokens)


SCRIPTS = {
    "complete": (Line("It is 3.", "Say 7."), "Say 7.", "It is 3.", False),
    "number and score in it": (
        Line("Score: 0.5\nIt is 3.", "Score: -1\n#### 8"),
        "Score: -1\n#### 8",
        "Score: 0.5\nIt is 3.",
        False,
    ),
    "empty": (Line("It is 3.", ""), "", "It is 3.", False),
    "too long": (Line("It is 3.", "Well", ends=False), None, "It is 3.", True),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_model_thinks_and_then_replies(tmp_path, name, kind):
    line, thought, says, closed = SCRIPTS[kind]
    script = {ASK: line, AGAIN: Line("Yes.", "Hm.")}
    loaded = scripted(tmp_path, name, script, on=True, limit=20)
    first, second = two_turns(loaded, script)
    assert (first.text, second.text) == (says, "Yes.")
    assert second.thought == "Hm."
    assert first.closed == closed
    if thought is None:
        assert first.thought.startswith("Well and and")
        assert first.written == 20 + len(first.tokens)
    else:
        assert first.thought == thought
    assert loaded.tokenizer.decode(list(first.tokens)) == says + TEMPLATES[name].eos
    assert first.finished
    checked(loaded, (first, (ASK, says)), (second, (ASK, says, AGAIN, "Yes.")))
    # Whoever prefills everything writes the same.
    naive, naive_second = two_turns(loaded, script, GenerateOptions(reuse=False))
    assert (naive.tokens, naive.opening) == (first.tokens, first.opening)
    assert naive_second.conversation.tokens == second.conversation.tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_shall_not_think_replies_at_once(tmp_path, name):
    script = {ASK: Line("It is 3.", "Say 7."), AGAIN: Line("Yes.", "Hm.")}
    loaded = scripted(tmp_path, name, script, on=False)
    first, second = two_turns(loaded, script)
    assert (first.text, first.thought, second.text) == ("It is 3.", "", "Yes.")
    assert first.written == len(first.tokens)
    assert first.opening == ()
    checked(loaded, (first, (ASK, "It is 3.")), (second, (ASK, "It is 3.", AGAIN, "Yes.")))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_thought_within_a_reply_is_none_of_it(tmp_path, name):
    says = f"It is 9.{marked(name, 'No: 3.')}It is 3."
    script = {ASK: Line(says, "Say 7."), AGAIN: Line("Yes.", "Hm.")}
    loaded = scripted(tmp_path, name, script, on=True)
    first, second = two_turns(loaded, script, most=80)
    if name == "harmony":  # the first message ends the turn
        assert (first.text, first.thought) == ("It is 9.", "Say 7.")
        checked(loaded, (first, (ASK, "It is 9.")), (second, (ASK, "It is 9.", AGAIN, "Yes.")))
        return
    assert (first.text, first.thought) == ("It is 3.", "Say 7.\nNo: 3.")
    assert loaded.tokenizer.decode(list(first.tokens)).strip() == "It is 3." + TEMPLATES[name].eos
    assert loaded.tokenizer.decode(first.conversation.tokens).count("It is 9.") == 0
    assert tokens_in(second.conversation.cache) == list(second.conversation.tokens)


def test_a_reply_after_a_thought_keeps_all_bytes_of_its_last_character(tmp_path):
    script = {ASK: Line("", "Say 7."), AGAIN: Line("Yes.", "Hm.")}
    loaded = scripted(tmp_path, "qwen3", script, on=True)
    text = f"It is 9.{marked('qwen3', 'No: 3.')}It is \U0001f642"
    tokens = loaded.tokenizer.encode(text, add_special_tokens=False)
    assert loaded.tokenizer.decode(tokens[-3:]) != "\U0001f642"  # it is more than three tokens
    turn = Turn(text, (*tokens, loaded.tokenizer.eos_token_id), True, Conversation(), 0)
    found = without_thoughts(loaded, loaded.thinking, turn)
    assert found.text == "It is \U0001f642"
    assert loaded.tokenizer.decode(found.tokens[:-1]).strip() == found.text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_that_ends_within_its_thought_says_nothing(tmp_path, name):
    script = {ASK: Line("It is 3.", "#### 7", stops=True), AGAIN: Line("Yes.", "Hm.")}
    loaded = scripted(tmp_path, name, script, on=True)
    first, second = two_turns(loaded, script, GenerateOptions(logprobs=True))
    assert (first.text, first.thought, second.text) == ("", "#### 7", "Yes.")
    assert first.tokens == (loaded.tokenizer.eos_token_id,)
    assert len(first.logprobs) == 1
    checked(loaded, (first, (ASK, "")), (second, (ASK, "", AGAIN, "Yes.")))


@pytest.mark.parametrize("name", FAMILIES)
def test_many_think_side_by_side_as_one_by_one(tmp_path, name):
    lines = {
        "A?": Line("It is 3.", "Say 7."),
        "BB?": Line("It is 4, and that is sure.", ""),
        "CCC?": Line("It is 5.", "Well", ends=False),
        "DDDD?": Line("It is 6.", "Oh", stops=True),
    }
    loaded = scripted(tmp_path, name, lines, on=True, limit=12)
    prompts = [first_prompt(loaded, message) for message in lines]
    none = [Conversation()] * len(prompts)
    together = generate(loaded, none, prompts, Sampling(30))
    alone = [generate(loaded, none[:1], [prompt], Sampling(30))[0] for prompt in prompts]
    # And as without mlx-lm's batched generator, which some models need.
    alone += generate(dataclasses.replace(loaded, batched=False), none, prompts, Sampling(30))
    for one, other in zip(together * 2, alone, strict=True):
        assert (one.text, one.thought, one.tokens) == (other.text, other.thought, other.tokens)
        assert tokens_in(one.conversation.cache) == list(one.conversation.tokens)
        assert one.conversation.tokens == other.conversation.tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_put_into_its_mouth_comes_after_its_thought(tmp_path, name):
    script = {ASK: Line("Score: 0.5\nFeedback: Right.", "Score: -1")}
    loaded = scripted(tmp_path, name, script, on=True)
    begun = loaded.tokenizer.encode("Score:", add_special_tokens=False)
    [turn] = generate(
        loaded, [Conversation()], [(*first_prompt(loaded, ASK), *begun)], Sampling(40)
    )
    assert (turn.text, turn.thought) == ("0.5\nFeedback: Right.", "Score: -1")
    checked(loaded, (turn, (ASK, "Score: 0.5\nFeedback: Right.")))


def test_who_has_no_marks_of_thoughts_cannot_think(tmp_path):
    from mlx_fd.models.loading import load

    loaded = load(make_model_dir(tmp_path / "m"))
    assert loaded.thinking is None
    with pytest.raises(UserError, match="does not think"):
        with_thinking(loaded, on=True, limit=8)


@pytest.mark.parametrize("architecture", ["qwen3_5", "gemma3_text"])
@pytest.mark.parametrize("name", ["qwen3", "nemotron3"])
def test_states_that_cannot_be_cut_back_lose_the_thought_too(tmp_path, architecture, name):
    kind, tokenizer = TEMPLATES[name], make_tokenizer()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in kind.tokens]
    )
    make_architecture(tmp_path / "m", architecture, vocab_size=402)
    write_tokenizer(tmp_path / "m", tokenizer, chat_template=kind.source)
    plain = load(tmp_path / "m")
    for on in (True, False):
        loses_the_thought(with_thinking(plain, on=on, limit=6))


def loses_the_thought(loaded):
    prompts = [first_prompt(loaded, text) for text in (ASK, "How many apples does Tom have?")]
    none = [Conversation()] * 2

    def turns(options):
        first = generate(loaded, none, prompts, Sampling(9), options)
        befores = [turn.conversation for turn in first]
        request = followup_prompt(loaded, AGAIN)
        requests = [without_repeated_eos(before, request) for before in befores]
        return first, generate(loaded, befores, requests, Sampling(9), options)

    kept, naive = turns(GenerateOptions(mark=True)), turns(GenerateOptions(reuse=False))
    for ours, theirs in zip(kept, naive, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.tokens, one.opening) == (other.tokens, other.opening)
            assert one.conversation.tokens == other.conversation.tokens
    for turn, after in zip(*kept, strict=True):
        # What is read for the second turn does not hold the first one's prompt again.
        assert after.prefilled < len(turn.conversation.tokens)
        ready = (*turn.conversation.tokens, *followup_prompt(loaded, AGAIN))
        assert rewind_to(after.conversation, ready).cache is not None


def test_a_template_that_is_not_understood_has_replies_without_thoughts_too(tmp_path):
    script = {ASK: Line("It is 3.", "#### 7")}
    with pytest.raises(UserError, match="is not understood"):
        scripted(tmp_path / "on", "odd", script, on=True)
    loaded = scripted(tmp_path / "off", "odd", script, on=False)
    [turn] = generate(loaded, [Conversation()], [first_prompt(loaded, ASK)], Sampling(40), PLAIN)
    assert (turn.text, turn.thought) == ("It is 3.", "#### 7")
    assert "7" not in loaded.tokenizer.decode(list(turn.tokens))
    assert tokens_in(turn.conversation.cache) == list(turn.conversation.tokens)


UNKNOWN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<ponder>\n' }}{% endif %}"
OTHERS = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize("tokens", [(), ("<think>", "</think>")])
def test_what_a_template_puts_before_a_new_reply_has_to_be_known(tmp_path, tokens):
    """Its thought would count as the reply, whatever numbers are in it."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in tokens])
    source = "{% for m in messages %}" + OTHERS + UNKNOWN
    make_model_dir(tmp_path / "m", tokenizer=tokenizer, chat_template=source)
    with pytest.raises(UserError, match=r"puts '<ponder>' before a new reply and not before an"):
        open_template(tmp_path / "m")
    # The same before every reply is how this model's turns begin.
    every = "('<ponder>\\n' if m.role == 'assistant' else '') + m.content"
    always = source.replace("m.content", every)
    make_model_dir(tmp_path / "n", tokenizer=tokenizer, chat_template=always)
    assert open_template(tmp_path / "n").source == always
