"""The two models that eval.sh compares, and what tells whether an earlier run was of the same."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from llama_squad.weights import find_file, tuned_from, weights_digest


class Side(NamedTuple):
    """One of the two models that are compared."""

    model: str
    adapter: str | None = None


class Sides(NamedTuple):
    """What is compared. Both take the tuned model's tokenizer: nothing but the weights differs."""

    base: Side
    tuned: Side
    tokenizer: str


def find_sides(model: str, base: str | None) -> Sides:
    """Return what is compared; ``base`` is None where the tuned model says what it was tuned from.

    Raises:
        ValueError: ``model`` is no adapter and no model, or does not name its base.
    """
    adapter = find_file(model, "adapter_config.json")
    if not adapter and not find_file(model, "config.json"):
        raise ValueError(
            f"{model} holds neither an adapter nor a model: give the folder of one, such as "
            "train_llama_squad.py writes to results/final_checkpoints"
        )
    if not base:
        try:
            base = tuned_from(model)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"{model} is damaged: {first}") from error
    if not base:
        raise ValueError(f"{model} names no base model: give it with --base")
    tokenizer = model if find_file(model, "tokenizer_config.json") else base
    return Sides(Side(base), Side(base, model) if adapter else Side(model), tokenizer)


def base_key(args: argparse.Namespace, sides: Sides) -> dict[str, Any]:
    """Return all that what the base says depends on, beside what it is asked."""
    return {
        **{name: getattr(args, name) for name in ("quantize", "device", "dtype")},
        "base": sides.base.model,
        "weights": weights_digest(sides.base.model),
        "tokenizer": digests(sides.tokenizer, "*token*", "chat_template*") or sides.tokenizer,
        "transformers": version("transformers"),
    }


def digests(folder: str | None, *patterns: str) -> list[str]:
    """Return digests of the matching files of a folder; [] of a name on the Hub."""
    paths = [p for pattern in patterns for p in (Path(folder).glob(pattern) if folder else [])]
    return [_digest(path.read_bytes()) for path in sorted(paths) if path.is_file()]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def digest_of(key: Mapping[str, Any]) -> str:
    return _digest(json.dumps(key, sort_keys=True).encode())


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
