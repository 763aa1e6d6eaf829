"""Reading from Python and from the shell: the same answers as evaluation, with their places."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Page, make_records, model_folder, tiny_tokenizer
from test_forgetting_study import adapter_folder

import llama_squad
from llama_squad import __main__ as shell
from llama_squad import modeling, thresholds
from llama_squad.arguments import AppArguments, EvalArguments, ModelArguments, resolve_decoding
from llama_squad.calibration import Abstention, Calibration
from llama_squad.config import write_json
from llama_squad.decoding.chat import ChatSession
from llama_squad.durable import hold
from llama_squad.encoding import ChatEncoder
from llama_squad.feedback import queue
from llama_squad.folders import THRESHOLD_FILE
from llama_squad.predictors.base import group_paragraphs
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import Message

pytestmark = pytest.mark.usefixtures("narrow")

RECORDS = make_records(3, [2], seed=11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def reader(folder: str) -> Any:
    return llama_squad.Reader(folder, dtype="float32", n_best=3, na_prob_thresh=1.0)


def test_readings_are_those_of_evaluation(reader: Any, folder: str) -> None:
    args = ModelArguments(model_name=folder, dtype="float32")
    model = LocalModel(
        modeling.load_model(args), modeling.load_encoder(args), num_beams=4, n_best=3,
        na_prob_thresh=1.0,
    )  # fmt: skip
    expected = model.answer(group_paragraphs(RECORDS))
    readings = reader([r["question"] for r in RECORDS], [r["context"] for r in RECORDS])
    by_id = {p.record["id"]: p.reply for p in expected}
    for record, reading in zip(RECORDS, readings, strict=True):
        reply = by_id[record["id"]]
        assert reply.best
        assert reading.answer == reply.best.text
        assert record["context"][reading.start : reading.end] == reading.answer
        assert reading.na_prob == pytest.approx(reply.na_prob, abs=1e-5)
        assert [s.text for s in reading.n_best] == [s.text for s in reply.spans]
        for span in reading.n_best:
            assert record["context"][span.start : span.end] == span.text


def test_one_question_many_and_none(reader: Any, folder: str) -> None:
    context, question = RECORDS[0]["context"], RECORDS[0]["question"]
    one = reader(question, context)
    for again in reader((question, question), context):
        assert (again.answer, again.start) == (one.answer, one.start)
        assert again.na_prob == pytest.approx(one.na_prob, abs=1e-4)
    assert reader([], context) == []
    abstaining = llama_squad.Reader(folder, dtype="float32", na_prob_thresh=0.0)
    none = abstaining(question, context)
    assert (none.answer, none.start, none.end) == (None, None, None)
    assert none.n_best and none.na_prob == pytest.approx(one.na_prob, abs=1e-5)
    for asked, message in (
        ((question, [context]), "one question takes one context"),
        (([question], [context, context]), "1 questions, but 2 contexts"),
        ((" ", context), "the question of question 1 is empty"),
        (([question] * 2, [context, "\ud83d"]), "the context of question 2 has half a character"),
    ):
        with pytest.raises(ValueError, match=message):
            reader(*asked)


@pytest.mark.slow
def test_a_long_text_is_read_in_windows(reader: Any) -> None:
    filler = "The road is long and the day is grey. " * 400
    text = f"{filler}{RECORDS[0]['context']} {filler}"
    reading = reader(RECORDS[0]["question"], text)
    assert text[reading.start : reading.end] == reading.answer


def test_chat(reader: Any) -> None:
    said = reader.chat([{"role": "user", "content": "Hello"}])
    assert isinstance(said, str)
    with pytest.raises(ValueError, match="leaves no room for a reply"):
        reader.chat([{"role": "user", "content": "Hello " * 600}])
    with pytest.raises(ValueError, match="must end with a user turn"):
        reader.chat([{"role": "assistant", "content": "Hello"}])


def test_the_base_chats_unless_asked_otherwise(folder: str, tmp_path: Path) -> None:
    """A specialist that still talks, whatever the training was: on the page, too."""
    tuned = adapter_folder(folder, tmp_path / "adapter")
    options: dict[str, Any] = {"dtype": "float32", "max_new_tokens": 12}
    reader = llama_squad.Reader(tuned, **options)
    messages: list[Message] = [{"role": "user", "content": "Hello, who are you?"}]
    base = llama_squad.Reader(folder, **options).chat(messages)
    assert reader.chat(messages) == base
    with_adapter = reader.chat(messages, adapter=True)
    assert with_adapter != base
    model = modeling.load_model(ModelArguments(model_name=folder, dtype="float32"), False, tuned,
                                merge=False).eval()  # fmt: skip
    for chat_adapter, said in ((False, base), (True, with_adapter)):
        args = AppArguments(max_new_tokens=12, system_prompt="", chat_adapter=chat_adapter)
        session = ChatSession(model, ChatEncoder(tiny_tokenizer()), args)
        *_, talk = session.converse([], [messages[0]["content"]])
        assert talk[-1]["content"] == said


def test_threads_that_read_and_chat_at_once(folder: str, tmp_path: Path) -> None:
    """A chat switches the adapter off: not while another thread reads with it."""
    reader = llama_squad.Reader(
        adapter_folder(folder, tmp_path / "adapter"), dtype="float32", max_new_tokens=8
    )
    question, context = RECORDS[0]["question"], RECORDS[0]["context"]

    def read() -> Any:
        return reader(question, context)

    def chat() -> Any:
        return reader.chat([{"role": "user", "content": "Hello, who are you?"}])

    alone = read(), chat()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(each) for _ in range(6) for each in (read, chat)]
        found = [call.result() for call in calls]
    assert found == [*alone] * 6


def test_a_whole_model_takes_the_place_of_a_base(folder: str, tmp_path: Path) -> None:
    """As --adapter_name in the stages: all parameters were trained."""
    torch.manual_seed(7)
    whole = model_folder(tmp_path, max_position_embeddings=512, initializer_range=0.3)
    options: dict[str, Any] = {"dtype": "float32", "na_prob_thresh": 1.0}
    question, context = RECORDS[0]["question"], RECORDS[0]["context"]
    alone = llama_squad.Reader(whole, **options)(question, context)
    assert llama_squad.Reader(whole, model_name=folder, **options)(question, context) == alone
    assert llama_squad.Reader(folder, **options)(question, context).score != alone.score


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    shell.main(list(flags))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_shell(
    folder: str, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    context, question = RECORDS[0]["context"], RECORDS[0]["question"]
    flags = ("--model_name", folder, "--dtype", "float32", "--na_prob_thresh", "1", "--n_best", "3")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(context.encode())))
    piped = run(capsys, *flags, question)
    (tmp_path / "page.txt").write_text(context)
    lines = run(capsys, *flags, "--context", str(tmp_path / "page.txt"), question)
    assert piped == lines
    assert lines[0]["answer"] == reader(question, context).answer
    # a SQuAD file without answers, and a run that was stopped in the middle of a line
    qas = [{"id": f"q{i}", "question": r["question"]} for i, r in enumerate(RECORDS[:2])]
    paragraphs = [{"context": context, "qas": qas}]
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    output = tmp_path / "out" / "answers.jsonl"
    asked = (*flags, "--input", str(squad), "--output", str(output))
    run(capsys, *asked)
    whole = output.read_text()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == ["q0", "q1"]
    output.write_text(whole[: whole.index("\n") + 20])
    page = tmp_path / "pages" / "answers.html"
    run(capsys, *asked, "--html", str(page))
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["q0", "q1"]
    # the page also holds what the run found in the file, and texts are marked as it says
    marked = Page.of(page.read_text())
    assert marked.texts == [context]
    assert [marked.marks[f"1-{i + 1}"] for i in range(2)] == [a["answer"] for a in answers]
    squad.write_text(squad.read_text().replace(qas[0]["question"], "When?"))
    with pytest.raises(
        SystemExit, match="another question, or about another text, under the id q0"
    ):
        run(capsys, *asked)


@pytest.mark.parametrize("name", ["asked.csv", "asked.parquet"])
def test_a_table_of_questions_needs_no_answers(name: str, tmp_path: Path) -> None:
    import pandas as pd

    asked = pd.DataFrame([{key: r[key] for key in ("question", "context")} for r in RECORDS])
    (asked.to_csv if name.endswith("csv") else asked.to_parquet)(tmp_path / name, index=False)
    args = shell._parse(["--model_name", "M/M", "--input", str(tmp_path / name)])
    questions = [(q["question"], q["context"]) for q in shell._questions(args)]
    assert questions == [(r["question"], r["context"]) for r in RECORDS]
    assert len(queue.records_of_file(tmp_path / name)) == len(RECORDS)


def test_answers_of_another_model_are_not_gone_on_with(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = tmp_path / "asked.jsonl", str(tmp_path / "a.jsonl")
    rows = [{"id": str(n), "question": "Who?", "context": f"Ann and {n}."} for n in range(2)]
    asked.write_text(json.dumps(rows[0]) + "\n")
    flags = ("--model_name", folder, "--dtype", "float32", "--input", str(asked), "--output", out)
    run(capsys, *flags)
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more, named in (("--n_best", "2"), "n_best"), (("--model_name", "M/M"), "model_name"):
        with pytest.raises(SystemExit, match=rf"given with another {named} \("):
            run(capsys, *flags, *more)
    kept = Path(folder, THRESHOLD_FILE)
    kept.write_text(json.dumps({"na_prob_thresh": 0.25}))
    with pytest.raises(SystemExit, match=r"given with another tuned threshold \("):
        run(capsys, *flags)
    kept.unlink()
    run(capsys, *flags)
    assert len(Path(out).read_text().splitlines()) == 2
    Path(f"{out}.config.json").write_text("{")
    with pytest.raises(SystemExit, match="a.jsonl.config.json is damaged"):
        run(capsys, *flags)


def test_no_other_file_is_taken_for_answers(tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"id": "q", "question": "Who?", "context": "Ann."}) + "\n")
    with pytest.raises(SystemExit, match=r"asked.jsonl is named twice"):
        shell.main(["--model_name", "M/M", "--input", str(asked), "--output", str(asked)])
    for other in ('{"data": [1, 2]}', "line one\nline two, cut", '{"id": "q"}\n{"a'):
        (tmp_path / "other.txt").write_text(other)
        with pytest.raises(SystemExit, match=r"other.txt holds other lines than answers"):
            shell.main([
                "--model_name", "M/M", "--input", str(asked), "--output", str(tmp_path / "other.txt")
            ])  # fmt: skip
        assert (tmp_path / "other.txt").read_text() == other  # nothing of it is cut off
    asked.write_text("\n")
    with pytest.raises(SystemExit, match=r"asked.jsonl holds no questions"):
        shell.main(["--model_name", "M/M", "--input", str(asked)])
    asked.write_text('{"id": "q", "question": "Who?", "context": "Ann \\ud83d."}\n')
    with pytest.raises(SystemExit, match=r"asked.jsonl, line 1: half a character"):
        shell.main(["--model_name", "M/M", "--input", str(asked)])
    with pytest.raises(SystemExit, match=r"'Who\\udce9' is no UTF-8 text"):
        shell.main(["--model_name", "M/M", "--context", str(asked), "Who\udce9"])


def test_offsets_are_of_the_file_s_own_text(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "One.\r\nTwo.\r\nThe mill opened in 1912."
    page = tmp_path / "page.txt"
    page.write_bytes(b"\xef\xbb\xbf" + text.encode())
    flags = ("--model_name", folder, "--dtype", "float32", "--na_prob_thresh", "1")
    (answer,) = run(capsys, *flags, "--context", str(page), "When?")
    assert text[answer["start"] : answer["end"]] == answer["answer"]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([
        {"id": n, "question": "When?", "context": "In 1912."} for n in (0, 7.0, None)
    ]))  # fmt: skip
    answers = run(capsys, *flags, "--input", str(asked))
    assert [answer["id"] for answer in answers] == ["0", "7", "[2]"]


def test_a_merged_model_brings_its_threshold(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    args = resolve_decoding(EvalArguments(adapter_name=folder))
    tuned_for = thresholds._tuning_settings(args, ModelArguments(model_name=folder))
    kept = {"na_prob_thresh": 0.125, "calibration": {"scale": 0.5, "shift": -1.0}}
    write_json(Path(folder, THRESHOLD_FILE), kept | {"tuned_for": tuned_for})
    reader: Any = llama_squad.Reader(folder)
    found = reader._local._generator.constraint._abstention
    assert found == Abstention(0.125, Calibration(0.5, -1.0))


def test_what_was_read_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.txt").write_text("Ada met Bob.")
    asked = ["--model_name", "M/M", "--context", "page.txt"]
    for more in (["--html", "page.txt"], ["--html", "a.jsonl", "--output", "./a.jsonl"]):
        with pytest.raises(SystemExit, match="is named twice: it would be overwritten"):
            shell.main([*asked, *more, "Who?"])
    with (
        hold(Path(".a.jsonl.lock"), "a.jsonl", "--output"),
        pytest.raises(SystemExit, match=r"another process is writing a\.jsonl: wait for it"),
    ):
        shell.main([*asked, "--output", "a.jsonl", "Who?"])
    assert [path.name for path in tmp_path.iterdir()] == ["page.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name", "M"], "give questions, or a file of them"),
        (["When?"], "give --adapter_name"),
        (["--model_name", "M", "--n_best", "0", "When?"], "--n_best must be at least 1"),
        (["--model_name", "results/x", "When?"], "no folder results/x"),
        (["--model_name", "M/M", "--context", "nowhere.txt", "When?"], "cannot read nowhere.txt"),
        (["--model_name", "M/M", "--input", "no.jsonl"], "cannot read no.jsonl"),
        (["--model_name", "M/M", "--input", "q", "--context", "c"], "leave --context out"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        shell.main(flags)
    assert message in f"{ended.value}{capsys.readouterr().err}"
