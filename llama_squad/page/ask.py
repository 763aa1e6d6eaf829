"""Ask: a text and a question in; the answer marked in the text, how sure it is, and what else.

The threshold re-decides without the model. Below, the model speaks freely (``conversation.py``).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from llama_squad.answers import NO_ANSWER, Answer
from llama_squad.metrics import is_exact_match
from llama_squad.page import talk
from llama_squad.page.conversation import EMPTY, PRIVATE, VISITORS, Conversation
from llama_squad.page.desk import Desk, check_length, decide
from llama_squad.page.sources import record_of
from llama_squad.page.style import card, percent
from llama_squad.page.text import bars_element, bars_value, mark, text_element, text_value
from llama_squad.reader import Reading

SPLITS = ("test", "val", "train")
ANSWER_TITLE = "Answer"
NO_READING = card(ANSWER_TITLE, note="stands here, and is marked in the text, once you ask")
NO_GOLDS = ""
NAME = "ask-text"
PROMPT_SHOWN = 20_000
"""Characters of a text to show in its prompt."""

EXAMPLES = {
    "A year": (
        "The mill at Harrow Bridge opened in 1912 and ground flour for the whole valley. It closed "
        "in 1954, when the railway came, and is a museum today.",
        "When did the mill close?",
    ),
    "A name": (
        "Lily lived by the sea with a cat named Tom. Her brother Sam kept bees on the hill.",
        "Who kept bees?",
    ),
    "Not in the text": (
        "Lily lived by the sea with a cat named Tom. Her brother Sam kept bees on the hill.",
        "How old was the cat?",
    ),
}


# What the handlers do ------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What was asked last, and what the model reads there; never abstaining."""

    record: Mapping[str, Any]
    reading: Reading
    base: Reading | None = None


def read(desk: Desk, context: str, question: str, compare: bool) -> Asked:
    """Put a question to the model, and to its base where asked. Raises ValueError."""
    record = {"context": context, "question": question}
    check_length(context, question)
    (reading,) = desk.read([record])
    if reading.failure:
        raise ValueError(f"This question cannot be asked: {reading.failure}.")
    base = desk.read([record], base=True)[0] if compare and desk.has_adapter else None
    return Asked(record, reading, base)


def show(asked: Asked | None, threshold: float, golds: Sequence[str] | None) -> tuple[Any, ...]:
    """Return the card, the marked text and the bars at a threshold; no model is asked."""
    if asked is None:
        return NO_READING, text_value(NAME, ""), {"name": NAME, "bars": []}
    answer = decide(asked.reading, threshold)
    cards = answer_card(answer, golds)
    marks = mark(answer)
    if asked.base is not None:
        base = decide(asked.base, threshold)
        cards += answer_card(base, golds, "Answer of the base model")
        marks = mark(base, "base") + marks
    text = text_value(NAME, asked.record["context"], marks)
    return cards, text, bars_value(NAME, asked.reading, answer)


def answer_card(answer: Reading, golds: Sequence[str] | None, title: str = ANSWER_TITLE) -> str:
    """Return an answer as HTML: how sure it is, and whether it is right where that is known."""
    there = "" if answer.na_prob is None else percent(1 - answer.na_prob)
    note = f"{there} likely that the text holds an answer" if there else ""
    tone = "plain"
    if golds is not None:
        text = NO_ANSWER if answer.answer is None else answer.answer
        state: Any = "no_answer" if answer.answer is None else "answer"
        right = is_exact_match(Answer(state, text), golds)
        tone = "good" if right else "bad"
        note = ("right" if right else "wrong") + f" · {note}" * bool(note)
    return card(title, [answer.answer or "The text does not say."], note, tone)


def draw(desk: Desk) -> dict[str, Any]:
    """Draw a question of the dataset's test split, else of val or train. Raises ValueError."""
    from llama_squad.data import load_squad

    name = desk.args.dataset_name
    dataset = load_squad(name)  # memory-mapped; it may have been made just now
    split = next((dataset[s] for s in SPLITS if len(dataset.get(s, ()))), None)
    if split is None:
        raise ValueError(f"{name} holds no question: build it anew")
    row = split[random.randrange(len(split))]
    return record_of(row)


# The tab -------------------------------------------------------------------------------------


class AskTab:
    """The tab's parts, and what happens when they are used. Build it inside of ``gr.Blocks``."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.record, self.asked, self.golds, self.drawn = (gr.State() for _ in range(4))
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._question_side()
            with gr.Column(scale=2, min_width=320):
                self._answer_side()
        self.talk = Conversation(desk, self.context, self.question, self.golds)
        self._wire()

    def _question_side(self) -> None:
        self.context = gr.Textbox(
            label="Text", lines=10, max_lines=14, elem_id="context",
            placeholder="Paste a text, take an example, or draw a random question.",
        )  # fmt: skip
        self.text = text_element(NAME, "Text, with the answer marked", visible=False)
        self.edit = gr.Button("Edit the text", size="sm", visible=False)
        self.question = gr.Textbox(label="Question (Enter asks)", lines=1, max_lines=3)
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", min_width=100)
            self.draw = gr.Button("Random question", min_width=100)
        with gr.Row():
            self.examples = [gr.Button(label, size="sm", min_width=90) for label in EXAMPLES]
        with gr.Accordion("The prompt, as the model reads it", open=False):
            self.prompt = gr.Textbox(show_label=False, lines=4, max_lines=16, interactive=False)

    def _answer_side(self) -> None:
        self.card = gr.HTML(NO_READING)
        self.bars = bars_element(NAME, "The likeliest answers: touch one to see it in the text")
        self.threshold = gr.Slider(
            0, 1, self.desk.threshold, step=0.001, label="No-answer threshold",
            info="The model says nothing where “no answer” is likelier than this.",
        )  # fmt: skip
        self.compare = gr.Checkbox(
            label="Ask the base model, too", visible=self.desk.has_adapter, container=False
        )
        self.reveal = gr.Button("Show the right answer", size="sm", visible=False)
        self.right = gr.HTML(NO_GOLDS)

    def _wire(self) -> None:
        shown = [self.card, self.text, self.bars]
        views = [self.context, self.text, self.edit]
        once = {"concurrency_id": "read", "concurrency_limit": VISITORS, "show_progress": "minimal"}
        gr.on(
            [self.ask.click, self.question.submit], self.on_ask,
            [self.context, self.question, self.threshold, self.compare, self.golds],
            [*shown, self.asked, self.prompt, self.context, self.edit],
            api_name="ask", show_progress_on=[self.card], **once,
        )  # fmt: skip
        self.threshold.input(
            show, [self.asked, self.threshold, self.golds], shown, **PRIVATE,
            trigger_mode="always_last",
        )  # fmt: skip
        self.edit.click(lambda: _editing(True), None, views, **PRIVATE)
        cleared = [*shown, self.asked, self.golds, self.right, self.reveal, *self.talk.parts]
        cleared += [self.prompt, self.context, self.edit]
        drawn = [self.context, self.question, self.record]
        self.draw.click(
            self.on_draw, None, [*drawn, self.right, self.drawn], api_name="random_question",
            show_progress_on=[self.context],
        ).success(self.on_drawn, [self.record, self.drawn], cleared, **PRIVATE)  # fmt: skip
        for button, example in zip(self.examples, EXAMPLES.values(), strict=True):
            button.click(partial(lambda pair: (*pair, None), example), None, drawn, **PRIVATE).then(
                self.on_drawn, self.record, cleared, **PRIVATE
            )
        self.reveal.click(
            self.on_reveal, [self.record, self.asked, self.threshold],
            [self.right, self.golds, self.reveal, *shown], api_name="right_answer",
            show_progress="hidden",
        )  # fmt: skip
        for field in (self.context, self.question):
            field.change(
                self.on_edit, [self.record, self.context, self.question],
                [self.record, self.right, self.golds, self.reveal], **PRIVATE,
            )  # fmt: skip

    def on_ask(
        self, context: str, question: str, threshold: float, compare: bool, golds: Any
    ) -> tuple[Any, ...]:
        """Read; where that fails, all stays as it is but for a message."""
        try:
            asked = read(self.desk, context, question, compare)
            prompt = self.desk.prompt_text(context[:PROMPT_SHOWN], question)
            if len(context) > PROMPT_SHOWN:
                prompt += f"\n\n(Here with the first {PROMPT_SHOWN:,} characters of the text.)"
        except Exception as error:  # whatever failed, the page goes on
            talk.failed(error)
            return tuple([gr.skip()] * 7)
        cards, text, bars = show(asked, threshold, golds)
        hidden, marked, edit = _editing(False)
        return cards, gr.update(value=text, **marked), bars, asked, prompt, hidden, edit

    def on_draw(self) -> tuple[Any, ...]:
        """Draw a random question; its right answer stays hidden."""
        try:
            record = draw(self.desk)
        except Exception as error:  # whatever failed, the page goes on
            return *[gr.skip()] * 3, talk.failed(error), False
        return record["context"], record["question"], record, NO_GOLDS, True

    def on_drawn(self, record: Any, drawn: bool = True) -> tuple[Any, ...]:
        """Clear what the last question left; nothing where none was drawn."""
        if not drawn:
            return tuple([gr.skip()] * (10 + len(EMPTY)))
        cards, text, bars = show(None, 0.0, None)
        hidden, marked, edit = _editing(True)
        reveal = gr.update(visible=record is not None)
        return (
            cards, gr.update(value=text, **marked), bars, None, None, NO_GOLDS, reveal, *EMPTY,
            "", hidden, edit,
        )  # fmt: skip

    def on_reveal(self, record: Any, asked: Asked | None, threshold: float) -> tuple[Any, ...]:
        """Show the right answers, and judge what was answered."""
        if not record:
            return tuple([gr.skip()] * 6)
        golds = list(record["answers"]["text"])
        shown = show(asked, threshold, golds)
        return talk.show_golds(golds), golds, gr.update(visible=False), *shown

    def on_edit(self, record: Any, context: str, question: str) -> tuple[Any, ...]:
        """Forget the right answers of a question that is another now."""
        if record is None or talk.known_golds(record, context, question) is not None:
            return tuple([gr.skip()] * 4)
        return None, NO_GOLDS, None, gr.update(visible=False)


def _editing(editing: bool) -> tuple[Any, Any, Any]:
    """Return what shows the text to edit, or the marked one in its place, and the edit button."""
    return (
        gr.update(visible=editing), {"visible": not editing}, gr.update(visible=not editing),
    )  # fmt: skip
