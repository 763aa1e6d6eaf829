"""Review: one question after the other, those most worth a look first; a key for each verdict.

Each verdict is on disk, in ``data/feedback.jsonl``, when the next question shows.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llama_squad.answers import NO_ANSWER, Answer
from llama_squad.feedback import exchange
from llama_squad.feedback.queue import Item
from llama_squad.feedback.verdicts import Kind
from llama_squad.page.ask import answer_card
from llama_squad.page.conversation import PRIVATE
from llama_squad.page.desk import Desk
from llama_squad.page.seat import Review, Seat, new_seat
from llama_squad.page.sources import Sources, signature
from llama_squad.page.style import card
from llama_squad.page.talk import failed, show_golds
from llama_squad.page.text import (
    MARKED_JS,
    bars_element,
    bars_value,
    keys_element,
    mark,
    text_element,
    text_value,
)
from llama_squad.reader import Reading

NAME = "review-text"
KEYS = (
    ("R", "right"), ("W", "wrong"), ("1–5", "pick that answer"), ("M", "the marked words"),
    ("N", "not answerable"), ("S", "skip"), ("U", "undo"),
)  # fmt: skip
NOTHING_LEFT = "Nothing is left to review here. Choose another source, or export what there is."


# The tab -------------------------------------------------------------------------------------


class ReviewTab:
    """The tab's parts, and what happens when they are used. Build it inside of ``gr.Blocks``."""

    def __init__(self, desk: Desk, page: Any) -> None:
        self.sources = Sources(desk)
        self.review = Review(desk, self.sources)
        self.seat = gr.State(new_seat)
        with gr.Row():
            names = self.sources.names()
            self.source = gr.Dropdown(
                names, value=names[0] if names else None, label="What to review", scale=3,
                min_width=200, elem_id="source",
            )  # fmt: skip
            self.reviewer = gr.Textbox(label="Your name", max_lines=1, scale=1, min_width=120)
            self.start = gr.Button("Start", variant="primary", scale=1, min_width=100)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.question = gr.HTML(card("Question", note="Press Start."))
                self.text = text_element(
                    NAME, "Text: select the right words, if others are right", selectable=True
                )
                self.note = gr.Textbox(label="Note, kept with the verdict", max_lines=2)
                with gr.Accordion("The dataset's answer", open=False):
                    self.golds = gr.HTML("")
            with gr.Column(scale=2, min_width=320):
                self._verdict_side()
        self.progress = gr.HTML("")
        self.marked = gr.Textbox(visible=False)  # filled by MARKED_JS
        with gr.Accordion("Files: your own questions, export, import", open=False):
            self._files_side()
        self._wire(page)

    def _verdict_side(self) -> None:
        self.card = gr.HTML("")
        self.bars = bars_element(NAME, "Other answers: a click, or its number, picks one")
        labels: Sequence[tuple[Kind, str, str]] = (
            ("right", "Right (R)", "key-r"), ("wrong", "Wrong (W)", "key-w"),
            ("marked", "Marked words (M)", "key-m"),
            ("unanswerable", "Not answerable (N)", "key-n"), ("skipped", "Skip (S)", "key-s"),
        )  # fmt: skip
        self.buttons: dict[Kind, Any] = {}
        for pair in (labels[:2], labels[2:4], labels[4:]):
            with gr.Row():
                for kind, label, key in pair:
                    self.buttons[kind] = gr.Button(label, elem_id=key, min_width=120, size="md")
                if pair == labels[4:]:
                    self.undo = gr.Button("Undo (U)", elem_id="key-u", min_width=120, size="md")
        keys_element(KEYS)

    def _files_side(self) -> None:
        with gr.Row():
            self.own = gr.UploadButton(
                "Review a file of my own", size="sm", min_width=140,
                file_types=[".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"],
            )  # fmt: skip
            self.take_in = gr.UploadButton(
                "Take in a labelled file", size="sm", min_width=140,
                file_types=[".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"],
            )  # fmt: skip
            self.export = gr.Button("Export as SQuAD 2.0", size="sm", min_width=140)
        self.exported = gr.File(label="Exported", interactive=False, visible=False)
        self.said = gr.HTML("")

    def _wire(self, page: Any) -> None:
        shown = [self.seat, self.question, self.text, self.card, self.bars, self.golds,
                 self.note, self.progress]  # fmt: skip
        options: dict[str, Any] = {
            "show_progress": "minimal", "show_progress_on": [self.question],
            "api_visibility": "private", "concurrency_id": "read", "concurrency_limit": 8,
        }  # fmt: skip
        page.load(_sign, None, self.reviewer, **PRIVATE)
        gr.on(
            [self.start.click, self.source.input], self.on_next, [self.seat, self.source], shown,
            **options,
        )  # fmt: skip
        said = [self.seat, self.note, self.reviewer]
        for kind, button in self.buttons.items():
            if kind == "marked":
                button.click(self.on_marked, [self.marked, *said], shown, js=MARKED_JS, **options)
            else:
                button.click(self.giver(kind), said, shown, **options)
        self.bars.select(self.on_pick, said, shown, **options)
        self.undo.click(self.on_undo, self.seat, shown, **options)
        self.own.upload(self.on_upload, self.own, [self.source, self.said], **PRIVATE)
        self.take_in.upload(self.on_import, [self.take_in, self.reviewer], self.said, **PRIVATE)
        self.export.click(self.on_export, None, [self.exported, self.said], **PRIVATE)

    # Each returns what the page shows next.

    def on_next(self, seat: Seat, source: str) -> tuple[Any, ...]:
        """Show the next question of a source."""
        return self._do(lambda: self.review.next(seat, source))

    def giver(self, kind: Kind) -> Callable[..., tuple[Any, ...]]:
        """Return what keeps a verdict of a kind, and shows the next question."""

        def on_give(seat: Seat, note: str, name: str, request: gr.Request) -> tuple[Any, ...]:
            return self._do(lambda: self.review.give(seat, kind, note, _signed(name, request)))

        return on_give

    def on_marked(
        self, marked: str, seat: Seat, note: str, name: str, request: gr.Request
    ) -> tuple[Any, ...]:
        """Keep that the marked words are right."""
        span, by = json.loads(marked or "null"), _signed(name, request)
        return self._do(lambda: self.review.give(seat, "marked", note, by, marked=span))

    def on_pick(
        self, seat: Seat, note: str, name: str, event: gr.EventData, request: gr.Request
    ) -> tuple[Any, ...]:
        """Keep that another of the model's spans is right."""
        rank, by = int(event._data["rank"]), _signed(name, request)
        return self._do(lambda: self.review.give(seat, "picked", note, by, rank=rank))

    def on_undo(self, seat: Seat) -> tuple[Any, ...]:
        """Take the last verdict back."""
        return self._do(lambda: self.review.undo(seat))

    def on_upload(self, path: str) -> tuple[Any, ...]:
        """Add a file of the reviewer's own to what can be reviewed."""
        try:
            name = self.sources.add(path)
        except Exception as error:  # whatever failed, the page goes on
            return gr.skip(), failed(error)
        number = len(self.sources.get(name))
        note = f"{number:,} questions of {name}: press Start."
        return gr.update(choices=self.sources.names(), value=name), card("Taken", note=note)

    def on_import(self, path: str, name: str, request: gr.Request) -> str:
        """Take the answers of a labelled file for verdicts."""
        try:
            new, there = exchange.import_file(path, self.review.path, _signed(name, request))
        except Exception as error:  # whatever failed, the page goes on
            return failed(error)
        return card("Taken in", note=f"{new:,} answers; {there:,} were there already.")

    def on_export(self) -> tuple[Any, ...]:
        """Write the questions with an answer, and where they come from, to download."""
        folder = Path(tempfile.mkdtemp(prefix="feedback-"))
        path = folder / "feedback.json"
        try:
            number = exchange.export(self.sources.feedback.read(), path)
        except Exception as error:  # whatever failed, the page goes on
            return gr.skip(), failed(error)
        files = [str(path), str(exchange.provenance_path(path))]
        note = f"{number:,} questions with their answers, and whose they are."
        return gr.update(value=files, visible=True), card("Exported", note=note)

    def _do(self, step: Any) -> tuple[Any, ...]:
        """Take a step; where that fails, all stays as it is but for a message."""
        try:
            seat = step()
            progress = self.review.progress(seat)
        except Exception as error:  # whatever failed, the page goes on
            failed(error)
            return tuple([gr.skip()] * 8)
        return (seat, *show(seat), "", f'<p class="keys">{progress}</p>')


def _sign(request: gr.Request) -> Any:
    """Fill in who reviews; whoever logged in stays who they are."""
    return gr.update(value=signature(request), interactive=not request.username)


def _signed(name: str, request: gr.Request) -> str:
    """Return who says so: whoever logged in, whatever the page sends as a name."""
    return request.username or name


def show(seat: Seat) -> tuple[Any, ...]:
    """Return question, text, answer, bars and the dataset's answer."""
    if seat.item is None or seat.reading is None or seat.answer is None:
        tone = "bad" if seat.fault else "plain"
        nothing = card("Question", note=seat.fault or NOTHING_LEFT, tone=tone)
        return nothing, text_value(NAME, ""), "", {"name": NAME, "bars": []}, ""
    record, answer = seat.item.record, seat.answer
    golds = record.get("answers")
    known = show_golds(golds["text"]) if golds else card("", note="The file gives none.")
    return (
        card(
            record["title"].replace("_", " ") or "Question",
            [record["question"]],
            why_here(seat.item, answer),
        ),
        text_value(NAME, record["context"], mark(answer), selectable=True, about=seat.item.key),
        answer_card(answer, None, "The model's answer"),
        bars_value(NAME, seat.reading, answer, pick=True),
        known,
    )


def why_here(item: Item, answer: Reading) -> str:
    """Say why a question is shown, and where the model answers otherwise than its result file.

    In 16 bits it does so near the threshold: there it read all questions of a text in one pass,
    and sums round otherwise.
    """
    why = f"Here because {item.doubt.why or 'it comes next'}."
    said = item.said
    if said is None or said == _as_answer(answer):
        return why
    held = {"answer": f"the answer “{said.text}”", "no_answer": "no answer"}
    return f"{why} The result file holds {held.get(said.state, 'no readable answer')}."


def _as_answer(reading: Reading) -> Answer:
    found = reading.answer
    return Answer("no_answer", NO_ANSWER) if found is None else Answer("answer", found)
