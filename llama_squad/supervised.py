"""Logits of the supervised tokens: what training takes its loss of.

Where an activated adapter is trained, the tokens before it (system prompt and instruction, and the
context, where it acts from the question on) are run by the base without gradients, the others over
their keys and values. Uses ``llama_squad.tree``.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache

from llama_squad.activation import ADAPTER_MASK, activation_of
from llama_squad.encoding import IGNORE
from llama_squad.processes import is_sharded
from llama_squad.tree import kept_logits, make_masks, widen

CPU_LOGITS, GPU_LOGITS = 2**19, 2**26
"""Logits that ``CrossEntropy`` takes at a time: 2 and 256 MiB in float32."""


def answer_logits(
    model: Any, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that predict the supervised tokens, row by row, and these tokens.

    Args:
        model: causal language model.
        inputs: a batch of ``SquadDataCollator``: "input_ids" and "labels" of shape (rows, length),
            and what the model takes beside them.

    Returns:
        Logits of shape (supervised tokens, vocabulary), in the model's type, and ids of shape
        (supervised tokens,).
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
    visible = torch.stack([row[:, o][:, :, o] for row, o in zip(visible, order, strict=True)])
    cache = DynamicCache()
    if first:
        stem = positions[:, :first]
        # keys and values are all that is wanted; told a number, Gemma 4 cuts what layers read
        # whose keys and values are another layer's
        shared = getattr(inner.config.get_text_config(), "num_kv_shared_layers", 0)
        with torch.no_grad(), inner.disable_adapter():
            inner(
                input_ids=ids[:, :first],
                position_ids=stem,
                attention_mask=make_masks(inner, visible[:, :, :first, :first], stem, stem),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1 if shared else stem.new_empty(0),
            )
    rest = positions[:, first:]
    return model(
        input_ids=ids[:, first:],
        position_ids=rest,
        attention_mask=make_masks(inner, visible[:, :, first:], rest, positions),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep[:, first:],
        **{ADAPTER_MASK: adapted[:, first:]},
    ).logits


class CrossEntropy(torch.autograd.Function):
    """Summed cross entropy, its gradient taken at once, a few tokens at a time.

    The probabilities of a large vocabulary in float32 are the largest tensors of a step, and are
    needed three times; a few tokens' fit into a CPU's cache, and into what a GPU has left.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        wanted: torch.Tensor,
        smoothing: float = 0.0,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss in nats, and how many tokens are the likeliest.

        Args:
            ctx: for the gradient.
            logits: of shape (tokens, vocabulary).
            wanted: ids, of shape (tokens,).
            smoothing: the share of a token's probability that all tokens have in common.
            weights: how often each token counts, int64, of shape (tokens,); None: once.
        """
        size = logits.shape[-1]
        step = max((CPU_LOGITS if logits.device.type == "cpu" else GPU_LOGITS) // size, 1)
        gradients = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss = widen(logits.new_zeros(()))
        right = torch.zeros((), dtype=torch.long, device=logits.device)
        for at in range(0, len(logits), step):
            part, ids = widen(logits[at : at + step]), wanted[at : at + step, None]
            times = 1 if weights is None else weights[at : at + step, None]
            # argmax is three times as slow on a CPU
            right += ((part.max(-1, keepdim=True).indices == ids) * times).sum()
            part = part.log_softmax(-1)
            loss -= (part.gather(1, ids) * times).sum() * (1 - smoothing)
            if smoothing:
                loss -= (part.mean(-1, keepdim=True) * times).sum() * smoothing
            if gradients is not None:
                part = part.exp_().sub_(smoothing / size)
                part.scatter_add_(1, ids, part.new_full(ids.shape, smoothing - 1))
                if weights is not None:
                    part *= times
                gradients[at : at + step] = part
        ctx.gradients = gradients
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the logits, once: it is too large to be kept beside itself."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of this cross entropy was taken before: run it anew")
        return gradients.mul_(given[0]), None, None, None


def runs_base_first(model: Any, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether tokens that no adapter has touched are kept apart, as keys and values."""
    from peft import PeftModel

    # DeepSpeed's wrapper is none: all processes have to run such models equally often
    if is_sharded() or not isinstance(model, PeftModel) or activation_of(model) is None:
        return False
    # layers that are run again for the gradient take no cache
    again = model.training and model.is_activation_checkpointing
    return not again and ADAPTER_MASK in inputs and inputs["attention_mask"].dim() == 4
