"""Tokenizer, model, quantisation, adapter and reasoning token."""

import dataclasses
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llama_squad import merging
from llama_squad.arguments import ModelArguments
from llama_squad.config import RUN_CONFIG, load_run_config
from llama_squad.encoding import ChatEncoder
from llama_squad.folders import is_hub_name

_ROOT = Path(__file__).resolve().parents[1]
_COMPUTE_4BIT = torch.bfloat16


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
    """Find a file of a model or adapter, here or on the Hub; None where it has none."""
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    if not is_hub_name(source):
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
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
        ValueError: an adapter that is none, or a damaged configuration.
    """
    if not adapter_name:
        return _training_settings(model_name) if model_name else {}
    base = whole_model(adapter_name) or _base_of(adapter_name)
    return {"model_name": base} | _training_settings(adapter_name)


def lora_settings(adapter_name: str) -> dict[str, Any]:
    """Return the LoRA settings that a new training goes on with, by the names of its flags.

    Raises:
        ValueError: it is no adapter, or not one of LoRA.
    """
    from peft import LoraConfig, PeftConfig

    base = _base_of(adapter_name)
    config = PeftConfig.from_pretrained(adapter_name)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter_name} is no LoRA adapter, but one of {config.peft_type}")
    modules = config.target_modules
    return _training_settings(adapter_name) | {
        "model_name": base,
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": [modules] if isinstance(modules, str) else sorted(modules or ()),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
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


def _base_of(adapter_name: str) -> str | None:
    """Return the name or folder of an adapter's base model."""
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(adapter_name).base_model_name_or_path
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load the adapter {adapter_name}: {_one_line(error)} It is neither a folder "
            "here nor, as seen from here, an adapter on the Hub: train one with "
            "`python train_llama_squad.py`, or name another with --adapter_name"
        ) from error
    return _from_here(base)


def tuned_from(source: str) -> str | None:
    """Return the name or folder of what an adapter or a whole model was tuned from; None if unsaid.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        ValueError: a damaged configuration.
    """
    if find_file(source, "adapter_config.json"):
        return _base_of(source)
    path = find_file(source, RUN_CONFIG)
    saved = load_run_config(path.parent) if path else {}
    return _from_here(saved.get("model", {}).get("model_name"))


def _from_here(base: str | None) -> str | None:
    """Find a folder that was relative to where a model was trained, most likely this repository."""
    if base and not Path(base).is_dir() and (_ROOT / base).is_dir():
        return str(_ROOT / base)
    return base


def _training_settings(source: str) -> dict[str, Any]:
    """Return what a model or adapter was trained on; {} where it does not say."""
    path = find_file(source, RUN_CONFIG)
    saved = load_run_config(path.parent) if path else {}
    settings: dict[str, Any] = {k: saved[k] for k in ("prompt", "system_prompt") if k in saved}
    if "train" in saved:
        settings["reasoning_tokens"] = saved["train"]["reasoning_tokens"]
    return settings


def _loaded(args: ModelArguments, adapter_name: str | None) -> ModelArguments:
    """Return the arguments with the model that is really loaded, whatever --model_name says."""
    whole = whole_model(adapter_name)
    return dataclasses.replace(args, model_name=whole) if whole else args


def load_tokenizer(
    args: ModelArguments, adapter_name: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the adapter, where it carries one, or of the model.

    Raises:
        ValueError: it cannot be had.
    """
    source = args.model_name
    if adapter_name and find_file(adapter_name, "tokenizer_config.json"):
        source = adapter_name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load("tokenizer", source, error)) from error
    if args.chat_template is not None:
        try:
            tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"cannot read --chat_template {args.chat_template}: {error}"
            ) from error
    if tokenizer.pad_token is None:
        # Safe: padding is told apart by the attention mask, so the pad may be the end of turn
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _one_line(error: Exception) -> str:
    """Return what a library says, in one line that ends as a sentence does."""
    said = " ".join(str(error).split())
    return said if said.endswith((".", "!", "?")) else f"{said}."


def _cannot_load(what: str, source: str, error: Exception) -> str:
    said = _one_line(error)
    if Path(source).is_dir():
        return f"cannot load the {what} in {source}: {said}"
    return (
        f"cannot load the {what} of {source!r}: {said} It is neither a folder here nor, as seen "
        "from here, a model on the Hub. Check the name, your network and, for a gated model such "
        "as Llama, your access (`hf auth login`); or give a folder with --model_name"
    )


def load_encoder(
    args: ModelArguments, reasoning_tokens: int = 0, adapter_name: str | None = None
) -> ChatEncoder:
    """Load the tokenizer and return its encoder, with a token for the pauses where there are any.

    Raises:
        ValueError: the tokenizer cannot be had, or is of no use here.
    """
    loaded = _loaded(args, adapter_name)
    tokenizer = load_tokenizer(args, adapter_name)
    pause = reasoning_token_id(tokenizer, vocab_size(loaded)) if reasoning_tokens else None
    return ChatEncoder(tokenizer, reasoning_tokens, pause)


def reasoning_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Find a token to pause on: one whose embedding exists, and that no text is encoded to.

    In order: a reserved special token (Llama 3), the unknown token of a vocabulary with byte
    fallback (Llama 2), a new token on a spare row of the embedding (Qwen). None of them makes the
    embedding grow, so the adapter holds that one row and not the whole matrix.

    Raises:
        ValueError: the vocabulary has no room.
    """
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        if re.search(r"reserved|unused", token.content):
            return token_id
    fallback = '"byte_fallback":true' in tokenizer.backend_tokenizer.to_str()
    if tokenizer.unk_token_id is not None and fallback:
        return tokenizer.unk_token_id
    if len(tokenizer) < vocab_size:
        tokenizer.add_tokens(["<|pause|>"], special_tokens=True)
        return tokenizer.added_tokens_encoder["<|pause|>"]
    raise ValueError(
        "this vocabulary has no reserved token and its embedding no spare row, so there is "
        "nothing to pause on: leave --reasoning_tokens out"
    )


def load_reader(args: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder with a question-answering head, and its tokenizer.

    Raises:
        ValueError: it cannot be had, or is no such model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name)
        # Answers hang on differences of logits, and encoders are small: no bfloat16 unasked.
        dtype = torch.float32 if args.dtype == "auto" else resolve_dtype(args.dtype)
        model, info = AutoModelForQuestionAnswering.from_pretrained(
            args.model_name, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(_cannot_load("encoder", args.model_name, error)) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{args.model_name} has no fast tokenizer, which spans need")
    if info["missing_keys"]:
        raise ValueError(
            f"{args.model_name} was not trained to answer questions: it has no weights for "
            f"{max(info['missing_keys'])}, for one. Give a model that was, such as "
            "deepset/deberta-v3-large-squad2"
        )
    return model.to(device()).eval(), tokenizer


def device() -> torch.device:
    """Return this process's device: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def say_device() -> None:
    """Say once, and from the first process only, where no GPU is found."""
    if not torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
        print("No CUDA device: running on the CPU.", file=sys.stderr)


def resolve_dtype(name: str) -> torch.dtype:
    """Return the torch type; "auto" is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, name)


def load_model(
    args: ModelArguments,
    quantize: bool = False,
    adapter_name: str | None = None,
    where: str | None = None,
    merge: bool = True,
) -> PreTrainedModel:
    """Load a causal language model, in 4 bits where asked, with its adapter where there is one.

    The weights go to this process's GPU; a single process with several GPUs spreads them. An
    adapter is merged where that changes no more than the order of a sum: into float32 weights. In
    16 bits the rounding would change answers, and in 4 bits all the more: there it stays apart.

    Args:
        args: which model, and how.
        quantize: hold it in 4 bits.
        adapter_name: a folder, or a name on the Hub.
        where: device for the weights, such as cuda:1 (default: as said above).
        merge: False leaves the adapter apart in float32, too, so that it can be switched off.

    Raises:
        ValueError: the model or the adapter cannot be had, or they do not fit.
    """
    args = _loaded(args, adapter_name)
    dtype = _weights_dtype(args)
    options: dict[str, Any] = {"dtype": dtype}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    if where:
        options["device_map"] = {"": where}
    elif torch.cuda.is_available():
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        spread = alone and torch.cuda.device_count() > 1
        options["device_map"] = "auto" if spread else {"": device()}
    if quantize:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=_COMPUTE_4BIT,
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(args.model_name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load("model", args.model_name, error)) from error
    except ImportError as error:  # of flash attention, or of 4 bits
        raise ValueError(
            f"cannot load the model {args.model_name}: {_one_line(error)} Install the missing "
            "package, or ask for less: --attn_implementation sdpa, --no_quantize"
        ) from error
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) == 0:  # which masks would take for seeing nothing
        config.sliding_window = None
    if quantize:
        _keep_4bit_differentiable(model)
    if adapter_name and not whole_model(adapter_name):
        model = attach_adapter(model, adapter_name, args.model_name)
        if merge and dtype == torch.float32 and not quantize and _is_lora(model):
            model = merging.merge(model, dtype)
    return model


def _weights_dtype(args: ModelArguments) -> torch.dtype:
    """Return the type to load a model's weights in.

    A model that was trained or merged here in float32 is loaded so unless another type is asked
    for: in bfloat16 most of a low learning rate's updates would be rounded away.
    """
    dtype = resolve_dtype(args.dtype)
    if args.dtype == "auto" and dtype != torch.float32 and find_file(args.model_name, RUN_CONFIG):
        config = AutoConfig.from_pretrained(args.model_name)
        return torch.float32 if config.dtype == torch.float32 else dtype
    return dtype


def _is_lora(model: Any) -> bool:
    return all(config.peft_type == "LORA" for config in model.peft_config.values())


def attach_adapter(model: Any, adapter_name: str, base_name: str, trainable: bool = False) -> Any:
    """Put an adapter on its base model, and say where it was trained on another.

    Raises:
        ValueError: it does not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    trained_on = _base_of(adapter_name)
    misfit = (
        f"the adapter {adapter_name} was trained on {trained_on} and does not fit {base_name}: "
        "leave --model_name out, and the adapter brings its own base"
    )
    try:
        with warnings.catch_warnings():  # of missing weights, which end below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter_name, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(misfit) from error
    here = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    saved = set(load_peft_weights(adapter_name, device="cpu"))
    if any("lora_" in key for key in here ^ saved):  # of a model with more layers, or fewer
        raise ValueError(misfit)
    other = Path(str(trained_on)).resolve() != Path(base_name).resolve()  # also of Hub names
    if other and os.environ.get("RANK", "0") == "0":
        print(
            f"The adapter {adapter_name} was trained on {trained_on}, and is used on {base_name}.",
            file=sys.stderr,
        )
    return model


def _keep_4bit_differentiable(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU.

    On AVX512-BF16 processors the first forward without gradients repacks them in place, for a
    kernel that has no gradient: training after an evaluation would be silently wrong, and so would
    a merge (bitsandbytes 0.50).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantize(model: Any) -> None:
    """Replace 4-bit weights by those that the forward pass computes with.

    It rounds them to bfloat16 (its compute type) whatever type the model was loaded in. In float32
    they would be others than the ones trained on, and rounding them only after an adapter was
    merged would lose a tenth of a small update's gain.
    """
    import bitsandbytes

    names = [n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    model.dequantize()
    for name in names:
        weight = model.get_submodule(name).weight
        weight.data = weight.data.to(_COMPUTE_4BIT).to(model.dtype)


def vocab_size(args: ModelArguments) -> int:
    """Return the number of rows of the model's embedding, without loading its weights.

    Raises:
        ValueError: the model cannot be had.
    """
    try:
        config = AutoConfig.from_pretrained(args.model_name)
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load("configuration", args.model_name, error)) from error
    return config.get_text_config().vocab_size
