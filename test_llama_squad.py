"""Evaluate a model, an adapter, an API or an encoder on a split, and print the row of the table.

Reads the dataset folder and the model; writes ``--output`` (results/results.csv), one row per
question as it is known, so that a killed run goes on where it stopped. Several processes share the
work.

    python test_llama_squad.py --adapter_name=results/final_checkpoints --num_beams 10
    python test_llama_squad.py --model_name meta-llama/Llama-2-7b-chat-hf --decoding free
    python test_llama_squad.py --adapter_name=results/final_checkpoints --tune_threshold
    python test_llama_squad.py --predictor server --model_name gpt-4 --num_samples 1000 --shuffle
    python test_llama_squad.py --predictor encoder --model_name deepset/deberta-v3-large-squad2
    torchrun --nproc_per_node 8 test_llama_squad.py --adapter_name=results/final_checkpoints
"""

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llama_squad.arguments import EvalArguments, ModelArguments, resolve_decoding
from llama_squad.checks import check_evaluation
from llama_squad.config import parse_stage
from llama_squad.predictors.loading import adapter_settings, load_predictor
from llama_squad.stage import if_interrupted, next_command, run_stage


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    types = (EvalArguments, ModelArguments)
    check = partial(check_evaluation, argv)
    try:
        args, model_args = parse_stage(
            "test", types, argv, saved=adapter_settings, description=__doc__, check=check
        )
        args = resolve_decoding(args)
        again = "the same command without --overwrite" if args.overwrite else "the same command"
        with if_interrupted(f"the rows so far are kept in {args.output}: {again} goes on"):
            run(args, model_args)
    except ValueError as error:
        sys.exit(f"test_llama_squad.py: {error}")
    from llama_squad.processes import this_process  # late: it loads torch

    if this_process().is_main_process:
        print(f"Wrote {args.output}. Next: {next_command('summarize', argv, args.output)}")


def run(args: EvalArguments, model_args: ModelArguments) -> None:
    """Answer, score and print."""
    from llama_squad.calibration import Abstention
    from llama_squad.data import load_squad
    from llama_squad.evaluation import (
        begun_with,
        check_outputs,
        check_resumable,
        choose_records,
        evaluate,
        settings_of,
    )
    from llama_squad.processes import share
    from llama_squad.thresholds import load_abstention, tune_abstention

    check_outputs(args)
    dataset = load_squad(args.dataset_name)
    abstention = Abstention(1.0) if args.tune_threshold else load_abstention(args, model_args)
    records = choose_records(dataset[args.split], args)
    check_resumable(args, model_args, abstention, records)
    model = load_predictor(args, model_args)
    if args.batch_size is None:
        size = begun_with(args)
        size = size or getattr(model(**abstention.options), "batch_size", 32)
        args = dataclasses.replace(args, batch_size=share(size))
    assert args.batch_size is not None
    if args.tune_threshold:
        # held nowhere else, so that what it keeps of the weights is freed
        abstention = tune_abstention(model(**abstention.options), dataset["val"], args, model_args)
    evaluate(
        model(**abstention.options, n_best=max(1, args.n_best)),
        records,
        Path(args.output),
        settings_of(args, model_args, abstention, records),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        finish=partial(report, args),
    )


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
