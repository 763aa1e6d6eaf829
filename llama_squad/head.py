"""Logits in float32 of a model whose weights have 16 bits."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

HEAD_ROWS = 8192
"""So many rows of a 16-bit head are turned to float32 at once on a GPU."""

_WIDE: "weakref.WeakKeyDictionary[nn.Module, torch.Tensor]" = weakref.WeakKeyDictionary()
"""Heads on a CPU, in float32: to convert one takes longer than its product with a few tokens."""


@contextlib.contextmanager
def exact_head(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with 16-bit weights give its logits in float32, in the body of ``with``.

    A logit of 20 is rounded to the next 0.125 in bfloat16: that is the coarsest rounding of all,
    and it falls on what is compared. Heads of other kinds (quantised, adapted) stay as they are.
    On a CPU the head is that of the last ``renew_head``.
    """
    head = cast(Any, model.get_output_embeddings())
    kinds = (torch.bfloat16, torch.float16)
    if type(head) is not nn.Linear or head.weight.dtype not in kinds or hasattr(head, "_hf_hook"):
        yield
        return

    def product(hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        if hidden.device.type == "cpu":
            logits = F.linear(wide, _wide_weight(head))
        else:
            parts = [F.linear(wide, rows.float()) for rows in head.weight.split(HEAD_ROWS)]
            logits = torch.cat(parts, dim=-1)
        return logits if head.bias is None else logits + head.bias.float()

    own = head.__dict__.get("forward")
    head.forward = product  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


def renew_head(model: PreTrainedModel) -> None:
    """Bring what ``exact_head`` keeps of a head up to date: to be called before a batch is decoded.

    Nothing tells that weights have changed: fused optimizers, merges and all that writes to
    ``.data`` leave a tensor's version as it is.
    """
    head = cast(Any, model.get_output_embeddings())
    kept = None if head is None else _WIDE.get(head)
    if kept is None:
        return
    weight = getattr(head, "weight", None)
    if weight is None or weight.device.type != "cpu" or weight.shape != kept.shape:
        del _WIDE[head]
        return
    with torch.inference_mode():  # in which it may have been made
        kept.copy_(weight)


def _wide_weight(head: nn.Linear) -> torch.Tensor:
    """Return a head's weight in float32, kept until ``renew_head`` or the model is dropped."""
    kept = _WIDE.get(head)
    if kept is None or kept.shape != head.weight.shape:
        kept = _WIDE[head] = head.weight.detach().float()
    return kept
