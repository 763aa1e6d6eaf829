"""Weights in 4 bits, where bitsandbytes alone would be silently wrong: training, and merging."""

from typing import Any

import torch


def keep_4bit_differentiable(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU.

    On AVX512-BF16 processors the first forward without gradients repacks them in place, for a
    kernel that has no gradient: training after an evaluation would be silently wrong, and so would
    a merge (bitsandbytes 0.50).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantize(model: Any) -> None:
    """Replace 4-bit weights by those that the forward pass computes with.

    It rounds them to its compute type; here they are then in the model's. Unrounded they would be
    others than the ones trained on where that is bfloat16, and rounding them only after an adapter
    was merged would lose a tenth of a small update's gain.
    """
    import bitsandbytes

    kind = bitsandbytes.nn.Linear4bit
    types = {n: m.compute_dtype for n, m in model.named_modules() if isinstance(m, kind)}
    model.dequantize()
    for name, dtype in types.items():
        weight = model.get_submodule(name).weight
        weight.data = weight.data.to(dtype).to(model.dtype)
