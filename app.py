"""Put questions about a text to a model in the browser, talk with it, and correct its answers.

Reads the base model or an adapter, the dataset folder for random questions, and what is to be
reviewed (the page also works without either); appends verdicts to ``--feedback``, and writes
nothing else. Answers are found by span decoding, as in ``test_llama_squad.py``; the model also
speaks freely, greedily and one token at a time.

    python app.py --adapter_name=results/final_checkpoints
    python app.py --adapter_name=results/final_checkpoints --review results/results.csv
    python app.py --model_name meta-llama/Meta-Llama-3-8B-Instruct --quantize
"""

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from llama_squad.arguments import AppArguments, ModelArguments
from llama_squad.checks import check_at_least
from llama_squad.config import parse_stage
from llama_squad.folders import check_answering, check_file
from llama_squad.page.access import who_may_come_in
from llama_squad.stage import if_interrupted, next_command, run_stage

WAITING = 64
"""Visitors who may wait; the next is told that there is no room."""


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


def check_flags(argv: Sequence[str] | None, parsed: Sequence[Any]) -> None:
    """Check what can be checked before anything is loaded. Raises ValueError."""
    from llama_squad.durable import check_writable

    args, model_args = parsed
    check_at_least(0, args, "reasoning_tokens", "filler", "port")
    if args.port is not None and args.port > 65535:
        raise ValueError(f"--port must be at most 65535, not {args.port}")
    check_at_least(1, args, "max_new_tokens")
    check_file("--review", args.review)
    check_writable(args.feedback)
    who_may_come_in(args)
    train = next_command("train", argv, dataset_name=args.dataset_name)
    check_answering(args.adapter_name, model_args.model_name, model_args.chat_template, train)


def run(args: AppArguments, model_args: ModelArguments) -> None:
    """Load the model and serve the page."""
    import gradio

    from llama_squad.page import desk

    page = build(desk.load(args, model_args, gradio.Info))
    auth = who_may_come_in(args) or None
    try:
        serve(
            page, server_name=args.host, server_port=args.port, share=args.share, auth=auth,
            prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(
            f"cannot serve {args.host}:{args.port}: give another --port ({error})"
        ) from error
    while page.is_running:  # gradio's own wait would take Ctrl-C for a normal end
        time.sleep(0.2)


def _adapter_settings(parsed: Sequence[Any]) -> Mapping[str, Any]:
    from llama_squad.weights import saved_settings

    return saved_settings(parsed[0].adapter_name, parsed[1].model_name)


def build(desk: Any) -> Any:
    """Return the page, a ``gradio.Blocks``; ``serve`` starts it."""
    import gradio as gr

    from llama_squad.page.ask import AskTab
    from llama_squad.page.review import ReviewTab
    from llama_squad.page.style import header

    with gr.Blocks(title="Llama SQuAD", analytics_enabled=False) as page:
        gr.HTML(header(desk), elem_id="title")
        with gr.Tab("Ask"):
            AskTab(desk)
        with gr.Tab("Review"):
            ReviewTab(desk, page)
    return page.queue(max_size=WAITING)


def serve(page: Any, **options: Any) -> Any:
    """Launch the page, with its looks; nothing on it comes from another machine."""
    from llama_squad.page import style

    return page.launch(
        theme=style.theme(), css=style.CSS, ssr_mode=False, run_history=False, footer_links=[],
        **options,
    )  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
