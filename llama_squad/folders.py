"""What lies where: datasets, models and adapters on this machine, told apart from names on the Hub.

Reads directory listings and small JSON files; loads no library and asks no network, so that a stage
can say at once that something is missing.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

FINAL = "final_checkpoints"
"""Where training puts its result, in its output folder,"""
MERGED = "final_merged_checkpoint"
"""and the merged model."""
THRESHOLD_FILE = "na_prob_thresh.json"
"""The threshold tuned on the validation split, beside the weights."""

_OUR_FOLDERS = ("results", "data", "quickstart")
"""Where this repository keeps what its stages write: no names of users on the Hub."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_name(name: str) -> bool:
    """Tell whether a name may be one on the Hub, as gpt2 or meta-llama/Llama-2-7b-chat-hf may.

    A path may not: one with more slashes, or that begins with a dot or one of our own folders, such
    as results/final_checkpoints, or that exists.
    """
    if Path(name).exists() or not _HUB_NAME.fullmatch(name):
        return False
    return name.partition("/")[0] not in _OUR_FOLDERS


def check_weights(flag: str, name: str | None, cure: str) -> None:
    """Refuse a folder that is not there, or holds no model and no adapter, or not their weights.

    Names on the Hub are not looked up.

    Args:
        flag: where the name was given, such as --model_name.
        name: a folder, a name on the Hub, or None.
        cure: what to do about it.

    Raises:
        ValueError: it names the flag, the folder and the cure.
    """
    if name is None or is_hub_name(name):
        return
    folder = Path(name)
    if not folder.is_dir():
        what = f"{name} is a file, and no folder" if folder.exists() else f"no folder {name} here"
        raise ValueError(f"{flag}: {what}: {cure}")
    if not any((folder / file).is_file() for file in ("adapter_config.json", "config.json")):
        raise ValueError(f"{flag}: {name} holds neither an adapter nor a model: {cure}")
    files = ("*.safetensors", "adapter_model*.bin", "pytorch_model*.bin")
    if not any(any(folder.glob(pattern)) for pattern in files):
        raise ValueError(f"{flag}: {name} holds no weights (a copy that was stopped?): {cure}")


def check_file(flag: str, name: str | None) -> None:
    """Refuse a file that is not there. Raises ValueError."""
    if name is not None and not Path(name).is_file():
        raise ValueError(f"{flag}: no file {name} here")


def check_dataset(dataset_name: str, splits: Iterable[str] = (), command: str = "") -> None:
    """Refuse a folder without a dataset, or one that lacks a split.

    Args:
        dataset_name: the folder.
        splits: names of splits that are needed.
        command: what makes such a dataset (default: the stage with that folder's name).

    Raises:
        ValueError: what is missing, and how to make it.
    """
    path = Path(dataset_name) / "dataset_dict.json"
    command = command or f"python create_squad_dataset.py --dataset_name {dataset_name}"
    if not path.is_file():
        raise ValueError(
            f"no dataset in {dataset_name!r}: make it with `{command}`, or name another folder "
            "with --dataset_name"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): make it anew with `{command}`") from error
    makers = {"train": "--train_files", "val": "--validation_ratio 0.05", "test": "--test_files"}
    for name in splits:
        if name not in found:
            raise ValueError(
                f"{dataset_name} has no {name} split, only {', '.join(found)}: build it with "
                f"create_squad_dataset.py {makers[name]}"
            )


def check_answering(
    adapter_name: str | None, model_name: str, chat_template: str | None, train: str
) -> None:
    """Check what a model is loaded from to answer with; ``train`` is the command that trains one.

    Raises:
        ValueError: something is not there.
    """
    check_weights("--adapter_name", adapter_name, f"train one with `{train}`, or name another")
    check_file("--chat_template", chat_template)
    if not adapter_name:
        check_weights("--model_name", model_name, "give another folder, or a name on the Hub")


def check_output(flag: str, source: str, output_dir: str) -> None:
    """Refuse to train on a model or adapter that the run's own result would take the place of.

    Raises:
        ValueError: what ``flag`` names lies there.
    """
    path, output = Path(source).resolve(), Path(output_dir).resolve()
    results = path in ((output / FINAL).resolve(), (output / MERGED).resolve())
    if results or (path.parent == output and path.name.startswith("checkpoint-")):
        raise ValueError(
            f"{flag} {source} is what this run would replace by its own result: "
            "give another --output_dir"
        )
