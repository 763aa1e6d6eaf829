"""What is wrong with a command line: checks of flags, before anything is loaded.

They take the arguments of ``llama_squad.arguments``, and load no torch.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llama_squad.arguments import (
    EvalArguments,
    ModelArguments,
    SummarizeArguments,
    TrainArguments,
    TrainerArguments,
    resolve_decoding,
)
from llama_squad.folders import (
    check_answering,
    check_dataset,
    check_file,
    check_output,
    check_weights,
)
from llama_squad.result_reader import name_files
from llama_squad.stage import next_command

SERVER_FLAGS = (
    "base_url", "concurrency", "timeout", "temperature", "max_tokens_name", "structured_output"
)  # fmt: skip

LORA_FIELDS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"),
    "alora_from",
)
"""What an adapter's own configuration says of it."""

_OF_ADAPTERS = {
    *LORA_FIELDS,
    *("quantize", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "merged_dtype"),
}


def check_at_least(least: float, args: Any, *names: str) -> None:
    """Refuse a number that is too small; one that is None was not given.

    Raises:
        ValueError: the flag, the least it takes, and what was given.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:  # also refuses nan
            raise ValueError(f"--{name} must be at least {least}, not {value}")


def check_above_zero(args: Any, *names: str) -> None:
    """Refuse zero and less. Raises ValueError."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0, not {value}")


def check_training_numbers(args: TrainArguments, trainer: TrainerArguments) -> None:
    """Refuse numbers that no training can be run with. Raises ValueError."""
    check_at_least(0, args, "reasoning_tokens", "filler", "eval_samples", "show_mask")
    check_at_least(1, args, "lora_r", "row_tokens")
    check_above_zero(args, "lora_alpha")
    if not 0 <= args.chat_share < 1:
        raise ValueError(f"--chat_share must be at least 0 and below 1, not {args.chat_share}")
    check_at_least(0, args, "chat_kl")
    if args.chat_kl and not args.chat_share:
        raise ValueError("--chat_kl weighs plain chat, of which there is none: give --chat_share")
    if args.chat_kl and args.full_parameters:
        raise ValueError(
            "--chat_kl compares with the base, which is the model without its adapter: leave out "
            "--chat_kl or --full_parameters"
        )
    if args.loss_on == "all" and (args.filler or args.reasoning_tokens):
        raise ValueError(
            "--loss_on all would train the model to write filler and pauses: leave it out, or "
            "--filler and --reasoning_tokens"
        )
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"--lora_dropout must be at least 0 and below 1, not {args.lora_dropout}")
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    check_at_least(1, trainer, *sizes, "gradient_accumulation_steps", "max_length")
    check_at_least(0, trainer, "learning_rate")
    check_above_zero(trainer, "eval_steps", "logging_steps", "save_steps")
    if trainer.max_steps < 1 and trainer.max_steps != -1:
        raise ValueError(
            f"--max_steps must be at least 1, or -1 to go by epochs, not {trainer.max_steps}"
        )
    if trainer.max_steps == -1:
        check_above_zero(trainer, "num_train_epochs")


def check_adapter_flags(args: TrainArguments, given: Sequence[str]) -> None:
    """Refuse flags that mean nothing beside ``--full_parameters``, or without a merge.

    Args:
        args: as parsed.
        given: the words of the command line. A recipe's file may set what a flag takes no part in:
            flags beat the file.

    Raises:
        ValueError: the flags clash.
    """
    names = [w.split("=")[0][2:].replace("-", "_") for w in given if w.startswith("--")]
    if "merged_dtype" in names and not args.merge_and_push:
        raise ValueError("--merged_dtype needs --merge_and_push: nothing is merged without it")
    if args.from_adapter:
        kept = {*LORA_FIELDS, "reasoning_tokens"}  # whose row of the embedding is in the adapter
        brought = [f"--{name}" for name in names if name in kept]
        if args.full_parameters or brought:
            raise ValueError(
                f"--from_adapter goes on with the LoRA of {args.from_adapter} as it is: leave out "
                + (", ".join(brought) if brought else "--full_parameters")
            )
    if not args.full_parameters:
        check_activated(args)
        return
    clashing = [
        f"--{name}"
        for name in names
        if name in _OF_ADAPTERS and getattr(args, name, None) is not False
    ]
    if clashing:
        raise ValueError(
            "--full_parameters trains every weight, without LoRA or 4 bits, so "
            f"{', '.join(clashing)} would do nothing: leave out one or the other"
        )


def check_activated(args: TrainArguments) -> None:
    """Refuse what an activated adapter cannot do: one that acts from some token of its task on.

    With ``--from_adapter`` the arguments must hold what the adapter brings.

    Raises:
        ValueError: the flags clash.
    """
    if args.alora_from == "start":
        return
    own = "" if args.from_adapter else " or --alora_from"
    adapter = f"an adapter that acts from the {args.alora_from} on"
    if args.from_adapter:
        adapter = f"{args.from_adapter} acts from the {args.alora_from} on: such an adapter"
    if args.merge_and_push:
        raise ValueError(
            f"{adapter} cannot be merged, because merged weights act on every token: leave out "
            f"--merge_and_push{own} (--merge_and_push false, where the configuration has it)"
        )
    if args.chat_share:
        raise ValueError(
            f"{adapter} takes no part in plain chat, so --chat_share would train nothing: leave "
            f"out --chat_share{own}"
        )
    if args.loss_on == "all":
        raise ValueError(
            f"{adapter} takes no part in what stands before, so --loss_on all would train nothing "
            f"there: leave out --loss_on{own}"
        )
    if args.use_dora:
        raise ValueError(
            f"--use_dora scales what every token gives, so it cannot act from the "
            f"{args.alora_from} on alone: leave it or --alora_from out"
        )


def check_training(argv: Sequence[str], parsed: Sequence[Any]) -> None:
    """Check what can be checked before anything is loaded. Raises ValueError."""
    if "--help_all" in argv:  # which the parser with all flags takes
        return
    args, model_args, trainer = parsed
    if trainer.output_dir is None:
        raise ValueError("--output_dir is null: name a folder, or delete the line for the default")
    check_training_numbers(args, trainer)
    check_adapter_flags(args, argv)
    check_output("--model_name", model_args.model_name, trainer.output_dir)
    if args.from_adapter:
        check_output("--from_adapter", args.from_adapter, trainer.output_dir)
    if args.resume_anyway and not trainer.resume_from_checkpoint:
        raise ValueError(
            "--resume_anyway needs --resume_from_checkpoint: it changes how a run resumes"
        )
    create = next_command("create", argv, dataset_name=args.dataset_name)
    check_dataset(args.dataset_name, ["train"], create)
    another = "give another folder, or a name on the Hub"
    check_weights("--from_adapter", args.from_adapter, another)
    if not args.from_adapter:  # which brings its base
        check_weights("--model_name", model_args.model_name, another)
    check_file("--chat_template", model_args.chat_template)


def check_evaluation(argv: Sequence[str] | None, parsed: Sequence[Any]) -> None:
    """Check what can be checked before anything is loaded. Raises ValueError."""
    args, model_args = resolve_decoding(parsed[0]), parsed[1]
    check_eval_flags(args, model_args)
    create = next_command("create", argv, dataset_name=args.dataset_name)
    check_dataset(args.dataset_name, [args.split, *["val"] * args.tune_threshold], create)
    if args.predictor == "server":
        return
    train = next_command("train", argv, dataset_name=args.dataset_name)
    check_answering(args.adapter_name, model_args.model_name, model_args.chat_template, train)


def check_eval_flags(args: EvalArguments, model_args: ModelArguments) -> None:
    """Refuse flags that mean nothing together. Raises ValueError."""
    _check_local_flags(args, model_args)
    _check_server_flags(args)
    _check_span_flags(args)
    _check_threshold_flags(args)
    sizes = ("num_beams", "batch_size", "max_new_tokens", "num_samples", "concurrency")
    check_at_least(1, args, *sizes)
    for name in ("n_best", "reasoning_tokens", "filler"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative: 0 does without")
    if args.sample == "paragraphs" and (args.shuffle or args.num_samples is None):
        raise ValueError(
            "--sample paragraphs takes --num_samples questions at random: give their number, and "
            "leave --shuffle out"
        )


def _check_local_flags(args: EvalArguments, model_args: ModelArguments) -> None:
    server, encoder = (args.predictor == name for name in ("server", "encoder"))
    needs_local = {
        "--adapter_name": args.adapter_name,
        "--quantize": args.quantize,
        "--num_beams": args.num_beams != 1,
        "--length_penalty": args.length_penalty,
        "--span_boundaries": args.span_boundaries != "word",
        "--reasoning_tokens": args.reasoning_tokens,
        "--filler": args.filler,
        "--tune_threshold": args.tune_threshold,
        "--calibrate": args.calibrate,
        "--stop_after_answer": args.stop_after_answer,
        "--n_best": args.n_best,
        "--chat_template": model_args.chat_template,
        "--attn_implementation": model_args.attn_implementation,
        "--na_prob_thresh": server and args.na_prob_thresh is not None,
        "--batch_size": server and args.batch_size is not None,
        "--dtype": server and model_args.dtype != "auto",
        "--decoding free": encoder and args.decoding == "free",
        "--max_new_tokens": encoder and args.max_new_tokens != EvalArguments.max_new_tokens,
        f"--prompt {args.prompt}": encoder and args.prompt != "single_turn",
    }
    for flag, given in needs_local.items():
        if given and args.predictor != "local":
            what = f"{flag} means nothing to --predictor {args.predictor}"
            raise ValueError(f"{what}: leave it out, as a flag or in the configuration")


def _check_span_flags(args: EvalArguments) -> None:
    if args.stop_after_answer and args.decoding == "span":
        raise ValueError("--stop_after_answer needs --decoding free: spans end by themselves")
    needs_spans = {
        "--tune_threshold": args.tune_threshold,
        "--calibrate": args.calibrate,
        "--na_prob_thresh": args.na_prob_thresh is not None,
        "--n_best": args.n_best,
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


def _check_threshold_flags(args: EvalArguments) -> None:
    """Refuse thresholds that are none, or that clash. Raises ValueError."""
    if args.na_prob_thresh is not None and not 0 <= args.na_prob_thresh <= 1:
        raise ValueError(f"--na_prob_thresh is a probability, not {args.na_prob_thresh}")
    if args.tune_threshold and args.na_prob_thresh is not None:
        raise ValueError("--tune_threshold chooses what --na_prob_thresh sets: give one of them")
    if args.tune_for != "exact" and not args.tune_threshold:
        raise ValueError("--tune_for says what --tune_threshold tunes for: give both")
    share = args.no_answer_share
    if share is not None and not (args.tune_threshold and 0 < share < 1):
        raise ValueError(
            "--no_answer_share, between 0 and 1, is what --tune_threshold is to expect: give both"
        )
    if args.calibrate and not args.tune_threshold:
        raise ValueError("--calibrate moves na_prob, and so its threshold: give --tune_threshold")
    if args.tune_threshold and not (args.adapter_name and Path(args.adapter_name).is_dir()):
        raise ValueError(
            "--tune_threshold keeps the threshold in the adapter's folder: give a local "
            "--adapter_name, or choose a threshold with --na_prob_thresh"
        )


def _check_server_flags(args: EvalArguments) -> None:
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
        _check_url(args)


def _check_url(args: EvalArguments) -> None:
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


def check_summary(args: SummarizeArguments, argv: Sequence[str]) -> None:
    """Refuse what clashes, or no na_prob can be compared with. Raises ValueError.

    Other systems' files may hold any figure in the place of a probability, such as log-odds.
    """
    files = map(str, name_files(args.results).values())
    names = (*files, args.data, args.predictions, args.na_prob)
    if args.output and Path(args.output).resolve() in {Path(n).resolve() for n in names if n}:
        raise ValueError(f"--output {args.output} is read: name another file for the table")
    if args.paired and (args.predictions or len(args.results) < 2):
        raise ValueError("--paired compares result files with the first of them: give two or more")
    if args.predictions and {word.split("=")[0] for word in argv} & {"--intervals", "--results"}:
        raise ValueError(
            "--predictions scores one file of any system, without intervals: leave out --intervals "
            "and the result files"
        )
    threshold = args.na_prob_thresh
    if threshold is None or (args.predictions and not math.isnan(threshold)):
        return
    if not 0 <= threshold <= 1:
        raise ValueError(f"--na_prob_thresh is a probability, not {threshold}")
