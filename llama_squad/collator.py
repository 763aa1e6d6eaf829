"""Examples → batches in which only the answer is trained.

``SquadDataCollator`` pads batches, and builds rows in which the questions of a paragraph share its
context: ``[prefix][branch 1]...[branch k]``, each branch seeing the prefix and itself. Loss and
gradients are those of the separate examples; see docs/how-it-works.md. The encoder is in
``llama_squad.encoding``, the layout of a row in ``llama_squad.tree``.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llama_squad.activation import ADAPTER_MASK
from llama_squad.encoding import IGNORE, ChatEncoder, Encoded
from llama_squad.prompts import Message
from llama_squad.tree import Tree, batch_rows


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_length: int | None = None,
) -> Encoded | None:
    """Encode one conversation that ends with the assistant's JSON answer.

    Returns:
        ``{"input_ids": [...], "labels": [...]}``: labels are -100 except on the last reply, from
        its first token through the one that ends the turn. None where the conversation is longer
        than ``max_length`` tokens: a label is never cut, the example is left out.
    """
    encoded = ChatEncoder(tokenizer).encode([messages])[0]
    fits = max_length is None or len(encoded["input_ids"]) <= max_length
    return encoded if fits else None


def colour_labels(tokenizer: PreTrainedTokenizerBase, example: Encoded) -> str:
    """Return the conversation for a terminal, its supervised tokens in green."""
    parts: list[str] = []
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    for supervised, run in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        text = str(tokenizer.decode([token for token, _ in run]))
        parts.append(f"\033[1;30;42m{text}\033[0m" if supervised else text)
    return "".join(parts)


@dataclass
class SquadDataCollator(DataCollatorForLanguageModeling):
    """Pad examples, or rows of examples that share contexts, into a batch.

    Takes features of two kinds, one kind a batch:

    - ``{"input_ids", "labels"}``, one example: gives right-padded ``input_ids``, ``labels`` and
      ``attention_mask`` of shape (examples, length);
    - ``{"paragraphs": [[example, ...], ...]}``, a row: gives ``input_ids``, ``labels`` and
      ``position_ids`` of shape (rows, length) and ``attention_mask``, bool, of shape
      (rows, 1, length, length), of which ``tree.make_masks`` makes what a model takes. Rows of one
      example each are collated as that example, unless it holds filler, which takes a mask.

    Examples of an activated adapter, which hold ``adapter_from``, also give ``adapter_mask``: where
    it acts, bool, of shape (rows, length).

    Rows of examples with labels on all tokens also give ``weights``: of how many examples each
    label is, int64, of shape (rows, length).

    Examples that say whether they are plain chat also give ``chat``: which tokens are, bool, of
    shape (rows, length).

    With ``counts`` either kind also gives ``counts``, int64 of shape (rows, 3): a row's questions,
    its tokens, and its tokens if nothing was shared. No model takes it: ``SquadTrainer`` does.

    Padding is told apart by the attention mask, never by comparing with ``pad_token_id``, so the
    pad token may be the one that ends the turn.
    """

    counts: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate; see the class."""
        rows = [example.get("paragraphs", [[example]]) for example in examples]
        lengths = [[len(e["input_ids"]) for group in row for e in group] for row in rows]
        if max(map(len, lengths)) > 1 or "hidden" in rows[0][0][0]:
            trees = [Tree.build(row) for row in rows]
            batch = dict(batch_rows(trees, self.pad_token_id, self.pad_to_multiple_of))
            tokens = [len(tree.input_ids) for tree in trees]
        else:  # nothing to share
            alone = [{k: row[0][0][k] for k in ("input_ids", "labels")} for row in rows]
            batch, tokens = super().torch_call(alone), [length for (length,) in lengths]
            if "adapter_from" in rows[0][0][0]:
                start = torch.tensor([row[0][0]["adapter_from"] for row in rows])
                batch[ADAPTER_MASK] = torch.arange(batch["input_ids"].shape[1]) >= start[:, None]
            if "chat" in rows[0][0][0]:
                chat = torch.tensor([row[0][0]["chat"] for row in rows])
                batch["chat"] = chat[:, None].expand(batch["input_ids"].shape).clone()
        if self.counts:
            held = zip(lengths, tokens, strict=True)
            batch["counts"] = torch.tensor([[len(each), n, sum(each)] for each, n in held])
        return batch
