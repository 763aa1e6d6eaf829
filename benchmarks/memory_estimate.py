"""Estimate what memory a model needs: arithmetic from its sizes, not a measurement.

Counts the weights (4-bit NF4 with its scales for the linear layers, 16 bits for the rest), and for
training the adapter (float32: weights, gradients and Adam's two moments) and the activations that
gradient checkpointing keeps, for one row of ``--row_tokens``. For evaluation it counts the
key/value cache of as many tokens. What PyTorch, CUDA and the passes take beside that is 1 to 2 GB.

    python benchmarks/memory_estimate.py
"""

import argparse
from dataclasses import dataclass

NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Per weight: 4 bits, and per block of 64 a scale of 8 bits, whose own scale serves 256 blocks."""
ADAM_BYTES = 4 * 4
"""Per trained weight: itself, its gradient and two moments in float32."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama; names as in its configuration."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block: q, k, v, o, gate, up, down."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        wide = (hidden, self.intermediate)
        return [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), wide, wide, wide]

    @property
    def linear_weights(self) -> int:
        """Weights of all blocks' linear layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear)

    @property
    def other_weights(self) -> int:
        """Embeddings, the head where it is a tensor of its own, and norms."""
        tables = 1 if self.tied else 2
        return tables * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def adapter_weights(self, r: int) -> int:
        """Weights of a LoRA adapter of rank ``r`` on all linear layers but the head."""
        return self.layers * r * sum(inputs + outputs for inputs, outputs in self.linear)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens, in 16 bits."""
        return 2 * 2 * self.layers * tokens * self.hidden // self.heads * self.kv_heads

    def checkpointed_bytes(self, tokens: int) -> int:
        """Bytes that gradient checkpointing keeps: each block's input, in 16 bits."""
        return 2 * self.layers * tokens * self.hidden


MODELS = {
    "SmolLM2 135M": Sizes(30, 576, 1536, 9, 3, 49152, tied=True),
    "Llama 3.2 1B": Sizes(16, 2048, 8192, 32, 8, 128256, tied=True),
    "Llama 3.2 3B": Sizes(28, 3072, 8192, 24, 8, 128256, tied=True),
    "Llama 2 7B": Sizes(32, 4096, 11008, 32, 32, 32000),
    "Llama 3 8B": Sizes(32, 4096, 14336, 32, 8, 128256),
    "Llama 2 70B": Sizes(80, 8192, 28672, 64, 8, 32000),
}


def estimate(sizes: Sizes, r: int, row_tokens: int) -> dict[str, float]:
    """Return GB by what is done; see the top of the file."""
    four_bits = sizes.linear_weights * NF4_BYTES + 2 * sizes.other_weights
    sixteen_bits = 2 * (sizes.linear_weights + sizes.other_weights)
    training = sizes.adapter_weights(r) * ADAM_BYTES + sizes.checkpointed_bytes(row_tokens)
    cache = sizes.cache_bytes(row_tokens)
    needed = {
        "evaluate, 4 bits": four_bits + cache,
        "evaluate, 16 bits": sixteen_bits + cache,
        "QLoRA": four_bits + training,
        "LoRA, 16 bits": sixteen_bits + training,
        "full, float32": (sizes.linear_weights + sizes.other_weights) * ADAM_BYTES
        + sizes.checkpointed_bytes(row_tokens),
    }
    return {name: count / 1e9 for name, count in needed.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora_r", type=int, default=64)
    parser.add_argument("--row_tokens", type=int, default=4096)
    args = parser.parse_args()
    columns = list(estimate(MODELS["Llama 3 8B"], args.lora_r, args.row_tokens))
    print("| GB | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    for name, sizes in MODELS.items():
        needed = estimate(sizes, args.lora_r, args.row_tokens).values()
        print(f"| {name} | " + " | ".join(f"{count:.1f}" for count in needed) + " |")


if __name__ == "__main__":
    main()
