"""What a folder or a name on the Hub holds: an adapter or a whole model, and how it was trained.

Reads small files beside the weights, and of the weights no more than a sample of bytes.
"""

import hashlib
from pathlib import Path
from typing import Any

from llama_squad.config import RUN_CONFIG, load_run_config, prompt_settings
from llama_squad.folders import is_hub_name
from llama_squad.prompts import ActsFrom

_ROOT = Path(__file__).resolve().parents[1]


def is_adapter(folder: str | Path) -> bool:
    """Tell whether a folder holds a PEFT adapter (and not a whole model)."""
    return (Path(folder) / "adapter_config.json").is_file()


def is_model(folder: str | Path) -> bool:
    """Tell whether a folder holds a whole model: its configuration and weights."""
    weights = ("*.safetensors", "pytorch_model*.bin")
    return (Path(folder) / "config.json").is_file() and any(
        any(Path(folder).glob(pattern)) for pattern in weights
    )


def find_file(source: str, name: str) -> Path | None:
    """Find a file of a model or adapter, here or on the Hub; None where it has none.

    Raises:
        ValueError: the Hub could not be asked (but not where HF_HUB_OFFLINE says not to ask it).
    """
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    if not is_hub_name(source):
        return None
    from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError as error:
        answer = getattr(error.__cause__, "response", None)  # of a mirror that has no such file
        known = try_to_load_from_cache(source, name) is _CACHED_NO_EXIST
        if constants.HF_HUB_OFFLINE or known or getattr(answer, "status_code", None) == 404:
            return None
        raise ValueError(
            f"the Hub could not be asked whether {source} has {name}: try again, or set "
            "HF_HUB_OFFLINE=1 to go by what is on this machine"
        ) from error
    except (OSError, ValueError):  # what is wrong with the name itself, the loaders say
        return None


def saved_settings(adapter_name: str | None, model_name: str | None = None) -> dict[str, Any]:
    """Return the settings that trained weights bring to evaluation and the demo.

    That is the prompt and the reasoning tokens that they were trained on, and an adapter's base
    model. Weights made elsewhere bring no more than the base model.

    Args:
        adapter_name: a folder, that of a whole model too, or a name on the Hub.
        model_name: the model that is used where there is no adapter, such as a merged one.

    Raises:
        ValueError: no such adapter, or a damaged configuration.
    """
    if not adapter_name:
        return _training_settings(model_name) if model_name else {}
    base = whole_model(adapter_name) or base_of(adapter_name)
    return {"model_name": base} | _training_settings(adapter_name)


def lora_settings(adapter_name: str) -> dict[str, Any]:
    """Return the settings that a new training goes on with, by the names of its flags.

    Those of LoRA, and how the base was held: in 4 bits or not, and in which type. Adapters made
    elsewhere do not tell the latter.

    Raises:
        ValueError: it is no adapter, or not one of LoRA.
    """
    from peft import LoraConfig, PeftConfig

    if is_model(Path(adapter_name)) and not is_adapter(adapter_name):
        raise ValueError(
            f"{adapter_name} is a whole model, and no adapter: give it by --model_name"
        )
    base = base_of(adapter_name)
    config = PeftConfig.from_pretrained(adapter_name)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter_name} is no LoRA adapter, but one of {config.peft_type}")
    modules = config.target_modules
    trained = _training_settings(adapter_name) | _base_settings(adapter_name)
    return trained | {
        "model_name": base,
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": [modules] if isinstance(modules, str) else sorted(modules or ()),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "alora_from": acts_from(adapter_name),
    }


def whole_model(adapter_name: str | None) -> str | None:
    """Return the folder that ``--adapter_name`` gives if it is a whole model; None if an adapter.

    Raises:
        ValueError: a folder that holds neither, or a path that is no folder.
    """
    if not adapter_name or is_adapter(adapter_name):
        return None
    folder = Path(adapter_name)
    if not folder.is_dir():
        if is_hub_name(adapter_name):
            return None
        raise ValueError(f"no folder {adapter_name}: train first, or give another --adapter_name")
    if not is_model(folder):
        raise ValueError(
            f"{folder} holds neither an adapter nor a model: train one with "
            "`python train_llama_squad.py`, or name another with --adapter_name"
        )
    return str(folder)


def base_of(adapter_name: str) -> str | None:
    """Return the name or folder of an adapter's base model."""
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(adapter_name).base_model_name_or_path
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load the adapter {adapter_name}: {one_line(error)} It is neither a folder "
            "here nor, as seen from here, an adapter on the Hub: train one with "
            "`python train_llama_squad.py`, or name another with --adapter_name"
        ) from error
    return _from_here(base)


def _run_config(source: str) -> dict[str, Any]:
    """Read the run configuration of a folder or a name on the Hub; {} where it has none."""
    path = find_file(source, RUN_CONFIG)
    return load_run_config(path.parent) if path else {}


def tuned_from(source: str) -> str | None:
    """Return the name or folder of what an adapter or a whole model was tuned from; None if unsaid.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        ValueError: a damaged configuration.
    """
    if find_file(source, "adapter_config.json"):
        return base_of(source)
    return _from_here(_run_config(source).get("model", {}).get("model_name"))


def _from_here(base: str | None) -> str | None:
    """Find a folder that was relative to where a model was trained, most likely this repository."""
    if base and not Path(base).is_dir() and (_ROOT / base).is_dir():
        return str(_ROOT / base)
    return base


def _training_settings(source: str) -> dict[str, Any]:
    """Return what a model or adapter was trained on; {} where it does not say."""
    saved = _run_config(source)
    settings = prompt_settings(saved)
    if "train" in saved:
        settings["reasoning_tokens"] = saved["train"]["reasoning_tokens"]
        settings["filler"] = saved["train"].get("filler", 0)
    return settings


def _base_settings(adapter_name: str) -> dict[str, Any]:
    """Return how an adapter's base was held in its training; {} where it does not say."""
    saved = _run_config(adapter_name)
    train, model = saved.get("train", {}), saved.get("model", {})
    told = [(train, "quantize"), (model, "dtype")]
    bits = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    told += [(model, name) for name in bits if train.get("quantize")]
    return {name: settings[name] for settings, name in told if name in settings}


def acts_from(adapter_name: str) -> ActsFrom:
    """Return from where on an adapter acts: "start" is everywhere, as plain LoRA does.

    It is asked of the run configuration beside the adapter.

    Raises:
        ValueError: a damaged configuration.
    """
    return _run_config(adapter_name).get("train", {}).get("alora_from", "start")


def weights_digest(folder: str | None) -> str | None:
    """Return a digest of the weights in a local folder: of their sizes, and a sample of bytes.

    A training changes every tensor, so 256 pieces of 4 KiB a file tell it, however large the model.
    """
    files = sorted(
        path for path in Path(folder or "").glob("*") if path.suffix in (".safetensors", ".bin")
    )
    if not folder or not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(256):
                file.seek(size * piece // 256)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def one_line(error: Exception) -> str:
    """Return what a library says, in one line that ends as a sentence does."""
    said = " ".join(str(error).split())
    return said if said.endswith((".", "!", "?")) else f"{said}."
