"""Adapters that act from some token of a task on: activated LoRA (aLoRA, arXiv 2504.12397).

What stands before that token, such as the system prompt, is run by the base model alone: its
key/value cache is the base's own, bit for bit, and so is every reply in a conversation without the
task. PEFT 0.21 has aLoRA too (``alora_invocation_tokens``), but there the adapter acts on the last
so many tokens of each row of a batch. A row here is a tree: a context, and after it many questions,
each with a beginning of its own. So the forward pass is told token by token, and the layers are
PEFT's plain LoRA: since B(A(m x)) = m B(A(x)) for m in {0, 1}, it is their input that is masked.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from llama_squad.prompts import ActsFrom

ADAPTER_MASK = "adapter_mask"
"""The keyword of a forward pass that tells where the adapter acts: bool, of shape (rows, tokens).
A pass without it is the base model's."""


class Activation:
    """Lets a model's adapter act on the tokens that a forward pass names.

    Args:
        where: from where on the adapter was trained to act.
    """

    def __init__(self, where: ActsFrom) -> None:
        self.where = where
        # Kept after the pass: checkpointed layers are run again when gradients are taken.
        self._mask: torch.Tensor | None = None

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Take the mask out of what the model is called with: its hook before each pass."""
        mask = kwargs.pop(ADAPTER_MASK, None)
        self._mask = None if mask is None else mask[..., None]
        return args, kwargs

    @property
    def mask(self) -> torch.Tensor | None:
        """Where the adapter acts in this pass: bool, of shape (rows, tokens, 1); None: nowhere."""
        return self._mask

    def gate(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        """Mask what goes into an adapter's first matrix: that module's hook before each pass."""
        (x,) = args
        if self._mask is None:
            return (torch.zeros_like(x),)  # in the graph all the same: it is trained elsewhere
        if x.shape[:-1] != self._mask.shape[:-1]:
            raise ValueError(
                f"an adapter that acts from the {self.where} on needs layers that take "
                f"rows of tokens: one was given {tuple(x.shape[:-1])} of {self._mask.shape[:-1]}. "
                "Leave --alora_from out, or choose other --lora_target_modules"
            )
        return (x * self._mask.to(x.device),)


def activate(model: Any, where: ActsFrom) -> None:
    """Let a ``PeftModel``'s LoRA adapter act on the tokens alone that a forward pass names.

    Raises:
        ValueError: it is an adapter of another kind.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    activation = Activation(where)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        # of experts and their routers PEFT adapts the weight, which all tokens have in common
        if not layer.lora_A or layer.lora_variant or isinstance(layer, ParamWrapper):
            raise ValueError(
                f"the adapter of {name} cannot be switched on token by token: an adapter that acts "
                f"from the {where} on is a plain LoRA of linear layers. Leave "
                "--alora_from out, or choose other --lora_target_modules"
            )
        for matrix in layer.lora_A.values():
            matrix.register_forward_pre_hook(activation.gate)
    model.get_base_model().register_forward_pre_hook(activation.begin, with_kwargs=True)
    model.adapter_activation = activation


def keep_last(width: int, count: int, device: torch.device) -> torch.Tensor:
    """Return the last ``count`` of so many tokens (0: all) as ``logits_to_keep``.

    To a number of them Gemma 4 cuts what its last layers read, and the adapter's mask with it not.
    """
    return torch.arange(width - count if count else 0, width, device=device)


def activation_of(model: Any) -> Activation | None:
    """Return what switches a model's adapter on; None where that acts on all tokens, or is none."""
    return getattr(model, "adapter_activation", None)


def adapter_off(model: Any, off: bool = True) -> AbstractContextManager[Any]:
    """Return what switches a model's adapter off for a ``with`` block, where it has one."""
    return model.disable_adapter() if off and hasattr(model, "peft_config") else nullcontext()
