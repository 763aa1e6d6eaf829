"""A tree of token sequences that grows on a key/value cache; decoding's own check of a model.

Uses ``llama_squad.tree`` for masks and for what the check asks.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llama_squad.activation import ADAPTER_MASK, keep_last
from llama_squad.encoding import IGNORE
from llama_squad.head import exact_head
from llama_squad.tree import Tree, batch_rows, make_masks
from llama_squad.tree_check import RowProbe, move_back, other_tokens, why_not_shared

ROOM = 128
"""Columns that a full cache grows by, beside those asked for."""


@dataclass
class Branch:
    """Tokens that follow those of ``parent``; ``wanted`` of their logits, the last ones."""

    parent: "Branch | None"
    tokens: list[int]
    wanted: int = 1
    adapter_from: int | None = None
    """The position from which on an activated adapter acts; None: its parent's, or nowhere."""
    hidden: range = range(0)
    """The positions of filler among its tokens: no other token sees that."""
    columns: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Where in the cache its tokens and all their ancestors' are, but for the filler."""
    depth: int = 0
    """The position after its last token, once it has been run."""

    def __post_init__(self) -> None:
        """Let the adapter act where it does in the parent."""
        if self.adapter_from is None and self.parent is not None:
            self.adapter_from = self.parent.adapter_from


class _Layer(DynamicLayer):
    """A layer's keys and values with room for more: a pass over a few tokens copies no others."""

    _room: tuple[torch.Tensor, ...] = ()
    _shown: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a pass's keys and values; return all."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        held = cast(tuple[torch.Tensor, torch.Tensor], (self.keys, self.values))
        start = held[0].shape[2]
        stop = start + key_states.shape[2]
        if held[0] is not self._shown or stop > self._room[0].shape[2]:  # or the tree changed them
            self._room = tuple(F.pad(x, (0, 0, 0, stop - start + ROOM)) for x in held)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        self._shown = self.keys
        return self.keys, self.values

    def replace(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Hold others in their place, of any length."""
        self.keys, self.values = keys, values
        self._room, self._shown = (), None


class TokenTree:
    """Token sequences that share stems, one tree per row, run with one key/value cache.

    Rows are padded on the right; a pad is seen by itself alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.cache = DynamicCache()
        self.cache.layer_class_to_replicate = _Layer
        self._length = self._compact_length = 0
        self._depths = np.zeros((0, 0), dtype=np.int64)  # of the cache's columns, a row each

    @torch.inference_mode()
    def prefill(self, stem: list[int], adapter_from: int | None = None) -> Branch:
        """Run the stem of a single row; nothing is wanted of its logits."""
        root = self._root(stem, adapter_from)
        if stem:
            adapted = None if adapter_from is None else self._depths >= adapter_from
            self._forward(np.array([stem], np.int64), logits_to_keep=1, adapted=adapted)
        return root

    def begin(self, stem: list[int], held: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Branch:
        """Begin a single row with tokens whose keys and values are known, a pair a layer."""
        for index, (keys, values) in enumerate(held):
            self.cache.update(keys, values, index)
        return self._root(stem)

    def _root(self, stem: list[int], adapter_from: int | None = None) -> Branch:
        self._length = len(stem)
        columns = np.arange(self._length)
        self._depths = columns[None]
        return Branch(None, stem, adapter_from=adapter_from, columns=columns, depth=self._length)

    @torch.inference_mode()
    def extend(self, rows: Sequence[Sequence[Branch]]) -> torch.Tensor:
        """Run new branches of each row; a branch's parent stands before it.

        Returns:
            the wanted logits in float32, of shape (wanted tokens, vocabulary), in the order of the
            branches.
        """
        # Tokens of which no logits are wanted come first, so that the head is spared them.
        silent = max(sum(len(b.tokens) - b.wanted for b in row) for row in rows)
        wanted = max(sum(b.wanted for b in row) for row in rows)
        width, past = silent + wanted, self._length
        ids = np.zeros((len(rows), width), dtype=np.int64)
        positions = np.zeros((len(rows), width), dtype=np.int64)
        visible = np.zeros((len(rows), 1, width, past + width), dtype=bool)
        visible[:, 0, np.arange(width), past + np.arange(width)] = True
        adapted = None
        if any(branch.adapter_from is not None for row in rows for branch in row):
            adapted = np.zeros((len(rows), width), dtype=bool)
        chosen = []
        for r, row in enumerate(rows):
            quiet, loud = itertools.count(), itertools.count(silent)
            for branch in row:
                first_loud = len(branch.tokens) - branch.wanted
                new = np.array([next(quiet if i < first_loud else loud)
                                for i in range(len(branch.tokens))], dtype=np.int64)  # fmt: skip
                stem = branch.parent.columns if branch.parent else np.empty(0, dtype=np.int64)
                ids[r, new] = branch.tokens
                depth = branch.parent.depth if branch.parent else 0
                branch.depth = depth + len(new)
                positions[r, new] = np.arange(depth, branch.depth)
                visible[r, 0, new[:, None], stem] = True
                seen = ~np.isin(positions[r, new], branch.hidden)
                own = np.tril(np.ones((len(new), len(new)), dtype=bool)) & seen
                np.fill_diagonal(own, True)
                visible[r, 0, new[:, None], past + new] = own
                branch.columns = np.concatenate([stem, past + new[seen]])
                if adapted is not None and branch.adapter_from is not None:
                    adapted[r, new] = positions[r, new] >= branch.adapter_from
                chosen += [r * wanted + column - silent for column in new[first_loud:]]
        if not past:
            self._depths = np.zeros((len(rows), 0), dtype=np.int64)
        self._length += width
        self._depths = np.concatenate([self._depths, positions], axis=1)
        if not self._compact_length:  # the first branches are the questions
            self._compact_length = self._length
        logits = self._forward(ids, positions, visible, logits_to_keep=wanted, adapted=adapted)
        if len(chosen) == logits.shape[0] * wanted:
            return logits.flatten(0, 1).float()
        return logits.flatten(0, 1)[torch.tensor(chosen, device=logits.device)].float()

    @classmethod
    def join(cls, trees: Sequence["TokenTree"]) -> "TokenTree":
        """Make one tree of the rows of several, whose branches stay as they are.

        The given ones are used up, layer by layer, so that no second copy of them is held.
        """
        if len(trees) == 1:
            return trees[0]
        joined = cls(trees[0]._model)
        joined._length = joined._compact_length = max(tree._length for tree in trees)
        missing = [joined._length - tree._length for tree in trees]
        joined._depths = np.concatenate(
            [np.pad(t._depths, ((0, 0), (0, pad))) for t, pad in zip(trees, missing, strict=True)]
        )
        caches = [cast(list[Any], tree.cache.layers) for tree in trees]
        for index, layers in enumerate(zip(*caches, strict=True)):
            pairs = list(zip(layers, missing, strict=True))
            keys = torch.cat([F.pad(layer.keys, (0, 0, 0, pad)) for layer, pad in pairs])
            values = torch.cat([F.pad(layer.values, (0, 0, 0, pad)) for layer, pad in pairs])
            for layer in layers:
                layer.replace(None, None)
            joined.cache.update(keys, values, index)
        return joined

    def compact(self, branches: Sequence[Sequence[Branch]]) -> None:
        """Forget every token that is in no given branch (a list a row)."""
        kept = []
        for row in branches:
            own = {id(branch): branch for branch in row}.values()
            needed = np.zeros(self._length, dtype=bool)
            needed[np.concatenate([branch.columns for branch in own])] = True
            renumbered = np.cumsum(needed) - 1
            for branch in own:
                branch.columns = renumbered[branch.columns]
            kept.append(np.flatnonzero(needed))
        length = max(map(len, kept))
        index = np.zeros((len(kept), length), dtype=np.int64)
        for r, columns in enumerate(kept):
            index[r, : len(columns)] = columns
        self._length = self._compact_length = length
        self._depths = np.take_along_axis(self._depths, index, axis=1)
        for layer in cast(list[Any], self.cache.layers):
            chosen = torch.from_numpy(index).to(layer.keys.device)
            # Row by row: a take along all rows goes entry by entry, and is much slower on a CPU.
            layer.replace(*(
                torch.stack([row.index_select(1, i) for row, i in zip(x, chosen, strict=True)])
                for x in (layer.keys, layer.values)
            ))  # fmt: skip

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        self._depths = self._depths[list(rows)]
        for layer in cast(list[Any], self.cache.layers):
            index = torch.tensor(rows, device=layer.keys.device)
            layer.replace(*(x.index_select(0, index) for x in (layer.keys, layer.values)))

    @property
    def grown(self) -> int:
        """Columns of the cache that came since it was last compact."""
        return self._length - self._compact_length

    def _forward(
        self,
        ids: np.ndarray,
        positions: np.ndarray | None = None,
        visible: np.ndarray | None = None,
        logits_to_keep: int = 0,
        adapted: np.ndarray | None = None,
    ) -> torch.Tensor:
        device = self._model.device
        keep: int | torch.Tensor = logits_to_keep
        more: dict[str, Any] = {}
        if adapted is not None:
            more[ADAPTER_MASK] = torch.from_numpy(adapted).to(device)
            keep = keep_last(ids.shape[1], logits_to_keep, device)
        if positions is not None and visible is not None:
            # Both or neither: position ids without the mask would let a branch see its sisters.
            more["position_ids"] = torch.from_numpy(positions).to(device)
            more["attention_mask"] = make_masks(
                self._model,
                torch.from_numpy(visible).to(device),
                more["position_ids"],
                torch.from_numpy(self._depths).to(device),
            )
        with exact_head(self._model):
            output = self._model(
                input_ids=torch.from_numpy(ids).to(device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
                **more,
            )
        return output.logits


WATCHED = 64
"""So many logits of a branch are compared, its last: those of all of a long one take gigabytes."""

LONGEST_BRANCH = 256
"""Tokens of a branch, at most: its mask has as many rows, each as long as the prompt."""


class _CacheProbe:
    """A prompt's end and another of its length, grown on a cache as decoding does it."""

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int]) -> None:
        self._model = model
        cut = max(len(prompt) // 2, len(prompt) - LONGEST_BRANCH)
        self._stem, own = list(prompt[:cut]), list(prompt[cut:])
        self._branches = [other_tokens(torch.tensor(own)).tolist(), own]
        self._wanted = min(len(own), WATCHED)
        unwatched = len(prompt) - self._wanted + 1
        self.examples = [
            {"input_ids": ids, "labels": [IGNORE] * unwatched + ids[unwatched:]}
            for ids in (self._stem + branch for branch in self._branches)
        ]
        self.watched = [range(len(prompt) - self._wanted, len(prompt))] * 2

    def run(self, change: str) -> list[torch.Tensor]:
        """Run it; see ``Probe``."""
        stem, (sister, own) = self._stem, self._branches
        if change == "stem":
            stem = other_tokens(torch.tensor(stem)).tolist()
        elif change == "sister":
            sister = other_tokens(torch.tensor(sister)).tolist()
        tree = TokenTree(self._model)
        if change == "positions":
            tree = _MovedTree(self._model)
            tree.moved = len(own)
        root = tree.prefill(stem)
        branches = [Branch(root, tokens, self._wanted) for tokens in (sister, own)]
        return list(tree.extend([branches]).split(self._wanted))


class _MovedTree(TokenTree):
    """A tree whose last tokens stand elsewhere than they should."""

    moved = 0

    def _forward(
        self,
        ids: np.ndarray,
        positions: np.ndarray | None = None,
        *args: Any,
        **more: Any,
    ) -> torch.Tensor:
        if positions is not None:
            positions = positions.copy()
            positions[:, -self.moved :] += move_back(int(positions[0, -self.moved]))
        return super()._forward(ids, positions, *args, **more)


_CHECKED: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()


def check_tree(model: PreTrainedModel, prompt: Sequence[int]) -> None:
    """Ask ``why_not_shared`` before decoding, once per model.

    Raises:
        ValueError: this architecture's questions cannot share their context.
    """
    if model in _CHECKED:
        return
    probe = _CacheProbe(model, prompt)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return batch_rows([Tree.build(row["paragraphs"]) for row in rows], 0)

    why = why_not_shared(model, probe, lambda: RowProbe(model, collate, [probe.examples]))
    if why:
        raise ValueError(
            f"{type(model).__name__} cannot evaluate questions that share their context: {why}. It "
            "needs layers of attention alone that take a 4D mask, position ids and a key/value "
            "cache, as Llama, Mistral, Qwen, Gemma and Phi have them"
        )
    _CHECKED.add(model)
