"""Logits in float32 of a model that computes in 16 bits."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from llama_squad.products import is_packable, pack, packed_linear, sums_in_float32
from llama_squad.tree import is_out_of_memory

HEAD_ROWS = 8192
"""So many rows of a 16-bit head are turned to float32 at once, where it is not kept."""


@contextlib.contextmanager
def exact_head(model: PreTrainedModel, product: "Product | None" = None) -> Iterator[None]:
    """Let a model with 16-bit weights, or under autocast, give its logits in float32.

    A logit of 20 is rounded to the next 0.125 in bfloat16: that is the coarsest rounding of all,
    and it falls on what is compared. Heads of other kinds (quantised, adapted) stay as they are.
    The weights must not change in the body; one within another is the outer one.

    Args:
        model: whose output layer is replaced in the body of ``with``.
        product: of it, where one was made before and the weights are still the same.
    """
    head = cast(Any, model.get_output_embeddings())
    # where a model is spread over GPUs, accelerate's hook stands before it
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    own = head.__dict__.get(name)
    if not _is_plain(head) or isinstance(own, Product):
        yield
        return
    setattr(head, name, product or Product(head))
    try:
        yield
    finally:
        if own is None:
            delattr(head, name)
        else:
            setattr(head, name, own)


def _is_plain(head: Any) -> bool:
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return type(head) is nn.Linear and head.weight.dtype in kinds


def _is_kept(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and _packs()))
        and len(weight) > HEAD_ROWS  # a small one gains nothing
    )


def _packs() -> bool:
    """Tell whether a float32 copy is packed; units of AMX are faster, in bfloat16."""
    return is_packable(torch.float32) and not torch.cpu._is_amx_tile_supported()


def _sums_wide(weight: torch.Tensor) -> bool:
    """Tell whether a product of 16-bit factors can be had in float32, without a copy of them."""
    return weight.is_cuda and torch.version.hip is None


class Product:
    """The product of a head, in float32; a large one's weights are kept so, on a CPU.

    Args:
        head: the output layer of a model. Its weights must not change.
    """

    def __init__(self, head: nn.Linear) -> None:
        self._head = head
        self._wide: torch.Tensor | None = None
        self._fits = True

    def keep(self, room: float = math.inf) -> None:
        """Make what is kept, where anything is, and where ``room`` bytes hold it."""
        if self._wide is not None or not self._fits:
            return
        if not (_is_plain(self._head) and _is_kept(self._head.weight)):
            return
        weight = self._head.weight.detach()
        copies = 2 if _packs() and weight.dtype != torch.float32 else 1
        self._fits = 4 * weight.numel() * copies <= room
        try:
            if self._fits:
                self._wide = pack(weight.float()) if _packs() else weight.float()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._fits = False

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, of shape (..., vocabulary)."""
        # a trainer's evaluation runs under autocast, which would round factors and logits
        with torch.autocast(hidden.device.type, enabled=False):
            return self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self._head.weight, self._head.bias
        wide = hidden.float().flatten(0, -2)  # of more dimensions, torch would copy the weights
        plain = hidden.dtype == weight.dtype and not torch.is_grad_enabled()
        if plain and weight.dtype == torch.bfloat16:  # for one pass in float32 it does not pay
            self.keep()
        if plain and self._wide is not None:
            logits = self._by_kept(wide, self._wide)
        elif weight.dtype == torch.float32:
            return F.linear(hidden.float(), weight, bias)
        elif plain and _sums_wide(weight):
            logits = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32)
        else:
            parts = [F.linear(wide, rows.float()) for rows in weight.split(HEAD_ROWS)]
            logits = torch.cat(parts, dim=-1)
        logits = logits.unflatten(0, hidden.shape[:-1])
        return logits if bias is None else logits + bias.float()

    def _by_kept(self, hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        if _packs():
            return packed_linear(hidden, kept)
        with sums_in_float32(self._head.weight.dtype):
            return F.linear(hidden, kept)
