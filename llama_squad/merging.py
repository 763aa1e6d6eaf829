"""Merge an adapter into its base so that the tuning survives the type of the weights.

May use torch and peft; knows nothing of files, of the trainer or of questions.
"""

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from llama_squad.activation import activation_of

SEED = 42
"""Of the rounding: the same merge gives the same file on the same kind of device."""


def merge(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Merge the active adapter of a ``PeftModel`` into its base; the weights come out in ``dtype``.

    Each adapted layer is added up in float32, one layer at a time, so that next to no memory is
    needed beyond the model's. The sum is then rounded up or down at random: an update smaller than
    half a unit of the weight's last place, which rounding to nearest would drop from every weight,
    is kept by that share of them. In float32 nothing is lost.

    Args:
        model: a ``PeftModel`` whose base is not in 4 bits; it is of no use afterwards.
        dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: the adapter acts on a part of the tokens only.
    """
    activation = activation_of(model)
    if activation:
        raise ValueError(
            f"an adapter that acts from the {activation.where} on cannot be merged, because merged "
            "weights act on every token: use it as an adapter"
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    generators: dict[torch.device, torch.Generator] = {}

    def write(weight: torch.Tensor) -> torch.Tensor:
        if dtype == torch.float32:
            return weight.float()
        if weight.device not in generators:
            generators[weight.device] = torch.Generator(weight.device).manual_seed(SEED)
        return round_stochastically(weight, dtype, generators[weight.device])

    held = model.dtype
    with torch.no_grad():
        for layer in [m for m in model.modules() if isinstance(m, BaseTunerLayer)]:
            name = getattr(layer, "parameter_name", "weight")  # of a mixture's experts: their own
            parameter = getattr(layer.get_base_layer(), name)
            parameter.data = parameter.data.float()
            layer.merge()
            parameter.data = write(parameter.data)
        with warnings.catch_warnings():  # of the layers that are merged already
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            merged = model.merge_and_unload()
        if held != dtype:
            for parameter in merged.parameters():
                if parameter.dtype == held:  # not what the architecture keeps in float32
                    parameter.data = write(parameter.data)
    return merged


def round_stochastically(
    weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Round to one of the two neighbours in ``dtype``, each as likely as it is near.

    The expectation is the weight itself, and a weight that ``dtype`` can hold stays as it is.

    Args:
        weight: of any shape, on the generator's device.
        dtype: bfloat16 or float16.
        generator: of the random numbers.
    """
    weight = weight.float()
    info = torch.finfo(dtype)
    power = (weight.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, at most |weight|
    unit = (power * info.eps).clamp_(min=info.smallest_normal * info.eps)
    steps = weight / unit  # exact: the unit is a power of two
    low = steps.floor()
    up = torch.rand(weight.shape, generator=generator, device=weight.device) < steps - low
    return ((low + up) * unit).to(dtype)
