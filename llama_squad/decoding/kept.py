"""What decoding makes of a model's weights once, and keeps for all replies."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from transformers import PreTrainedModel

from llama_squad.decoding.cache import Branch, TokenTree
from llama_squad.decoding.layers import LeanLayers
from llama_squad.head import Product, exact_head


class Kept:
    """A model as decoding runs it.

    Args:
        model: whose weights must not change; its adapter may be switched off and on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers = LeanLayers(model)
        self._head = Product(cast(Any, model.get_output_embeddings()))
        self._prefix: list[Any] = []
        self._held: list[Any] = []

    @contextlib.contextmanager
    def in_place(self, room: float) -> Iterator[None]:
        """Let the model run so in the body of ``with``; ``room`` as ``LeanLayers`` takes it."""
        self._head.keep()  # before it is asked how much memory is free
        with exact_head(self._model, self._head), self._layers.in_place(room):
            yield

    def begin(self, tree: TokenTree, tokens: list[int]) -> Branch:
        """Begin a tree's only row with what all prompts begin with, which is run once.

        No adapter that acts from some token on may act on these.
        """
        prefix = [tokens, self._layers.switches()]
        if prefix != self._prefix:
            first = TokenTree(self._model)
            first.prefill(tokens)
            self._held = [
                (layer.keys, layer.values) for layer in cast(list[Any], first.cache.layers)
            ]
            self._prefix = prefix
        return tree.begin(tokens, self._held)
