"""What decoding makes of a model once, and keeps for all replies; and the last contexts."""

import contextlib
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from llama_squad.activation import activation_of
from llama_squad.decoding.cache import Branch, TokenTree
from llama_squad.decoding.layers import LeanLayers
from llama_squad.head import Product, exact_head

STEM_ALONE = 1024
"""A longer stem is run as a whole: a pass without anything before it needs no mask."""

LONGEST_KEPT = 4096
"""A context of more tokens is not kept, as its keys and values may take gigabytes."""

States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values, a pair a layer."""


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
        self._held: dict[Any, States] = {}
        self._contexts: dict[Any, States] = {}
        self.keeps_contexts = True

    def exact_head(self, room: float) -> contextlib.AbstractContextManager[None]:
        """Let the model give its logits in float32; what ``room`` bytes hold for it is kept."""
        self._head.keep(room)
        return exact_head(self.model, self._head)

    def begin(self, tree: TokenTree, tokens: list[int]) -> Branch:
        """Begin a tree's only row with what all prompts begin with, which is run once.

        No adapter that acts from some token on may act on these.
        """
        key = self._key(tokens)
        if key not in self._held:
            first = TokenTree(self.model)
            first.prefill(tokens)
            _add(self._held, key, first)
        return tree.begin(tokens, self._held[key])

    def begin_context(
        self, tree: TokenTree, tokens: list[int], known: int, acts: int | None
    ) -> Branch:
        """Begin with all that stands before a context's questions; run where it is not kept.

        Args:
            tree: see ``begin``.
            tokens: of the context and what stands before it.
            known: so many of them all prompts begin with, and no activated adapter acts on.
            acts: the first token that an activated adapter acts on, here or later; None: on none.
        """
        acts = None if acts is None or acts >= len(tokens) else acts
        key = self._key(tokens, acts)
        if key not in self._contexts:
            first = TokenTree(self.model)
            if known and len(tokens) <= STEM_ALONE:
                begun = self.begin(first, tokens[:known])
                first.extend([[Branch(begun, tokens[known:], adapter_from=acts)]])
            else:
                first.prefill(tokens, acts)
            _add(self._contexts, key, first)
        self._contexts[key] = self._contexts.pop(key)  # the last that goes
        return tree.begin(tokens, self._contexts[key])

    def forget_contexts(self) -> bool:
        """Keep no context any more, for good; tell whether they were kept so far."""
        kept, self.keeps_contexts = self.keeps_contexts, False
        self._contexts.clear()
        return kept

    def _key(self, tokens: list[int], acts: int | None = None) -> Any:
        """Return what tells their keys and values: the tokens, and the adapter that acts on them.

        ``acts`` is the first that an activated one acts on; None: all are the base's.
        """
        adapted = [] if activation_of(self.model) and acts is None else self._adapted
        return tuple(tokens), tuple((m.disable_adapters, *m.active_adapters) for m in adapted)


def _add(held: dict[Any, States], key: Any, tree: TokenTree) -> None:
    """Keep a tree's keys and values, and those used before them: of the same without an adapter."""
    layers = cast(list[Any], tree.cache.layers)
    for old in [*held][:-1]:
        del held[old]
    held[key] = [(layer.keys, layer.values) for layer in layers]
