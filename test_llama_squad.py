"""Evaluate a model, an adapter, an API or an encoder on a split, and print the row of the table.

Reads the dataset folder and the model; writes ``--output`` (results/results.csv), a row a question
as it is known, so that a killed run goes on where it stopped. Several processes share the work.

    python test_llama_squad.py --adapter_name=results/final_checkpoints --num_beams 10
    python test_llama_squad.py --model_name meta-llama/Llama-2-7b-chat-hf --decoding free
    python test_llama_squad.py --adapter_name=results/final_checkpoints --tune_threshold
    python test_llama_squad.py --predictor server --model_name gpt-4 --num_samples 1000 --shuffle
    python test_llama_squad.py --predictor encoder --model_name deepset/deberta-v3-large-squad2
    torchrun --nproc_per_node 8 test_llama_squad.py --adapter_name=results/final_checkpoints
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llama_squad.arguments import EvalArguments, ModelArguments, resolve_beams
from llama_squad.config import parse_stage
from llama_squad.folders import check_answering, check_dataset
from llama_squad.stage import if_interrupted, next_command, run_stage

if TYPE_CHECKING:
    from llama_squad.predictors.base import Predictor

SERVER_FLAGS = (
    "base_url", "concurrency", "timeout", "temperature", "max_tokens_name", "structured_output"
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    types = (EvalArguments, ModelArguments)
    check = partial(check_all, argv)
    try:
        args, model_args = parse_stage(
            "test", types, argv, saved=adapter_settings, description=__doc__, check=check
        )
        if args.predictor == "server":
            args = dataclasses.replace(args, decoding="free")  # it knows nothing of spans
        args = resolve_beams(args)
        check_flags(args, model_args)
        again = "the same command without --overwrite" if args.overwrite else "the same command"
        with if_interrupted(f"the rows so far are kept in {args.output}: {again} goes on"):
            run(args, model_args)
    except ValueError as error:
        sys.exit(f"test_llama_squad.py: {error}")
    if os.environ.get("RANK", "0") == "0":
        print(f"Wrote {args.output}. Next: {next_command('summarize', argv, args.output)}")


def check_all(argv: Sequence[str] | None, parsed: Sequence[Any]) -> None:
    """Check what can be checked before anything is loaded. Raises ValueError."""
    args, model_args = parsed
    if args.predictor == "server":
        args = dataclasses.replace(args, decoding="free")
    args = resolve_beams(args)
    check_flags(args, model_args)
    create = next_command("create", argv, dataset_name=args.dataset_name)
    check_dataset(args.dataset_name, [args.split, *["val"] * args.tune_threshold], create)
    if args.predictor == "server":
        return
    train = next_command("train", argv, dataset_name=args.dataset_name)
    check_answering(args.adapter_name, model_args.model_name, model_args.chat_template, train)


def adapter_settings(parsed: Sequence[Any]) -> Mapping[str, Any]:
    """Return what trained weights bring: base model, prompt and reasoning tokens."""
    if parsed[0].predictor != "local":
        return {}
    from llama_squad.modeling import saved_settings

    return saved_settings(parsed[0].adapter_name, parsed[1].model_name)


def check_flags(args: EvalArguments, model_args: ModelArguments) -> None:
    """Refuse flags that mean nothing together. Raises ValueError."""
    needs_local = {
        "--adapter_name": args.adapter_name,
        "--quantize": args.quantize,
        "--num_beams": args.num_beams != 1,
        "--length_penalty": args.length_penalty,
        "--span_boundaries": args.span_boundaries != "word",
        "--reasoning_tokens": args.reasoning_tokens,
        "--tune_threshold": args.tune_threshold,
        "--n_best": args.n_best,
        "--audit": args.audit,
        "--chat_template": model_args.chat_template,
        "--attn_implementation": model_args.attn_implementation,
        "--na_prob_thresh": args.predictor == "server" and args.na_prob_thresh is not None,
        "--batch_size": args.predictor == "server" and args.batch_size is not None,
        "--dtype": args.predictor == "server" and model_args.dtype != "auto",
        "--decoding free": args.predictor == "encoder" and args.decoding == "free",
        "--prompt multi_turn": args.predictor == "encoder" and args.prompt == "multi_turn",
    }
    for flag, given in needs_local.items():
        if given and args.predictor != "local":
            raise ValueError(
                f"{flag} means nothing to --predictor {args.predictor}: leave it "
                "out, as a flag or in the configuration"
            )
    check_server_flags(args)
    needs_spans = {
        "--tune_threshold": args.tune_threshold,
        "--na_prob_thresh": args.na_prob_thresh is not None,
        "--n_best": args.n_best,
        "--audit": args.audit,
        "--span_boundaries": args.span_boundaries != "word",
    }
    for flag, given in needs_spans.items():
        if given and args.decoding == "free":
            raise ValueError(f"{flag} needs --decoding span: free decoding weighs no spans")
    if args.length_penalty and (args.decoding == "span" or args.num_beams == 1):
        raise ValueError(
            "--length_penalty needs --decoding free and several --num_beams: nothing else weighs "
            "replies by their length"
        )
    check_threshold_flags(args)
    for name in ("num_beams", "batch_size", "max_new_tokens", "num_samples", "concurrency"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    for name in ("n_best", "audit", "reasoning_tokens"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative: 0 does without")
    if args.sample == "paragraphs" and (args.shuffle or args.num_samples is None):
        raise ValueError(
            "--sample paragraphs takes --num_samples questions at random: give their number, and "
            "leave --shuffle out"
        )


def check_threshold_flags(args: EvalArguments) -> None:
    """Refuse thresholds that are none, or that clash. Raises ValueError."""
    if args.na_prob_thresh is not None and not 0 <= args.na_prob_thresh <= 1:
        raise ValueError(f"--na_prob_thresh is a probability, not {args.na_prob_thresh}")
    if args.tune_threshold and args.na_prob_thresh is not None:
        raise ValueError("--tune_threshold chooses what --na_prob_thresh sets: give one of them")
    if args.tune_for != "exact" and not args.tune_threshold:
        raise ValueError("--tune_for says what --tune_threshold tunes for: give both")
    if args.tune_threshold and not (args.adapter_name and Path(args.adapter_name).is_dir()):
        raise ValueError(
            "--tune_threshold keeps the threshold in the adapter's folder: give a local "
            "--adapter_name, or choose a threshold with --na_prob_thresh"
        )


def check_server_flags(args: EvalArguments) -> None:
    """Refuse a server's flags without one, and values that no server takes. Raises ValueError."""
    defaults = EvalArguments()
    for name in SERVER_FLAGS:
        if args.predictor != "server" and getattr(args, name) != getattr(defaults, name):
            raise ValueError(f"--{name} needs --predictor server: no other is asked over a network")
    if not args.timeout > 0:
        raise ValueError(f"--timeout must be above 0 seconds, not {args.timeout}")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature must be a number from 0, not {args.temperature}")
    if args.base_url is not None:
        check_url(args)


def check_url(args: EvalArguments) -> None:
    """Refuse what is no address of a server, or holds a secret. Raises ValueError."""
    if any(mark in str(args.base_url) for mark in "@?#"):
        raise ValueError(
            "--base_url must hold no secret, as it is written beside the results: the key belongs "
            "into OPENAI_API_KEY"
        )
    try:
        url = urlsplit(str(args.base_url))
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of the host or the port
        good = False
    if not good or " " in url.netloc or url.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"--base_url is such as http://localhost:8000/v1, not {args.base_url!r}")


def run(args: EvalArguments, model_args: ModelArguments) -> None:
    """Answer, score and print."""
    from llama_squad.audit import AUDIT_BEAMS, audit
    from llama_squad.data import load_squad
    from llama_squad.evaluation import (
        Processes,
        begun_with,
        check_outputs,
        choose_records,
        evaluate,
        settings_of,
    )
    from llama_squad.thresholds import load_threshold, tune_threshold

    check_outputs(args)
    dataset = load_squad(args.dataset_name)
    threshold = 1.0 if args.tune_threshold else load_threshold(args, model_args)
    model = load_predictor(args, model_args)
    if args.batch_size is None:
        size = begun_with(args)
        size = size or getattr(model(na_prob_thresh=threshold), "batch_size", 32)
        args = dataclasses.replace(args, batch_size=Processes.join().share(size))
    assert args.batch_size is not None
    if args.tune_threshold:
        judge = model(na_prob_thresh=threshold)
        threshold = tune_threshold(judge, dataset["val"], args, model_args)
    records = choose_records(dataset[args.split], args)
    evaluate(
        model(na_prob_thresh=threshold, n_best=max(1, args.n_best)),
        records,
        Path(args.output),
        settings_of(args, model_args, threshold, records),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        finish=partial(report, args),
    )
    if args.audit and Processes.join().rank == 0:
        exhaustive = model(na_prob_thresh=1.0, num_beams=AUDIT_BEAMS)
        print(audit(model(na_prob_thresh=1.0), exhaustive, records, args))


def load_predictor(args: EvalArguments, model_args: ModelArguments) -> "Callable[..., Predictor]":
    """Load who answers; return what makes it for some options of ``Generator``.

    Raises:
        ValueError: it cannot be loaded.
    """
    from llama_squad import modeling
    from llama_squad.predictors.extractive import ExtractiveModel
    from llama_squad.predictors.local import LocalModel

    chat: dict[str, Any] = {
        "prompt": args.prompt,
        "system_prompt": args.system_prompt,
        "max_new_tokens": args.max_new_tokens,
    }
    if args.predictor == "server":
        from llama_squad.predictors.server import ServerModel

        server = ServerModel(
            model_args.model_name, args.base_url, temperature=args.temperature,
            timeout=args.timeout, concurrency=args.concurrency,
            max_tokens_name=args.max_tokens_name, structured_output=args.structured_output, **chat,
        )  # fmt: skip
        return lambda **_: server
    modeling.say_device()
    if args.predictor == "encoder":
        reader, tokenizer = modeling.load_reader(model_args)
        return lambda na_prob_thresh, **_: ExtractiveModel(reader, tokenizer, na_prob_thresh)
    encoder = modeling.load_encoder(model_args, args.reasoning_tokens, args.adapter_name)
    weights = modeling.load_model(model_args, args.quantize, args.adapter_name).eval()
    return partial(
        LocalModel, weights, encoder, decoding=args.decoding, num_beams=args.num_beams,
        length_penalty=args.length_penalty, span_boundaries=args.span_boundaries, **chat,
    )  # fmt: skip


def report(args: EvalArguments) -> None:
    """Print the row of the table; write the official files if asked."""
    from llama_squad.report import render_summaries
    from llama_squad.result_reader import iter_results
    from llama_squad.summary import summarize, write_official

    if args.predictions_dir:
        write_official(iter_results(args.output), args.predictions_dir)
    name = Path(args.adapter_name or args.output).name
    print("\n" + render_summaries({name: summarize(iter_results(args.output))}, "table"))


if __name__ == "__main__":
    run_stage(main)
