"""The OpenAI engine against servers in this process: one like vLLM, and ones that misbehave."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_fd import problems
from mlx_fd.errors import UserError
from mlx_fd.export.bundle import make_bundle
from mlx_fd.export.compare import Job, judged, report
from mlx_fd.export.engines import openai
from mlx_fd.export.engines.mlx import MlxEngine
from mlx_fd.export.engines.openai import OpenAIEngine
from mlx_fd.export.measures import coarse_kl, measure
from mlx_fd.export.wording import measured
from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve
from mlx_fd.report.comparison_page import report_folder, write_report


@pytest.fixture(scope="module")
def bundle():
    chosen = problems.load("arithmetic", "test").problems[:1]
    return make_bundle(load(resolve("tiny-student")), problems=chosen, seed=0, source={})


@pytest.fixture(scope="module")
def perturbed(bundle):
    """The bundle's model after a blow to its weights."""
    engine = MlxEngine(resolve("tiny-student"), bundle)
    model = engine._loaded.model
    mx.random.seed(0)
    model.update(tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape), model.parameters()))
    mx.eval(model.parameters())
    return engine


@contextmanager
def serving(answer):
    """A server on loopback: ``answer(method, path, headers, body)`` -> status, headers, bytes."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def _reply(self):
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            seen.append((self.command, self.path, dict(self.headers), body))
            status, headers, data = answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _reply

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_json(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


class Model:
    """A model behind a server, its logits computed beforehand: MLX stays in one thread."""

    def __init__(self, engine, bundle):
        self.engine, self.known = engine, {}
        self.vocab, self.eos = bundle.vocab, bundle.eos
        self.write(list(bundle.prompts[0].tokens[:8]))
        for prompt in bundle.prompts:
            # It is asked again after each divergence, and reads what the bundle has.
            begin = len(prompt.tokens)
            while begin < min(len(prompt.tokens) + 32, len(prompt.sequence)):
                written = self.write(list(prompt.sequence[:begin]))
                rest = prompt.sequence[begin:]
                same = [a == b for a, b in zip(written, rest, strict=False)]
                begin += (same.index(False) if False in same else len(same)) + 1

    def write(self, tokens):
        """What it goes on with, of 33 tokens at most."""
        written = list(self.engine.greedy(tokens, 33))
        logits = self.engine.logits([*tokens, *written], len(tokens) - 1).astype(np.float64)
        assert logits.argmax(-1).tolist() == written
        rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place, row in enumerate(rows):
            self.known[*tokens, *written[:place]] = row
        return written


def like_vllm(model, bundle, encode):
    """A server with ids, ``/tokenize``, streams, and 20 log-probabilities a token."""

    def complete(body):
        prompt = body["prompt"]
        tokens = list(prompt) if isinstance(prompt, list) else list(encode(prompt))
        written, top = [], []
        for _ in range(body["max_tokens"]):
            row = model.known[(*tokens, *written)]
            best = np.argsort(-row)[: body.get("logprobs") or 0].tolist()
            top.append({f"token_id:{t}": row[t] for t in best})
            written.append(int(row.argmax()))
            if written[-1] in bundle.eos:
                break
        return tokens, written, top

    def answer(method, path, body):
        if path == "/v1/models":
            return as_json({"data": [{"id": "student"}]})
        if path == "/tokenize":
            return as_json({"tokens": list(encode(body["prompt"])), "count": 1})
        assert path == "/v1/completions" and body["model"] == "student"
        assert body["temperature"] == 0 and body["repetition_penalty"] == 1
        tokens, written, top = complete(body)
        text = "".join(bundle.pieces.get(token, "?") for token in written)
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(written)}
        if body.get("stream"):
            chunks = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}]
            chunks.append({"choices": [], "usage": usage})
            lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
            return 200, {}, (lines + "data: [DONE]\n\n").encode()
        names = [f"token_id:{token}" for token in written]
        own = [row[name] for row, name in zip(top, names, strict=True)] if top[0] else []
        found = {"tokens": names, "token_logprobs": own, "top_logprobs": top} if top[0] else None
        return as_json({"choices": [{"text": text, "logprobs": found}], "usage": usage})

    return answer


def test_a_server_gives_the_numbers_that_its_logits_give(bundle, perturbed):
    """Asked again after every divergence, it is read at all positions of the continuations."""
    with serving(like_vllm(Model(perturbed, bundle), bundle, perturbed.encode)) as (url, seen):
        engine = OpenAIEngine(url, bundle)
        followed = {prompt.role: engine.score_continuation(prompt) for prompt in bundle.prompts}
        counts = [engine.count(prompt) for prompt in bundle.prompts]
    assert counts == [(True, "ids")] * 6
    parted = 0
    for prompt in bundle.prompts:
        found, local = followed[prompt.role], perturbed.score_continuation(prompt)
        own = np.arange(prompt.positions)[-len(prompt.greedy) :]
        rows = own[: len(found.rows)]
        np.testing.assert_array_equal(found.rows, rows)
        assert found.agreed == local.agreed
        parted += found.agreed < len(prompt.greedy)
        np.testing.assert_array_equal(found.top, local.top[rows])
        # Its 20 likeliest tokens are known, and no others.
        whole = perturbed.logits(prompt.sequence, prompt.begin).astype(np.float64)[rows]
        whole -= np.log(np.exp(whole).sum(-1, keepdims=True))
        shown = np.where(whole >= np.sort(whole, -1)[:, [-20]], whole, np.nan)
        wanted = np.take_along_axis(shown, prompt.top_ids[rows].astype(int), -1)
        np.testing.assert_allclose(found.logprobs, wanted, atol=1e-4)
        reference = prompt.top_logprobs[rows]
        np.testing.assert_allclose(
            coarse_kl(reference, found.logprobs), coarse_kl(reference, wanted), atol=1e-4
        )
    # What is tested needs continuations that part, and ones that are read to their end after it.
    assert parted >= 3
    assert sum(len(followed[p.role].rows) == len(p.greedy) for p in bundle.prompts) >= 4
    final = next(prompt for prompt in bundle.prompts if prompt.role == "final")
    assert followed["final"].timing.written == perturbed.score_continuation(final).timing.written
    assert [role for role in followed if followed[role].timing] == ["final"]
    assert max(len(body["prompt"]) for _, path, _, body in seen if path == "/v1/completions") > 200


def test_the_same_model_behind_a_server_is_the_same_model(bundle):
    same = MlxEngine(resolve("tiny-student"), bundle)
    with serving(like_vllm(Model(same, bundle), bundle, same.encode)) as (url, _):
        found = measure(OpenAIEngine(f"{url}/v1", bundle), bundle, (), lambda *done: None)
    continuations = sum(len(prompt.greedy) for prompt in bundle.prompts)
    assert found["kl"]["n"] == found["top1"]["agreeing"] == continuations
    assert found["greedy"]["agreeing"] == continuations and found["kl"]["mean"] < 1e-6
    assert found["perplexity"]["engine"] == pytest.approx(found["perplexity"]["reference"], 1e-5)
    assert found["speed"]["n"] == 1 and found["about"].endswith(", student")


def test_a_server_without_log_probabilities_is_compared_by_its_text(bundle):
    def answer(method, path, body):
        if path != "/v1/completions" or "logprobs" in body:
            return as_json({"error": {"message": "not here"}}, 400)
        if isinstance(body["prompt"], list):
            return as_json({"error": "prompt must be text"}, 422)
        prompt = next(p for p in bundle.prompts if p.text == body["prompt"])
        kept = prompt.greedy if prompt.role != "merge" else (*prompt.greedy[:3], 20, 20)
        kept = [t for t in kept if t not in bundle.eos][: body["max_tokens"]]
        return as_json({"choices": [{"text": "".join(bundle.pieces.get(t, "~") for t in kept)}]})

    with serving(answer) as (url, _):
        engine = OpenAIEngine(url, bundle)
        found = measure(engine, bundle, (), lambda *done: None)
    merge = next(prompt for prompt in bundle.prompts if prompt.role == "merge")
    lost = len(merge.greedy) - 3
    assert found["greedy"]["agreeing"] == found["greedy"]["n"] - lost
    assert found["greedy"]["first_divergence"] == 4
    assert found["kl"] == {"mean": None, "worst": None, "n": 0, "tokens": 0.0}
    assert found["perplexity"]["engine"] is None and found["tokenisation"]["n"] == 0
    assert found["missing"]["KL"] == "the server gives no log-probabilities"
    assert found["missing"]["speed"] == "the server does not stream"


def test_nothing_is_sent_where_a_redirect_leads(bundle, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda *request: as_json({})) as (other, seen_there):
        away = 307, {"Location": f"{other}/v1/completions"}, b""
        with (
            serving(lambda *request: away) as (url, seen),
            pytest.raises(UserError, match=f"redirects to {other}"),
        ):
            OpenAIEngine(url, bundle)
    assert seen_there == []
    assert seen[0][2]["Authorization"] == "Bearer secret"


def test_the_key_is_not_sent_in_the_clear(bundle, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = []

    def only_model(self):
        found.append(self)
        raise UserError("far enough")

    monkeypatch.setattr(OpenAIEngine, "_only_model", only_model)
    for url, sent in {
        "http://192.0.2.1:8000": False,
        "https://192.0.2.1": True,
        "http://localhost:1": True,
        "http://[::1]:1": True,
    }.items():
        with pytest.raises(UserError, match="far enough"):
            OpenAIEngine(url, bundle)
        assert ("Authorization" in found[-1]._headers) == sent
        assert ("API key" in found[-1].missing) == (not sent)


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://a", "http://", "http://u:p@host"])
def test_an_address_that_is_none_is_refused(bundle, url):
    with pytest.raises(UserError, match="give the server's address as"):
        OpenAIEngine(url, bundle)


def test_nobody_there(bundle):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"cannot be reached .*is it running there"):
        OpenAIEngine(f"http://127.0.0.1:{port}", bundle)


def test_a_server_that_does_not_answer_is_left_after_one_try(bundle):
    asked, release = [], threading.Event()

    def answer(method, path, body):
        asked.append(path)
        release.wait(10)
        return as_json({})

    with serving(answer) as (url, _):
        with pytest.raises(UserError, match=r"/v1/models: .* was not done within 0\.3 seconds"):
            OpenAIEngine(url, bundle, seconds=0.3)
        release.set()
    assert asked == ["/v1/models"]


def test_several_models_want_a_choice(bundle):
    models = as_json({"data": [{"id": "a"}, {"id": "b"}]})
    with (
        serving(lambda *request: models) as (url, _),
        pytest.raises(UserError, match="serves a, b: name one as openai:URL#MODEL"),
    ):
        OpenAIEngine(url, bundle)


BAD = {
    "no JSON": (200, {}, b"<html>"),
    "a list": (200, {}, b"[]"),
    "no choices": as_json({"choices": []}),
    "choices of nothing": as_json({"choices": [None]}),
    "text of nothing": as_json({"choices": [{}]}),
    "an error": as_json({"error": {"message": "out of memory"}}, 400),
    "an error that is a text": as_json({"error": "no such model"}, 404),
    "an error of bytes": (400, {}, b"\xff\xfe"),
    "deep": (200, {}, b"[" * 100_000),
}


@pytest.mark.parametrize("name", BAD)
def test_odd_responses_end_in_a_message(bundle, name):
    def answer(method, path, body):
        return as_json({"data": []}) if path == "/v1/models" else BAD[name]

    with serving(answer) as (url, _), pytest.raises(UserError) as caught:
        OpenAIEngine(url, bundle)
    assert url in str(caught.value)
    if name.startswith("an error"):
        assert "answers 40" in str(caught.value)


@pytest.mark.parametrize(
    "logprobs",
    [
        {"tokens": ["a"], "token_logprobs": [0.7], "top_logprobs": [{"a": 0.7}]},
        {"tokens": ["a"], "token_logprobs": ["x"], "top_logprobs": [None]},
        {"content": [{"token": "a"}]},
        {"content": [{"token": "a", "logprob": None, "top_logprobs": [{"logprob": "x"}]}]},
        {"content": 3},
        [],
        "text",
    ],
)
def test_log_probabilities_that_are_none_are_not_used(bundle, logprobs):
    def answer(method, path, body):
        if path != "/v1/completions":
            return as_json({}, 404)
        told = logprobs if body.get("logprobs") else None
        return as_json({"choices": [{"text": "a", "logprobs": told}]})

    with serving(answer) as (url, _):
        assert OpenAIEngine(url, bundle).missing["KL"] == "the server gives no log-probabilities"


@pytest.mark.parametrize(
    ("value", "reasons"),
    [
        (-9999.0, ["mean KL", "the perplexity is not finite"]),
        (-1e308, ["the mean KL is not finite", "the perplexity is not finite"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_server_that_says_minus_infinity_in_numbers_is_judged(bundle, tmp_path, value, reasons):
    """It writes the reference's tokens, and calls each of them all but impossible."""

    def answer(method, path, body):
        if path != "/v1/completions":
            return as_json({}, 404)
        asked, most = body["prompt"], body["max_tokens"]
        if isinstance(asked, str):
            counts = [len(p.tokens) for p in bundle.prompts if p.text == asked]
            choice = {"text": "1", "logprobs": None}
            return as_json({"choices": [choice], "usage": {"prompt_tokens": counts[0]}})
        sequence = next(
            p.sequence for p in bundle.prompts if p.sequence[: len(asked)] == tuple(asked)
        )
        names = [f"token_id:{token}" for token in sequence[len(asked) :][:most]]
        said = {
            "tokens": names,
            "token_logprobs": [value] * len(names),
            "top_logprobs": [{name: value} for name in names],
        }
        choice = {"text": "1", "logprobs": said if body.get("logprobs") else None}
        return as_json({"choices": [choice], "usage": {"prompt_tokens": len(asked)}})

    with serving(answer) as (url, _):
        measures = measure(OpenAIEngine(url, bundle), bundle, (), lambda done, total: None)
    job = Job("openai", url, tmp_path, bundle)
    row = judged(job, {"measures": measures})
    assert measures["greedy"]["agreeing"] == measures["greedy"]["n"]
    assert not row["parity"] and len(row["reasons"]) == 2
    for reason, text in zip(row["reasons"], reasons, strict=True):
        assert reason.startswith(text)
    with report_folder(tmp_path / "out"):
        write_report(report([job], [row]), tmp_path / "out")

    def refuse(constant):
        raise AssertionError(constant)

    written = (tmp_path / "out" / "compare.json").read_text()
    [again] = json.loads(written, parse_constant=refuse)["rows"]
    assert again["measures"]["perplexity"]["engine"] is None
    assert measured(again)["perplexity"] == "n/a"
    assert "perplexity is not finite" in (tmp_path / "out" / "compare.html").read_text()


def test_a_busy_server_is_asked_again(bundle, monkeypatch):
    monkeypatch.setattr(openai, "_PATIENCE", (0.01, 0.01))
    left = [2]

    def answer(method, path, body):
        if left[0]:
            left[0] -= 1
            return as_json({"error": "busy"}, 503)
        if path == "/v1/models":
            return as_json({"data": [{"id": "m"}]})
        return as_json({"choices": [{"text": "a"}], "usage": {"prompt_tokens": 8}})

    with serving(answer) as (url, seen):
        assert OpenAIEngine(url, bundle).about == f"{url}, m"
    assert [path for _, path, _, _ in seen[:3]] == ["/v1/models"] * 3


def test_a_response_that_breaks_off_is_no_traceback(bundle):
    def answer(method, path, body):
        if path == "/v1/models":
            return as_json({"data": []})
        return 200, {"Content-Length": "1000"}, b'{"choices"'

    with (
        serving(answer) as (url, _),
        pytest.raises(UserError, match=r"broke off|not JSON|cannot be reached"),
    ):
        OpenAIEngine(url, bundle)


def test_two_tokens_that_look_alike_are_not_told_apart(bundle):
    """A text that stands for two of the reference's tokens says nothing of either."""
    engine = OpenAIEngine.__new__(OpenAIEngine)
    engine.bundle = bundle
    one, two, three = list(bundle.pieces)[:3]
    pieces = {one: "x", two: "x", three: "y"}
    engine.bundle = type("Bundle", (), {"pieces": pieces})
    known = engine._known(openai._Step("x", {"x": -1.0, "y": -2.0}), [one, two, three])
    assert np.isnan(known[:2]).all() and known[2] == -2.0
    known = engine._known(openai._Step(one, {one: -1.0}), [one, two, three])
    assert known[0] == -1.0 and np.isnan(known[1:]).all()
