"""Logits of the supervised tokens: what training takes its loss of.

Where an activated adapter is trained, the tokens before it (contexts, system prompts) are run by
the base without gradients, the others over their keys and values. Uses ``llama_squad.tree``.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from llama_squad.activation import ADAPTER_MASK, activation_of
from llama_squad.encoding import IGNORE
from llama_squad.tree import kept_logits, make_masks


def answer_logits(
    model: Any, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that predict the supervised tokens, row by row, and these tokens.

    Args:
        model: causal language model.
        inputs: a batch of ``SquadDataCollator``: "input_ids" and "labels" of shape (rows, length),
            and what the model takes beside them.

    Returns:
        Logits of shape (supervised tokens, vocabulary), and ids of shape (supervised tokens,).
    """
    targets = next_tokens(inputs["labels"], IGNORE)
    keep = targets != IGNORE
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not runs_base_first(inner, inputs):
        return kept_logits(model, inputs, keep), targets[keep]
    return _logits_over_the_base(model, inner, inputs, keep), targets[keep]


def next_tokens(values: torch.Tensor, fill: int) -> torch.Tensor:
    """Return at each token what stands at the next one, of shape (rows, length)."""
    return F.pad(values, (0, 1), value=fill)[:, 1:]


def _logits_over_the_base(
    model: Any, inner: Any, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor
) -> torch.Tensor:
    """Return what ``kept_logits`` does; tokens that no adapter has touched take no gradient.

    They are the base's own, so nothing that is trained stands before them: the base runs them
    first, and the other tokens are run over its keys and values.

    Args:
        model: what is called for the gradient.
        inner: the ``PeftModel`` in it.
        inputs: a batch with "attention_mask" of shape (rows, 1, length, length).
        keep: bool, of shape (rows, length).
    """
    visible = inputs["attention_mask"]
    later = inputs[ADAPTER_MASK] | keep
    later = (visible[:, 0] & later[:, None]).any(-1)  # what sees such tokens comes after them
    first = int((~later).sum(1).min())  # in all rows; what a longer one has beyond it comes later
    order = later.long().argsort(dim=1, stable=True)
    ids, positions, adapted, keep = (
        part.gather(1, order)
        for part in (inputs["input_ids"], inputs["position_ids"], inputs[ADAPTER_MASK], keep)
    )
    visible = visible.take_along_dim(order[:, None, :, None], 2)
    visible = visible.take_along_dim(order[:, None, None, :], 3)
    cache = DynamicCache()
    if first:
        stem = positions[:, :first]
        with torch.no_grad(), inner.disable_adapter():
            inner(
                input_ids=ids[:, :first],
                position_ids=stem,
                attention_mask=make_masks(inner, visible[:, :, :first, :first], stem, stem),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    rest = positions[:, first:]
    logits = model(
        input_ids=ids[:, first:],
        position_ids=rest,
        attention_mask=make_masks(inner, visible[:, :, first:], rest, positions),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep[:, first:],
        **{ADAPTER_MASK: adapted[:, first:]},
    ).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def runs_base_first(model: Any, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether tokens that no adapter has touched are kept apart, as keys and values."""
    from peft import PeftModel

    # wrappers of FSDP and DeepSpeed are none: all processes have to run these equally often
    if not isinstance(model, PeftModel) or activation_of(model) is None:
        return False
    # layers that are run again for the gradient take no cache
    again = model.training and model.is_activation_checkpointing
    return not again and ADAPTER_MASK in inputs and inputs["attention_mask"].dim() == 4
