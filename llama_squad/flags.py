"""The command line of a stage: its parser, a short ``--help``, and the names of TRL's flags.

transformers' parser turns dataclasses into flags; this adds what a reader of ``--help`` needs. It
loads neither torch nor TRL.
"""

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_HELP_ALL = "--help_all"

_GROUPS = {
    "data": (
        *("dataset_name", "source", "train_files", "test_files", "validation_ratio"),
        *("split", "num_samples", "shuffle", "sample", "seed", "eval_samples", "results", "data"),
        *("predictions", "na_prob"),
    ),
    "model": (
        *("model_name", "adapter_name", "predictor", "base_url", "chat_template", "dtype"),
        *("attn_implementation", "quantize", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    ),
    "prompt": ("prompt", "system_prompt", "reasoning_tokens", "filler"),
    "adapter": (
        *("full_parameters", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        *("use_rslora", "use_dora", "alora_from"),
    ),
    "training": (
        *("num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "share_context", "row_tokens", "max_length", "bf16"),
        *("resume_from_checkpoint", "resume_anyway", "eval_strategy", "eval_steps", "show_mask"),
    ),
    "answers": (
        *("decoding", "num_beams", "batch_size", "max_new_tokens", "stop_after_answer"),
        *("na_prob_thresh", "tune_threshold", "calibrate", "no_answer_share", "n_best"),
    ),
    "output": (
        *("output_dir", "output", "predictions_dir", "overwrite"),
        *("format", "intervals", "paired", "plot"),
        *("merge_and_push", "hub_model_id", "save_steps", "logging_steps", "report_to"),
    ),
}
"""Title → flags, in the order in which ``--help`` lists the titles; all other flags follow."""

_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}

FILES_FIRST = "files stand before the flags"


def make_parser(
    types: Sequence[type],
    description: str | None,
    later: Collection[str] = (),
    hidden: Collection[str] = (),
) -> argparse.ArgumentParser:
    """Make the parser of a stage.

    Args:
        types: dataclasses whose fields are the flags.
        description: what ``--help`` says first, its lines as they are.
        later: names of flags that another parser takes: ``--help`` says where they are listed, and
            ``--help_all`` is left to that other parser.
        hidden: names of flags that are not listed.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            if "Truthy value expected" in message and "--results" in self._option_string_actions:
                message = f"{message} {FILES_FIRST}"
            self.exit(2, f"{self.prog}: error: {message}\n")

        def format_help(self) -> str:
            return _format_help(self, _own_fields(types), hidden)

    parser = Parser(
        types,  # type: ignore[arg-type]
        allow_abbrev=False,
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="Configuration file (default: config.yaml, if there)."
    )
    if later:
        text = "List every other field of TRL's SFTConfig, too: each is a flag."
        parser.add_argument(_HELP_ALL, action="store_true", help=text)
    else:  # what --help does
        parser.add_argument(_HELP_ALL, action="help", help=argparse.SUPPRESS)
    for action in parser._actions:
        if action.metavar is None and action.choices is None and action.option_strings:
            action.metavar = _METAVARS.get(action.type, "TEXT")
    return parser


def unknown_flags(words: Sequence[str], later: Collection[str]) -> Iterator[str]:
    """Yield of the words that a parser did not know those that are not ``later``'s either."""
    values_may_follow = False
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-[\d.].*", word):
            name = word.split("=")[0].lstrip("-").replace("-", "_")
            values_may_follow = name in later or name.removeprefix("no_") in later
        if not values_may_follow:
            yield word


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


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


def parse_values(
    parser: argparse.ArgumentParser,
    types: Sequence[type],
    arguments: Sequence[str],
    library: Collection[str],
    values: Mapping[str, Any],
    *,
    where: str = "",
) -> tuple[Any, ...]:
    """Parse values of a file, then the command line, which beats them.

    Args:
        parser: of the stage.
        types: the dataclasses to fill.
        arguments: the command line.
        library: fields that another parser takes.
        values: by field.
        where: the file; its values are checked alone first, so that its faults name it.
    """
    values = {key: value for key, value in values.items() if key not in library}
    parser.set_defaults(**{key: None for key, value in values.items() if value is None})
    flags = _to_flags({key: value for key, value in values.items() if value is not None})
    if where:
        prog = parser.prog
        parser.prog = f"{prog}: {where}"
        parser.parse_args(flags)
        parser.prog = prog
    # apart, as a list that ends the file would take the command line's first words
    namespace, unknown = parser.parse_known_args(flags)
    namespace, more = parser.parse_known_args(arguments, namespace)
    unknown += more
    for word in unknown_flags(unknown, library):
        if word.startswith("-"):
            name = word.split("=")[0]
            flags = [*parser._option_string_actions, *(f"--{name}" for name in library)]
            parser.error(f"unknown flag {name}{nearest(name, flags)}")
        takes_files = "--results" in parser._option_string_actions
        cure = f": {FILES_FIRST}" if takes_files else ""
        parser.error(f"unexpected argument {word!r}{cure}")
    values = vars(namespace)
    return tuple(
        cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.init}) for cls in types
    )


def sft_config_fields() -> frozenset[str]:
    """Return the names of the fields of TRL's ``SFTConfig``, read from its source.

    Importing it takes ten seconds, since it loads torch; this takes 0.1, so that a misspelt flag is
    refused at once. Empty where the source is not to be found: then the real parser refuses it.
    """
    names: set[str] = set()
    for package, file in (
        ("trl", "trainer/sft_config.py"),
        ("trl", "trainer/base_config.py"),
        ("transformers", "training_args.py"),
    ):
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin or "").parent / file if spec else Path()
        if not path.is_file():
            return frozenset()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                names |= {item.target.id for item in fields if isinstance(item.target, ast.Name)}
    return frozenset(names)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the description's lines alone, and lists a flag in one spelling, with its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = next(name for name in action.option_strings if name.startswith("--"))
        if _is_switch(action):
            return name.replace("--", "--[no_]", 1) if action.default is True else name
        if action.nargs == 0:
            return name
        return f"{name} {self._format_args(action, '')}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.choices is not None:
            if len(tuple(action.choices)) > 8:
                return "NAME"
            return "{" + ",".join(map(str, action.choices)) + "}"
        return f"{action.metavar} ..." if action.nargs == "+" else str(action.metavar)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").strip()
        default = action.default
        if isinstance(default, list):
            default = " ".join(map(str, default))
        unsaid = default in (None, "", argparse.SUPPRESS) or isinstance(default, bool)
        if unsaid or "default" in text:
            return text
        shown = " ".join(str(default).split()).replace("%", "%%")
        if len(shown) > 60:
            shown = shown[:57] + "..."
        return f"{text} (default: {shown})"


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == "?" and action.const is True


def _own_fields(types: Sequence[type]) -> set[str]:
    """Return the fields that this project's own classes declare."""
    bases = [base for cls in types for base in cls.__mro__]
    own = [base for base in bases if not base.__module__.startswith(("trl.", "transformers."))]
    return {name for base in own for name in vars(base).get("__annotations__", ())}


def _format_help(
    parser: argparse.ArgumentParser, own: Collection[str], hidden: Collection[str]
) -> str:
    """Return the help: our own flags by subject, each once, and then the library's."""
    listed: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and action.dest not in hidden:
            listed.setdefault(action.dest, action)  # the first of --x and --no_x
    formatter: Any = parser._get_formatter()
    formatter.add_text(f"python {parser.prog} [flags]")
    formatter.add_text(parser.description)
    for title, names in _GROUPS.items():
        actions = [listed.pop(name) for name in names if name in listed]
        if actions:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
    ours = {*own, "help", "help_all", "config"}
    for title, rest in (
        ("more", [action for name, action in listed.items() if name in ours]),
        ("TRL's SFTConfig", [action for name, action in listed.items() if name not in ours]),
    ):
        if rest:
            formatter.start_section(title)
            formatter.add_arguments(rest)
            formatter.end_section()
    return formatter.format_help()
