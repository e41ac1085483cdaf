"""Chats, prompts, instructions: problems without gold, unless their replies say what is right."""

import json

import pytest

from mlx_fd.errors import UserError
from mlx_fd.problems import load

USER = {"role": "user", "content": "And of Italy?"}
RICH = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris."},
    USER,
]
ASKED = (
    "Be brief.\n\nThe conversation so far:\n\nUser: The capital of France?\n\nAssistant: Paris.\n\n"
    "The next message, which is to be answered:\n\nAnd of Italy?"
)
REPLY = {"role": "assistant", "content": "Rome."}


def only(tmp_path, *rows, **options):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load(str(path), **options).problems


@pytest.mark.parametrize(
    ("row", "question", "solution"),
    [
        pytest.param({"messages": RICH}, ASKED, "", id="the user has the last word"),
        pytest.param({"messages": [*RICH, REPLY]}, ASKED, "Rome.", id="several turns"),
        pytest.param({"messages": [USER, REPLY]}, "And of Italy?", "Rome.", id="mlx-lm chat"),
        pytest.param(
            {"prompt": "Say hi.", "completion": "Hi!"}, "Say hi.", "Hi!", id="mlx-lm completions",
        ),
        pytest.param({"prompt": [USER], "completion": [REPLY]}, "And of Italy?", "Rome.", id="TRL"),
        pytest.param(
            {"prompt": "And of Italy?", "prompt_id": "p1", "messages": [USER, REPLY]},
            "And of Italy?", "Rome.", id="UltraChat",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]},
            "Hi.", "", id="parts",
        ),
        pytest.param({"prompt": "Tell a joke."}, "Tell a joke.", "", id="prompts alone"),
        pytest.param({"prompt": "Joke?", "source": "web", "id": 3}, "Joke?", "", id="with an id"),
        pytest.param(
            {"instruction": "Name a colour.", "input": "", "output": "Red."},
            "Name a colour.", "Red.", id="Alpaca",
        ),
        pytest.param(
            {"instruction": "Draw a cat.", "input": None, "output": ""}, "Draw a cat.", "",
            id="Alpaca without an output",
        ),
        pytest.param(
            {"instruction": "Sum it up.", "input": "It rains.", "output": "Rain."},
            "It rains.\n\nSum it up.", "Rain.", id="Alpaca with an input",
        ),
    ],
)  # fmt: skip
def test_published_shapes(tmp_path, row, question, solution):
    (problem,) = only(tmp_path, row)
    assert (problem.kind, problem.answer) == ("none", "")
    assert (problem.question, problem.solution) == (question, solution)


def test_a_reply_that_says_what_is_right_is_gold(tmp_path):
    solved = {"role": "assistant", "content": "3 + 5 = 8\n#### 8"}
    (problem,) = only(tmp_path, {"messages": [{"role": "user", "content": "3 + 5?"}, solved]})
    assert (problem.kind, problem.answer, problem.solution) == ("number", "8", "3 + 5 = 8\n#### 8")
    (problem,) = only(tmp_path, {"instruction": "What is x?", "output": r"So \boxed{\sqrt{2}}."})
    assert (problem.kind, problem.answer) == ("math", r"\sqrt{2}")
    (problem,) = only(tmp_path, {"messages": [USER, REPLY]}, kind="text")
    assert (problem.kind, problem.answer) == ("text", "Rome.")
    with pytest.raises(UserError, match="no 'answer'"):
        only(tmp_path, {"messages": [USER]}, kind="text")


def test_longer_answers_are_not_compared_word_by_word(tmp_path):
    essay = "Rain falls because the air cools. " * 20
    (problem,) = only(tmp_path, {"question": "Why does it rain?", "answer": essay})
    assert (problem.kind, problem.solution) == ("none", essay)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [REPLY]}, "a chat without a message of the user"),
        ({"messages": [USER, USER | {"role": "tool"}]}, r"has a message of a tool \('tool'\)"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "has tools; mlx-fd reads text"),
        ({"messages": [{"by": "human", "value": "?"}]}, "not of 'role' and 'content'"),
        ({"messages": ["user"]}, "not of 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "a message is not text but NoneType"),
        ({"messages": [{"role": "user", "content": " "}]}, "the user's last message is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"a message has a part that is not text \('image'\)",
        ),
        ({"messages": [USER, REPLY], "image_1": "x.png"}, "has an image"),
    ],
)
def test_more_than_texts_is_refused(tmp_path, row, reason):
    with pytest.raises(UserError, match=reason):
        only(tmp_path, row)


def test_answers_in_an_unknown_column_are_not_passed_over(tmp_path):
    row = {"question": "3 + 5?", "result": "8"}
    with pytest.raises(UserError, match=r"columns that are not read are there: 'result'"):
        only(tmp_path, row)
    assert only(tmp_path, row, kind="none")[0].kind == "none"
    assert only(tmp_path, row, columns="answer=result")[0].answer == "8"


def test_empty_answers_are_missing_and_no_prompts(tmp_path):
    row = {"question": "3 + 5?", "answer": None}
    with pytest.raises(UserError, match=r"no 'answer'\n.*--answer-kind none is without answers"):
        only(tmp_path, row)
    assert only(tmp_path, row, kind="none")[0].kind == "none"


def test_a_chat_in_a_column_of_another_name(tmp_path):
    (problem,) = only(tmp_path, {"turns": [USER, REPLY]}, columns="question=turns")
    assert (problem.question, problem.solution) == ("And of Italy?", "Rome.")
