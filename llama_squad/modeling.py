"""Tokenizer, model, quantisation, adapter and reasoning token."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
from llama_squad.activation import activate, activation_of
from llama_squad.arguments import ModelArguments
from llama_squad.config import RUN_CONFIG
from llama_squad.encoding import ChatEncoder, reasoning_token_id
from llama_squad.processes import take_free_cores, this_process
from llama_squad.quantized import keep_4bit_differentiable
from llama_squad.tree import ask_no_router, gather_hidden
from llama_squad.weights import acts_from, base_of, find_file, one_line, whole_model


def _loaded(args: ModelArguments, adapter_name: str | None) -> ModelArguments:
    """Return the arguments with the model that is really loaded, whatever --model_name says."""
    whole = whole_model(adapter_name)
    if not (whole or args.model_name):
        raise ValueError(f"{adapter_name} does not say what its base is: give it by --model_name")
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


def _cannot_load(what: str, source: str, error: Exception) -> str:
    said = one_line(error)
    if Path(source).is_dir():
        return f"cannot load the {what} in {source}: {said}"
    return (
        f"cannot load the {what} of {source!r}: {said} It is neither a folder here nor, as seen "
        "from here, a model on the Hub. Check the name, your network and, for a gated model such "
        "as Llama, your access (`hf auth login`); or give a folder with --model_name"
    )


def load_encoder(
    args: ModelArguments,
    reasoning_tokens: int = 0,
    adapter_name: str | None = None,
    filler: int = 0,
) -> ChatEncoder:
    """Load the tokenizer and return its encoder, with a reasoning token where there are any.

    Raises:
        ValueError: the tokenizer cannot be had, or is of no use here.
    """
    loaded = _loaded(args, adapter_name)
    tokenizer = load_tokenizer(args, adapter_name)
    token = reasoning_token_id(tokenizer, vocab_size(loaded)) if reasoning_tokens else None
    return ChatEncoder(tokenizer, reasoning_tokens, token, filler)


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
        index = max(0, this_process().local_process_index)
        # some launchers show each process its own GPU alone
        return torch.device("cuda", index % torch.cuda.device_count())
    return torch.device("cpu")


def choose_device() -> None:
    """Where no GPU is found take the cores that are free; the first process says what is slow."""
    first = this_process().is_main_process
    if torch.cuda.is_available():
        if first and not torch.cuda.is_bf16_supported(including_emulation=False):
            print(
                "This GPU only emulates bfloat16, which is slow: try --dtype float16, and in "
                "training --fp16, unless the model needs the range of bfloat16 (Gemma does).",
                file=sys.stderr,
            )
        return
    default, threads = torch.get_num_threads(), take_free_cores()
    busy = f", as other work keeps the rest of {default} cores busy" if threads < default else ""
    if first:
        count = f"{threads} thread{'s' * (threads > 1)}"
        print(f"No CUDA device: running on the CPU, {count}{busy}.", file=sys.stderr)


def resolve_dtype(name: str) -> torch.dtype:
    """Return the torch type; "auto" is bfloat16 on CUDA and on a CPU that multiplies in it."""
    if name == "auto":
        able = torch.cuda.is_available() or cpu_multiplies_bfloat16()
        return torch.bfloat16 if able else torch.float32
    return getattr(torch, name)


def cpu_multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for it (AVX512-BF16, AMX); others crawl."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_model(
    args: ModelArguments,
    quantize: bool = False,
    adapter_name: str | None = None,
    where: str | None = None,
    *,
    merge: bool = True,
    sharded: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, in 4 bits where asked, with its adapter where there is one.

    The weights go to this process's GPU; a single process with several GPUs spreads them. An
    adapter is merged where that changes no more than the order of a sum: into float32 weights. In
    16 bits the rounding would change answers, and in 4 bits all the more: there it stays apart. So
    does an activated one.

    Args:
        args: which model, and how.
        quantize: hold it in 4 bits.
        adapter_name: a folder, or a name on the Hub.
        where: device for the weights, such as cuda:1 (default: as said above).
        merge: False leaves the adapter apart in float32, too, so that it can be switched off.
        sharded: the weights are placed by what shards them (FSDP).

    Raises:
        ValueError: the model or the adapter cannot be had, or they do not fit.
    """
    args = _loaded(args, adapter_name)
    dtype = weights_dtype(args)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model_name, dtype=dtype, **_load_options(args, quantize, where, sharded)
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(_cannot_load("model", args.model_name, error)) from error
    except ImportError as error:  # of flash attention, or of 4 bits
        raise ValueError(
            f"cannot load the model {args.model_name}: {one_line(error)} Install the missing "
            "package, or ask for less: --attn_implementation sdpa, --no_quantize"
        ) from error
    quantize = quantize or getattr(model, "is_loaded_in_4bit", False)  # as it was saved
    _make_usable(model, quantize)
    if adapter_name and not whole_model(adapter_name):
        model = attach_adapter(model, adapter_name, args.model_name)
        mergeable = _is_lora(model) and not activation_of(model)
        mergeable = mergeable and not getattr(model, "is_quantized", False)
        if merge and dtype == torch.float32 and mergeable:
            model = merging.merge(model, dtype)
    return model


def _make_usable(model: Any, quantize: bool) -> None:
    """Mend what was loaded: sampling flags that saving refuses, windows of no width, 4 bits."""
    config = model.config.get_text_config()
    ask_no_router(model)
    if (sampling := getattr(model, "generation_config", None)) and not sampling.do_sample:
        sampling.update(temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
    if getattr(config, "sliding_window", None) == 0:  # which masks would take for seeing nothing
        config.sliding_window = None
    if quantize:
        keep_4bit_differentiable(model)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        gather_hidden(model)


def _load_options(
    args: ModelArguments, quantize: bool, where: str | None, sharded: bool
) -> dict[str, Any]:
    """Return what ``from_pretrained`` takes: the attention, the device and the 4 bits."""
    options: dict[str, Any] = {}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    if where:
        options["device_map"] = {"": where}
    elif torch.cuda.is_available() and not sharded:
        spread = this_process().num_processes == 1 and torch.cuda.device_count() > 1
        options["device_map"] = "auto" if spread else {"": device()}
    if quantize:
        compute = resolve_dtype("float16" if args.dtype == "float16" else "auto")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_storage=compute if sharded else torch.uint8,  # FSDP shards floats only
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=compute,
        )
    return options


def weights_dtype(args: ModelArguments) -> torch.dtype:
    """Return the type to load a model's weights in.

    Where "auto" is bfloat16, two kinds of models that were saved in float32 stay so: those trained
    or merged here, of whose low learning rate's updates most would be rounded away; and any on a
    CPU, which has the memory.
    """
    dtype = resolve_dtype(args.dtype)
    if args.dtype != "auto" or dtype == torch.float32:
        return dtype
    if torch.cuda.is_available() and not find_file(args.model_name, RUN_CONFIG):
        return dtype
    try:
        saved = AutoConfig.from_pretrained(args.model_name).dtype
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load("configuration", args.model_name, error)) from error
    return torch.float32 if saved in (None, torch.float32) else dtype


def _is_lora(model: Any) -> bool:
    return all(config.peft_type == "LORA" for config in model.peft_config.values())


def attach_adapter(model: Any, adapter_name: str, base_name: str, trainable: bool = False) -> Any:
    """Put an adapter on its base model, and say where it was trained on another.

    Raises:
        ValueError: it does not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    trained_on = base_of(adapter_name)
    misfit = (
        f"the adapter {adapter_name} was trained on {trained_on} and does not fit {base_name}: "
        "leave --model_name out, and the adapter brings its own base"
    )
    try:
        with warnings.catch_warnings():  # of missing weights, which end below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter_name, is_trainable=trainable)
    except (SafetensorError, OSError) as error:  # a copy that was cut off
        raise ValueError(_cannot_load("adapter", adapter_name, error)) from error
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(misfit) from error
    if any(getattr(c, "alora_invocation_tokens", None) for c in model.peft_config.values()):
        raise ValueError(
            f"{adapter_name} is an activated LoRA of PEFT's own kind, which acts from certain "
            "tokens on, and in PEFT's `generate` only: train one here with --alora_from context"
        )
    here = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    saved = set(load_peft_weights(adapter_name, device="cpu"))
    if any("lora_" in key for key in here ^ saved):  # of a model with more layers, or fewer
        raise ValueError(misfit)
    other = Path(str(trained_on)).resolve() != Path(base_name).resolve()  # also of Hub names
    if other and this_process().is_main_process:
        print(
            f"The adapter {adapter_name} was trained on {trained_on}, and is used on {base_name}.",
            file=sys.stderr,
        )
    if (where := acts_from(adapter_name)) != "start":
        activate(model, where)
    return model


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
