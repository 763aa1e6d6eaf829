"""Chat with a model in the browser, and put questions about a text to it.

Reads the base model or an adapter, and the dataset folder for random questions (the page also works
without one); writes nothing. Replies are greedy and free, one token at a time as they stream:
``test_llama_squad.py`` searches with beams and holds answers to spans of the context.

    python app.py --adapter_name=results/final_checkpoints
    python app.py --model_name meta-llama/Meta-Llama-3-8B-Instruct --quantize
"""

import html
import itertools
import random
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llama_squad.answers import NO_ANSWER, Answer, extract_answer
from llama_squad.arguments import AppArguments, ModelArguments
from llama_squad.checks import check_at_least
from llama_squad.config import parse_stage
from llama_squad.folders import check_answering
from llama_squad.metrics import is_exact_match, score_answer
from llama_squad.prompts import Message
from llama_squad.stage import if_interrupted, next_command, run_stage

VISITORS = 8
"""Replies under way at a time, each with a key/value cache of its own; more wait in a queue."""
FAILED = "That did not work"
SPLITS = ("test", "val", "train")
PRIVATE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
#title h1 { font-size: 1.5rem; margin: 0; }
#title p { margin: .2rem 0 0; opacity: .7; overflow-wrap: anywhere; }
#chat .md { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .95rem; }
.card { --tone: #a1a1aa; border-left: 4px solid var(--tone); border-radius: 4px;
  background: color-mix(in srgb, var(--tone) 8%, transparent);
  padding: .6rem .9rem .7rem; overflow-wrap: anywhere; }
.card h2 { font-size: .85rem; font-weight: 500; margin: 0; opacity: .75; }
.card p { margin: .25rem 0 0; }
.card .span { font-size: 1.1rem; font-weight: 600; white-space: pre-wrap; }
.card .note { font-size: .9rem; opacity: .75; }
.card.good { --tone: #16a34a; } .card.bad { --tone: #dc2626; } .card.plain { --tone: #2563eb; }
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and serve the page until interrupted."""
    types = (AppArguments, ModelArguments)
    check = partial(check_flags, argv)
    try:
        with if_interrupted("the page is closed: the same command opens it again"):
            args, model_args = parse_stage(
                "app", types, argv, saved=_adapter_settings, description=__doc__, check=check
            )
            run(args, model_args)
    except ValueError as error:
        sys.exit(f"app.py: {error}")
    except OSError as error:  # the loaders' own are ValueErrors
        sys.exit(f"app.py: cannot serve {args.host}:{args.port}: give another --port ({error})")


def check_flags(argv: Sequence[str] | None, parsed: Sequence[Any]) -> None:
    """Check what can be checked before anything is loaded. Raises ValueError."""
    args, model_args = parsed
    check_at_least(0, args, "reasoning_tokens", "port")
    check_at_least(1, args, "max_new_tokens")
    train = next_command("train", argv, dataset_name=args.dataset_name)
    check_answering(args.adapter_name, model_args.model_name, model_args.chat_template, train)


def run(args: AppArguments, model_args: ModelArguments) -> None:
    """Load the model and serve the page."""
    import gradio

    from llama_squad import modeling
    from llama_squad.decoding.chat import ChatSession

    modeling.say_device()
    encoder = modeling.load_encoder(model_args, args.reasoning_tokens, args.adapter_name)
    model = modeling.load_model(model_args, args.quantize, args.adapter_name).eval()
    page = build(args, ChatSession(model, encoder, args, gradio.Info), model_args.model_name)
    serve(
        page, server_name=args.host, server_port=args.port, share=args.share,
        prevent_thread_lock=True,
    )  # fmt: skip
    while page.is_running:  # gradio's own wait would take Ctrl-C for a normal end
        time.sleep(0.2)


def _adapter_settings(parsed: Sequence[Any]) -> Mapping[str, Any]:
    from llama_squad.weights import saved_settings

    return saved_settings(parsed[0].adapter_name, parsed[1].model_name)


# The conversation ----------------------------------------------------------------------------


def answered_turns(history: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Read a chatbot's history: contents are strings, or the browser's lists of parts.

    A user turn without a reply (it was stopped, or failed) is left out, for templates want user and
    assistant in alternation.
    """
    messages = [{"role": str(m["role"]), "content": _plain_text(m["content"])} for m in history]
    return [
        message
        for user, reply in itertools.pairwise(messages)
        if user["role"] == "user" and reply["role"] == "assistant" and reply["content"]
        for message in (user, reply)
    ]


def _plain_text(content: Any) -> str:
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return html.unescape(content)


def as_shown(messages: Sequence[Message]) -> list[Message]:
    """Write messages for the chatbot, which takes them for HTML even without Markdown.

    Escaped, "</s>" is seen and not swallowed; ``answered_turns`` takes it back.
    """
    return [{**m, "content": html.escape(m["content"], quote=False)} for m in messages]


# The verdict ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a reply amounts to; None where there is nothing to compare with."""

    answer: Answer
    verbatim: bool | None  # the answer stands in the context, word for word
    right: bool | None  # strictly equal to a right answer
    f1: float | None  # the official F1, in [0, 1]


def judge(reply: str, context: str | None = None, golds: Sequence[str] | None = None) -> Verdict:
    """Judge a reply; ``golds`` are the right answers, [] if there is none in the context."""
    answer = extract_answer(reply)
    verbatim = right = f1 = None
    if context is not None and answer.state == "answer":
        verbatim = bool(answer.text.strip()) and answer.text in context
    if golds is not None:
        right = is_exact_match(answer, golds)
        f1 = score_answer(answer.official, golds)[1]
    return Verdict(answer, verbatim, right, f1)


def show_verdict(verdict: Verdict, free: bool = False) -> str:
    """Return the verdict as HTML; in free chat a reply without an answer is no fault."""
    answer, right = verdict.answer, verdict.right
    if free and answer.state == "malformed":
        return card(VERDICT_TITLE, note="none: free chat needs no JSON")
    notes = {
        "answer": {
            None: "an answer",
            True: "word for word in the context",
            False: "not in the context",
        }[verdict.verbatim],
        "no_answer": "abstained: the model finds no answer in the context",
        "malformed": 'malformed: the reply holds no JSON object with a text "answer"',
    }
    at_fault = right is False or verdict.verbatim is False or answer.state == "malformed"
    tone = "good" if right else "bad" if at_fault else "plain"
    score = {None: "", True: "right · ", False: f"wrong (F1 {verdict.f1 or 0:.0%}) · "}[right]
    return card(VERDICT_TITLE, [answer.text] * bool(answer.text), score + notes[answer.state], tone)


def show_golds(golds: Sequence[str]) -> str:
    """Return the right answers as HTML, each once."""
    note = "any of these counts" if len(set(golds)) > 1 else ""
    if not golds:
        note = "the context does not hold the answer: the model should abstain"
    return card(GOLD_TITLE, list(dict.fromkeys(golds)) or [f"no answer: {NO_ANSWER}"], note)


def card(title: str, spans: Sequence[str] = (), note: str = "", tone: str = "") -> str:
    """Return a small box as HTML; all texts are escaped."""
    lines = [f'<p class="span">{html.escape(span)}</p>' for span in spans]
    lines += [f'<p class="note">{html.escape(note)}</p>'] if note else []
    return f'<div class="card {tone}"><h2>{html.escape(title)}</h2>{"".join(lines)}</div>'


VERDICT_TITLE, GOLD_TITLE = "Answer in the reply", "Right answer"
NO_VERDICT = card(VERDICT_TITLE, note="stands here when the model has replied")
NO_GOLDS = card(GOLD_TITLE, note="known for random questions")


# The page ------------------------------------------------------------------------------------


def failed(error: Exception) -> str:
    """Tell the visitor what went wrong, in passing and by a card; the log has a fault's trace."""
    import gradio as gr

    if not isinstance(error, ValueError):  # those say what the visitor can do
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    gr.Warning(html.escape(message))
    return card(FAILED, note=message, tone="bad")


def draw(args: AppArguments) -> tuple[Any, ...]:
    """Draw a question of the dataset: of its test split, else of val or train.

    Returns what the page shows: context, question, the record, its right answers, no verdict.
    """
    import gradio as gr

    from llama_squad.data import load_squad

    try:
        dataset = load_squad(args.dataset_name)  # memory-mapped; it may have been made just now
        split = next((dataset[name] for name in SPLITS if len(dataset.get(name, ()))), None)
        if split is None:
            raise ValueError(f"{args.dataset_name} holds no question: build it anew")
        row = split[random.randrange(len(split))]
    except Exception as error:  # whatever failed, the page goes on
        return *[gr.skip()] * 3, failed(error), gr.skip()
    record = {name: row[name] for name in ("id", "context", "question", "answers")}
    golds = show_golds(row["answers"]["text"])
    return row["context"], row["question"], record, golds, NO_VERDICT


def known_golds(record: Any, context: str, question: str) -> list[str] | None:
    """Return the record's right answers, if context and question are still the record's own."""
    if record and (record["context"], record["question"]) == (context, question):
        return list(record["answers"]["text"])
    return None


def ask(
    talker: Any, context: str, question: str, record: Mapping[str, Any] | None
) -> Iterator[tuple[list[Message], str]]:
    """Stream the conversation about a question, and the verdict at its end."""
    messages: list[Message] = []
    try:
        if not context.strip() or not question.strip():
            raise ValueError("Fill in a context and a question first.")
        for messages in talker.ask(context, question):
            yield as_shown(messages), NO_VERDICT
    except Exception as error:  # whatever failed, the page goes on
        yield as_shown(messages), failed(error)
        return
    verdict = judge(messages[-1]["content"], context, known_golds(record, context, question))
    yield as_shown(messages), show_verdict(verdict)


def chat(
    talker: Any, message: str, history: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[Message], str, str]]:
    """Stream the conversation with one more turn, the verdict at its end, and "" for the input."""
    messages = before = answered_turns(history)
    try:
        if not message.strip():
            raise ValueError("Write a message first.")
        for messages in talker.converse(before, [message]):
            yield as_shown(messages), NO_VERDICT, ""
    except Exception as error:  # whatever failed, the page goes on
        yield as_shown(messages), failed(error), message
        return
    yield as_shown(messages), show_verdict(judge(messages[-1]["content"]), free=True), ""


def build(args: AppArguments, talker: Any, model_name: str) -> Any:
    """Return the page, a ``gradio.Blocks``; ``serve`` starts it."""
    import gradio as gr

    sending: Any = {
        False: {"submit_btn": "Send", "stop_btn": False},
        True: {"submit_btn": False, "stop_btn": "Stop"},
    }

    def busy(now: bool) -> list[Any]:
        button = gr.update(interactive=not now)
        return [button, button, gr.update(interactive=not now, **sending[now])]

    def forget(record: Any, context: str, question: str) -> Any:
        if record is None or known_golds(record, context, question) is not None:
            return gr.skip(), gr.skip()
        return None, NO_GOLDS

    with gr.Blocks(title="Llama SQuAD", analytics_enabled=False) as page:
        gr.HTML(header(args, model_name, talker.model.device.type), elem_id="title")
        record = gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                context = gr.Textbox(
                    label="Context", lines=9, max_lines=9,
                    placeholder="Paste a text, or draw a random question.",
                )  # fmt: skip
                question = gr.Textbox(label="Question", lines=1, max_lines=3)
                with gr.Row():
                    draw_button = gr.Button("Random question", min_width=120)
                    ask_button = gr.Button("Ask", variant="primary", min_width=120)
                golds, verdict = gr.HTML(NO_GOLDS), gr.HTML(NO_VERDICT)
            with gr.Column(scale=3, min_width=320):
                chatbot = gr.Chatbot(
                    label="Conversation", height=600, buttons=["copy", "copy_all"],
                    elem_id="chat", render_markdown=False, line_breaks=False,
                    placeholder="Ask about the text, or just chat.",
                )  # fmt: skip
                message = gr.Textbox(
                    label="Message", show_label=False, **sending[False],
                    placeholder="Write a message",
                )  # fmt: skip
        drawn = [context, question, record, golds, verdict]
        draw_button.click(
            partial(draw, args), None, drawn, api_name="random_question", show_progress_on=[golds]
        )
        for field in (context, question):
            field.change(forget, [record, context, question], [record, golds], **PRIVATE)
        controls, running = [draw_button, ask_button, message], []
        for trigger, reply, inputs, outputs in (
            ([ask_button.click, question.submit], ask, [context, question, record], []),
            ([message.submit], chat, [message, chatbot], [message]),
        ):
            start = gr.on(trigger, lambda: busy(True), None, controls, **PRIVATE)
            run = start.then(
                partial(reply, talker),
                inputs,
                [chatbot, verdict, *outputs],
                api_name=reply.__name__,
                show_progress="minimal",
                show_progress_on=[chatbot],
                concurrency_id="reply",
                concurrency_limit=VISITORS,
            )
            run.then(lambda: busy(False), None, controls, **PRIVATE)
            running.append(run)
        message.stop(lambda: busy(False), None, controls, cancels=running, **PRIVATE)
        chatbot.clear(lambda: NO_VERDICT, None, verdict, **PRIVATE)
    return page


def header(args: AppArguments, model_name: str, device: str) -> str:
    """Return the page's heading: what is talking, and how it is asked."""
    parts = [args.adapter_name or model_name]
    if args.adapter_name and args.adapter_name != model_name:
        parts.append(f"on {model_name}")
    parts += ["in 4 bits"] if args.quantize else []
    parts.append(f"{args.prompt} prompt · {device}")
    return f"<h1>Llama SQuAD</h1><p>{html.escape(' · '.join(parts))}</p>"


def serve(page: Any, **options: Any) -> Any:
    """Launch the page, with its looks; nothing on it comes from another machine."""
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return page.launch(
        theme=theme, css=CSS, ssr_mode=False, run_history=False, footer_links=[], **options
    )


if __name__ == "__main__":
    run_stage(main)
