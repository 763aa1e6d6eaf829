"""Logits in float32 of a model that computes in 16 bits."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

HEAD_ROWS = 8192
"""So many rows of a 16-bit head are turned to float32 at once, where it is not kept."""

_PRECISION = threading.Lock()
"""Held while torch's own is another: two threads at once would leave it so."""


@contextlib.contextmanager
def exact_head(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with 16-bit weights, or under autocast, give its logits in float32.

    A logit of 20 is rounded to the next 0.125 in bfloat16: that is the coarsest rounding of all,
    and it falls on what is compared. Heads of other kinds (quantised, adapted) stay as they are.
    The weights must not change in the body; one within another is the outer one.
    """
    head = cast(Any, model.get_output_embeddings())
    # where a model is spread over GPUs, accelerate's hook stands before it
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    own = head.__dict__.get(name)
    if not _is_plain(head) or isinstance(own, _Product):
        yield
        return
    setattr(head, name, _Product(head))
    try:
        yield
    finally:
        if own is None:
            delattr(head, name)
        else:
            setattr(head, name, own)


def kept_bytes(model: PreTrainedModel) -> int:
    """Return how many bytes ``exact_head`` keeps: a large head in float32, on a CPU."""
    head = cast(Any, model.get_output_embeddings())
    return 4 * head.weight.numel() if _is_plain(head) and _is_kept(head.weight) else 0


def _is_plain(head: Any) -> bool:
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return type(head) is nn.Linear and head.weight.dtype in kinds


def _is_kept(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and len(weight) > HEAD_ROWS  # a small one gains nothing
    )


def _sums_wide(weight: torch.Tensor) -> bool:
    """Tell whether a product of 16-bit factors can be had in float32, without a copy of them."""
    return weight.is_cuda and torch.version.hip is None


class _Product:
    """The product of a head, in float32."""

    def __init__(self, head: nn.Linear) -> None:
        self._head = head
        self._wide: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, of shape (..., vocabulary)."""
        # a trainer's evaluation runs under autocast, which would round factors and logits
        with torch.autocast(hidden.device.type, enabled=False):
            return self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self._head.weight, self._head.bias
        if weight.dtype == torch.float32:
            return F.linear(hidden.float(), weight, bias)
        wide = hidden.float().flatten(0, -2)  # of more dimensions, torch would copy the weights
        if _is_kept(weight) and hidden.dtype == weight.dtype:
            if self._wide is None:
                self._wide = weight.float()
            logits = _bfloat16_product(wide, self._wide)
        elif _sums_wide(weight) and hidden.dtype == weight.dtype and not torch.is_grad_enabled():
            logits = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32)
        else:
            parts = [F.linear(wide, rows.float()) for rows in weight.split(HEAD_ROWS)]
            logits = torch.cat(parts, dim=-1)
        logits = logits.unflatten(0, hidden.shape[:-1])
        return logits if bias is None else logits + bias.float()


def _bfloat16_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the product of float32 factors whose values are all of bfloat16, on a CPU.

    Its units for bfloat16 (AMX) sum in float32, too, and several times as fast.
    """
    matmul = cast(Any, torch.backends.mkldnn).matmul
    with _PRECISION:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            return F.linear(x, weight)
        finally:
            matmul.fp32_precision = before
