"""Ask questions about a text from the shell; prints one JSON object per question.

    python -m llama_squad --adapter_name=results/final_checkpoints --context page.txt "Who?" "When?"
    cat page.txt | python -m llama_squad --adapter_name=results/final_checkpoints "When?"
    python -m llama_squad --adapter_name=results/final_checkpoints --input q.jsonl --output a.jsonl

``--input`` takes JSON lines with "question" and "context", SQuAD files, with answers or without,
CSV or parquet. The answers come as JSON lines, as they are known; with ``--output`` the same
command goes on where it stopped. ``--html FILE`` also writes the texts with their answers marked.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_squad import answer_page
from llama_squad.config import write_json
from llama_squad.durable import check_writable, hold, one_line_errors
from llama_squad.folders import THRESHOLD_FILE, check_weights
from llama_squad.results import config_path
from llama_squad.stage import if_interrupted, run_stage
from llama_squad.weights import weights_digest


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the questions of the command line, or of a file."""
    args = _parse(argv)
    try:
        questions = list(_questions(args))
        _check_files(args)
        with _alone(args.output):
            _run(args, questions)
    except ValueError as error:
        sys.exit(f"python -m llama_squad: {error}")


def _run(args: argparse.Namespace, questions: Sequence[dict[str, Any]]) -> None:
    """Answer what is not answered yet, and write the page where it is asked for."""
    done = _done(args.output)
    _check_same(questions, done, args.output)
    _check_settings(args, bool(done))
    todo = [q for q in questions if q["id"] not in done]
    if args.output:
        print(f"{len(done)} answers are there, {len(todo)} to come.", file=sys.stderr)
    if todo:
        kept = f"what was answered is kept in {args.output}: the same command goes on"
        with if_interrupted(kept if args.output else "nothing is kept"):
            done |= _answer(args, todo)
    if args.html:
        rows = [{**question, **done[question["id"]]} for question in questions]
        page = answer_page.render(rows)
        with one_line_errors(args.html):
            Path(args.html).write_text(page, "utf-8", "xmlcharrefreplace")


def _alone(output: str | None) -> contextlib.AbstractContextManager[None]:
    """Keep an output from being written by two runs at once."""
    if not output:
        return contextlib.nullcontext()
    path = Path(output)
    return hold(path.with_name(f".{path.name}.lock"), path, "--output")


def _check_files(args: argparse.Namespace) -> None:
    """Check that what is written can be, and takes the place of nothing that was read."""
    taken = {Path(path).resolve() for path in (args.context, args.input) if path and path != "-"}
    for path in filter(None, (args.output, args.html)):
        check_writable(path)
        if Path(path).resolve() in taken:
            raise ValueError(f"{path} is named twice: it would be overwritten, so name another")
        taken.add(Path(path).resolve())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m llama_squad", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("questions", nargs="*", metavar="QUESTION", help="Questions about the context.")
    add("--adapter_name", metavar="NAME", help="Adapter or merged model: a folder, or on the Hub.")
    add("--model_name", metavar="NAME", help="Chat model, or another base for the adapter.")
    add("--context", metavar="FILE", help="Text file (default: standard input).")
    add("--input", metavar="FILE", help="Questions with their contexts, instead.")
    add("--output", metavar="FILE", help="Append to this file (default: print).")
    add("--html", metavar="FILE", help="Write the texts with their answers marked, as a page.")
    add("--num_beams", type=int, metavar="N", help="Beams (default: 4).")
    add("--n_best", type=int, metavar="N", default=5, help="Spans to give per question (5).")
    add("--na_prob_thresh", type=float, metavar="X",
        help="No answer above it (default: tuned, or 0.5).")  # fmt: skip
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--quantize", action="store_true", help="Load the model in 4 bits.")
    args = parser.parse_args(argv)
    if bool(args.questions) == bool(args.input):
        parser.error("give questions, or a file of them with --input")
    if args.input and args.context:
        parser.error("--input brings the contexts of its questions: leave --context out")
    if not (args.adapter_name or args.model_name):
        parser.error("give --adapter_name (what was trained), or --model_name")
    for name, least in (("num_beams", 1), ("n_best", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, not {value}")
    if args.na_prob_thresh is not None and not 0 <= args.na_prob_thresh <= 1:
        parser.error(f"--na_prob_thresh is a probability, not {args.na_prob_thresh}")
    return args


def _questions(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is asked, with an id each; check names of models before anything is loaded."""
    from llama_squad.sources.records import HALF, as_text, has_surrogate

    cure = "give another folder, or a name on the Hub"
    check_weights("--adapter_name", args.adapter_name, cure)
    check_weights("--model_name", args.model_name, cure)
    if args.questions:
        context = _read(args.context or "-")
        for index, question in enumerate(args.questions):
            if has_surrogate(question):  # how Python reads bytes that are no UTF-8
                raise ValueError(f"{question!r} is no UTF-8 text")
            yield {"id": str(index), "question": question, "context": context}
        return
    from llama_squad.sources.formats import read_rows

    seen: set[str] = set()
    for row in read_rows(Path(args.input), answered=False):
        texts = {key: row.values.get(key) for key in ("question", "context")}
        if row.fault or not all(isinstance(t, str) and t.strip() for t in texts.values()):
            why = row.fault or "question and context must be texts, and not empty"
            raise ValueError(f"{args.input}, {row.place}: {why}")
        if any(has_surrogate(str(text)) for text in texts.values()):
            raise ValueError(f"{args.input}, {row.place}: {HALF}")
        id_ = as_text(row.values.get("id")) or row.place
        if id_ in seen:
            raise ValueError(f"{args.input}, {row.place}: id {id_} is there twice: name them apart")
        seen.add(id_)
        yield {"id": id_, **texts}
    if not seen:
        raise ValueError(f"{args.input} holds no questions: name another file")


def _read(path: str) -> str:
    from llama_squad.sources.formats import decode

    try:  # bytes: line ends stay as they are, or offsets would be of another text
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return decode(content, "the standard input" if path == "-" else path)


def _done(output: str | None) -> dict[str, dict[str, Any]]:
    """Return the answers that a file holds, by id; a last line that was cut off is dropped."""
    path = Path(output) if output else None
    if path is None or not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    torn = content[len(whole) :]
    try:
        answers = list(map(json.loads, whole.splitlines()))
        if not all({"question", "answer", "start", "end"} <= answer.keys() for answer in answers):
            raise ValueError("lines of another kind")
        if not torn.startswith(_LINE_START[: len(torn)]):
            raise ValueError("a last line of another kind")
        done = {answer["id"]: answer for answer in answers}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds other lines than answers: choose another --output"
        ) from error
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return done


_LINE_START = b'{"id": '


def _check_same(
    questions: Sequence[dict[str, Any]], done: dict[str, dict[str, Any]], output: str | None
) -> None:
    """Refuse a file that holds answers about another text, or to another question, by the id."""
    for question in questions:
        answer = done.get(question["id"])
        if answer is None:
            continue
        found = question["context"][answer["start"] or 0 : answer["end"] or 0] or None
        if (answer["question"], answer["answer"]) != (question["question"], found):
            raise ValueError(
                f"{output} holds the answer to another question, or about another text, under the "
                f"id {question['id']}: choose another --output"
            )


def _check_settings(args: argparse.Namespace, goes_on: bool) -> None:
    """Refuse a file whose answers another model gave, or the same with other flags; else note both.

    The note is ``OUTPUT.config.json``; a file without one is taken as it is.
    """
    if not args.output:
        return
    others = ("questions", "context", "input", "output", "html")
    settings = {name: value for name, value in vars(args).items() if name not in others}
    for name in ("adapter_name", "model_name"):
        settings[f"weights of {name}"] = weights_digest(settings[name])
    path = config_path(args.output)
    tuned = Path(args.adapter_name or args.model_name, THRESHOLD_FILE)
    with one_line_errors(path):
        content = tuned.read_bytes() if tuned.is_file() else b""
        settings["tuned threshold"] = hashlib.sha256(content).hexdigest()[:16]
        if goes_on and path.is_file():
            try:
                saved = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it") from error
            saved = settings | saved  # an older version's says less
            differ = [name for name in settings if settings[name] != saved[name]]
            if differ:
                raise ValueError(
                    f"{args.output} holds answers that were given with another {differ[0]} "
                    f"({saved[differ[0]]}): give the same again, or choose another --output"
                )
        write_json(path, settings)


def _answer(
    args: argparse.Namespace, questions: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Answer the questions, write each as it is known, and return the answers by id."""
    from llama_squad.modeling import choose_device
    from llama_squad.predictors.base import batch_paragraphs
    from llama_squad.reader import Reader, as_json

    choose_device()
    reader = Reader(
        args.adapter_name or args.model_name,
        model_name=args.model_name if args.adapter_name else None,
        num_beams=args.num_beams, n_best=args.n_best, na_prob_thresh=args.na_prob_thresh,
        quantize=args.quantize, dtype=args.dtype, merge=True,
    )  # fmt: skip
    done: dict[str, dict[str, Any]] = {}
    for batch in batch_paragraphs(questions, 32):
        records = [record for group in batch for record in group]
        answers = [
            {"id": q["id"], "question": q["question"], **as_json(r)}
            for q, r in zip(records, reader.read(records), strict=True)
        ]
        lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
        _write(args.output, "".join(f"{line}\n" for line in lines))
        done |= {answer["id"]: answer for answer in answers}
    return done


def _write(output: str | None, text: str) -> None:
    if output is None:
        print(text, end="", flush=True)
        return
    with one_line_errors(output):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with Path(output).open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    run_stage(main)
