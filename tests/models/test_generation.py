import copy

import mlx.core as mx
import pytest
from mlx_lm import generate as mlx_generate
from mlx_lm.generate import generate_step

from mlx_fd.models.conversation import Conversation, forward, prefill, rewind, without_repeated_eos
from mlx_fd.models.generation import first_prompt, followup_prompt, generate
from mlx_fd.models.loading import load
from mlx_fd.models.writing import GenerateOptions, Sampling
from support.pairs import logits_of
from support.tiny import make_model_dir

MESSAGES = ["How many apples?", "Tom has 3 apples and buys 5 more apples.", "Why?"]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load(make_model_dir(folder / "m", arch=request.param, layers=3))


@pytest.fixture(scope="module")
def turns(loaded):
    prompts = [first_prompt(loaded, text) for text in MESSAGES]
    return generate(loaded, [Conversation()] * 3, prompts, Sampling(10))


def test_a_batch_writes_what_mlx_lm_writes_for_each_alone(loaded, turns):
    for text, turn in zip(MESSAGES, turns, strict=True):
        alone = mlx_generate(
            loaded.model,
            loaded.tokenizer,
            list(first_prompt(loaded, text)),
            max_tokens=10,
        )
        assert turn.text == alone.strip()


def test_conversation_holds_exactly_what_was_said(loaded, turns):
    for text, turn in zip(MESSAGES, turns, strict=True):
        tokens = turn.conversation.tokens
        assert tokens == (*first_prompt(loaded, text), *turn.tokens)
        assert all(layer.offset == len(tokens) for layer in turn.conversation.cache)
        assert turn.prefilled == len(tokens) - len(turn.tokens)


def test_going_on_from_the_cache_equals_prefilling_everything(loaded, turns):
    message = followup_prompt(loaded, "Are you sure?")
    before = [turn.conversation for turn in turns]
    prompts = [without_repeated_eos(conversation, message) for conversation in before]
    reused = generate(loaded, before, prompts, Sampling(8))
    naive = generate(loaded, before, prompts, Sampling(8), GenerateOptions(reuse=False))
    assert [turn.tokens for turn in reused] == [turn.tokens for turn in naive]
    assert all(turn.conversation.cache is None for turn in naive)
    assert [turn.prefilled for turn in reused] == [len(prompt) for prompt in prompts]
    assert [t.prefilled for t in naive] == [
        len(c.tokens) + len(p) for c, p in zip(before, prompts, strict=True)
    ]


def test_conversations_are_values(loaded, turns):
    message = followup_prompt(loaded, "Again?")
    before = turns[0].conversation
    kept = [(mx.array(layer.keys), layer.offset) for layer in copy.deepcopy(before.cache)]
    first = generate(loaded, [before], [without_repeated_eos(before, message)], Sampling(5))
    second = generate(loaded, [before], [without_repeated_eos(before, message)], Sampling(5))
    assert first[0].tokens == second[0].tokens
    for layer, (keys, offset) in zip(before.cache, kept, strict=True):
        assert layer.offset == offset
        assert mx.array_equal(layer.keys, keys)


def test_sampling_depends_on_its_seed_alone(loaded):
    prompts = [first_prompt(loaded, text) for text in MESSAGES]

    def draw(seed):
        mx.random.uniform(shape=(seed + 1,))
        found = generate(loaded, [Conversation()] * 3, prompts, Sampling(12, 1.0, 1.0, seed))
        return [turn.tokens for turn in found]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_repetition_penalty_sees_the_whole_conversation(loaded):
    prompt = first_prompt(loaded, MESSAGES[0])
    plain = generate(loaded, [Conversation()], [prompt], Sampling(12))[0]
    strong = generate(loaded, [Conversation()], [prompt], Sampling(12, 0.0, 50.0))[0]
    assert len(set(strong.tokens)) == len(strong.tokens)
    assert plain.tokens != strong.tokens


def test_next_message_continues_what_the_template_would_write(loaded):
    tokenizer = loaded.tokenizer
    said = tokenizer.encode("It is 8.", add_special_tokens=False)
    ours = [*first_prompt(loaded, "How many?"), *said, *followup_prompt(loaded, "Sure?")]
    whole = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "It is 8."},
            {"role": "user", "content": "Sure?"},
        ],
        add_generation_prompt=True,
    )
    assert ours == whole


def test_an_end_of_turn_is_not_said_twice(loaded):
    message = followup_prompt(loaded, "Sure?")
    end = message[0]
    assert end in loaded.tokenizer.eos_token_ids
    assert without_repeated_eos(Conversation((1, 2, end)), message) == message[1:]
    assert without_repeated_eos(Conversation((1, 2)), message) == message


def test_taps_give_the_models_own_logits_and_every_layer(loaded):
    tokens = mx.array([first_prompt(loaded, MESSAGES[1])])
    seen = loaded.view.forward(tokens)
    assert len(seen.layers) == len(loaded.model.layers) + 1
    assert mx.array_equal(seen.layers[0], loaded.model.model.embed_tokens(tokens))
    assert mx.array_equal(loaded.model.model.norm(seen.layers[-1]), seen.final)
    assert mx.allclose(logits_of(loaded.view, seen.final), loaded.model(tokens), atol=1e-5)
    assert type(loaded.model.layers[0]).__name__ == "TransformerBlock"


def test_prefill_run_on_and_rewind_agree_with_one_pass(loaded, turns):
    conversation = turns[1].conversation
    extra = [5, 6, 7, 8]
    whole = loaded.view.forward(mx.array([[*conversation.tokens, *extra]]))
    for before in (conversation, Conversation(conversation.tokens)):
        seen = forward(loaded, before, extra)
        assert mx.allclose(seen.final, whole.final[:, -4:], atol=1e-4)
        assert all(
            mx.allclose(a, b[:, -4:], atol=1e-4)
            for a, b in zip(seen.layers, whole.layers, strict=True)
        )
    for old in (conversation, Conversation(conversation.tokens)):
        hidden, before = prefill(loaded, old, extra)
        assert mx.allclose(hidden, whole.final[0, -1], atol=1e-4)
        assert before.tokens == (*conversation.tokens, *extra[:-1])
    short = rewind(conversation, 4)
    assert short.tokens == conversation.tokens[:4] and short.cache[0].offset == 4
    assert conversation.cache[0].offset == len(conversation.tokens)


def test_stops_at_the_models_own_end(tmp_path):
    loaded = load(make_model_dir(tmp_path / "m", arch="llama"))
    prompt = first_prompt(loaded, "Hi")
    stream = generate_step(mx.array(prompt), loaded.model, max_tokens=6)
    tokens = [int(token) for token, _ in stream]
    loaded.tokenizer.add_eos_token(str(tokens[3]))
    turn = generate(loaded, [Conversation()], [prompt], Sampling(6))[0]
    place = tokens.index(tokens[3])
    assert turn.finished
    assert list(turn.tokens) == tokens[: place + 1]
    assert turn.text == loaded.tokenizer.decode(tokens[:place]).strip()


def test_nothing_to_say():
    assert generate(None, [], [], Sampling(1)) == []
