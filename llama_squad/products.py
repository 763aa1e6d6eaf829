"""Products on a CPU: of 16-bit factors with sums in float32, and by weights that were packed."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch

_PRECISION = threading.Lock()
"""Held while torch's own is another: two threads at once would leave it so."""

_ROWS = 64
"""oneDNN chooses a packed order for so many rows of the other factor; any are right."""


@contextlib.contextmanager
def sums_in_float32(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 factors whose values are all of type ``dtype`` be exact and fast.

    In bfloat16 a CPU's units for it (AMX, AVX512-BF16) sum in float32, too, and several times as
    fast. Nothing is changed for other types. What other threads multiply in float32 meanwhile is
    rounded to bfloat16 first.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = cast(Any, torch.backends.mkldnn).matmul
    with _PRECISION:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


@functools.cache
def is_packable(dtype: torch.dtype) -> bool:
    """Tell whether this CPU multiplies faster by packed weights of a type.

    In float32 torch multiplies by MKL, which on AMD's CPUs leaves AVX-512 idle; oneDNN does not,
    and is twice as fast (``benchmarks/RESULTS.md``).
    """
    cpu = torch.cpu.get_capabilities()
    if not torch.backends.mkldnn.is_available() or cpu.get("architecture") != "x86_64":
        return False
    if dtype == torch.float32:
        return bool(cpu.get("avx512_f")) and str(cpu.get("cpu_name")).startswith("AMD")
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's weights in the order that oneDNN otherwise makes for each product.

    For the few tokens of a decoding step that takes as long as the product itself.

    Args:
        weight: of shape (outputs, inputs), of a type that ``is_packable``.
    """
    return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS))


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``F.linear`` by weights of ``pack``: no gradients are taken, and none warns.

    In bfloat16 it is the same to the last bit, of contiguous inputs.
    """
    linear = torch.ops.mkldnn._linear_pointwise
    return cast(torch.Tensor, linear(x, packed, bias, "none", [], ""))
