"""LoRA's linear layers on a CPU, as one autograd function each.

PEFT's layer is a dozen steps: the input is cast to the adapter's float32 and back for the product,
masked, scaled, added, and each is undone for the gradient. Such passes over activations cost a CPU
as much as the products themselves (``benchmarks/cpu_speed.py``). Here a layer is three products
forward and six backward, the sums done within them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from llama_squad.activation import Activation, activation_of


def quicken(model: Any) -> None:
    """Let the plain LoRA layers of a ``PeftModel`` train as ``LoraLinear``, where they can."""
    activation = activation_of(model)
    for layer in model.modules():
        if plain_adapter(layer):
            layer.forward = _Layer(layer, layer.forward, activation)


class _Layer:
    """The forward pass of a LoRA layer, PEFT's own where it is more than ``LoraLinear``."""

    def __init__(self, layer: Any, otherwise: Any, activation: Activation | None) -> None:
        self._layer = layer
        self._otherwise = otherwise
        self._activation = activation

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what PEFT's does, within rounding."""
        layer = self._layer
        mask = self._activation.mask if self._activation else None
        # a mask of other tokens than these is refused there
        masked = not self._activation or (mask is not None and mask.shape[:-1] == x.shape[:-1])
        if args or kwargs or not masked or not is_plain(layer, x):
            return self._otherwise(x, *args, **kwargs)
        (name,) = layer.active_adapters
        base, first, second = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
        return LoraLinear.apply(
            x, base.weight, base.bias, first.weight, second.weight, layer.scaling[name], mask
        )


def is_plain(layer: Any, x: torch.Tensor) -> bool:
    """Tell whether ``LoraLinear`` is all that a layer does with an input, on a CPU."""
    name = plain_adapter(layer)
    return (
        name is not None
        and x.device.type == "cpu"
        # without autocast PEFT's products of the adapter are in the adapter's type
        and (torch.is_autocast_enabled("cpu") or x.dtype == layer.lora_A[name].weight.dtype)
        and (isinstance(layer.lora_dropout[name], nn.Identity) or not layer.training)
        and not any(p.requires_grad for p in layer.base_layer.parameters())
    )


def plain_adapter(layer: Any) -> str | None:
    """Return the name of a layer's adapter, where that is one plain LoRA on a linear layer."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
        return None
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or hasattr(layer, "_hf_hook") or len(names) != 1:
        return None
    (name,) = names
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    matrices = layer.lora_A[name], layer.lora_B[name]
    return name if all(type(m) is nn.Linear and m.bias is None for m in matrices) else None


class LoraLinear(torch.autograd.Function):
    """W x + b + s B(m A x), for gradients of x, A and B: LoRA, arXiv 2106.09685.

    Products are in the type that autocast asks for, else in that of ``x``; the gradients of A and B
    in theirs.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # torch gives them by position
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the layer's output, of shape (..., outputs).

        Args:
            ctx: for the gradient.
            x: of shape (..., inputs).
            weight: of shape (outputs, inputs).
            bias: of shape (outputs,).
            first: A, of shape (rank, inputs).
            second: B, of shape (outputs, rank).
            scaling: s.
            mask: m, of shape (..., 1), where the adapter acts; None: everywhere.
        """
        cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
        ctx.types = x.dtype, first.dtype, second.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        weight, first = weight.to(dtype), first.to(dtype)
        second = (second * scaling).to(dtype)
        with torch.autocast("cpu", enabled=False):
            inner = flat @ first.T
            if mask is not None:
                mask = mask.reshape(-1, 1).to(dtype)
                inner *= mask
            found = F.linear(flat, weight, None if bias is None else bias.to(dtype))
            found.addmm_(inner, second.T)
        ctx.save_for_backward(flat, weight, first, second, inner, mask)
        ctx.scaling = scaling
        return found.view(*x.shape[:-1], found.shape[-1])  # not -1: there may be no tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        flat, weight, first, second, inner, mask = ctx.saved_tensors
        of_x, of_first, of_second = ctx.types
        (given,) = gradients
        shape = given.shape
        given = given.reshape(-1, shape[-1]).to(flat.dtype)
        through = given @ second
        if mask is not None:
            through *= mask
        found = None
        if ctx.needs_input_grad[0]:
            found = (given @ weight).addmm_(through, first)
            found = found.view(*shape[:-1], found.shape[-1]).to(of_x)
        return (
            found,
            None,
            None,
            (through.T @ flat).to(of_first),
            (given.T @ inner).to(of_second) * ctx.scaling,
            None,
            None,
        )
