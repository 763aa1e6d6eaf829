"""Typed configuration: dataclass defaults < ``config.yaml`` < the adapter's own < the command line.

The file holds shared keys at the top and one section per stage. Every value goes through the same
parser as the flags do, so a flag and a key of the file cannot mean two things, and an unknown one
is refused with the nearest name. The scripts parse; the package only takes the dataclasses.
"""

import dataclasses
import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from llama_squad.arguments import (
    AppArguments,
    CreateArguments,
    EvalArguments,
    ModelArguments,
    TrainArguments,
)
from llama_squad.flags import make_parser, nearest, parse_values

STAGES = ("create", "train", "test", "summarize", "app")

RUN_CONFIG = "llama_squad.json"
"""The resolved configuration that every dataset and adapter carries beside its files."""


# The file ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but ``1e-6`` is a number and a doubled key is an error."""

    def construct_document(self, node: yaml.Node) -> Any:
        self._refuse_doubled(node, set())  # before `<<: *other` merges others into a mapping
        return super().construct_document(node)

    def _refuse_doubled(self, node: yaml.Node, done: set[int]) -> None:
        if id(node) in done or isinstance(node, yaml.ScalarNode):
            return
        done.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            for item in node.value:
                self._refuse_doubled(item, done)
            return
        seen: set[Any] = set()
        for key_node, value in node.value:
            self._refuse_doubled(value, done)
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is there twice")
            seen.add(key)


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
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a key may be no plain value
        raise ValueError(f"{path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found a {type(content).__name__}")
    return content


def _shared_keys() -> set[str]:
    """Keys that may stand at the top of the file: those of more than one stage."""
    own = (CreateArguments, TrainArguments, EvalArguments, AppArguments)
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
        if value is False and str in kinds and bool not in kinds:  # `no`, to YAML
            value = None if NoneType in kinds and name != "report_to" else "no"
        settled[name] = value
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
    parser = make_parser(types, description, later, hidden)
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = _known_keys(types)
    library: dict[str, tuple[str, set[Any]]] = {
        name: (name, {NoneType, bool}) for name in later if name not in known
    }

    parse = functools.partial(parse_values, parser, types, arguments, library)
    path = _config_path(given_config(arguments))
    try:
        values = _file_values(path, stage, known | library) if path else {}
        parsed = parse(values, where=str(path) if path else "")
    except ValueError as error:
        parser.error(str(error))
    if check and "--help_all" not in arguments:  # which another call answers
        check(parsed)
    try:
        more = saved(parsed) if saved else {}
        if more:
            parsed = parse(values | {k: v for k, v in more.items() if k in known})
    except ValueError as error:
        parser.error(str(error))
    return parsed


def given_config(arguments: Sequence[str]) -> str | None:
    """Return the FILE of the last ``--config FILE``; None where there is none."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith("--config="):
            found = argument.removeprefix("--config=")
    return found


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


def prompt_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt's settings among those that a stage saved; they may be none."""
    return {key: saved[key] for key in ("prompt", "system_prompt") if key in saved}
