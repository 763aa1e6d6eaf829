"""A LoRA adapter in decoding: two small products onto the base's, in the base's number format.

PEFT's layer turns its input to the adapter's float32 and passes six times over what the base gave:
more work than the product of a small model itself. And an adapter that acts from some token on
(``llama_squad.activation``) is run on those tokens alone.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from llama_squad.activation import Activation, activation_of
from llama_squad.lora import plain_adapter


@contextlib.contextmanager
def lean_adapters(model: Any) -> Iterator[None]:
    """Run a model's plain LoRA layers without PEFT's detours, in the body of ``with``.

    There, no gradients are taken and no weights change. Layers of other kinds (quantised, DoRA, of
    several adapters) stay as they are, and so do all under autocast.
    """
    layers = _plain_layers(model) if hasattr(model, "peft_config") else []
    acting = _Acting(activation_of(model))
    try:
        for layer in layers:
            layer.forward = _Sum(layer, acting)
        yield
    finally:
        for layer in layers:  # not all have it where memory ran out
            layer.__dict__.pop("forward", None)


def copied_bytes(model: Any) -> int:
    """Return how many bytes ``lean_adapters`` takes: B scaled, and A in the base's type."""
    total = 0
    for layer in _plain_layers(model) if hasattr(model, "peft_config") else []:
        (name,) = layer.active_adapters
        dtype = layer.base_layer.weight.dtype
        first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
        copied = second.numel() + (first.numel() if first.dtype != dtype else 0)
        total += dtype.itemsize * copied
    return total


def _plain_layers(model: Any) -> list[Any]:
    return [
        layer
        for layer in model.modules()
        if plain_adapter(layer) and not layer.training and "forward" not in layer.__dict__
    ]


class _Acting:
    """The tokens of a pass on which the adapter acts, found once a pass."""

    def __init__(self, activation: Activation | None) -> None:
        self._activation = activation
        self._mask: torch.Tensor | None = None
        self._tokens: slice | torch.Tensor | None = None

    def fits(self, x: torch.Tensor) -> bool:
        """Tell whether a layer's input is of the tokens that the pass names."""
        mask = self._activation.mask if self._activation else None
        return mask is None or mask.shape[:-1] == x.shape[:-1]

    def tokens(self, x: torch.Tensor) -> slice | torch.Tensor | None:
        """Return which rows of a layer's flattened input the adapter acts on; None: on none."""
        if self._activation is None:
            return slice(None)
        mask = self._activation.mask
        if mask is not self._mask:
            self._mask, self._tokens = mask, None if mask is None else _places(mask)
        return self._tokens if mask is not None else None


def _places(mask: torch.Tensor) -> slice | torch.Tensor | None:
    index = mask.flatten().nonzero()[:, 0]
    if not len(index):
        return None
    first, stop = int(index[0]), int(index[-1]) + 1
    return slice(first, stop) if stop - first == len(index) else index  # a slice is no copy


class _Sum:
    """A linear layer's product and its adapter's."""

    def __init__(self, layer: Any, acting: _Acting) -> None:
        self._layer, self._base, self._acting = layer, layer.base_layer, acting
        (name,) = layer.active_adapters
        dtype = self._base.weight.dtype
        self._first = layer.lora_A[name].weight.to(dtype).T
        self._second = (layer.lora_B[name].weight * layer.scaling[name]).to(dtype).T

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum, of shape (..., width)."""
        # autocast: of a trainer's evaluation, in forward alone; other tokens are refused there
        if torch.is_autocast_enabled(x.device.type) or not self._acting.fits(x):
            return type(self._layer).forward(self._layer, x)
        result: torch.Tensor = self._base(x)
        tokens = self._acting.tokens(x)
        if tokens is None:
            return result
        given, total = x.flatten(0, -2), result.flatten(0, -2)
        if isinstance(tokens, slice):
            total[tokens].addmm_(given[tokens] @ self._first, self._second)
        else:
            tokens = tokens.to(x.device)  # of a model on several GPUs, found on the first one
            total.index_add_(0, tokens, given[tokens] @ self._first @ self._second)
        return result
