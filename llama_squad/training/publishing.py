"""The end of a training run: the final adapter with its card, the merged model, and the Hub."""

import dataclasses
import gc
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from llama_squad import merging, modeling
from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.config import (
    RUN_CONFIG,
    load_run_config,
    prompt_settings,
    save_run_config,
    write_json,
)
from llama_squad.durable import aside_of, put_in_place, start_aside
from llama_squad.folders import FINAL, MERGED
from llama_squad.quantized import dequantize
from llama_squad.training.merge_error import MergeError, MergeMeter, Sample


def run_settings(
    args: TrainArguments, model_args: ModelArguments, asked: dict[str, Any]
) -> dict[str, Any]:
    """Return what is saved beside all weights of a run: evaluation and the demo go by it.

    Args:
        args: of the run.
        model_args: of the run.
        asked: the trainer's configuration as it was asked for.
    """
    prompts = prompt_settings(load_run_config(args.dataset_name).get("create", {}))
    return {"train": args, "model": model_args, "trainer": asked, **prompts}


def save_final(trainer: Any, settings: dict[str, Any]) -> Path:
    """Save adapter (or model), tokenizer, run configuration and model card; return the folder.

    The folder is replaced as a whole, so that nothing of an earlier run stays in it, such as an
    adapter beside a full model, or a threshold tuned for other weights. The earlier one stays until
    the new one is complete. All processes must call this.

    Args:
        trainer: at the end of its training.
        settings: see ``run_settings``.
    """
    folder = Path(trainer.args.output_dir) / FINAL
    aside = aside_of(folder)
    first = trainer.args.should_save
    if first:
        start_aside(aside)
    trainer.accelerator.wait_for_everyone()
    # the internal call pushes nothing: the folder is not in its place yet
    trainer.save_model(str(aside), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if first:
        metrics = _metrics(_of_the_saved(trainer))
        save_run_config(aside, "train", **settings, figures=metrics)
        (aside / "README.md").write_text(model_card(settings, metrics), encoding="utf-8")
        put_in_place(aside, folder)
        print(f"Saved {folder}.")
        _remove_merged(folder.parent / MERGED)
    trainer.accelerator.wait_for_everyone()
    later = settings["train"].merge_and_push and trainer.args.hub_model_id  # with the merged one
    if first and trainer.args.push_to_hub and not later:
        _push(folder, trainer.hub_model_id, trainer.args)
    return folder


def _remove_merged(merged: Path) -> None:
    """Remove a merged model of an earlier run, which would pass for the one just trained."""
    if merged.exists():
        shutil.rmtree(merged)
        print(f"Removed {merged}: an earlier run's weights were merged in it.")


def _of_the_saved(trainer: Any) -> list[dict[str, Any]]:
    """Return the log, without evaluations later than the weights that are saved."""
    history, best = trainer.state.log_history, trainer.state.best_global_step
    if not (trainer.args.load_best_model_at_end and best):
        return history
    return [e for e in history if e["step"] <= best or not any(k.startswith("eval_") for k in e)]


def _metrics(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last value of each figure that was logged."""
    metrics: dict[str, Any] = {}
    for entry in history:
        metrics |= entry
    kept = ("step", "epoch", "loss", "train_loss", "mean_token_accuracy", "num_tokens")
    return {k: v for k, v in metrics.items() if k in kept or k.startswith("eval_")}


_LOSS_ON = {"reply": "the replies only", "all": "all tokens, prompts too"}

_ACTS_FROM = """
**An activated LoRA: it must act from the {} of its task on alone**, and leave all other tokens to
the base. PEFT by itself lets it act on all tokens, which gives other answers: load it with the
repository that it was trained with (`Reader`, `test_llama_squad.py`, `app.py`).
"""

_MERGE_TEXT = """\
The adapter was merged into its base in float32, and the sums written so that small updates survive.
Base, base + adapter, and the merged weights as they were written, on the same questions:"""


def model_card(
    settings: dict[str, Any], metrics: dict[str, Any], merge: MergeError | None = None
) -> str:
    """Return the model card of the adapter or full model, or that of the merged one."""
    args, model_args = settings["train"], settings["model"]
    rows = "\n".join(
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in metrics.items()
    )
    method = "full-parameter" if args.full_parameters else f"LoRA (r={args.lora_r})"
    if args.quantize and not args.full_parameters:
        method = f"QLoRA (r={args.lora_r}, 4-bit {model_args.bnb_4bit_quant_type})"
    library = "transformers" if args.full_parameters or merge else "peft"
    flag = "--model_name" if merge else "--adapter_name"
    section = f"\n## The merge\n\n{_MERGE_TEXT}\n\n{merge.table()}\n" if merge else ""
    rate = settings["trainer"]["learning_rate"]
    chat = f", {args.chat_share:.0%} of them plain chat" if args.chat_share else ""
    acts = "start" if args.full_parameters else args.alora_from
    place = _ACTS_FROM.format(acts) if acts != "start" else ""
    # The Hub refuses a card whose metadata name a folder; the dataset always is one.
    known = not Path(model_args.model_name).is_dir()
    base = f"base_model: {model_args.model_name}\n" if known else ""
    return f"""---
{base}library_name: {library}
pipeline_tag: question-answering
tags: [squad, question-answering, trl, sft]
---
# {model_args.model_name} that answers with the exact words of the context, or abstains

Fine-tuned with {method} on `{args.dataset_name}`: given a context and a question it replies with
JSON whose "answer" is a span of the context word for word, or "?" where the context holds none.
The loss fell on {_LOSS_ON[args.loss_on]}{chat}; learning rate {rate}.
{place}
## Figures of the run

| figure | last value |
|---|---|
{rows}
{section}
`{RUN_CONFIG}` holds the resolved configuration, the versions and the commit. To evaluate it:

    python test_llama_squad.py {flag}=FOLDER
"""


def merge_and_push(
    folder: Path, args: TrainArguments, model_args: ModelArguments, sft_args: Any, sample: Sample
) -> None:
    """Merge the adapter in ``folder``, and push adapter and merged model where the Hub is given.

    What the merge has kept is measured on ``sample``, printed, and said in the merged model's card.
    A push that fails ends the program with a message; the local files stay.
    """
    gc.collect()
    pushed = {sft_args.hub_model_id: folder}
    if args.full_parameters:
        print("All parameters were trained, so there is no adapter to merge.")
    else:
        merged = folder.parent / MERGED
        aside = aside_of(merged)
        start_aside(aside)
        error = merge_adapter(args, model_args, folder, aside, sample)
        saved = load_run_config(folder)
        settings = {"train": args, "model": model_args, "trainer": saved["trainer"]}
        card = model_card(settings, saved["figures"], error)
        (aside / "README.md").write_text(card, encoding="utf-8")
        write_json(aside / RUN_CONFIG, saved | {"merge": dataclasses.asdict(error)})
        put_in_place(aside, merged)
        pushed[f"{sft_args.hub_model_id}-merged"] = merged
        print(f"\n{error.table()}\n\nSaved the merged model in {merged}.")
        if error.warning():
            print(error.warning(), file=sys.stderr)
    if not sft_args.hub_model_id:
        print("Not pushed to the Hub: no --hub_model_id was given. The files are complete here.")
        return
    for name, path in pushed.items():
        _push(path, name, sft_args)


def merge_adapter(
    args: TrainArguments, model_args: ModelArguments, adapter: Path, output: Path, sample: Sample
) -> MergeError:
    """Merge an adapter into its base model, save the whole, and measure what was saved.

    After a 4-bit run the base is loaded in 4 bits and dequantised, for these are the weights that
    the adapter was trained on; merging into the original ones, or in 4 bits, is far less exact.
    """
    base: Any = modeling.load_model(model_args, quantize=args.quantize)
    if getattr(base, "is_loaded_in_4bit", False):
        dequantize(base)
    computed = base.dtype
    dtype = computed if args.merged_dtype == "auto" else modeling.resolve_dtype(args.merged_dtype)
    model = modeling.attach_adapter(base, str(adapter), model_args.model_name)
    meter = MergeMeter(model, sample)
    merging.merge(model, dtype).save_pretrained(str(output))
    # byte for byte: loading and saving it would add the settings of its last use
    others = ("adapter_*", "training_args.bin", "README.md", RUN_CONFIG)
    shutil.copytree(adapter, output, ignore=shutil.ignore_patterns(*others), dirs_exist_ok=True)
    del base, model
    gc.collect()
    # as it lies on disk, computing in the type that the adapter was measured in, or a wider one
    wide: Any = str(torch.promote_types(dtype, computed)).removeprefix("torch.")
    saved = dataclasses.replace(model_args, model_name=str(output), dtype=wide)
    return meter.measure(modeling.load_model(saved), dtype)


def _push(folder: Path, name: str, sft_args: Any) -> None:
    from huggingface_hub import HfApi, get_token

    token = sft_args.hub_token or get_token()
    if not token:
        print(
            f"Not pushed to {name}: no token. Log in with `hf auth login`, or give --hub_token. "
            f"The files are complete in {folder}.",
            file=sys.stderr,
        )
        return
    try:
        api = HfApi(token=token)
        # with the user's name before it, where that was left out
        made = api.create_repo(name, private=sft_args.hub_private_repo, exist_ok=True)
        name = made.repo_id
        if sft_args.hub_revision:
            api.create_branch(name, branch=sft_args.hub_revision, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), revision=sft_args.hub_revision)
    except Exception as error:  # the network and the Hub fail in many ways; the run must not
        sys.exit(
            f"train_llama_squad.py: pushing {folder} to {name} failed "
            f"({type(error).__name__}: {error}). The files are complete there; push them with "
            f"`hf upload {name} {folder}`"
        )
    print(f"Pushed {folder} to https://huggingface.co/{name}")
