"""Servers that misbehave on purpose: every exchange ends, in time and in size, and shows nothing.

They speak through bare sockets on loopback, so that they can do what no HTTP library does.
"""

import contextlib
import itertools
import json
import random
import socket
import threading
import time

import pytest

from mlx_fd import problems
from mlx_fd.cli.terminal.comparison import print_comparison
from mlx_fd.errors import UserError
from mlx_fd.export import compare
from mlx_fd.export.bundle import make_bundle
from mlx_fd.export.compare import Job, judged, plan, report
from mlx_fd.export.engines import openai
from mlx_fd.export.engines.address import parse_address, without_secrets
from mlx_fd.export.engines.openai import OpenAIEngine
from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve
from mlx_fd.report.comparison_page import page, report_folder, write_report

DEADLINE = 0.6
PATIENCE = 20.0  # of a test on a busy machine; without a deadline these servers take for ever


@pytest.fixture(scope="module")
def bundle():
    chosen = problems.load("arithmetic", "test").problems[:1]
    return make_bundle(load(resolve("tiny-student")), problems=chosen, seed=0, source={})


@contextlib.contextmanager
def bare_server(speak):
    """``speak(send, head, body)`` is called with each request; ``send`` fails when all is over."""
    listening = socket.create_server(("127.0.0.1", 0))
    over, threads = threading.Event(), []

    def talk(connection):
        with connection, contextlib.suppress(OSError, ValueError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65536)
            head, _, body = received.partition(b"\r\n\r\n")
            sizes = [
                x.split(b":")[1] for x in head.split(b"\r\n") if b"content-length" in x.lower()
            ]
            while sizes and len(body) < int(sizes[0]):
                body += connection.recv(65536)

            def send(data, wait=0.0):
                if over.wait(wait):
                    raise OSError("the test is over")
                connection.sendall(data)

            speak(send, head, json.loads(body) if body else None)

    def accept():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=talk, args=(connection,), daemon=True))
            threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        over.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for thread in (accepting, *threads):
            thread.join(5)


def as_json(value, status="200 OK"):
    data = json.dumps(value).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(data), data)


def dripping(send, data):
    for byte in itertools.cycle(data):
        send(bytes([byte]), 0.02)


def silent(send):
    send(b"", PATIENCE)


def endless_continue(send):
    while True:
        send(b"HTTP/1.1 100 Continue\r\n\r\n", 0.02)


def dripped_status(send):
    dripping(send, b"H")


def dripped_headers(send):
    send(b"HTTP/1.1 200 OK\r\n")
    dripping(send, b"X")


def dripped_body(send):
    send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    dripping(send, b" ")


def dripped_chunks(send):
    send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        send(b"1\r\n \r\n", 0.02)


def dripped_refusal(send):
    send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    dripping(send, b" ")


def busy_for_ever(send):
    send(as_json({}, "503 Busy"), 0.1)


@pytest.mark.parametrize(
    "misbehave",
    [silent, endless_continue, dripped_status, dripped_headers, dripped_body, dripped_chunks,
     dripped_refusal, busy_for_ever],
)  # fmt: skip
def test_an_exchange_ends_in_time(bundle, misbehave):
    begin = time.monotonic()
    with (
        bare_server(lambda send, head, body: misbehave(send)) as url,
        pytest.raises(UserError, match=r"/v1/models: .* was not done within 0\.6 seconds"),
    ):
        OpenAIEngine(url, bundle, seconds=DEADLINE)
    assert DEADLINE <= time.monotonic() - begin < PATIENCE


def test_a_stream_ends_in_time(bundle):
    """It sends a token now and then, as a server does; only not so slowly, and never the last."""

    def speak(send, head, body):
        if body is None:
            send(as_json({"data": [{"id": "m"}]}))
        elif body.get("stream"):
            send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
            while True:
                send(b'data: {"choices": [{"text": "a"}]}\n\n', 0.02)
        else:
            send(as_json({"choices": [{"text": "a"}], "usage": {"prompt_tokens": 8}}))

    with bare_server(speak) as url:
        engine = OpenAIEngine(url, bundle, seconds=PATIENCE)
        engine._seconds = DEADLINE
        final = next(prompt for prompt in bundle.prompts if prompt.role == "final")
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"/v1/completions: .* not done within 0\.6 seconds"):
            engine.score_continuation(final)
        assert time.monotonic() - begin < PATIENCE


def flood(send, head, unit):
    send(head)
    while True:
        send(unit * 1000)


FLOODS = {
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "a body of a petabyte": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000000\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffff\r\n", b"x"),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_an_exchange_ends_in_size(bundle, monkeypatch, name):
    monkeypatch.setattr(openai, "_LARGEST", 1 << 18)
    # The list of models may be missing; the completions may not.
    with (
        bare_server(lambda send, head, body: flood(send, *FLOODS[name])) as url,
        pytest.raises(UserError, match=r"/v1/completions: the response is above 0\.25 MiB"),
    ):
        OpenAIEngine(url, bundle, seconds=300)


ODD = {
    "a chunk of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
    "a chunk of a word": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n",
    "no HTTP": b"\x1b[2Jhello\r\n\r\n",
    "a long line": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "a length below 0": b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n{}",
    "a status that is none": b"HTTP/1.1 999999 OK\r\n\r\n",
    "a redirect to no URL": b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
    "a redirect to a file": b"HTTP/1.1 307 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
    "a redirect to nowhere": b"HTTP/1.1 301 Found\r\n\r\n",
    "a body in Latin-1": b'HTTP/1.1 200 OK\r\n\r\n"\xe4"',
    "steering": b"HTTP/1.1 400 \x1b]0;title\x07\r\n\r\n\x1b[2J\x9b31m",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_responses_are_one_sentence(bundle, monkeypatch, name):
    monkeypatch.setattr(openai, "_PATIENCE", (0.01, 0.01))
    with (
        bare_server(lambda send, head, body: send(ODD[name])) as url,
        pytest.raises(UserError) as caught,
    ):
        OpenAIEngine(url, bundle, seconds=PATIENCE)
    assert url in str(caught.value) and str(caught.value).isprintable()


JUNK = [None, True, -1, 0, 3, 1e999, -1e999, 10**400, "", "a", "\ud800", "\x1b[2J", [], {}, [None],
        {"id": 1}, [[1]], "token_id:7", "token_id:" + "7" * 5000, -0.5, "-0.5"]  # fmt: skip
NAMES = ["choices", "text", "logprobs", "usage", "prompt_tokens", "tokens", "token_logprobs", "id",
         "top_logprobs", "content", "token", "logprob", "data", "error", "message"]  # fmt: skip


def junk(rng, depth=0):
    if depth > 4 or rng.random() < 0.4:
        return rng.choice(JUNK)
    if rng.random() < 0.4:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {name: junk(rng, depth + 1) for name in rng.sample(NAMES, rng.randrange(6))}


def test_replies_of_any_shape_are_read_or_refused(bundle):
    """Seeded: half of them have a completion's outline, so that what is inside is looked at."""
    rng = random.Random(0)
    replies, outcomes = [], []

    def reply(body):
        if body is None and rng.random() < 0.7:
            return {"data": []}
        if rng.random() < 0.7:
            text = junk(rng) if rng.random() < 0.3 else "a"
            return {"choices": [{"text": text, "logprobs": junk(rng)}], "usage": junk(rng)}
        return junk(rng)

    def speak(send, head, body):
        replies.append(reply(body))
        if body and body.get("stream"):
            send(b"HTTP/1.1 200 OK\r\n\r\ndata: %s\n\n" % json.dumps(replies[-1]).encode())
        else:
            send(as_json(replies[-1]))

    final = next(prompt for prompt in bundle.prompts if prompt.role == "final")
    with bare_server(speak) as url:
        while len(replies) < 600:
            try:
                engine = OpenAIEngine(url, bundle, seconds=PATIENCE)
                engine.count(final)
                engine.score_continuation(final)
                engine.answer("1", 4)
                outcomes.append("read")
            except UserError as error:
                assert url in str(error) and str(error).isprintable()
                outcomes.append("refused")
    assert {"read", "refused"} == set(outcomes)


# ------------------------------------------------------------------------------------- secrets

SECRET = "sk-S3CRET"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://gpu-box:8000/v1#model", "http://gpu-box:8000/v1#model"),
        ("http://gpu-box:8000#model@001", "http://gpu-box:8000#model@001"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        (f"http://user:{SECRET}@host/v1", "http://***@host/v1"),
        (f"http://{SECRET}@host:1/v1#m", "http://***@host:1/v1#m"),
        (f"http://user:{SECRET}#x@host/v1", "http://***@host/v1"),
        (f"http://user:{SECRET}?x/y@host/v1", "http://***@host/v1"),
        (f"http://user:{SECRET}@else@host/v1", "http://***@host/v1"),
        (f"https://host/v1?api_key={SECRET}", "https://host/v1?***"),
        (f"https://host/v1?a=1&api_key={SECRET}#m", "https://host/v1?***#m"),
        (f"user:{SECRET}@host:80", "***@host:80"),
        ("http://host/\x1b[2J", "http://host/\ufffd[2J"),
        ("", ""),
    ],
)
def test_what_of_an_address_is_shown(url, shown):
    assert without_secrets(url) == shown


@pytest.mark.parametrize(
    "address",
    [
        f"http://user:{SECRET}@host/v1",
        f"http://{SECRET}@host",
        f"https://host?api_key={SECRET}",
        f"https://host/v1?api_key={SECRET}#m",
        f"user:{SECRET}@host",
        f"http://u:{SECRET}@",
        f"http://u:{SECRET}@host:x",
    ],
)
def test_an_address_with_a_secret_is_refused_and_the_secret_is_not_repeated(bundle, address):
    for engine in (f"openai:{address}", f"opnai:{address}"):
        with pytest.raises(UserError) as caught:
            plan([], [engine])
        assert SECRET not in str(caught.value) and "--engine " in str(caught.value)
    with pytest.raises(UserError, match="without a password or a query") as caught:
        OpenAIEngine(address, bundle)
    assert SECRET not in str(caught.value)


def test_no_secret_reaches_a_report(bundle, tmp_path, capsys):
    from rich.console import Console

    address = f"http://user:{SECRET}@127.0.0.1:1/v1?api_key={SECRET}"
    job = Job("openai", address, tmp_path, bundle)
    progress = []
    row = judged(job, compare.run(job, (), lambda *told: progress.append(told)))
    found = report([job], [row])
    with report_folder(tmp_path / "out"):
        write_report(found, tmp_path / "out")
    print_comparison([row], Console())
    written = [(tmp_path / "out" / name).read_text() for name in ("compare.json", "compare.html")]
    for text in (*written, capsys.readouterr().out, str(progress)):
        assert SECRET not in text
    assert all("127.0.0.1" in text for text in written)
    assert "could not be compared" in written[1]


def test_an_address_is_taken_apart():
    found = parse_address("https://host:8000/some/path/v1/#model")
    assert (found.root, found.host) == ("https://host:8000/some/path", "host")
    assert (found.scheme, found.model) == ("https", "model")
    for bad in ("http://host:x", "http://host:99999", "http://[", "host:80", "http://host?x"):
        with pytest.raises(UserError, match="give the server's address"):
            parse_address(bad)


def test_a_key_that_a_server_says_back_is_not_shown(bundle, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    def speak(send, head, body):
        assert SECRET.encode() in head
        send(as_json({"error": {"message": f"wrong key {SECRET}\x1b[2J"}}, "401 No"))

    with bare_server(speak) as url, pytest.raises(UserError) as caught:
        OpenAIEngine(url, bundle, seconds=PATIENCE)
    assert "answers 401: wrong key ***\ufffd[2J" in str(caught.value)


def test_a_redirect_says_where_to_without_its_key(bundle):
    away = f"HTTP/1.1 307 Away\r\nLocation: http://u:{SECRET}@a/b?key={SECRET}\r\n\r\n".encode()
    with (
        bare_server(lambda send, head, body: send(away)) as url,
        pytest.raises(UserError, match=r"redirects to http://\*\*\*@a/b\?\*\*\*; name"),
    ):
        OpenAIEngine(url, bundle, seconds=PATIENCE)


def test_what_a_server_calls_its_model_cannot_steer(bundle, tmp_path):
    """An escape sequence in a terminal, a lone surrogate in a file."""
    name = "a\x1b[2J\ud800<b>"

    def speak(send, head, body):
        if body is None:
            send(as_json({"data": [{"id": name}]}))
        else:
            assert body.get("model") == name
            send(as_json({"choices": [{"text": "a"}], "usage": {"prompt_tokens": 8}}))

    with bare_server(speak) as url:
        engine = OpenAIEngine(url, bundle, seconds=PATIENCE)
    assert engine.about == f"{url}, a\ufffd[2J\ufffd<b>"
    source = {"path": name}
    shown = page(
        {"parity": True, "rows": [], "bundles": {"x": {"prompts": 1, "positions": 1, "items": 1,
         "reference": source, "versions": {}, "source": source}}}
    )  # fmt: skip
    assert "\x1b" not in shown and shown.encode()
