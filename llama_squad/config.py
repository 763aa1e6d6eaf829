"""Typed configuration: dataclass defaults < ``config.yaml`` < the adapter's own < the command line.

The file holds shared keys at the top and one section a stage. Every value goes through the same
parser as the flags do, so a flag and a key of the file cannot mean two things, and an unknown one
is refused with the nearest name. The scripts parse; the package only takes the dataclasses.
"""

import dataclasses
import difflib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from llama_squad.prompts import SYSTEM_PROMPT

STAGES = ("create", "train", "test", "summarize", "app")
RUN_CONFIG = "llama_squad.json"
"""The resolved configuration that every dataset and adapter carries beside its files."""

DEFAULT_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"


SPAN_BEAMS = 4
"""Beams of span decoding where none are given; benchmarks/RESULTS.md says why so many."""


def _option(default: Any, help_text: str, **metadata: Any) -> Any:
    extra = {"help": help_text, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=extra)
    return dataclasses.field(default=default, metadata=extra)


_DATASET_HELP = "Folder of the dataset that create_squad_dataset.py builds."
_SYSTEM_HELP = 'System prompt ("" for none).'
_PROMPT_HELP = "Prompt style: one user turn, or three with the model called turn by turn."
_TEMPLATE_HELP = "Jinja file with a chat template, for a tokenizer that has none of its own."


@dataclasses.dataclass(frozen=True)
class CreateArguments:
    """What ``create_squad_dataset.py`` takes."""

    dataset_name: str = _option("data/squad_v2", "Folder to write the dataset to.")
    source: str = _option("rajpurkar/squad_v2", "SQuAD v2 dataset on the Hub, or a local copy.")
    train_files: list[str] | None = _option(
        None,
        "Training files: SQuAD's JSON, or rows with context, question, answer as JSON, JSON lines, "
        "CSV or parquet (docs/own-data.md); globs allowed. Replaces --source.",
    )
    test_files: list[str] | None = _option(None, "Test files, of the same forms.")
    mend: bool = _option(
        False,
        "Take the best guess for questions that can be read in several ways: the nearest place of "
        "an answer whose offset is wrong, a number added to an id that another question has.",
    )
    skip_bad: bool = _option(
        False, "Leave out questions that cannot be used, and list them beside the dataset."
    )
    sample: bool = _option(False, "Use the small world bundled in quickstart/data.")
    prompt: Literal["single_turn", "multi_turn"] = _option("single_turn", _PROMPT_HELP)
    system_prompt: str = _option(SYSTEM_PROMPT, _SYSTEM_HELP)
    validation_ratio: float = _option(
        0.05, "Share of the training questions to hold out for validation, by whole titles."
    )
    seed: int = _option(42, "Seed of the split.")


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """Which model, and how it is loaded; shared by training, evaluation and the demo."""

    model_name: str = _option(DEFAULT_MODEL, "Base model: a name on the Hub, or a folder.")
    chat_template: str | None = _option(None, _TEMPLATE_HELP)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "Weights' type: auto is bfloat16 on CUDA and float32 on a CPU, or float32 where a model "
        "trained here was saved so.",
    )
    attn_implementation: str | None = _option(
        None, "Attention: sdpa, eager, flash_attention_2... (default: the library's choice)."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _option("nf4", "4-bit data type.")
    bnb_4bit_use_double_quant: bool = _option(
        True, "Quantise the quantisation constants too: 0.4 bits a parameter less, a little slower."
    )


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """What ``train_llama_squad.py`` takes beside ``ModelArguments`` and TRL's ``SFTConfig``."""

    dataset_name: str = _option("data/squad_v2", _DATASET_HELP)
    quantize: bool = _option(True, "QLoRA: hold the frozen base in 4 bits (--no_quantize: not).")
    full_parameters: bool = _option(
        False, "Train every weight, without LoRA (implies --no_quantize)."
    )
    lora_r: int = _option(64, "LoRA rank.")
    lora_alpha: int = _option(16, "LoRA alpha; updates are scaled by alpha / r.")
    lora_dropout: float = _option(0.1, "LoRA dropout.")
    lora_target_modules: list[str] = _option(
        ["all-linear"], "Names of the modules to adapt, or all-linear."
    )
    use_rslora: bool = _option(False, "Scale by alpha / sqrt(r) (rank-stabilised LoRA).")
    use_dora: bool = _option(False, "Weight-decomposed LoRA: slower, sometimes better.")
    reasoning_tokens: int = _option(
        0, "Learnable pause tokens between prompt and answer: room to think (0: none)."
    )
    share_context: bool = _option(
        True, "Train the questions of a paragraph in one row that holds its context once."
    )
    row_tokens: int = _option(
        2048,
        "Token budget of a row of several paragraphs; one paragraph may need more, up to "
        "--max_seq_length.",
    )
    eval_samples: int = _option(
        200, "Validation questions answered by real generation at each evaluation (0: all)."
    )
    merge_and_push: bool = _option(
        False,
        "At the end merge the adapter into the model, and push both where --hub_model_id "
        "and a token are given.",
    )
    merged_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "Type of the merged model's weights: auto is the base's as it was loaded (--dtype). In 16 "
        "bits they are rounded at random, so that small updates survive on average; in float32 "
        "nothing is lost, in a file of twice the size.",
    )
    resume_anyway: bool = _option(
        False,
        "Go on from a checkpoint although this run lays its questions out otherwise, or follows "
        "another schedule; without it the differences are named, and refused.",
    )
    show_mask: int = _option(
        0, "Print this many examples with their supervised tokens in colour, and exit."
    )


@dataclasses.dataclass
class TrainerArguments:
    """The fields of TRL's ``SFTConfig`` that matter most, with this project's defaults.

    ``llama_squad.training.SquadSFTConfig`` adds all others. These stand here so that a command line
    can be checked, and ``--help`` shown, without the seconds that importing TRL takes.
    """

    output_dir: str | None = _option("results", "Folder of checkpoints, logs and the final model.")
    per_device_train_batch_size: int = _option(
        8, "Questions at once on each device, also where they share contexts."
    )
    per_device_eval_batch_size: int = _option(8, "The same for validation.")
    gradient_accumulation_steps: int = _option(1, "Batches before the weights are updated.")
    num_train_epochs: float = _option(3.0, "Epochs to train.")
    max_steps: int = _option(-1, "Steps to train, in place of epochs (-1: go by epochs).")
    learning_rate: float = _option(
        2e-7,
        "Peak learning rate. Low on purpose: at 2e-4 Llama 2 learned the task quickly and forgot "
        "English as quickly; 2e-7 keeps the chat ability.",
    )
    bf16: bool = _option(
        None,  # resolved by SquadSFTConfig, so that one given is told apart
        "Compute in bfloat16 (default: on GPUs that can; a CPU may crawl).",
    )
    max_length: int | None = _option(
        4096,
        "Longest example and row in tokens; longer examples are left out and counted.",
        aliases=["--max_seq_length"],
    )
    train_sampling_strategy: str = _option(
        "group_by_length",
        "Order of plain batches (--no_share_context): random, sequential or group_by_length. Rows "
        "that share contexts are balanced, and shuffled.",
    )
    eval_strategy: str = _option("steps", "When to validate: no, steps or epoch.")
    eval_steps: float | None = _option(500, "Validate every so many steps (a ratio if below 1).")
    logging_steps: float = _option(10, "Log every so many steps.")
    save_steps: float = _option(500, "Save a checkpoint every so many steps.")
    report_to: None | str | list[str] = _option(  # noqa: RUF036 - the parser takes this order only
        "auto", "Trackers; auto: TensorBoard, and W&B where you are logged in to it."
    )
    resume_from_checkpoint: str | None = _option(
        None,
        "A checkpoint's folder; `latest` for the newest; `auto` for the newest, if there is one.",
    )
    hub_model_id: str | None = _option(
        None, "Repository on the Hub to push to (USER/NAME); the merged model goes to NAME-merged."
    )


@dataclasses.dataclass(frozen=True)
class TestArguments:
    """What ``test_llama_squad.py`` takes beside ``ModelArguments``."""

    adapter_name: str | None = _option(None, "Adapter: a folder, or a name on the Hub.")
    predictor: Literal["local", "server", "encoder"] = _option(
        "local",
        "Who answers: a chat model loaded here, one behind a server, or a BERT-like encoder.",
    )
    base_url: str | None = _option(
        None,
        "Server of --predictor server (default: OpenAI's own): its model's name goes to "
        "--model_name, its key to OPENAI_API_KEY, and it always decodes freely.",
    )
    concurrency: int = _option(32, "Questions that a server is asked at once.")
    timeout: float = _option(600.0, "Seconds to wait for a server's reply.")
    temperature: float = _option(0.0, "Temperature that a server is asked for.")
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] | None = _option(
        None, "The server's name for --max_new_tokens (default: found out by asking)."
    )
    structured_output: bool = _option(
        False, "Ask the server to hold replies to the JSON schema of the answer."
    )
    dataset_name: str = _option("data/squad_v2", _DATASET_HELP)
    split: Literal["train", "val", "test"] = _option("test", "Split to answer.")
    prompt: Literal["single_turn", "multi_turn"] = _option("single_turn", _PROMPT_HELP)
    system_prompt: str = _option(SYSTEM_PROMPT, _SYSTEM_HELP)
    reasoning_tokens: int = _option(0, "Pause tokens before the answer (the adapter knows).")
    quantize: bool = _option(False, "Load the model in 4 bits.")
    decoding: Literal["span", "free"] = _option(
        "span", "span: only substrings of the context, or no answer. free: whatever is likeliest."
    )
    span_boundaries: Literal["word", "any"] = _option(
        "word",
        "Where spans may begin and end: word: at word boundaries, and they hold a letter or digit. "
        "any: at any character.",
    )
    num_beams: int | None = _option(
        None, f"Beams of the search (default: {SPAN_BEAMS} for spans, 1 for free decoding)."
    )
    length_penalty: float = _option(
        0.0,
        "Free decoding with several beams: a reply counts log P / tokens ** this, as in generate "
        "(0: the likeliest reply).",
    )
    batch_size: int | None = _option(
        None,
        "Questions at once, in whole paragraphs; halved by itself on out-of-memory "
        "(default: 32, more on a GPU with room for them).",
    )
    max_new_tokens: int = _option(256, "Length limit of a reply.")
    na_prob_thresh: float | None = _option(
        None, "Abstain where na_prob is above this (default: the adapter's tuned one, else 0.5)."
    )
    tune_threshold: bool = _option(
        False, "Pick the threshold on the validation split first, and keep it with the adapter."
    )
    tune_for: Literal["exact", "f1"] = _option(
        "exact", "Which official score --tune_threshold makes as high as it can."
    )
    n_best: int = _option(
        0, "Find this many best spans of each question: JSON, in a column of the result file."
    )
    audit: int = _option(
        0, "Score every span for this many questions, and say how often the search found the best."
    )
    num_samples: int | None = _option(None, "Answer only this many questions.")
    shuffle: bool = _option(False, "Take the questions in random order (see --seed).")
    sample: Literal["questions", "paragraphs"] = _option(
        "questions",
        "What --num_samples counts out: questions, or whole paragraphs at random until they hold "
        "so many: faster, as their questions share the context, but those of one paragraph are "
        "alike, so the figures vary more.",
    )
    seed: int = _option(42, "Seed of --shuffle and --sample paragraphs.")
    output: str = _option("results/results.csv", "Result file, appended to and resumable.")
    predictions_dir: str | None = _option(
        None, "Also write the official predictions.json and na_prob.json into this folder."
    )
    overwrite: bool = _option(False, "Start the result file anew.")


def resolve_beams(args: TestArguments) -> TestArguments:
    """Return the arguments with the number of beams that they mean."""
    if args.num_beams is not None:
        return args
    spans = args.predictor == "local" and args.decoding == "span"
    return dataclasses.replace(args, num_beams=SPAN_BEAMS if spans else 1)


@dataclasses.dataclass(frozen=True)
class AppArguments:
    """What ``app.py`` takes beside ``ModelArguments``."""

    adapter_name: str | None = _option(None, "Adapter: a folder, or a name on the Hub.")
    dataset_name: str = _option("data/squad_v2", "Dataset that the random questions come from.")
    prompt: Literal["single_turn", "multi_turn"] = _option("single_turn", _PROMPT_HELP)
    system_prompt: str = _option(SYSTEM_PROMPT, _SYSTEM_HELP)
    reasoning_tokens: int = _option(0, "Pause tokens before the answer (the adapter knows).")
    quantize: bool = _option(False, "Load the model in 4 bits.")
    max_new_tokens: int = _option(512, "Length limit of a reply, in tokens.")
    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(7860, "Port to listen on.")
    share: bool = _option(False, "Open a public Gradio link.")


# Checks --------------------------------------------------------------------------------------
# Beside the flags, and without torch: what is wrong with a command line is said at once.

_OF_ADAPTERS = {
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"),
    *("quantize", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "merged_dtype"),
}


def check_at_least(least: float, args: Any, *names: str) -> None:
    """Refuse a number that is too small; one that is None was not given.

    Raises:
        ValueError: the flag, the least it takes, and what was given.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:  # also refuses nan
            raise ValueError(f"--{name} must be at least {least}, not {value}")


def check_above_zero(args: Any, *names: str) -> None:
    """Refuse zero and less. Raises ValueError."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, not {value}")


def check_training_numbers(args: TrainArguments, trainer: TrainerArguments) -> None:
    """Refuse numbers that no training can be run with. Raises ValueError."""
    check_at_least(0, args, "reasoning_tokens", "eval_samples", "show_mask")
    check_at_least(1, args, "lora_r", "row_tokens")
    check_above_zero(args, "lora_alpha")
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
    if args.full_parameters:
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


# The file ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but ``1e-6`` is a number and a doubled key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is there twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ValueError: no such file, not YAML, not a mapping, or a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found a {type(content).__name__}")
    return content


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _shared_keys() -> set[str]:
    """Keys that may stand at the top of the file: those of more than one stage."""
    own = (CreateArguments, TrainArguments, TestArguments, AppArguments)
    names = [{f.name for f in dataclasses.fields(cls)} for cls in own]
    several = {name for fields in names for name in fields if sum(name in n for n in names) > 1}
    return several | {f.name for f in dataclasses.fields(ModelArguments)}


def _kinds(hint: Any) -> set[Any]:
    """Return the types of the values that a type hint admits."""
    if get_origin(hint) is Literal:
        return set(map(type, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return {kind for part in get_args(hint) for kind in _kinds(part)}
    return {hint}


def _known_keys(types: Sequence[type]) -> dict[str, tuple[str, set[Any]]]:
    """Map each key of a stage, a flag's other names included, to its field's name and types."""
    known = {}
    for cls in types:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            kinds = _kinds(hints[field.name]) | ({NoneType} if field.default is None else set())
            for name in (field.name, *field.metadata.get("aliases", ())):
                known[name.lstrip("-")] = (field.name, kinds)
    return known


def _settle(
    values: Mapping[str, Any], known: Mapping[str, tuple[str, set[Any]]], where: str
) -> dict[str, Any]:
    """Return the values under their fields' names, as the fields take them."""
    settled: dict[str, Any] = {}
    for key, value in values.items():
        name, kinds = known[key]
        if name in settled:
            raise ValueError(f"{where}: {key!r} is another name of a key that is there already")
        if value is None and NoneType not in kinds:
            raise ValueError(
                f"{where}: {key!r} is null: give it a value, or delete the line for the default"
            )
        # YAML takes `eval_strategy: no` for a boolean
        settled[name] = "no" if value is False and str in kinds and bool not in kinds else value
    return settled


def _file_values(
    path: Path, stage: str, known: Mapping[str, tuple[str, set[Any]]]
) -> dict[str, Any]:
    """Return what the file says to one stage: shared keys first, then its section's."""
    content = load_yaml(path)
    shared = {key: value for key, value in content.items() if key not in STAGES}
    section = content.get(stage) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: section {stage!r} must hold `key: value` lines")
    for key in shared.keys() - _shared_keys():
        where = "" if key not in known else f" (it belongs in the section `{stage}:`)"
        hint = where or nearest(str(key), [*_shared_keys(), *STAGES])
        raise ValueError(f"{path}: unknown key {key!r} at the top{hint}")
    for key in section.keys() - known:
        raise ValueError(f"{path}: unknown key {key!r} in `{stage}:`{nearest(str(key), known)}")
    shared = {key: value for key, value in shared.items() if key in known}
    return _settle(shared, known, str(path)) | _settle(section, known, f"{path}, `{stage}:`")


def _to_flags(values: Mapping[str, Any]) -> list[str]:
    """Write values as flags, so that file and command line share one parser."""
    flags: list[str] = []
    for key, value in values.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value)}")
        else:
            flags.append(f"--{key}={value}")
    return flags


def parse_stage(
    stage: str,
    types: Sequence[type],
    argv: Sequence[str] | None = None,
    saved: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
    description: str | None = None,
    *,
    check: Callable[[Sequence[Any]], object] | None = None,
    later: Collection[str] = (),
    hidden: Collection[str] = (),
) -> tuple[Any, ...]:
    """Parse a stage's configuration: defaults < file < ``saved`` < command line.

    Args:
        stage: the section of the file, one of ``STAGES``.
        types: dataclasses whose fields are the flags; one instance of each is returned.
        argv: the command line without the program's name (default: this process's).
        saved: given the instances as parsed so far, returns values that beat the file but not the
            flags (how an adapter brings the settings that it was trained with).
        description: what ``--help`` says first.
        check: given the instances before ``saved`` is called, which may take long; its ValueError
            is the caller's.
        later: names of further fields, which another call parses: they are passed over here.
        hidden: fields that ``--help_all`` does not list.

    Anything the user got wrong ends the program with exit code 2 and a message that names it.
    """
    from llama_squad.flags import make_parser, unknown_flags

    parser = make_parser(types, description, later, hidden)
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = _known_keys(types)
    library: dict[str, tuple[str, set[Any]]] = {
        name: (name, {NoneType, bool}) for name in later if name not in known
    }

    def parse(values: Mapping[str, Any], where: str) -> tuple[Any, ...]:
        values = {key: value for key, value in values.items() if key not in library}
        parser.set_defaults(**{key: None for key, value in values.items() if value is None})
        flags = _to_flags({key: value for key, value in values.items() if value is not None})
        if where:
            parser.prog = f"{prog}: {where}"
            parser.parse_args(flags)
            parser.prog = prog
        namespace, unknown = parser.parse_known_args([*flags, *arguments])
        for word in unknown_flags(unknown, library):
            if word.startswith("-"):
                name = word.split("=")[0]
                flags = [*parser._option_string_actions, *(f"--{name}" for name in library)]
                parser.error(f"unknown flag {name}{nearest(name, flags)}")
            parser.error(f"unexpected argument {word!r}")
        values = vars(namespace)
        return tuple(
            cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.init})
            for cls in types
        )

    prog = parser.prog
    path = _config_path(given_config(arguments))
    try:
        values = _file_values(path, stage, known | library) if path else {}
        parsed = parse(values, str(path) if path else "")
    except ValueError as error:
        parser.error(str(error))
    if check and "--help_all" not in arguments:  # which another call answers
        check(parsed)
    try:
        more = saved(parsed) if saved else {}
        if more:
            parsed = parse(values | {k: v for k, v in more.items() if k in known}, "")
    except ValueError as error:
        parser.error(str(error))
    return parsed


def given_config(arguments: Sequence[str]) -> str | None:
    """Return the FILE of ``--config FILE``, if it is there."""
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _config_path(config: str | None) -> Path | None:
    """Return the configuration file; without one ``config.yaml`` of the current folder, if any."""
    if config is not None:
        return Path(config)
    default = Path("config.yaml")
    return default if default.is_file() else None


def stage_values(stage: str, types: Sequence[type], config: str | None) -> dict[str, Any]:
    """Return the values that a stage takes where no flag is given: the file's, else the defaults.

    Raises:
        ValueError: the file is at fault.
    """
    values = {f.name: f.default for cls in types for f in dataclasses.fields(cls)}
    path = _config_path(config)
    if path:
        content = load_yaml(path)
        section = content.get(stage)
        known = _known_keys(types)
        for part in (content, section if isinstance(section, dict) else {}):
            values |= {known[key][0]: value for key, value in part.items() if key in known}
    return values


_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def provenance() -> dict[str, Any]:
    """Return what a run was made with: package versions, Python, and the commit if there is one."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": {"python": platform.python_version(), **versions}, "commit": _commit()}


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return git.stdout.strip() or None


def write_json(path: Path, content: Any) -> None:
    """Write JSON aside, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:  # such as a full disk
        aside.unlink(missing_ok=True)
        raise


def save_run_config(folder: str | Path, stage: str, **settings: Any) -> None:
    """Save the resolved configuration of a run beside its output, with its provenance."""
    content = {
        key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        for key, value in settings.items()
    }
    write_json(Path(folder) / RUN_CONFIG, {"stage": stage, **content, **provenance()})


def load_run_config(folder: str | Path) -> dict[str, Any]:
    """Read what ``save_run_config`` wrote; {} where there is none (an adapter made elsewhere)."""
    path = Path(folder) / RUN_CONFIG
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object): restore it, or delete it")
    return content
