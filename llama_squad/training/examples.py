"""From a split of the dataset to encoded examples, cached on disk."""

from collections.abc import Mapping
from typing import Any

from llama_squad.data import paragraph_key
from llama_squad.encoding import ChatEncoder
from llama_squad.prompts import ActsFrom, adapter_start

_ENCODING_VERSION = 1
"""Raised when ``ChatEncoder`` changes what it gives, so that no stale cache is read."""


def encode_split(
    split: Any,
    encoder: ChatEncoder,
    max_length: int | None,
    name: str,
    *,
    prompt: str = "single_turn",
    adapter_from: ActsFrom = "start",
) -> tuple[Any, int]:
    """Encode a split's messages; return a dataset of token ids, and how many were dropped.

    Its columns are "input_ids", "labels", "paragraph" (a digest of title and context) and "length"
    (in tokens). An example longer than ``max_length`` tokens is left out. With an activated
    adapter, one that acts from some part of the ``prompt`` on (``ActsFrom``), there is
    "adapter_from", too: the first token that it acts on.

    Results are cached on disk, keyed by the data, the tokenizer and the template.
    """
    from datasets.fingerprint import Hasher

    filler = encoder.filler_ids
    columns = ["input_ids", "labels", "paragraph", "length"]
    columns += ["adapter_from"] * (adapter_from != "start") + ["hidden"] * bool(filler)

    def encode(batch: Mapping[str, list]) -> dict[str, list]:
        encoded = encoder.encode(batch["messages"], _places(batch, prompt, adapter_from))
        of = zip(batch["title"], batch["context"], strict=True)
        for example, (title, context) in zip(encoded, of, strict=True):
            example["paragraph"] = paragraph_key(title, context)
            example["length"] = len(example["input_ids"])
        fit = [e for e in encoded if max_length is None or e["length"] <= max_length]
        return {column: [example[column] for example in fit] for column in columns}

    backend = encoder.tokenizer.backend_tokenizer.to_str()
    template, reasoning = encoder.tokenizer.chat_template, encoder.reasoning_ids
    more = (filler, adapter_from, prompt)
    key = (split._fingerprint, backend, template, reasoning, max_length, *more)
    dataset = split.map(
        encode,
        batched=True,
        batch_size=500,
        remove_columns=split.column_names,
        new_fingerprint=Hasher.hash((_ENCODING_VERSION, *key)),
        desc=f"Encoding {name}",
    )
    return dataset, len(split) - len(dataset)


def _places(
    batch: Mapping[str, list], prompt: str, adapter_from: ActsFrom
) -> list[tuple[int, int]] | None:
    """Return where an activated adapter begins to act in each conversation; None: there is none."""
    if adapter_from == "start":
        return None
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    return [adapter_start(row["messages"], row, prompt, adapter_from) for row in rows]


def encode_dataset(
    dataset: Any, encoder: ChatEncoder, max_length: int | None, **options: Any
) -> dict[str, Any]:
    """Encode the train and val splits, and say how many examples had to be left out.

    ``options`` are those of ``encode_split``.

    Raises:
        ValueError: nothing is left of a split.
    """
    encoded = {}
    for name in ("train", "val"):
        if name not in dataset:
            continue
        encoded[name], dropped = encode_split(dataset[name], encoder, max_length, name, **options)
        if dropped:
            print(
                f"{name}: {dropped:,} of {len(dataset[name]):,} examples are longer than "
                f"{max_length} tokens and were left out (raise --max_seq_length to keep them)."
            )
        if not len(encoded[name]):
            raise ValueError(f"no example of the {name} split fits in {max_length} tokens")
    if "train" not in encoded:
        raise ValueError("the dataset has no train split: build it with --train_files")
    return encoded
