"""Checkpoints of a training: which one is complete, and whether a run may go on from it.

A resumed run skips what the checkpoint's run had seen. Laid out anew, by another batch size, data
set or number of processes, the same places hold other questions: so each checkpoint carries what
its run was made with, and a run that goes on from it is compared with that first.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_squad.config import load_run_config
from llama_squad.encoding import ChatEncoder
from llama_squad.processes import this_process
from llama_squad.weights import weights_digest

RUN_RECORD = "resume"
"""Where in a checkpoint's saved configuration its run's record stands."""

_START_ANEW = "leave --resume_from_checkpoint out to start anew"

_QUESTIONS = ["id", "title", "context", "question", "answers"]

# Of the run's own arguments: what decides neither the rows nor the weights.
_OF_NO_MATTER = {
    *("dataset_name", "eval_samples", "merge_and_push", "merged_dtype", "show_mask"),
    *("resume_anyway", "chat_template", "attn_implementation"),
}
# Of the trainer's: what decides which questions a step holds, or how a step moves the weights.
_OF_TRAINER = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed"),
    *("data_seed", "train_sampling_strategy", "dataloader_drop_last", "accelerator_config"),
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16"),
    *("average_tokens_across_devices", "optim_target_modules", "fsdp", "deepspeed"),
)
# These come back with the optimizer's saved state, whatever the flag says.
_OF_OPTIMIZER = (
    *("optim", "optim_args", "learning_rate", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)
_OF_SHAPE = ("full_parameters", "lora_r", "lora_target_modules", "use_dora")
_OF_4BIT = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


# Finding one -----------------------------------------------------------------------------------


def find_checkpoint(
    asked: str | None, output_dir: str, record: Mapping[str, Any] | None = None
) -> str | None:
    """Return the checkpoint to resume from; "latest" and "auto" are the last complete one.

    Where a ``record`` is given, the last one of runs like this; of other runs if there is none.

    Raises:
        ValueError: there is none, and "auto" was not asked for.
    """
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() in ("latest", "true", "auto"):
        found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name[11:].isdigit()]
    else:
        found = [Path(asked)]
    complete = [path for path in found if _is_complete(path)]
    if not complete and asked.lower() == "auto":
        return None
    if not complete:
        raise ValueError(
            f"no complete checkpoint in {output_dir if len(found) != 1 else found[0]}: "
            f"{_START_ANEW}"
        )
    if len(complete) == 1:  # of any name
        return str(complete[0])
    if record is not None:  # a longer run may have used the folder before
        complete = [path for path in complete if _is_like(path, record)] or complete
    return str(max(complete, key=lambda path: int(path.name[11:])))


def own_checkpoint(last: str, sft_args: Any, record: Mapping[str, Any]) -> str:
    """Return the checkpoint of a run like this, ``last`` where there is none; note it, and say so.

    ``sft_args`` names it from then on, also where the run is interrupted.
    """
    found = find_checkpoint(sft_args.resume_from_checkpoint, sft_args.output_dir, record)
    sft_args.resume_from_checkpoint = found
    if found != last and this_process().is_main_process:
        print(f"Going on from {found}: {last} is another run's.")
    return found or last


def newest_checkpoint(output_dir: str, since: float) -> str | None:
    """Return the checkpoint that was completed last, if that was after ``since`` (Unix time, s)."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _is_complete(path)]
    times = {path: (path / "trainer_state.json").stat().st_mtime for path in found}
    newest = max(times, key=times.__getitem__, default=None)
    return str(newest) if newest and times[newest] >= since else None


def _is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end: the trainer writes its state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


# Comparing it with this run --------------------------------------------------------------------


def run_record(
    settings: Mapping[str, Any], train: Any, encoder: ChatEncoder, processes: int
) -> dict[str, Any]:
    """Return what decides a run's rows and steps, as JSON has it.

    Data, tokenizer, template, a local model and adapter are told by their content, whatever
    their names.

    Args:
        settings: see ``llama_squad.training.publishing.run_settings``.
        train: the training split, as it was written.
        encoder: of its messages.
        processes: how many train.
    """
    own = dataclasses.asdict(settings["train"]) | dataclasses.asdict(settings["model"])
    trainer = settings["trainer"]
    record = {name: value for name, value in own.items() if name not in _OF_NO_MATTER}
    record |= {name: trainer[name] for name in (*_OF_TRAINER, *_OF_OPTIMIZER) if name in trainer}
    record["lora_target_modules"] = sorted(record["lora_target_modules"])
    for name in _without_effect(record):
        del record[name]
    record |= {
        **tokenizer_digests(encoder),
        "processes": processes,
        "prompt": settings.get("prompt"),
        "system_prompt": settings.get("system_prompt"),
        "questions": _digest_rows(train.select_columns(_QUESTIONS)),
        "messages": _digest_rows(train.select_columns(["messages"])),
        "weights": weights_digest(record["model_name"]),
        "adapter": weights_digest(record["from_adapter"]),
    }
    return json.loads(json.dumps(record, default=str))


def tokenizer_digests(encoder: ChatEncoder) -> dict[str, str]:
    """Return digests of what makes ids of a conversation."""
    backend = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # of its last use
    template = encoder.tokenizer.chat_template
    return {"tokenizer": digest(backend), "chat_template": digest(template)}


def _without_effect(record: Mapping[str, Any]) -> list[str]:
    """Return the settings that others of the same run make meaningless."""
    names = ["num_train_epochs"] if record["max_steps"] > 0 else []
    if record["full_parameters"]:
        names += [name for name in record if name.startswith("lora_")]
        names += ["use_rslora", "use_dora", "quantize", "alora_from"]
    if record["full_parameters"] or not record["quantize"]:
        names += _OF_4BIT
    return [*names, *([] if record["share_context"] else ["row_tokens"])]


def digest(content: Any) -> str:
    """Return a short digest of anything that JSON can hold."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _digest_rows(split: Any) -> str:
    """Digest a split's content, in one order of columns, however its files hold it."""
    batches = split.with_format("arrow").iter(1000)
    return digest(
        [digest([_plain(batch[name]) for name in split.column_names]) for batch in batches]
    )


def _plain(column: Any) -> Any:
    """Return an Arrow column's content; several times as fast as with an object per row."""
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_list(array.type):
        return [array.value_lengths().to_pylist(), _plain(array.flatten())]
    if pa.types.is_struct(array.type):
        return [_plain(field) for field in array.flatten()]
    return array.to_pylist()


def check_resume(checkpoint: str | None, record: Mapping[str, Any], anyway: bool) -> list[str]:
    """Compare a run with that of the checkpoint that it is to go on from.

    Args:
        checkpoint: its folder, or None where the run starts anew: then all is well.
        record: of this run, or a part of it.
        anyway: go on where that is possible at all, and only say what differs.

    Returns:
        the differences that were passed over.

    Raises:
        ValueError: the settings differ, each one named, or the checkpoint's are not known.
    """
    if checkpoint is None:
        return []
    saved = load_run_config(checkpoint).get(RUN_RECORD)
    if saved is None:
        differences, fixed = ["it does not say what it was made with"], []
    else:
        names = _differing(saved, record)
        differences = [_describe(name, saved, record) for name in names]
        fixed = [name for name in names if _is_fixed(name, saved, record)]
        # DeepSpeed's has a place of its own
        if not any(map(any, map(Path(checkpoint).glob, ("scheduler.pt", "global_step*")))):
            differences.append("neither optimizer nor schedule was saved: --save_only_model")
    made = f"{checkpoint} was made with other settings ({'; '.join(differences)})"
    if fixed:
        raise ValueError(
            f"{made}, and its weights and optimizer go with its own {', '.join(fixed)}: give those "
            f"of the checkpoint, or {_START_ANEW}"
        )
    if differences and not anyway:
        raise ValueError(
            f"{made}, so going on would skip other questions than it has seen, or follow another "
            "schedule: give those of the checkpoint, --resume_anyway to go on with these, or "
            f"{_START_ANEW}"
        )
    if differences and this_process().is_main_process:
        print(f"Going on from {checkpoint} with other settings: {'; '.join(differences)}.")
    return differences


def _is_like(checkpoint: Path, record: Mapping[str, Any]) -> bool:
    try:
        saved = load_run_config(checkpoint).get(RUN_RECORD)
    except ValueError:  # damaged
        return False
    return saved is not None and not _differing(saved, record)


def _differing(saved: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ, but not those that only follow from others."""
    names = [name for name in record if name in saved and saved[name] != record[name]]
    follow = set()
    if {"questions", "prompt", "system_prompt"} & {*names}:
        follow.add("messages")
    for content, name in (("weights", "model_name"), ("adapter", "from_adapter")):
        if record.get(content) is not None and record[content] == saved.get(content):
            follow.add(name)  # the same elsewhere
    return [name for name in names if name not in follow]


def _is_fixed(name: str, saved: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Tell whether no run can go on with another value than the checkpoint's."""
    if name == "reasoning_tokens":  # the token's embedding is trained, or is not
        return 0 in (saved[name], record[name])
    return name in _OF_SHAPE or name in _OF_OPTIMIZER


def _describe(name: str, saved: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    return f"{name}: {saved[name]!r} in the checkpoint, {record[name]!r} now"


def what_is_kept(sft_args: Any, started: float) -> str:
    """Say what an interrupted run leaves, and how to go on with it."""
    asked = sft_args.resume_from_checkpoint
    checkpoint = newest_checkpoint(sft_args.output_dir, started)
    checkpoint = checkpoint or find_checkpoint(asked, sft_args.output_dir)
    if not checkpoint:
        return "no checkpoint is written yet (see --save_steps): the same command starts anew"
    return (
        f"{checkpoint} is kept: the same command with --resume_from_checkpoint {checkpoint} goes "
        "on from there"
    )
