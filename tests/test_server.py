"""A chat model behind a server (a scripted one here): what it answers, refuses and breaks."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import make_records, model_folder

import test_llama_squad
from llama_squad.answers import extract_answer, format_answer
from llama_squad.arguments import CreateArguments, EvalArguments, ModelArguments
from llama_squad.config import write_json
from llama_squad.data import write_dataset
from llama_squad.predictors import client
from llama_squad.predictors.base import Prediction
from llama_squad.predictors.loading import adapter_settings
from llama_squad.predictors.server import ServerModel
from llama_squad.result_reader import read_results

RECORDS = make_records(5, [2, 4], seed=3)
Response = tuple[int, dict[str, Any] | str]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 14 test questions on 5 paragraphs."""
    folder = str(tmp_path_factory.mktemp("server") / "data")
    splits = {"train": make_records(1, [1], 1), "val": make_records(1, [1], 2), "test": RECORDS}
    write_dataset(splits, CreateArguments(dataset_name=folder))
    return folder


def gold(prompt: str) -> str:
    """Answer as the test's records do, or say "Sure." where no JSON is asked for yet."""
    if "JSON" not in prompt:
        return "Sure."
    record = next(r for r in RECORDS if r["context"] in prompt and r["question"] in prompt)
    return format_answer(record["answers"]["text"][0] if record["answers"]["text"] else "?")


def completion(content: Any, finish_reason: str = "stop", **message: Any) -> Response:
    """Return a chat completion as a server sends it: 70 tokens in, 7 out."""
    message = {"role": "assistant", "content": content} | message
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    usage = {"prompt_tokens": 70, "completion_tokens": 7, "total_tokens": 77}
    return 200, reply | {"choices": [choice], "usage": usage}


def fault(status: int, message: str, **more: Any) -> Response:
    """Return an error as OpenAI sends it."""
    return status, {"error": {"message": message, **more}}


class Server(ThreadingHTTPServer):
    """Speaks the chat part of OpenAI's protocol; ``respond`` may answer, or leave it to ``gold``."""

    daemon_threads = True
    respond: Callable[[dict[str, Any], str], Response | None] = staticmethod(lambda *_: None)

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that are gone."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers one request of ``Server``."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(
            body | {"key": self.headers["Authorization"], "path": self.path}
        )
        prompt = "\n".join(message["content"] for message in body["messages"])
        status, content = self.server.respond(body, prompt) or completion(gold(prompt))
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    """Serve on a free port."""
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_squad.predictors.client.LONGEST_BACKOFF_S", 0.02)


def on(needle: str, *responses: Response | None) -> Callable[[dict, str], Response | None]:
    """Respond to requests whose prompt holds ``needle``, in turn; the last response stays."""
    left = list(responses)

    def respond(_: dict[str, Any], prompt: str) -> Response | None:
        if needle not in prompt:
            return None
        return left.pop(0) if len(left) > 1 else left[0]

    return respond


def stage(server: Server, dataset: str, output: Path, *flags: str) -> list[Any]:
    """Run the stage against the server; return the rows."""
    test_llama_squad.main(
        ["--predictor", "server", "--base_url", server.url, "--model_name", "gpt-test",
         "--dataset_name", dataset, "--output", str(output), *flags]
    )  # fmt: skip
    return read_results(output)


def ask(server: Server, **options: Any) -> dict[str, Prediction]:
    """Ask all records; return the predictions by id."""
    model = ServerModel("m", server.url, **options)
    parts = list(model.answer_all(RECORDS))
    known = {item.record["id"]: item for part in parts for item in part}
    assert len(known) == len(RECORDS) == sum(map(len, parts))
    return known


# Answers -------------------------------------------------------------------------------------


def test_every_question_is_answered(server: Server, dataset: str, tmp_path: Path) -> None:
    rows = stage(server, dataset, tmp_path / "results.csv")
    assert [row["id"] for row in rows] == [record["id"] for record in RECORDS]
    assert all(row["Exact match"] for row in rows)
    assert {(row["na_prob"], row["score"]) for row in rows} == {(None, None)}
    assert RECORDS[0]["context"] in rows[0]["Prompt"]
    assert len(server.requests) == len(RECORDS)
    request = server.requests[-1]
    assert request["model"] == "gpt-test"
    assert (request["temperature"], request["max_tokens"]) == (0, 256)
    assert "response_format" not in request
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert request["path"] == "/v1/chat/completions"


def test_the_model_is_called_turn_by_turn(server: Server, dataset: str, tmp_path: Path) -> None:
    flags = ["--prompt", "multi_turn", "--num_samples", "1", "--structured_output"]
    assert stage(server, dataset, tmp_path / "results.csv", *flags)[0]["Exact match"]
    roles = [[message["role"] for message in sent["messages"]] for sent in server.requests]
    pair = ["user", "assistant"]
    assert roles == [["system", *pair * turn, "user"] for turn in range(3)]
    assert server.requests[-1]["messages"][2]["content"] == "Sure."
    # Only the last reply is the JSON.
    assert ["response_format" in sent for sent in server.requests] == [False, False, True]


def test_flags_reach_the_server(server: Server, dataset: str, tmp_path: Path) -> None:
    flags = ["--temperature", "0.5", "--max_tokens_name", "max_completion_tokens",
             "--max_new_tokens", "9", "--structured_output", "--num_samples", "1"]  # fmt: skip
    stage(server, dataset, tmp_path / "results.csv", *flags)
    sent = server.requests[0]
    assert (sent["temperature"], sent["max_completion_tokens"]) == (0.5, 9)
    assert "max_tokens" not in sent
    schema = sent["response_format"]["json_schema"]
    assert (sent["response_format"]["type"], schema["strict"]) == ("json_schema", True)
    assert schema["schema"]["required"] == ["answer"]


def test_structured_output_is_read_and_its_absence_said(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.respond = on("", completion('{"answer": "red"}'))
    known = ask(server, structured_output=True)
    assert {extract_answer(item.reply.completion).text for item in known.values()} == {"red"}
    assert "JSON schema" not in capsys.readouterr().err
    server.respond = on("", completion(format_answer("red")))  # fenced: not the schema's
    ask(server, structured_output=True)
    assert capsys.readouterr().err.count("does not hold replies to the JSON schema") == 1


def test_the_name_of_the_limit_is_found_out(server: Server) -> None:
    def respond(body: dict[str, Any], _: str) -> Response | None:
        if "max_tokens" not in body:
            return None
        said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use ..."
        return fault(400, said, param="max_tokens", code="unsupported_parameter")

    server.respond = respond
    assert not any(item.failure for item in ask(server, concurrency=1).values())
    assert len(server.requests) == len(RECORDS) + 1
    with pytest.raises(ValueError, match=r"400 unsupported_parameter: .*max_tokens"):
        ask(server, max_tokens_name="max_tokens")


def test_a_limit_beyond_the_context_is_a_question_of_its_own(server: Server) -> None:
    said = "max_tokens is too large: 256. This model's context length is 1000, you asked for 2000"
    server.respond = on(RECORDS[3]["question"], fault(400, said, param="max_tokens"))
    known = ask(server, concurrency=1)
    assert [id_ for id_, item in known.items() if item.failure] == [RECORDS[3]["id"]]
    assert {*server.requests[-1]} >= {"max_tokens"}


def test_tokens_are_counted(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    ask(server)
    assert f"Tokens: {14 * 70} in, {14 * 7} out\n" in capsys.readouterr().err
    _, body = completion("x")
    server.respond = on("", (200, {**body, "usage": None}))  # type: ignore[dict-item]
    ask(server)
    assert "Tokens: 0 in, 0 out (14 replies did not say)." in capsys.readouterr().err


def test_no_question_waits_for_a_slow_one(server: Server) -> None:
    """One reply comes only after all others, though no more than two are asked at once."""
    slow, others = threading.Event(), []

    def respond(_: dict[str, Any], prompt: str) -> Response | None:
        if RECORDS[0]["question"] in prompt and RECORDS[0]["context"] in prompt:
            assert slow.wait(20)
        return None

    server.respond = respond
    for part in ServerModel("m", server.url, concurrency=2).answer_all(RECORDS):
        others += [item.record["id"] for item in part]
        if len(others) == len(RECORDS) - 1:
            slow.set()
    assert others[-1] == RECORDS[0]["id"]


def test_no_more_than_concurrency_at_once(server: Server) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def respond(*_: Any) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    server.respond = respond
    ask(server, concurrency=3)
    assert most == 3


# Refused questions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        (
            fault(400, "This model's maximum context length is 9\ntokens.",
                  code="context_length_exceeded", param="messages"),
            "400 context_length_exceeded: This model's maximum context length is 9 tokens",
        ),
        (fault(400, "flagged", code="content_filter"), "400 content_filter: flagged"),
        ((422, {"detail": "no such role"}), "422: no such role"),
        ((413, "too much"), "413: too much"),
        (completion(None, refusal="I cannot help with that."),
         "refusal: I cannot help with that"),
        (completion("par", "content_filter"), "content filter: the reply was withheld"),
        (completion(None), "no content: the reply is null (finish_reason stop)"),
        (completion(None, "length"), "no content: the reply is null (finish_reason length)"),
        (fault(500, "oops"), "500: oops (11 times)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_refused_question_fails_alone(
    server: Server, capsys: pytest.CaptureFixture[str], response: Response, failure: str,
    concurrency: int,
) -> None:  # fmt: skip
    server.respond = on(RECORDS[5]["question"], response)
    known = ask(server, concurrency=concurrency)
    refused = known.pop(RECORDS[5]["id"])
    assert (refused.failure, refused.reply.completion) == (failure, "")
    assert RECORDS[5]["question"] in refused.prompt_text
    assert not any(item.failure for item in known.values())
    said = capsys.readouterr().err
    assert f"Question {RECORDS[5]['id']} failed: {failure}" in said
    kind = failure.partition(":")[0]
    assert f"1 of 14 questions failed (1 {kind}): the result file has the reasons" in said


@pytest.mark.parametrize(
    "response",
    [
        fault(400, "This model's maximum context length is 9 tokens.",
              code="context_length_exceeded", param="messages"),
        fault(400, "'max_tokens' or 'max_completion_tokens' is too large: 256. This model's maximum "
              "context length is 512 tokens and your request has 400 input tokens", code=400),
        fault(400, "The prompt triggered the content policy of this model", code="content_filter"),
        fault(403, "Your input was flagged by moderation"),
        fault(400, "Your request has 900 tokens, which no model here reads"),
    ],
)  # fmt: skip
def test_the_first_question_may_be_refused(server: Server, response: Response) -> None:
    """As it is where a rerun asks those that failed: nothing was answered before."""
    server.respond = on(RECORDS[0]["question"], response)
    known = ask(server, concurrency=1)
    assert [id_ for id_, item in known.items() if item.failure] == [RECORDS[0]["id"]]


def test_half_a_character_is_sent_back_as_a_sign(server: Server) -> None:
    """A reply that was cut within an emoji goes into the next turn's prompt."""
    server.respond = lambda _, prompt: None if "JSON" in prompt else completion("Sure \ud83c")
    known = ask(server, prompt="multi_turn")
    assert not any(item.failure for item in known.values())
    assert "Sure ?" in next(iter(known.values())).prompt_text


def test_a_question_is_refused_for_what_the_other_name_brings(server: Server) -> None:
    """A server that knows only max_completion_tokens refuses one question for its content."""

    def respond(body: dict[str, Any], prompt: str) -> Response | None:
        if "max_tokens" in body:
            return fault(400, "max_tokens: use max_completion_tokens", code="unsupported_parameter")
        refused = RECORDS[0]["question"] in prompt and RECORDS[0]["context"] in prompt
        return fault(400, "flagged", code="content_filter") if refused else None

    server.respond = respond
    known = ask(server, concurrency=1)
    failed = {id_: item.failure for id_, item in known.items() if item.failure}
    assert failed == {RECORDS[0]["id"]: "400 content_filter: flagged"}


def test_a_question_that_is_too_long_does_not_change_the_limit_s_name(server: Server) -> None:
    """A server that leaves out what it does not know refuses it by either name."""

    def respond(body: dict[str, Any], prompt: str) -> Response | None:
        if RECORDS[0]["question"] not in prompt or RECORDS[0]["context"] not in prompt:
            return None
        more = " + max_tokens (100)" if "max_tokens" in body else ""
        return fault(400, f"the prompt (5000){more} exceeds the context")

    server.respond = respond
    known = ask(server, concurrency=1)
    assert [id_ for id_, item in known.items() if item.failure] == [RECORDS[0]["id"]]
    assert all("max_tokens" in request for request in server.requests[2:])


def test_a_malformed_reply_is_no_failure(server: Server) -> None:
    server.respond = on("", completion(""))
    assert {item.failure for item in ask(server).values()} == {""}


def test_cut_off_replies_are_said_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.respond = on("", completion("I think", "length"))
    ask(server)
    assert capsys.readouterr().err.count("cut off at --max_new_tokens") == 1


# Faults of the whole run ---------------------------------------------------------------------


def test_what_passes_is_waited_out_and_said(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = [fault(429, "slow down"), fault(503, "loading"), fault(408, "late"), None]
    server.respond = on("", *busy)
    assert not any(item.failure for item in ask(server, concurrency=1).values())
    assert len(server.requests) == len(RECORDS) + 3
    said = capsys.readouterr().err
    assert f"{server.url} (model 'm'): 429: slow down. Trying again in 0.0 s (1 of 10)." in said
    assert said.count("Trying again") == 1  # not a line each time


def test_a_spent_quota_is_not_asked_again(server: Server) -> None:
    server.respond = on("", fault(429, "You exceeded your quota", code="insufficient_quota"))
    with pytest.raises(ValueError, match=r"insufficient_quota: You exceeded your quota\. What"):
        ask(server, concurrency=1)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("response", "requests", "message"),
    [
        (fault(401, "bad key"), 1, "401: bad key"),
        (fault(403, "no access"), 1, "403: no access"),
        (fault(402, "pay"), 1, "402: pay"),
        (fault(404, "no such model"), 1, "404: no such model"),
        (fault(400, "no", param="temperature", code="unsupported_value"), 1, "unsupported_value"),
        ((400, {"detail": "unknown field response_format"}), 1, "unknown field response_format"),
        (fault(400, "The model 'm' does not exist"), 1, "The model 'm' does not exist"),
        (fault(400, "Invalid model name"), 1, "Invalid model name"),
        (fault(429, "slow down"), 11, "429: slow down"),
        (fault(500, "oops"), 22, "500: oops"),  # the first might be the question's own fault
    ],
)
def test_a_fault_of_the_whole_run_ends_it(
    server: Server, response: Response, requests: int, message: str
) -> None:
    server.respond = on("", response)
    with pytest.raises(ValueError, match=message) as caught:
        ask(server, concurrency=1)
    assert server.url in str(caught.value)
    assert "the same command goes on" in str(caught.value)
    assert len(server.requests) == requests


def test_a_server_that_is_not_there_ends_the_run(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.server_close()
    with pytest.raises(ValueError, match=r"connection: Connection error \(.*refused"):
        ask(server)
    assert "Trying again in" in capsys.readouterr().err


def test_a_timeout_says_which_flags_help(server: Server) -> None:
    release = threading.Event()

    def respond(*_: Any) -> None:
        release.wait(20)

    server.respond = respond
    with pytest.raises(ValueError, match=r"timed out.*--timeout waits longer, a smaller --conc"):
        ask(server, timeout=0.05, concurrency=2)
    release.set()


def test_a_long_wait_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    headers: dict[str, str] = {"retry-after": "86400"}
    send_response = Handler.send_response

    def with_headers(self: Handler, *args: Any) -> None:
        send_response(self, *args)
        for name, value in headers.items():
            self.send_header(name, value)

    monkeypatch.setattr(Handler, "send_response", with_headers)
    server.respond = on("", fault(429, "tomorrow"))
    with pytest.raises(ValueError, match="429: tomorrow"):
        ask(server, concurrency=1)
    assert len(server.requests) == 1
    headers["retry-after"] = "Wed, 25 Nov 2026 07:28:00 GMT"  # a date is as good as nothing
    server.respond = on("", fault(429, "soon"), None)
    assert not any(item.failure for item in ask(server, concurrency=1).values())


@pytest.mark.parametrize(
    "body",
    [
        "<html>Not here</html>", '{"id": ', '{"error": {"message": "no"}}', '{"choices": []}', "[1]",
        '{"choices": [{"index": 0, "finish_reason": "stop", "message": null}]}',
        '{"choices": [{"index": 0, "message": {"role": "assistant", "content": [{"text": "x"}]}}]}',
    ],
)  # fmt: skip
def test_something_else_than_a_completion_ends_the_run(server: Server, body: str) -> None:
    server.respond = on("", (200, body))
    with pytest.raises(ValueError, match="no chat completion") as caught:
        ask(server)
    assert server.url in str(caught.value)


def test_an_error_in_place_of_a_completion_is_of_its_question(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gateways answer 200 with an error where what is behind them fails; not all along."""
    body = {"error": {"message": "upstream is busy", "code": 502}}
    answered = ask(server, concurrency=1)
    server.respond = on(RECORDS[-1]["context"], (200, body))
    failed = [p for p in ask(server, concurrency=1).values() if p.failure]
    assert {p.record["context"] for p in failed} == {RECORDS[-1]["context"]}
    assert all("no completion: " in p.failure and "upstream is busy" in p.failure for p in failed)
    assert len(failed) < len(answered)
    left = [*[None] * 2, (200, body)]
    server.respond = lambda *_: left.pop(0) if len(left) > 1 else left[0]
    monkeypatch.setattr(client, "RETRIES", 3)
    with pytest.raises(ValueError, match="no chat completion"):
        ask(server, concurrency=1)


def test_a_model_s_folder_brings_its_prompt(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    saved = {"prompt": "question_first", "system_prompt": ""}
    others = {"train": {"reasoning_tokens": 4, "filler": 2}}  # which a server cannot be asked with
    write_json(Path(folder, "llama_squad.json"), saved | others)
    args = EvalArguments(predictor="server")
    assert adapter_settings([args, ModelArguments(model_name=folder)]) == saved
    assert adapter_settings([args, ModelArguments(model_name="gpt-4")]) == {}


def test_what_was_answered_before_a_fault_is_kept(
    server: Server, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    output = tmp_path / "results.csv"
    server.respond = on(RECORDS[-1]["context"], fault(404, "no such model"))
    with pytest.raises(SystemExit) as caught:
        stage(server, dataset, output, "--concurrency", "1")
    assert "no such model" in str(caught.value)
    kept = len(read_results(output))
    assert kept == sum(r["context"] != RECORDS[-1]["context"] for r in RECORDS) >= 10
    assert server.requests[0]["key"] == "Bearer secret"
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())
    server.respond, server.requests = on("", None), []
    # With other volatile flags; what is answered is not asked again.
    assert len(stage(server, dataset, output, "--timeout", "60")) == len(RECORDS)
    assert len(server.requests) == len(RECORDS) - kept


def test_a_fault_is_seen_at_once(server: Server) -> None:
    """The first question is still being answered when the last one has failed."""
    release, released = threading.Event(), []

    def respond(_: dict[str, Any], prompt: str) -> Response | None:
        if RECORDS[0]["question"] in prompt:
            released.append(release.wait(20))
            return None
        return fault(404, "no such model")

    server.respond = respond
    with pytest.raises(ValueError, match="no such model"):
        ServerModel("m", server.url).answer([[RECORDS[0]], [RECORDS[-1]]])
    assert released == []
    release.set()


# Keys and addresses --------------------------------------------------------------------------


def test_the_server_alone_is_asked(
    server: Server, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No Hub is asked for the model's settings."""

    def refuse(*_: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("llama_squad.predictors.loading.saved_settings", refuse)
    assert len(stage(server, dataset, tmp_path / "results.csv")) == len(RECORDS)


def test_no_variable_leads_to_another_server(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.OPENAI_URL == "https://api.openai.com/v1"
    monkeypatch.setattr(client, "OPENAI_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    (prediction,) = ServerModel("m").answer([RECORDS[:1]])
    assert not prediction.failure
    assert len(server.requests) == 1


def test_a_key_with_a_line_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        ServerModel("m")
    assert "secret" not in str(caught.value)


def test_openai_needs_a_key(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="OPENAI_API_KEY"):
        test_llama_squad.main(["--predictor", "server", "--dataset_name", dataset])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predictor=encoder", "--concurrency=2"], "--concurrency needs --predictor server"),
        (["--predictor=encoder", "--timeout=2"], "--timeout needs --predictor server"),
        (["--predictor=encoder", "--temperature=1"], "--temperature needs --predictor server"),
        (
            ["--predictor=encoder", "--max_tokens_name=max_tokens"],
            "--max_tokens_name needs --predictor server",
        ),
        (
            ["--predictor=encoder", "--structured_output"],
            "--structured_output needs --predictor server",
        ),
        (["--predictor=server", "--concurrency=0"], "--concurrency must be at least 1, not 0"),
        (["--predictor=server", "--timeout=0"], "--timeout must be above 0 seconds"),
        (["--predictor=server", "--timeout=nan"], "--timeout must be above 0 seconds"),
        (["--predictor=server", "--temperature=-1"], "--temperature must be a number from 0"),
        (["--predictor=server", "--temperature=inf"], "--temperature must be a number from 0"),
        (["--predictor=server", "--batch_size=4"], "--batch_size means nothing to --predictor se"),
        (["--predictor=server", "--dtype=float32"], "--dtype means nothing to --predictor server"),
    ],
)
def test_flags_of_servers(flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        test_llama_squad.main(flags)
