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
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_squad.arguments import EvalArguments, ModelArguments, resolve_decoding
from llama_squad.checks import check_eval_flags, check_evaluation
from llama_squad.config import parse_stage
from llama_squad.stage import if_interrupted, next_command, run_stage

if TYPE_CHECKING:
    from llama_squad.predictors.base import Predictor


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    types = (EvalArguments, ModelArguments)
    check = partial(check_evaluation, argv)
    try:
        args, model_args = parse_stage(
            "test", types, argv, saved=adapter_settings, description=__doc__, check=check
        )
        args = resolve_decoding(args)
        check_eval_flags(args, model_args)
        again = "the same command without --overwrite" if args.overwrite else "the same command"
        with if_interrupted(f"the rows so far are kept in {args.output}: {again} goes on"):
            run(args, model_args)
    except ValueError as error:
        sys.exit(f"test_llama_squad.py: {error}")
    from llama_squad.processes import this_process  # late: it loads torch

    if this_process().is_main_process:
        print(f"Wrote {args.output}. Next: {next_command('summarize', argv, args.output)}")


def adapter_settings(parsed: Sequence[Any]) -> Mapping[str, Any]:
    """Return what trained weights bring: base model, prompt and reasoning tokens."""
    if parsed[0].predictor != "local":
        return {}
    from llama_squad.weights import saved_settings

    return saved_settings(parsed[0].adapter_name, parsed[1].model_name)


def run(args: EvalArguments, model_args: ModelArguments) -> None:
    """Answer, score and print."""
    from llama_squad.audit import AUDIT_BEAMS, audit
    from llama_squad.data import load_squad
    from llama_squad.evaluation import (
        begun_with,
        check_outputs,
        choose_records,
        evaluate,
        settings_of,
    )
    from llama_squad.processes import share, this_process
    from llama_squad.thresholds import load_threshold, tune_threshold

    check_outputs(args)
    dataset = load_squad(args.dataset_name)
    threshold = 1.0 if args.tune_threshold else load_threshold(args, model_args)
    model = load_predictor(args, model_args)
    if args.batch_size is None:
        size = begun_with(args)
        size = size or getattr(model(na_prob_thresh=threshold), "batch_size", 32)
        args = dataclasses.replace(args, batch_size=share(size))
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
    if args.audit and this_process().is_main_process:
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
