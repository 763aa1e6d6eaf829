"""The model speaks freely: about the question, and on, turn by turn, with its adapter or not."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr

from llama_squad.page import talk
from llama_squad.page.desk import Desk

VISITORS = 8
"""Replies under way at a time, each with a key/value cache of its own; more wait in a queue."""

PRIVATE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
EMPTY: tuple[Any, ...] = ([[], []], [], [], "")
"""Values of ``Conversation.parts`` where nothing is said yet."""

WHO_CHATS = "The tuned model replies to the question. What is said after it, the base replies to."
"""Said where the adapter is not left on in chat."""


class Conversation:
    """The conversation's parts, and what happens when they are used. Build it in ``gr.Blocks``.

    Args:
        desk: the model.
        context, question: the fields that it speaks about.
        golds: the state of the right answers, where they are shown.
    """

    def __init__(self, desk: Desk, context: Any, question: Any, golds: Any) -> None:
        self.desk = desk
        self.about, self.golds = [context, question], golds
        self.talks = gr.State([[], []])
        self._draw()
        self.parts = [self.talks, *self.chats, self.judged]
        self._wire()

    def _draw(self) -> None:
        self.who = gr.Radio(
            [("the tuned model", "tuned"), ("its base: adapter off", "base"),
             ("both, side by side", "both")],
            value="tuned", label="Who speaks", visible=self.desk.has_adapter,
            info=None if self.desk.args.chat_adapter else WHO_CHATS,
        )  # fmt: skip
        self.speak = gr.Button("Let the model speak freely", size="md")
        first = "The tuned model" if self.desk.has_adapter else "Conversation"
        with gr.Row():
            self.chats = [
                gr.Chatbot(
                    label=label,
                    height=360,
                    min_width=320,
                    buttons=["copy", "copy_all"],
                    elem_classes="chat",
                    render_markdown=False,
                    line_breaks=False,
                    visible=visible,
                    placeholder="Let it answer the question, or just chat.",
                )
                for label, visible in ((first, True), ("The base model", False))
            ]
        self.message = gr.Textbox(
            show_label=False, label="Message", placeholder="Write a message", submit_btn="Send",
            stop_btn=False,
        )  # fmt: skip
        with gr.Row():
            self.explain = gr.Button("Explain your reasoning", size="sm", min_width=120)
            self.clear = gr.Button("Clear the conversation", size="sm", min_width=120)
        self.judged = gr.HTML("")

    def _wire(self) -> None:
        controls = [self.speak, self.explain, self.message]
        spoken = [*self.parts, self.message]
        running = []
        for triggers, reply, inputs, name in (
            ([self.speak.click], self.on_speak, [*self.about, self.golds, self.who], "speak"),
            ([self.message.submit], self.on_chat,
             [*self.about, self.message, self.talks, self.who], "chat"),
            ([self.explain.click], self.on_explain, [*self.about, self.talks, self.who], "explain"),
        ):  # fmt: skip
            start = gr.on(triggers, lambda: _busy(True), None, controls, **PRIVATE)
            run = start.then(
                reply, inputs, spoken, api_name=name, show_progress="minimal",
                show_progress_on=[self.judged], concurrency_id="reply", concurrency_limit=VISITORS,
            )  # fmt: skip
            run.then(lambda: _busy(False), None, controls, **PRIVATE)
            running.append(run)
        self.message.stop(lambda: _busy(False), None, controls, cancels=running, **PRIVATE)
        self.who.change(
            lambda who: (gr.update(visible=who != "base"), gr.update(visible=who != "tuned")),
            self.who, self.chats, **PRIVATE,
        )  # fmt: skip
        self.clear.click(lambda: EMPTY, None, self.parts, **PRIVATE)

    def on_speak(self, context: str, question: str, golds: Any, who: str) -> Iterator[Any]:
        """Stream the free reply to the question."""
        talks: list[talk.Talk] = [[], []]
        yield from self._stream(
            lambda: talk.speak(self.desk, context, question, golds, who), talks, context
        )

    def on_chat(
        self, context: str, question: str, said: str, talks: Any, who: str
    ) -> Iterator[Any]:
        """Stream one more turn of the conversation."""
        run = partial(talk.chat, self.desk, said, talks, who)
        yield from self._stream(run, talks, context, said)

    def on_explain(self, context: str, question: str, talks: Any, who: str) -> Iterator[Any]:
        """Ask for the reasons, as a turn of the conversation."""
        run = partial(talk.chat, self.desk, "Explain your reasoning.", talks, who)
        yield from self._stream(run, talks, context)

    def _stream(
        self, run: Callable[[], Iterator[talk.Update]], talks: list[talk.Talk], context: str,
        said: str = "",
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        def shown(talks: list[talk.Talk], judged: str, draft: str) -> tuple[Any, ...]:
            views = [talk.as_shown(t, context) for t in talks]
            return talks, *views, judged, draft

        try:
            for said_so_far, judged in run():
                talks = said_so_far
                yield shown(talks, judged, "")
        except Exception as error:  # whatever failed, the page goes on
            yield shown(talks, talk.failed(error), said)


def _busy(busy: bool) -> list[Any]:
    button = gr.update(interactive=not busy)
    sending: dict[str, Any] = {"submit_btn": False, "stop_btn": "Stop"} if busy else {
        "submit_btn": "Send", "stop_btn": False}  # fmt: skip
    return [button, button, gr.update(interactive=not busy, **sending)]
