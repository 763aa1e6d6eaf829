"""Logits in float32 of a model whose weights have 16 bits."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

HEAD_ROWS = 8192
"""So many rows of a 16-bit head are turned to float32 at once."""


@contextlib.contextmanager
def exact_head(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with 16-bit weights give its logits in float32, in the body of ``with``.

    A logit of 20 is rounded to the next 0.125 in bfloat16: that is the coarsest rounding of all,
    and it falls on what is compared. Heads of other kinds (quantised, adapted) stay as they are.
    """
    head = cast(Any, model.get_output_embeddings())
    kinds = (torch.bfloat16, torch.float16)
    if type(head) is not nn.Linear or head.weight.dtype not in kinds or hasattr(head, "_hf_hook"):
        yield
        return

    def product(hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
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
