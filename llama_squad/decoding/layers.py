"""Linear layers in decoding, where no weights change: packed, and LoRA without PEFT's detours.

On a CPU the base's weights are packed once (``llama_squad.products``). PEFT's layer turns its input
to the adapter's float32 and passes six times over what the base gave: more work than the product of
a small model itself. Here an adapter is two small products onto the base's, in the base's number
format, and one that acts from some token on (``llama_squad.activation``) is run on those alone.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llama_squad.activation import Activation, activation_of
from llama_squad.lora import plain_adapter
from llama_squad.products import is_packable, pack, packed_linear
from llama_squad.tree import is_out_of_memory

LEAST_ENTRIES = 2**15
"""A smaller matrix gains nothing from being packed."""


class LeanLayers:
    """A model's linear layers on packed weights, and plain LoRA on them as two products.

    Layers of other kinds (quantised, DoRA, of several adapters) stay as they are, and so do all
    under autocast.

    Args:
        model: a causal language model, or a ``PeftModel`` of one. Its weights, adapters and device
            must not change; an adapter may be switched off and on.
        packs: False leaves the weights as they are: of a model that is being trained.
    """

    def __init__(self, model: Any, packs: bool = True) -> None:
        from peft.tuners.lora import Linear

        adapted = [
            m for m in model.modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)
        ]
        self._adapted = [m for m in adapted if type(m) is Linear and "forward" not in m.__dict__]
        # others may change their base's weights in a pass (``target_parameters``)
        others = [m for m in adapted if m not in self._adapted]
        apart = {id(part) for m in adapted for part in m.modules()}
        apart -= {id(m.base_layer) for m in self._adapted}
        apart |= {id(part) for m in others for part in m.modules()}
        head = model.get_output_embeddings()  # which is ``llama_squad.head``'s
        self._plain = [
            m for m in (model.modules() if packs else ())
            if type(m) is nn.Linear and m is not head and id(m) not in apart
            and type(m.weight) is nn.Parameter and m.weight.device.type == "cpu"
            and m.weight.numel() >= LEAST_ENTRIES and is_packable(m.weight.dtype)
            and "forward" not in m.__dict__
        ]  # fmt: skip
        self._acting = _Acting(activation_of(model))
        self._packed: list[_Packed] | None = None
        self._sums: dict[tuple[Any, str], _Sum] = {}

    @contextlib.contextmanager
    def in_place(self, room: float) -> Iterator[None]:
        """Let them run in the body of ``with``, in which no gradients are taken.

        Args:
            room: how many bytes packed weights may take. The first call decides: where they would
                take more, none are packed.
        """
        if self._packed is None:
            self._packed = self._pack(room)
        used: list[Any] = []
        try:
            for packed in self._packed:
                _replace(packed.layer, packed, used)
            for layer in self._adapted:
                if (name := plain_adapter(layer)) and not layer.training:
                    if (layer, name) not in self._sums:
                        self._sums[layer, name] = _Sum(layer, self._acting)
                    _replace(layer, self._sums[layer, name], used)
            yield
        finally:
            for layer in used:  # not all where memory ran out
                del layer.__dict__["forward"]

    def _pack(self, room: float) -> "list[_Packed]":
        if sum(layer.weight.nbytes for layer in self._plain) > room:
            return []
        try:
            return [_Packed(layer) for layer in self._plain]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return []  # slower, and right


def _replace(layer: Any, forward: Any, replaced: list[Any]) -> None:
    """Let a layer's pass be another, where no one else has replaced it."""
    if "forward" not in layer.__dict__:
        layer.__dict__["forward"] = forward
        replaced.append(layer)


class _Packed:
    """A linear layer's product."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self._weight = layer, pack(layer.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product, of shape (..., outputs)."""
        # autocast: of a trainer's evaluation, in forward alone
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not x.numel():
            return nn.Linear.forward(self.layer, x)
        return packed_linear(x, self._weight, self.layer.bias)


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
