"""What decoding makes of a model once, and keeps for all replies."""

import contextlib
from typing import Any, cast

from transformers import PreTrainedModel

from llama_squad.decoding.cache import Branch, TokenTree
from llama_squad.decoding.layers import LeanLayers
from llama_squad.head import Product, exact_head


class Kept:
    """A model as decoding runs it.

    Args:
        model: whose weights, adapters and device must not change; an adapter may be switched off
            and on.
        packs: as ``LeanLayers`` takes it.
    """

    def __init__(self, model: PreTrainedModel, packs: bool = True) -> None:
        self.model = model
        self.layers = LeanLayers(model, packs)
        self._head = Product(cast(Any, model.get_output_embeddings()))
        self._adapted: list[Any] = []
        if hasattr(model, "peft_config"):
            from peft.tuners.tuners_utils import BaseTunerLayer

            self._adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._held: dict[Any, list[Any]] = {}

    def exact_head(self, room: float) -> contextlib.AbstractContextManager[None]:
        """Let the model give its logits in float32; what ``room`` bytes hold for it is kept."""
        self._head.keep(room)
        return exact_head(self.model, self._head)

    def begin(self, tree: TokenTree, tokens: list[int]) -> Branch:
        """Begin a tree's only row with what all prompts begin with, which is run once.

        No adapter that acts from some token on may act on these.
        """
        switches = [(m.disable_adapters, *m.active_adapters) for m in self._adapted]
        key = tuple(tokens), tuple(switches)
        if key not in self._held:
            if len(self._held) > 1:  # with the adapter and without it
                self._held.clear()
            first = TokenTree(self.model)
            first.prefill(tokens)
            layers = cast(list[Any], first.cache.layers)
            self._held[key] = [(layer.keys, layer.values) for layer in layers]
        return tree.begin(tokens, self._held[key])
