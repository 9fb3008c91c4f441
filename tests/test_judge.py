"""judge.py: files in the tools' formats, a judge that is scripted, and statistics against known truths."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import judge
from common import load_reward_model, reward_scores
from plumbing.data import split_of
from plumbing.endpoint import LONGEST
from plumbing.errors import BadInput
from conftest import feedback_rows, write_jsonl

KEY = "sk-secret-0123456789"


# ---- question files, in the shapes of the tools' own ----

ALPACA = [{"dataset": "d", "instruction": f"is thing{i} red ?", "output": "no .", "generator": "base"}
          for i in range(7)]
ARENA = [{"uid": f"u{i}", "category": "arena-hard-v0.1", "cluster": "c", "prompt": f"is thing{i} blue ?"}
         for i in range(5)]
MT = [{"question_id": 81 + i, "category": category, "turns": [f"is thing{i} red ?", "is it not blue ?"]}
      for i, category in enumerate(("writing", "math", "stem"))]
QUESTIONS = {"alpaca_eval": ALPACA, "arena_hard": ARENA, "mt_bench": MT}


def question_file(kind, folder):
    if kind == "alpaca_eval":
        (folder / "questions.json").write_text(json.dumps(ALPACA))
        return folder / "questions.json"
    return Path(write_jsonl(folder / "questions.jsonl", QUESTIONS[kind]))


def generate_to(out, kind, folder, model, *more):
    judge.main([str(word) for word in ("generate", "--policy", model, "--name", "ours", "--questions",
                                       question_file(kind, folder), "--out", out, "--dtype", "float32",
                                       "--response_length", 8, "--micro_batch", 2, *more)])
    return json.loads(out.read_text()) if kind == "alpaca_eval" else list(map(json.loads, out.open()))


def types_of(value):
    """The nested names and types of a JSON value; of a list those of its first element."""
    if isinstance(value, dict):
        return {name: types_of(part) for name, part in value.items()}
    return [types_of(value[0])] if isinstance(value, list) else type(value)


COUNTS = {"header_count": {f"h{i}": int for i in range(1, 7)},
          "list_count": {"ordered": int, "unordered": int}, "bold_count": {"**": int, "__": int}}
SCHEMAS = {
    "alpaca_eval": {"dataset": str, "instruction": str, "output": str, "generator": str},
    "arena_hard": {"uid": str, "ans_id": str, "model": str, "messages": [{"role": str, "content": str}],
                   "tstamp": float, "metadata": {"token_len": int, **COUNTS}},
    "mt_bench": {"question_id": int, "answer_id": str, "model_id": str,
                 "choices": [{"index": int, "turns": [str]}], "tstamp": float}}


@pytest.mark.parametrize("kind", list(QUESTIONS))
def test_answers_have_the_tools_format(kind, chain, tmp_path):
    """Every question, in order, its text verbatim, every field of the tool's own files and no other."""
    ending = "json" if kind == "alpaca_eval" else "jsonl"
    rows = generate_to(tmp_path / f"out.{ending}", kind, tmp_path, chain.sft)
    assert [types_of(row) for row in rows] == [SCHEMAS[kind]] * len(QUESTIONS[kind])
    if kind == "alpaca_eval":
        assert [row["instruction"] for row in rows] == [row["instruction"] for row in ALPACA]
        assert {row["generator"] for row in rows} == {"ours"}
    elif kind == "arena_hard":
        assert [(row["uid"], row["messages"][0]["content"]) for row in rows] == [
            (row["uid"], row["prompt"]) for row in ARENA]
        assert all(row["messages"][1]["role"] == "assistant" and isinstance(
            row["messages"][1]["content"]["answer"], str) for row in rows)
    else:
        assert [row["question_id"] for row in rows] == [81, 82, 83]
        assert all(len(row["choices"][0]["turns"]) == 2 for row in rows)
    settings = json.loads(next(tmp_path.glob("out.*settings.json")).read_text())
    assert settings["response_length"] == 8 and settings["kind"] == kind
    assert not list(tmp_path.glob("*partial*"))


def test_held_out_prompts_are_questions_too(chain, data, tmp_path):
    judge.main(["generate", "--policy", str(chain.sft), "--data", data, "--split_seed", "0", "--out",
                str(tmp_path / "out.jsonl"), "--dtype", "float32", "--response_length", "8"])
    asked = {row["messages"][0]["content"] for row in map(json.loads, (tmp_path / "out.jsonl").open())}
    held_out = {row["instruction"] for row in feedback_rows() if split_of(row["instruction"], 0) == "test"}
    assert asked == held_out != set()


def test_the_second_turn_sees_the_first_answer_and_categories_their_temperature(chain, tmp_path, monkeypatch):
    """MT-Bench: 0.7 for writing, greedy for math, 0.1 for stem."""
    seen, real = [], judge.generate

    def noting(policy, prompts, seeds, length, temperature, tokenizer, *args, **kwargs):
        answers = real(policy, prompts, seeds, length, temperature, tokenizer, *args, **kwargs)
        seen.extend((temperature, tokenizer.decode(p), tokenizer.decode(a, skip_special_tokens=True).strip())
                    for p, a in zip(prompts, answers))
        return answers
    monkeypatch.setattr(judge, "generate", noting)
    rows = generate_to(tmp_path / "out.jsonl", "mt_bench", tmp_path, chain.sft)
    assert sorted({temperature for temperature, _, _ in seen}) == [0.0, 0.1, 0.7] and len(seen) == 6
    for question, row in zip(MT, rows):
        first, second = row["choices"][0]["turns"]
        prompts = [prompt for _, prompt, answer in seen
                   if question["turns"][0] in prompt and answer == second]
        assert any(first in prompt and question["turns"][1] in prompt for prompt in prompts)


def test_interrupted_answers_go_on(chain, tmp_path, monkeypatch):
    """Cut in the middle, a half line at the end: the same command gives the file of a straight run, and asks
    for nothing twice. Other settings are refused."""
    (tmp_path / "a").mkdir()
    straight = generate_to(tmp_path / "a/out.json", "alpaca_eval", tmp_path, chain.sft, "--temperature", 1)
    real, calls = judge.generate, []

    def cut(policy, prompts, *args, **kwargs):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(policy, prompts, *args, **kwargs)
    monkeypatch.setattr(judge, "generate", cut)
    again = lambda *more: generate_to(tmp_path / "out.json", "alpaca_eval", tmp_path, chain.sft,
                                      "--temperature", 1, *more)
    with pytest.raises(KeyboardInterrupt):
        again()
    with open(tmp_path / "out.json.partial.jsonl", "a") as f:
        f.write('{"id": ')
    with pytest.raises(BadInput, match="other settings .seed"):
        again("--seed", 2)
    assert again() == straight and sum(calls) == 7 + 2  # the batch that was cut is sampled again
    again()
    assert sum(calls) == 9


def test_a_prompt_that_fills_the_context(chain, tmp_path, capsys):
    """It still has its row, because the tools want every question, and is counted."""
    rows = [{"instruction": text} for text in ("is it red ? " * 60, "is it red ? " * 30, "is it ?")]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    judge.main(["generate", "--policy", str(chain.sft), "--questions", str(tmp_path / "q.json"), "--out",
                str(tmp_path / "o.json"), "--dtype", "float32", "--response_length", "10"])
    answers = json.loads((tmp_path / "o.json").read_text())
    assert [row["instruction"] for row in answers] == [row["instruction"] for row in rows]
    assert answers[0]["output"] == "" and "2 of them had less room" in capsys.readouterr().out


# ---- a scripted endpoint ----

class Server:
    """An OpenAI-compatible endpoint. `script(number of the call, messages)` gives a text, a status, seconds
    to wait before an answer, or a function of the handler that answers by itself."""

    def __init__(self, script):
        server = self
        self.calls, self.headers, self.lock = [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.calls.append(body)
                    server.headers.append(self.headers["Authorization"])
                    said = script(len(server.calls), body["messages"])
                if callable(said):
                    with contextlib.suppress(OSError):
                        said(self)
                    return
                if isinstance(said, float):
                    time.sleep(said)
                    said = "late [[A]]"
                status, text = (said, f"error for {KEY}") if isinstance(said, int) else (200, said)
                content = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
                reply = json.dumps(content if status == 200 else {"error": {"message": text}}).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(reply)))
                    self.end_headers()
                    self.wfile.write(reply)
                except OSError:  # the client did not wait
                    pass

            def log_message(self, *args):
                pass
        ThreadingHTTPServer.request_queue_size = 64  # else some of eight requests at once wait for a second
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve():
    servers = []

    def make(script):
        servers.append(Server(script))
        return servers[-1]
    yield make
    for server in servers:
        server.http.shutdown()


def alpaca(path, name, texts):
    path.write_text(json.dumps([{"instruction": f"question {i}", "output": text, "generator": name}
                                for i, text in enumerate(texts)]))
    return f"{name}={path}"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(judge, "time", SimpleNamespace(time=time.time, sleep=lambda seconds: None))
    return [alpaca(tmp_path / "a.json", "ours", [f"good {i}" for i in range(6)]),
            alpaca(tmp_path / "b.json", "theirs", [f"bad {i}" for i in range(6)])]


def ask(server, files, *more, mode="pair"):
    judge.main(["judge", "--answers", files[0], "--against", files[1], "--mode", mode,
                "--judge_url", server.url, "--judge_model", "m", "--json", "result.json", *map(str, more)])
    return json.loads(Path("result.json").read_text())


def likes_good(number, messages):
    """[[A]] or [[B]], whichever is good."""
    first, second = messages[-1]["content"].index("good"), messages[-1]["content"].index("bad")
    return "[[A]]" if first < second else "[[B]]"


def test_all_answers_are_good(files, serve):
    server = serve(likes_good)
    result = ask(server, files)["policies"]["ours"]
    assert (result["win_rate"], result["low"], result["high"], result["n"]) == (1.0, 1.0, 1.0, 6)
    assert result["position"] == {"first_wins": 0.5, "orders_agree": 1.0} and len(server.calls) == 12
    assert set(server.headers) == {f"Bearer {KEY}"} and server.calls[0]["temperature"] == 0


def test_unparsable_slow_429_and_500(files, serve, tmp_path, capsys):
    """Retried where that helps, counted apart where not; nothing guessed or asked twice, the key nowhere."""
    def script(number, messages):
        content = messages[-1]["content"]
        if number in (1, 4):
            return 429
        if number in (2, 6, 7):
            return 500
        if number == 9:
            return 3.0  # longer than --timeout
        if "question 1" in content:
            return "I cannot decide."
        if "question 2" in content:
            return 400
        return likes_good(number, messages)
    server = serve(script)
    result = ask(server, files, "--timeout", 1.5, "--parallel", 1)
    ours = result["policies"]["ours"]
    assert (result["requests"], result["unread"], result["failed"]) == (12, 2, 2)
    assert (ours["n"], ours["left_out"], ours["win_rate"]) == (4, 2, 1.0)
    assert len(server.calls) == 12 + 6  # the six that were asked again
    before, text = len(server.calls), capsys.readouterr().out
    assert KEY not in text and "2 requests failed" in text and "***" in text
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())
    again = ask(server, files)
    assert len(server.calls) == before + 2 and again["policies"] == result["policies"]  # the two 400 only


def ask_until(verdicts, monkeypatch, server, files, *more):
    """Ctrl-C meets the judge when it has kept so many verdicts."""
    straight, seen = judge.ask_endpoint, []

    def dies(todo, ask, parallel, keep):
        def keep_and_die(key, text):
            keep(key, text)
            seen.append(key)
            if len(seen) == verdicts:
                raise KeyboardInterrupt
        return straight(todo, ask, parallel, keep_and_die)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(judge, "ask_endpoint", dies)
        ask(server, files, *more)


def test_nothing_is_lost_or_asked_twice_after_a_kill(files, serve, monkeypatch):
    server = serve(likes_good)
    ask_until(5, monkeypatch, server, files, "--parallel", 1)
    with open("verdicts.jsonl", "a") as f:
        f.write('{"key": "cut sh')
    assert 5 <= len(server.calls) < 12
    assert ask(server, files, "--parallel", 1)["policies"]["ours"]["n"] == 6
    ask(server, files)
    assert len(server.calls) == 12


def test_what_is_under_way_when_the_judge_ends_is_kept(files, serve, monkeypatch):
    """Eight requests at a time; the third verdict meets Ctrl-C: the others that were asked are paid for, so
    kept, and not asked again."""
    server = serve(lambda number, messages: 0.3 if number > 3 else likes_good(number, messages))
    ask_until(3, monkeypatch, server, files)
    asked = len(server.calls)
    assert 3 < asked <= 12 and len(Path("verdicts.jsonl").read_text().splitlines()) == asked
    ask(server, files)
    assert len(server.calls) == 12


def test_a_key_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    endpoint = judge.Endpoint(judge.Args(judge_url="http://127.0.0.1:1/v1"))
    for n in range(150, 210):
        assert "sk-" not in endpoint.without_key("p" * n + KEY)


# ---- a server that is out of order, or hostile ----

def reply(body, status=200, **headers):
    """A handler's answer of these bytes."""
    def answer(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
    return answer


def content(said):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()


def drips(handler):
    """Headers or a reply that never ends, a byte in a tenth of a second: no single read takes long."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def drips_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.1)


def first_then_good(said):
    """The first request of question 0 is answered by this again and again, the others by a good judge."""
    return lambda number, messages: said if "question 0" in messages[-1]["content"] else likes_good(
        number, messages)


@pytest.mark.parametrize("said", [[{"type": "text", "text": "[[A]]"}], [["A"]], [[7]], None, 7, {}, True])
def test_a_reply_without_text_is_unread(said, files, serve):
    """Paid for, kept, and no question for a later run; [[7]] as JSON is no grade."""
    server = serve(first_then_good(reply(content(said))))
    for _ in range(2):
        result = ask(server, files, "--parallel", 1)
        assert (result["unread"], result["failed"], result["policies"]["ours"]["n"]) == (2, 0, 5)
        assert len(server.calls) == 12


@pytest.mark.parametrize("body", [
    b"", b"[]", b"{}", b'"text"', b"[" * 100_000, b'{"choices": []}', b'{"choices": {"0": {}}}',
    b'{"choices": 3}', b'{"choices": [3]}', b'{"choices": [{"message": []}]}', b"\xff\xfe{}",
    b'{"choices": [{"message": {"content": "[[A]]"}}], "choices": 1}',
    b"<html>busy</html>", b'{"choices": [{"message": {"content": "[[A]]"}}', b"9" * 5000])
def test_a_reply_that_is_none_is_failed(body, files, serve):
    result = ask(serve(first_then_good(reply(body))), files, "--retries", 1)
    assert (result["unread"], result["failed"], result["policies"]["ours"]["n"]) == (0, 2, 5)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_reply_in_another_encoding_of_json_is_read(encoding, files, serve):
    server = serve(lambda *args: reply(content(likes_good(*args)).decode().encode(encoding)))
    assert ask(server, files)["policies"]["ours"]["win_rate"] == 1.0


@pytest.mark.parametrize("after", ["\xb2", "-3", "9" * 400, "Wed, 21 Oct 2015 07:28:00 GMT", "1.5", ""])
def test_retry_after_of_any_form(after, files, serve, monkeypatch):
    waits = []
    monkeypatch.setattr(judge, "time", SimpleNamespace(time=time.time, sleep=waits.append))
    server = serve(lambda number, messages: reply(b"{}", 429, Retry_After=after) if number == 1 else
                   likes_good(number, messages))
    assert ask(server, files, "--parallel", 1)["policies"]["ours"]["n"] == 6
    assert waits == [60 if after.isascii() and after.isdigit() else 1]


@pytest.mark.parametrize("said", [drips, drips_headers])
def test_a_request_has_so_much_time_in_all(said, files, serve):
    begin = time.monotonic()
    result = ask(serve(first_then_good(said)), files, "--timeout", 0.5, "--retries", 0)
    assert result["failed"] == 2 and time.monotonic() - begin < 4


def test_a_reply_of_any_size_is_not_read(files, serve):
    """Three times what is read at most: it is not kept, and not asked for again."""
    server = serve(first_then_good(reply(content("[[A]]" + "x" * (3 * LONGEST)))))
    result = ask(server, files)
    assert result["failed"] == 2 and len(server.calls) == 12
    assert Path("verdicts.jsonl").stat().st_size < 10_000


def test_a_row_of_an_earlier_version_kills_no_run(files, serve):
    """Which kept a list as the judge's text, or half a pair of surrogates."""
    server = serve(likes_good)
    ask(server, files)
    rows = [json.loads(line) for line in Path("verdicts.jsonl").read_text().splitlines()]
    for row, text in zip(rows, ([{"type": "text"}], None, "\ud800")):
        row["text"] = text
    write_jsonl(Path("verdicts.jsonl"), rows)
    assert ask(server, files)["unread"] == 1 and len(server.calls) == 12 + 2


@pytest.mark.parametrize("url", [
    "garbage", "http://", "ftp://host/v1", "file:///etc/passwd", "http://h:x/v1", "http://[::1", "http:/host",
    "http://a b/v1", "http://me:pass@127.0.0.1:1/v1"])
def test_a_garbage_address_ends_at_once(url, files, capsys):
    with pytest.raises(BadInput, match="--judge_url: .*address") as end:
        judge.main(["judge", "--answers", *files, "--judge_url", url, "--judge_model", "m"])
    assert "pass" not in str(end.value).replace("password", "") and not Path("verdicts.jsonl").exists()


@pytest.mark.parametrize("script", [lambda *args: 500, lambda *args: "I cannot say.",
                                    lambda *args: reply(b"busy")])
def test_a_judge_that_says_nothing_ends_in_an_error(script, files, serve):
    with pytest.raises(BadInput, match="12 requests, .*nothing could be read") as end:
        ask(serve(script), files, "--retries", 1)
    assert end.value.code and json.loads(Path("result.json").read_text())["policies"]["ours"]["n"] == 0


def test_nobody_listens(files):
    with pytest.raises(BadInput, match="12 failed.*nothing could be read"):
        ask(SimpleNamespace(url="http://127.0.0.1:9/v1"), files, "--retries", 1)


def test_a_server_that_is_down_is_not_asked_everything(files, tmp_path):
    many = [alpaca(tmp_path / f"{name}.json", name, [f"{name} {i}" for i in range(60)]) for name in "ab"]
    with pytest.raises(BadInput, match="the first 20 requests all failed"):
        ask(SimpleNamespace(url="http://127.0.0.1:9/v1"), many, "--retries", 0, "--parallel", 1)


def test_a_redirection_ends_at_once_and_takes_no_key_elsewhere(files, serve):
    other = serve(likes_good)
    server = serve(lambda *args: reply(b"", 307, Location=f"{other.url}/{KEY}"))
    with pytest.raises(BadInput, match="status 307 http.*check the address") as end:
        ask(server, files, "--parallel", 1)
    assert not other.calls and len(server.calls) <= 2 and KEY not in str(end.value)


# ---- the key ----

@pytest.mark.parametrize("name", ["JUDGE_API_KEY", "OPENAI_API_KEY"])
@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", " \t"])
def test_a_line_end_is_no_part_of_the_key(name, end, files, serve, monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.setenv(name, KEY + end)
    server = serve(likes_good)
    ask(server, files)
    assert set(server.headers) == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", [f"{KEY}\r\nX: 1", f"sk-\x01{KEY}", f"{KEY}\u2028more", f"\ufeff{KEY}"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key, files, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pytest.raises(BadInput, match="^JUDGE_API_KEY: ") as end:
        ask(SimpleNamespace(url="http://127.0.0.1:9/v1"), files)
    assert "secret" not in str(end.value) + "".join(capsys.readouterr())
    assert not Path("verdicts.jsonl").exists()


@pytest.mark.parametrize("spelling", [
    lambda key: key, lambda key: quote(key, safe=""), lambda key: json.dumps(key),
    lambda key: key[:12] + "...", lambda key: f"*{key[5:]}", lambda key: key.upper(),
    lambda key: key.replace("/", "\\/")])
def test_a_key_that_the_server_echoes_is_kept_nowhere(spelling, files, serve, monkeypatch, capsys, tmp_path):
    """In a verdict, in an error that is asked again, and in one that is not."""
    key = 'sk-se/cret"quux+zork+\\xyz'
    monkeypatch.setenv("JUDGE_API_KEY", key)

    def script(number, messages):
        if "question 0" in messages[-1]["content"]:
            return reply(f"no: {spelling(key)}".encode(), 400)
        if "question 1" in messages[-1]["content"]:
            return reply(json.dumps({"error": {"message": spelling(key)}}).encode(), 503)
        return f"For {spelling(key)} I say\n{likes_good(number, messages)}"
    result = ask(serve(script), files, "--retries", 1)
    assert (result["failed"], result["policies"]["ours"]["n"]) == (4, 4)
    shown = "".join(capsys.readouterr()) + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "***" in shown
    for part in ("sk-se", "cret", "quux", "zork", "xyz"):
        assert part not in shown.lower(), part


def test_a_dummy_key_of_a_local_server_hides_no_verdict(files, serve, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "A")
    assert ask(serve(likes_good), files)["policies"]["ours"]["win_rate"] == 1.0


# ---- files that are somebody's ----

THEIRS = ['{"a": 1}', '{"a": 1}\n', '[{"prompt": "a"}]', "text", '{"key": "k", "value": 1}',
          '{"key": "k", "text": "t"}\n{"a": 1}\n', '{"key": "k", "text": "t"}\n', "3\n", "[" * 100_000,
          "\x00\xff"]


@pytest.mark.parametrize("text", THEIRS)
def test_verdicts_that_are_not_ours_are_left_alone(text, files, serve, tmp_path):
    Path("p.json").write_text(text)
    server = serve(likes_good)
    with pytest.raises(BadInput, match="p.json: not a file that this script wrote"):
        ask(server, files, "--verdicts", "p.json")
    assert Path("p.json").read_text() == text and not server.calls


def test_results_are_written_over_results_alone(files, serve):
    """--json: an earlier result, or an empty file."""
    server = serve(likes_good)
    Path("result.json").write_text("")
    assert ask(server, files) == ask(server, files)
    for text in ('{"model_type": "llama"}', '{\n "command": "node",\n "args": []\n}', "[]"):
        Path("result.json").write_text(text)
        with pytest.raises(BadInput, match="--json result.json: a file that this command did not write"):
            ask(server, files)
        assert Path("result.json").read_text() == text
    assert len(server.calls) == 12


@pytest.mark.parametrize("name", ["o.json", "o.json.partial.jsonl", "o.json.settings.json"])
@pytest.mark.parametrize("text", ["[]", '{"id": 1}\n', '{"id": 1, "answers": []}', "{}", "text"])
def test_answers_are_written_over_nothing_of_others(name, text, chain, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput):
        generate_to(tmp_path / "o.json", "alpaca_eval", tmp_path, chain.sft)
    assert {path.name for path in tmp_path.iterdir()} == {name, "questions.json"}
    assert (tmp_path / name).read_text() == text


def test_a_file_that_came_while_answers_were_sampled_is_left_alone(chain, tmp_path, monkeypatch):
    """Interrupted after the first batch; then somebody writes to the place of --out."""
    real, calls = judge.generate, []

    def cut(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(judge, "generate", cut)
    with pytest.raises(KeyboardInterrupt):
        generate_to(tmp_path / "o.json", "alpaca_eval", tmp_path, chain.sft)
    (tmp_path / "o.json").write_text("mine")
    with pytest.raises(BadInput, match="--out .*did not write"):
        generate_to(tmp_path / "o.json", "alpaca_eval", tmp_path, chain.sft)
    assert (tmp_path / "o.json").read_text() == "mine"


def test_answers_of_weights_that_have_changed_are_not_taken(chain, tmp_path):
    """The folder was trained again: its old answers are not its own."""
    import shutil
    shutil.copytree(chain.sft, tmp_path / "policy")
    generate_to(tmp_path / "o.json", "alpaca_eval", tmp_path, tmp_path / "policy")
    shutil.copy(chain.dvpo / "model.safetensors", tmp_path / "policy")
    with pytest.raises(BadInput, match="other settings .weights"):
        generate_to(tmp_path / "o.json", "alpaca_eval", tmp_path, tmp_path / "policy")


@pytest.mark.parametrize("words, part", [
    (["judge", "--verdicts", "/proc/none/v.jsonl"], "/proc/none/v.jsonl: cannot be written"),
    (["judge", "--verdicts", "bad.jsonl"], "bad.jsonl: not a file"),
    (["judge", "--answers", "x"], "--answers 'x': expected name=file"),
    (["judge", "--answers", "a=bad.jsonl"], "bad.jsonl"),
    (["judge", "--answers", "a=empty.jsonl"], "empty.jsonl:1"),
    (["judge", "--answers", "a=id.jsonl"], "id.jsonl:1"), (["judge", "--judge_model", ""], "--judge_model"),
    (["meta"], "--labels"), (["meta", "--labels", "id.jsonl"], "id.jsonl:1: needs texts"),
    (["meta", "--labels", "label.jsonl"], "label.jsonl:1: needs texts"), (["table"], "runs/toy holds no"),
    (["generate", "--questions", "id.jsonl"], "id.jsonl: not a question file"),
    (["generate", "--mode", "pair"], "--mode is a flag of"),
    (["judge", "--timeout", "nan"], "--timeout nan"), (["judge", "--timeout", "1e300"], "--timeout 1e"),
    (["judge", "--parallel", "0"], "--parallel 0"), (["judge", "--retries", "1000000000"], "--retries 1e"),
    (["judge", "--verdicts", "."], "not a file"), (["judge", "--verdicts", "v\udcff.jsonl"], "--verdicts"),
    (["generate", "--out", "o\udcff.json"], "--out 'o\\udcff.json': not UTF-8"),
    (["generate", "--policy", "a" * 5000], "--policy 'aaa"),
    (["rank", "--response_length", "8"], "--response_length")])
def test_bad_input_is_one_sentence(words, part, files, tmp_path):
    for name, text in (("bad", "{\n"), ("empty", '{"uid": "a", "messages": []}\n'),
                       ("id", '{"uid": [], "messages": [{"content": "a"}, {"content": "b"}]}\n'),
                       ("label", '{"input": "a", "output_1": "b", "output_2": "c", "label": 1.0}\n')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    base = [] if words[0] in ("generate", "rank") or "--judge_model" in words else ["--judge_model", "m"]
    base += ["--answers", files[0]] if words[0] == "judge" and "--answers" not in words else []
    with pytest.raises(BadInput) as end:
        judge.main([words[0], *base, *words[1:]])
    assert part in str(end.value) and "\n" not in str(end.value)


def test_a_dry_run_asks_nothing(files, serve, capsys):
    server = serve(likes_good)
    assert ask(server, files, "--dry_run", True)["to_ask"] == 12
    assert not server.calls and "12 to ask: about" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_key_ends_at_once(files, serve):
    server = serve(lambda *args: 401)
    with pytest.raises(BadInput, match="JUDGE_API_KEY") as end:
        ask(server, files, "--parallel", 1)
    assert KEY not in str(end.value) and len(server.calls) <= 2


def test_points_of_single_answers(files, serve):
    """5 for good, 2 for bad, 4 for both of question 3: five wins and a tie."""
    def script(number, messages):
        content = messages[-1]["content"]
        score = 4 if "question 3" in content else 5 if "good" in content else 2
        return f"Score: {score} Evaluation evidence: x"
    result = ask(serve(script), files, mode="score")
    ours, theirs = (result["policies"][name] for name in ("ours", "theirs"))
    assert (ours["win"], ours["tie"], ours["lose"]) == (5 / 6, 1 / 6, 0.0) and ours["win_rate"] == 5.5 / 6
    assert ours["points"] == 29 / 6 and theirs["points"] == 14 / 6 and result["requests"] == 12


def test_a_local_model_as_judge(files, chain, tmp_path):
    """It says nothing that can be read, which is counted; what does not fit its context, which it says."""
    with pytest.raises(BadInput, match="12 requests.* nothing could be read"):
        judge.main(["judge", "--answers", files[0], "--against", files[1], "--mode", "pair", "--judge_model",
                    str(chain.sft), "--judge_tokens", "4", "--dtype", "float32", "--json", "result.json"])
    result = json.loads(Path("result.json").read_text())
    assert result["unread"] + result["failed"] == 12 and result["policies"]["ours"]["n"] == 0
    assert result["policies"]["ours"]["position"] == {"first_wins": None, "orders_agree": None}


def test_one_command_makes_the_papers_table(files, chain, tmp_path, serve, monkeypatch):
    """Two policies, three benchmarks: AlpacaEval's file is its own baseline, Arena-Hard's is named, MT-Bench
    has grades. A second run samples and asks nothing."""
    for kind in QUESTIONS:
        (tmp_path / kind).mkdir()
    paths = {kind: question_file(kind, tmp_path / kind) for kind in QUESTIONS}
    baseline = write_jsonl(tmp_path / "base.jsonl", [
        {"uid": row["uid"], "messages": [{"role": "user", "content": row["prompt"]},
                                         {"role": "assistant", "content": {"answer": "no ."}}]}
        for row in ARENA])
    server = serve(lambda number, messages: "[[A]] [[7]]" if "Rating" in messages[0]["content"] else "[[A]]")
    words = ["table", "--policies", f"one={chain.sft}", f"two={chain.dvpo}", "--benchmarks",
             paths["alpaca_eval"], f"{baseline}={paths['arena_hard']}", paths["mt_bench"],
             "--judge_url", server.url, "--judge_model", "m", "--dtype", "float32",
             "--response_length", 8, "--json", "table.json"]
    for _ in range(2):
        judge.main(list(map(str, words)))
        found = json.loads(Path("table.json").read_text())["policies"]
        assert set(found) == {"one", "two"}
        for row in found.values():  # a judge that takes the first answer: ties
            assert row == {"alpaca_eval": pytest.approx(50), "arena_hard": 50.0, "mt_bench": 7.0}
        asked = len(server.calls)
        monkeypatch.setattr(judge, "generate", None)
    assert len(server.calls) == asked
    with pytest.raises(BadInput, match="name the baseline's answers"):
        judge.main([*map(str, words[:6]), str(paths["arena_hard"]), "--judge_model", "m"])


WON = {"n": 4, "win": 0.5, "tie": 0.25, "lose": 0.25, "win_rate": 0.625, "low": 0.5, "high": 0.75,
       "length_controlled": {"win_rate": 0.6, "low": 0.4, "high": 0.7}, "longer_wins": 0.75, "left_out": 1,
       "against": "sft"}
SAID = {"judge": "m", "requests": 9, "failed": 2, "unread": 1}


def test_the_table_of_points(capsys):
    judge.show_judge({**SAID, "mode": "score", "policies": {"dvpo": {"points": 4.5, **WON},
                                                            "sft": {"points": 3.25}}})
    assert capsys.readouterr().out == """
Judge m, --mode score: 9 requests, 2 failed, 1 not readable; against sft

policy  points    win / tie / lose             win rate      at equal length    longer  compared  left out
                               [%]  [%] (95 % interval)  [%] (95 % interval)  wins [%]
------  ------  ------------------  -------------------  -------------------  --------  --------  --------
dvpo     4.500  50.0 / 25.0 / 25.0  62.5 (50.0 to 75.0)  60.0 (40.0 to 70.0)      75.0         4         1
sft      3.250                   -                    -                    -         -         -         -
"""


def test_the_table_of_pairs(capsys):
    """With what the judge made of the order. A policy of which no pair could be compared has its row, too."""
    judge.show_judge({**SAID, "mode": "pair", "policies": {
        "dvpo": {**WON, "position": {"first_wins": 0.5, "orders_agree": 0.8}, "longer_wins": None},
        "ppo": {"against": "sft", "n": 0, "left_out": 5,
                "position": {"first_wins": None, "orders_agree": None}}}})
    assert capsys.readouterr().out == """
Judge m, --mode pair: 9 requests, 2 failed, 1 not readable; against sft

policy    win / tie / lose             win rate      at equal length     first     orders  compared  left out
                       [%]  [%] (95 % interval)  [%] (95 % interval)  wins [%]  agree [%]
------  ------------------  -------------------  -------------------  --------  ---------  --------  --------
dvpo    50.0 / 25.0 / 25.0  62.5 (50.0 to 75.0)  60.0 (40.0 to 70.0)      50.0       80.0         4         1
ppo                      -                    -                    -         -          -         0         5
"""


def test_the_tables_of_benchmarks_labels_and_rankers(capsys):
    judge.show_table({"judge": "m", "policies": {
        "sft": {"alpaca_eval": 31.5, "arena_hard": 50.0, "mt_bench": None},
        "dvpo": {"alpaca_eval": 41.1234, "arena_hard": None, "mt_bench": 7.05}}})
    part = {"accuracy": 0.9, "low": 0.75, "high": 1.0}
    judge.show_meta({**SAID, "mode": "pair", "pairs": 20,
                     "agreement": {"all": {"n": 20, **part}, "": {"n": 0}},
                     "position": {"first_wins": 0.5, "orders_agree": 1.0}})
    judge.show_rank({"pairs": 3, "accuracy": {"reward model: all": {"n": 3, **part},
                                              "GVM, mean value: chat: easy": {"n": 1, **part}}})
    assert capsys.readouterr().out == """
Judge m; win rates are against the baseline's answers

policy  AlpacaEval, win rate   Arena-Hard,      MT-Bench,
         at equal length [%]  win rate [%]  grade 1 to 10
------  --------------------  ------------  -------------
sft                     31.5            50              -
dvpo                   41.12             -           7.05

Judge m, --mode pair: 9 requests, 2 failed, 1 not readable

source     pairs     agree with people     first     orders
                   [%] (95 % interval)  wins [%]  agree [%]
---------  -----  --------------------  --------  ---------
all           20  90.0 (75.0 to 100.0)      50.0      100.0
no source      0                     -         -          -

How often the chosen answer ranks above the rejected one; a tie counts half

ranker           subset      pairs   [%] (95 % interval)
---------------  ----------  -----  --------------------
reward model     all             3  90.0 (75.0 to 100.0)
GVM, mean value  chat: easy      1  90.0 (75.0 to 100.0)
"""


def test_rankers_on_preference_pairs(chain, baseline, tmp_path):
    """The reward model's accuracy by hand, by subset; the GVM's beside it; a tie is half."""
    rows = [{"prompt": "is thing1 red ?", "chosen": a, "rejected": b, "subset": subset}
            for a, b, subset in (("yes .", "no .", "s"), ("no .", "yes .", "s"), ("it is .", "it is .", "t"))]
    judge.main(["rank", "--pairs", write_jsonl(tmp_path / "p.jsonl", rows), "--dtype", "float32",
                "--reward_model", str(baseline.rm), "--value_model", str(chain.gvm),
                "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())["accuracy"]
    assert len(found) == 9 and {name: part["n"] for name, part in found.items() if "GVM, last" in name} == {
        "GVM, last value: all": 3, "GVM, last value: s": 2, "GVM, last value: t": 1}
    assert {part["accuracy"] for part in found.values()} == {0.5}, found  # a pair, its mirror image, a tie
    one = judge.rank_pairs(judge.Args(pairs=write_jsonl(tmp_path / "q.jsonl", rows[:1]), dtype="float32",
                                      reward_model=str(baseline.rm)), torch.device("cpu"))
    model, tokenizer, _, _ = load_reward_model(baseline.rm, torch.float32)
    yes, no = reward_scores(model, tokenizer, [([{"role": "user", "content": "is thing1 red ?"}], text)
                                               for text in ("yes .", "no .")], "cpu", 2)
    assert one["accuracy"]["reward model: all"]["accuracy"] == float(yes > no)
    with pytest.raises(BadInput, match="--pairs FILE"):
        judge.main(["rank", "--reward_model", str(baseline.rm)])


@pytest.mark.parametrize("mode, text, wanted", [
    ("score", "Score: 4 Evaluation evidence: fine", 4), ("score", "Score: 3\n... Score: **5** Evaluation", 5),
    ("score", "Score: 4 Evaluation evidence: a perfect Score: 5 needs more", 4),
    ("score", "Score: 3 or 4", None), ("score", "Score: 0 to 5", None), ("score", "Score: 6", None),
    ("score", "four of five", None), ("score", "", None), ("score", None, None),
    ("pair", "[[A]] or [[B]], who knows", None), ("pair", "[[A]] is [[A]]", "A"),
    ("grade", "[[5]] of [[10]]", None), ("grade", "Rating: [[7]]", 7),
    ("grade", "[[7.5]]\nno, [[8]]", 8), ("grade", "[[0]]", None), ("grade", "7", None),
    ("pair", "[[A]] at first\nbut [[B]]", "B"), ("pair", "[[C]]", "C"), ("pair", "A is better", None),
    ("pair", "[[D]]", None),
    ("score", "Score: 3.5 or 4", None), ("score", "Score: -1", None), ("score", "Score: 4,5", None),
    ("score", "Score: 3, maybe 4", None), ("score", "Score: 3\nScore: 4 or 5", None),
    ("score", "Score: 3 (or 4)", None), ("score", "Score: 4-5", None), ("score", "Score: 3/4", None),
    ("score", "Score: 4.5.1", None), ("score", "Score: \u0664", None), ("score", "Score: 1e0", None),
    ("score", "Score: 4/5", 4), ("score", "**Score: 4**", 4), ("score", "Score: 4, Evaluation: 3 of 4", 4),
    ("score", "Score: <4>", 4), ("score", "Score: 4.\nEvaluation evidence: Score 3 or 4", 4),
    ("score", "Score: 3.5", 3.5), ("score", "Score: 12", None),
    ("grade", "Rating: [[3]] or 4", None), ("grade", "Rating: [[-1]]", None), ("grade", "[[4,5]]", None),
    ("grade", "Rating: [[7]], maybe 8", None), ("grade", "[[7 of [[8]]", None),
    ("grade", "On a scale of 10: [[7]]/10.", 7), ("grade", "Rating: **[[7]]**", 7),
    ("pair", "[[A]]\nno, [[D]]", None), ("pair", "[[A]], or perhaps B", None), ("pair", "[[B or [[A]]", None),
    ("pair", "[[A]] [[tie]]", None), ("pair", "My verdict: **[[B]]**", "B"), ("grade", "[[" * 200_000, None),
    ("score", "." * 400_000, None)])
def test_verdicts_are_read_or_none(mode, text, wanted):
    assert judge.verdict(mode, text) == wanted


# ---- statistics ----

def test_an_oracle_and_a_judge_that_takes_the_first(tmp_path, monkeypatch):
    """Against labels: 100 %, and 50 % because its two orders always disagree."""
    monkeypatch.chdir(tmp_path)
    rows = [{"input": f"q{i}", "output_1": f"good {i}" if i % 3 else f"bad {i}",
             "output_2": f"bad {i}" if i % 3 else f"good {i}", "label": 1 if i % 3 else 2,
             "source": f"s{i % 2}"}
            for i in range(20)]
    args = lambda name: judge.Args(labels=write_jsonl(tmp_path / "labels.jsonl", rows), judge_model=name,
                                   verdicts=f"{name}.jsonl")
    oracle = judge.judge_the_judge(args("oracle"), ask=lambda messages: likes_good(0, messages))
    accuracy = {name: part["accuracy"] for name, part in oracle["agreement"].items()}
    assert accuracy == {"all": 1, "s0": 1, "s1": 1}
    first = judge.judge_the_judge(args("first"), ask=lambda messages: "[[A]]")
    assert first["agreement"]["all"]["accuracy"] == 0.5
    assert first["position"] == {"first_wins": 1.0, "orders_agree": 0.0}


def simulated(rng, n, quality, bias):
    """Outcomes of n questions: question by question ours is better by N(quality, 1); the judge says A with
    probability sigmoid(difference + bias) in each order."""
    gap = rng.normal(quality, 1, n)
    p = 1 / (1 + np.exp(-(np.stack([gap, -gap]) + bias)))
    said = np.where(rng.random((2, n)) < p, "A", "B")
    return [judge.of_both_orders(a, b) for a, b in said.T]


@pytest.mark.parametrize("quality, bias", [(0.5, 0.0), (0.3, 1.0), (-0.4, -0.7)])
def test_intervals_cover_the_truth(quality, bias):
    """Of 1,000 evaluations of 200 questions, 92.5 to 97.5 %. Truth: the mean of a million questions; a tie is
    half a win, so that it does not depend on more than P(A) in both orders: (1 + p_1 - p_2) / 2."""
    rng = np.random.default_rng(0)
    gap = rng.normal(quality, 1, 1_000_000)
    truth = np.mean((1 + 1 / (1 + np.exp(-(gap + bias))) - 1 / (1 + np.exp(-(-gap + bias)))) / 2)
    covered = 0
    for _ in range(1000):
        rate = judge.accuracy(simulated(rng, 200, quality, bias), np.arange(200), draws=400)
        covered += rate["low"] <= truth <= rate["high"]
    assert 925 <= covered <= 975, covered


def test_swapping_the_policies_mirrors_everything():
    rng = np.random.default_rng(0)
    outcome = np.array(simulated(rng, 150, 0.4, 0.5))
    ours, theirs = rng.integers(10, 900, (2, 150))
    here = judge.compare(outcome, ours, theirs, np.arange(150))
    there = judge.compare(1 - outcome, theirs, ours, np.arange(150))
    assert (there["win"], there["tie"], there["lose"]) == (here["lose"], here["tie"], here["win"])
    assert there["longer_wins"] == here["longer_wins"]
    for a, b in ((here, there), (here["length_controlled"], there["length_controlled"])):
        assert [b["win_rate"], b["low"], b["high"]] == pytest.approx(
            [1 - a["win_rate"], 1 - a["high"], 1 - a["low"]], abs=1e-12)


@pytest.mark.parametrize("quality, by_length", [(0.0, 2.0), (0.8, 0.0), (0.8, 2.0), (0.8, -2.0)])
def test_length_control_removes_length_and_leaves_quality(quality, by_length):
    """P(win) = sigmoid(quality + by_length * tanh(length difference)): ours are longer on the whole. What is
    left is sigmoid(quality), 0.5 or 0.69."""
    rng = np.random.default_rng(1)
    theirs = rng.uniform(200, 1000, 4000)
    ours = theirs + rng.normal(250, 300, 4000)
    gap = ours - theirs
    p = 1 / (1 + np.exp(-(quality + by_length * np.tanh(gap / np.sqrt(np.mean(gap ** 2))))))
    outcome = (rng.random(4000) < p).astype(float)
    found = judge.compare(outcome, ours, theirs, np.arange(4000))
    truth = 1 / (1 + np.exp(-quality))
    assert abs(found["length_controlled"]["win_rate"] - truth) < 0.03
    assert found["length_controlled"]["low"] < truth < found["length_controlled"]["high"]
    if by_length:
        assert abs(found["win_rate"] - truth) > 0.07  # what it was without
