"""Token sequences that share prefixes: their layout in a row, their masks, and the one check.

Training runs a row of examples in one pass (``Tree``, ``batch_rows``), decoding lets branches grow
on a key/value cache (``TokenTree``). Both build their masks here (``make_masks``), for sdpa and
eager attention and for layers that see a window, and both ask the same check whether this model may
share contexts at all (``why_not_shared``).
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedModel

IGNORE = -100
"""The label of a token that is not trained."""

Encoded = dict[str, list[int]]
"""An example: its ``input_ids`` and ``labels``."""

# Rows ----------------------------------------------------------------------------------------


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Return how many leading ids all sequences have in common."""
    shortest, longest = min(sequences), max(sequences)  # the extremes differ first
    for index, (a, b) in enumerate(zip(shortest, longest, strict=False)):
        if a != b:
            return index
    return min(len(shortest), len(longest))


@dataclass
class Tree:
    """Token sequences that share prefixes, flattened depth first into one row.

    ``ends[i]`` is one past the last position whose token may attend to token ``i``: the end of the
    subtree of its segment. ``mask[q, k] = (k <= q) & (q < ends[k])`` is the tree's attention.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    ends: list[int]
    leaves: list[range] = field(default_factory=list)
    """The columns of each example's own branch."""

    @classmethod
    def build(cls, paragraphs: Sequence[Sequence[Encoded]]) -> "Tree":
        """Share the prefix of all examples, then each paragraph's own, then branch.

        Cuts are made where the ids of whole examples part, at most before the last prompt token:
        a branch holds the token that predicts its first label, and a prefix holds no label.
        """
        tree = cls([], [], [], [])
        examples = [example for paragraph in paragraphs for example in paragraph]
        root = shareable_prefix(examples)
        tree._append(examples[0], 0, root)
        for paragraph in paragraphs:
            start = len(tree.input_ids)
            stem = shareable_prefix(paragraph)
            tree._append(paragraph[0], root, stem)
            for example in paragraph:
                begin = len(tree.input_ids)
                tree._append(example, stem, len(example["input_ids"]))
                tree.leaves.append(range(begin, len(tree.input_ids)))
            tree.ends[start : start + stem - root] = [len(tree.input_ids)] * (stem - root)
        tree.ends[:root] = [len(tree.input_ids)] * root
        return tree

    def _append(self, example: Encoded, start: int, stop: int) -> None:
        self.input_ids += example["input_ids"][start:stop]
        self.labels += example["labels"][start:stop]
        self.position_ids += range(start, stop)
        self.ends += [len(self.input_ids)] * (stop - start)


def shareable_prefix(examples: Sequence[Encoded]) -> int:
    """Return how many leading tokens the examples may hold once."""
    prompt = min(_prompt_length(example) for example in examples)
    return min(prompt - 1, common_prefix([example["input_ids"] for example in examples]))


def _prompt_length(example: Encoded) -> int:
    labels = example["labels"]
    return next(index for index, label in enumerate(labels) if label != IGNORE)


def batch_rows(
    trees: Sequence[Tree], pad_token_id: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """Pad rows into a batch; see ``SquadDataCollator`` for what it holds."""
    length = max(len(tree.input_ids) for tree in trees)
    if multiple:
        length = -(-length // multiple) * multiple

    def pad(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (length - len(values))

    # a pad attends to itself alone, and no token to it: a row without any key would be NaN
    ends = torch.tensor([t.ends + list(range(len(t.ends) + 1, length + 1)) for t in trees])
    position = torch.arange(length)
    causal = position[None, :] <= position[:, None]
    visible = position[None, :, None] < ends[:, None, :]
    return {
        "input_ids": torch.tensor([pad(t.input_ids, pad_token_id) for t in trees]),
        "labels": torch.tensor([pad(t.labels, IGNORE) for t in trees]),
        "position_ids": torch.tensor([pad(t.position_ids, 0) for t in trees]),
        "attention_mask": (causal & visible)[:, None],
    }


def answer_logits(
    model: Any, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that predict the supervised tokens, in order, and these tokens."""
    targets = F.pad(inputs["labels"], (0, 1), value=IGNORE)[:, 1:]
    keep = targets != IGNORE
    return _kept_logits(model, inputs, keep), targets[keep]


def _kept_logits(
    model: Any, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor
) -> torch.Tensor:
    """Run a batch; return the logits at the tokens that ``keep`` marks, at least in float32."""
    features: dict[str, Any] = {key: value for key, value in inputs.items() if key != "labels"}
    mask, positions = features.get("attention_mask"), features.get("position_ids")
    if mask is not None and mask.dim() == 4 and positions is not None:
        # of DDP, FSDP and DeepSpeed, whose wrappers have no configuration
        inner = model.module if hasattr(model, "module") else model
        features["attention_mask"] = make_masks(inner, mask, positions, positions)
    logits = model(**features, logits_to_keep=keep, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# Masks ---------------------------------------------------------------------------------------

Masks = torch.Tensor | dict[str, torch.Tensor]


def layer_kinds(config: Any) -> set[str]:
    """Return the kinds of a model's layers, by the names that transformers has for them."""
    config = config.get_text_config()
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(config, name, None)
        if kinds:
            return set(kinds)
    return {"sliding_attention"} if getattr(config, "sliding_window", None) else {"full_attention"}


def attention_windows(config: Any) -> dict[str, int]:
    """Return how many tokens the kinds of layers see that do not see all; 0 and None mean all."""
    config = config.get_text_config()
    windows = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    if not getattr(config, "use_sliding_window", True):
        windows["sliding_attention"] = None
    kinds = layer_kinds(config)
    return {kind: int(window) for kind, window in windows.items() if window and kind in kinds}


def make_masks(
    model: Any,
    visible: torch.Tensor,
    positions: torch.Tensor,
    depths: torch.Tensor,
    *,
    apart: bool = False,
) -> Masks:
    """Return a tree's mask in the form of this model's attention.

    Where some layers see a window only, and a sequence outgrows it, that is a mask for each kind
    of layer, or the window's own where all layers are of that kind.

    Args:
        model: whose configuration tells its attention and its windows.
        visible: bool, of shape (rows, 1, queries, keys): which tokens are ancestors.
        positions: of the queries in their own sequences, of shape (rows, queries).
        depths: the same of the keys, of shape (rows, keys).
        apart: give each kind of layer its mask also where no window is felt.

    Raises:
        ValueError: an attention that takes no such mask.
    """
    windows = attention_windows(model.config)
    if not apart and windows and int(positions.max()) < min(windows.values()):
        windows = {}
    query, key = positions[:, None, :, None], depths[:, None, None, :]
    near = {
        "sliding_attention": lambda window: query - key < window,
        "chunked_attention": lambda window: query // window == key // window,
    }
    kinds = layer_kinds(model.config)
    masks = {
        kind: _in_form(model, visible & near[kind](windows[kind]) if kind in windows else visible)
        for kind in (sorted(kinds) if windows else ["full_attention"])
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _in_form(model: Any, visible: torch.Tensor) -> torch.Tensor:
    kind = model.config.get_text_config()._attn_implementation
    if kind == "sdpa":
        return visible
    if kind == "eager":  # which adds the mask to its scores
        mask = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
    raise ValueError(_other_attention(kind))


def _other_attention(kind: str) -> str:
    return f"{kind} attention cannot hold a tree of questions: take --attn_implementation sdpa"


def longest_shared(model: Any) -> int | None:
    """Return how many tokens an example may have that shares a row; None where there is no limit.

    Some rotary embeddings depend on the longest sequence of a pass, so that a long example would
    change the short ones beside it. And a model may not take the masks of its own windows.
    """
    config = model.config.get_text_config()
    limits = []
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            limits.append(
                rope.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
    windows = attention_windows(config)
    if windows and len(layer_kinds(config)) > 1 and not _takes_masks_apart(model):
        limits += windows.values()
    return min(limits, default=None)


@torch.no_grad()
def _takes_masks_apart(model: Any) -> bool:
    """Tell whether a model takes a mask for each kind of its layers, and so its windows."""
    ids = torch.arange(1, 5, device=model.device)[None]
    positions = torch.arange(4, device=model.device)[None]
    visible = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=model.device).tril()
    try:
        masks = [make_masks(model, visible, positions, positions, apart=a) for a in (False, True)]
        one, each = (
            model(input_ids=ids, position_ids=positions, attention_mask=m, use_cache=False).logits
            for m in masks
        )
    except Exception as error:  # architectures fail in many ways
        if is_out_of_memory(error):
            raise
        return False
    return torch.equal(one, each)


# A tree that grows on a cache ----------------------------------------------------------------


@dataclass
class Branch:
    """Tokens that follow those of ``parent``; ``wanted`` of their logits, the last ones."""

    parent: "Branch | None"
    tokens: list[int]
    wanted: int = 1
    columns: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Where in the cache its tokens and all their ancestors' are."""


class TokenTree:
    """Token sequences that share stems, one tree a row, run with one key/value cache.

    Rows are padded on the right; a pad is seen by itself alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache()
        self._length = self._compact_length = 0
        self._depths = np.zeros((0, 0), dtype=np.int64)  # of the cache's columns, a row each

    @torch.inference_mode()
    def plant(self, stems: Sequence[list[int]]) -> list[Branch]:
        """Run each row's stem; nothing is wanted of its logits."""
        self._length = max(map(len, stems))
        ids = np.zeros((len(stems), self._length), dtype=np.int64)
        for row, stem in zip(ids, stems, strict=True):
            row[: len(stem)] = stem
        self._depths = np.tile(np.arange(self._length), (len(stems), 1))
        # Causal order keeps the pads, which come last, from being seen: no mask is needed.
        if self._length:
            self._forward(ids, logits_to_keep=1)
        return [Branch(None, stem, columns=np.arange(len(stem))) for stem in stems]

    @torch.inference_mode()
    def grow(self, rows: Sequence[Sequence[Branch]]) -> torch.Tensor:
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
        chosen = []
        for r, row in enumerate(rows):
            quiet, loud = itertools.count(), itertools.count(silent)
            for branch in row:
                first_loud = len(branch.tokens) - branch.wanted
                new = np.array([next(quiet if i < first_loud else loud)
                                for i in range(len(branch.tokens))])  # fmt: skip
                stem = branch.parent.columns if branch.parent else np.empty(0, dtype=np.int64)
                ids[r, new] = branch.tokens
                positions[r, new] = len(stem) + np.arange(len(new))
                visible[r, 0, new[:, None], stem] = True
                own = np.tril(np.ones((len(new), len(new)), dtype=bool))
                visible[r, 0, new[:, None], past + new] = own
                branch.columns = np.concatenate([stem, past + new])
                chosen += [r * wanted + column - silent for column in new[first_loud:]]
        if not past:
            self._depths = np.zeros((len(rows), 0), dtype=np.int64)
        self._length += width
        self._depths = np.concatenate([self._depths, positions], axis=1)
        if not self._compact_length:  # the first branches are the questions
            self._compact_length = self._length
        logits = self._forward(ids, positions, visible, logits_to_keep=wanted)
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
        caches = [cast(list[Any], tree._cache.layers) for tree in trees]
        for index, layers in enumerate(zip(*caches, strict=True)):
            pairs = list(zip(layers, missing, strict=True))
            keys = torch.cat([F.pad(layer.keys, (0, 0, 0, pad)) for layer, pad in pairs])
            values = torch.cat([F.pad(layer.values, (0, 0, 0, pad)) for layer, pad in pairs])
            for layer in layers:
                layer.keys = layer.values = None
            joined._cache.update(keys, values, index)
        return joined

    def compact(self, branches: Sequence[Sequence[Branch]]) -> None:
        """Forget every token that is in no given branch (a list a row)."""
        kept = [np.unique(np.concatenate([b.columns for b in row])) for row in branches]
        length = max(map(len, kept))
        index = np.zeros((len(kept), length), dtype=np.int64)
        for r, (columns, row) in enumerate(zip(kept, branches, strict=True)):
            index[r, : len(columns)] = columns
            for branch in {id(b): b for b in row}.values():
                branch.columns = np.searchsorted(columns, branch.columns)
        self._length = self._compact_length = length
        self._depths = np.take_along_axis(self._depths, index, axis=1)
        for layer in cast(list[Any], self._cache.layers):
            where = torch.from_numpy(index).to(layer.keys.device)[:, None, :, None]
            layer.keys = layer.keys.take_along_dim(where, dim=2)
            layer.values = layer.values.take_along_dim(where, dim=2)

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
    ) -> torch.Tensor:
        device = self._model.device
        more: dict[str, Any] = {}
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
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
                **more,
            )
        return output.logits


HEAD_ROWS = 8192
"""So many rows of a 16-bit head are turned to float32 at once."""


@contextlib.contextmanager
def exact_head(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with 16-bit weights give its logits in float32, in the body of ``with``.

    A logit of 20 is rounded to the next 0.125 in bfloat16: that is the coarsest rounding of all,
    and it falls on what is compared. Heads of other kinds (quantised, adapted) stay as they are.
    """
    head = cast(Any, model.get_output_embeddings())
    kinds = (torch.bfloat16, torch.float16)
    if type(head) is not nn.Linear or head.weight.dtype not in kinds or hasattr(head, "_hf_hook"):
        yield
        return

    def product(hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        parts = [F.linear(wide, rows.float()) for rows in head.weight.split(HEAD_ROWS)]
        logits = torch.cat(parts, dim=-1)
        return logits if head.bias is None else logits + head.bias.float()

    own = head.__dict__.get("forward")
    head.forward = product  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


# The check -----------------------------------------------------------------------------------

_CARRY = ("linear", "conv", "mamba", "recurrent", "hybrid", "rwkv", "lstm", "ssm", "retention")
"""Parts of the names of layers that carry a state or neighbours along the row."""

_CARRYING = ("mamba_", "ssm_", "state_size", "d_conv", "conv_kernel", "conv1d", "conv_L_cache",
             "linear_conv", "lru_width")  # fmt: skip
"""Parts of the names of what configures such layers, where no list of layers tells."""

_CARRIERS = ("mamba", "rwkv", "lstm", "recurrent")
"""Parts of the names of architectures that are made of such layers."""

TOLERANCE = 2.0
"""A tree may be off by so many times what other roundings change. Right ones were off by 0.06 to
0.9 times that (17 architectures, float32 and bfloat16, on a CPU), lost positions by 3 and more."""

BEGINNING = 8
"""Beside what is supervised, so many first tokens of each branch are watched: they stand next to
the sister's."""


def recurrent_layers(config: Any) -> str:
    """Name what in a configuration carries one branch into the next, whatever the mask; or ""."""
    config = config.get_text_config()
    name = str(config.model_type)
    if any(part in name for part in _CARRIERS):
        return f"{name} layers"
    kinds = sorted(k for k in layer_kinds(config) if any(part in k for part in _CARRY))
    if kinds:
        return f"{kinds[0]} layers"
    if getattr(config, "layer_types", None):  # a hybrid whose layers are all of attention
        return ""
    for key, value in sorted(vars(config).items()):
        if value and any(part in key for part in _CARRYING):
            return f"recurrent or convolutional layers ({key}: {value})"
    return ""


class Probe(Protocol):
    """A tree to try a model on."""

    @property
    def examples(self) -> Sequence[Encoded]:
        """The sequences of its branches, in order."""

    @property
    def watched(self) -> Sequence[Sequence[int]]:
        """The positions of each one's tokens whose logits are watched."""

    def run(self, change: str) -> list[torch.Tensor]:
        """Return each branch's watched logits, with something changed.

        ``change`` is "": nothing; "sister": all tokens of the first branch; "stem": all tokens
        before it; "positions": where the last branch stands.
        """


class RowProbe:
    """A row in one pass, as training runs it.

    Args:
        model: to try.
        collate: makes a batch of a list of one row.
        paragraphs: the row.
    """

    def __init__(
        self,
        model: Any,
        collate: Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]],
        paragraphs: Sequence[Sequence[Encoded]],
    ) -> None:
        self._model = model
        self.examples = [example for paragraph in paragraphs for example in paragraph]
        if len(self.examples) == 1:
            paragraphs = [[*self.examples, *self.examples]]
            self.examples *= 2
        self._batch = {
            key: value.to(model.device)
            for key, value in collate([{"paragraphs": paragraphs}]).items()
        }
        tree = Tree.build(paragraphs)
        self._leaves = tree.leaves
        self._columns = [
            [c for c in leaf if c < leaf.start + BEGINNING
             or (c + 1 in leaf and tree.labels[c + 1] != IGNORE)]
            for leaf in self._leaves
        ]  # fmt: skip
        self.watched = [[tree.position_ids[c] for c in columns] for columns in self._columns]

    def run(self, change: str) -> list[torch.Tensor]:
        """Run it; see ``Probe``."""
        batch = {key: value.clone() for key, value in self._batch.items()}
        first, last = self._leaves[0], self._leaves[-1]
        if change == "sister":
            batch["input_ids"][0, first.start : first.stop] = _others(
                batch["input_ids"][0, first.start : first.stop]
            )
        elif change == "stem":
            batch["input_ids"][0, : first.start] = _others(batch["input_ids"][0, : first.start])
        elif change == "positions" and "position_ids" in batch:
            moved = batch["position_ids"][0, last.start : last.stop]
            moved += _move(int(moved[0]))
        with torch.no_grad(), exact_head(self._model):
            return self._watch(batch)

    def gradient_crosses(self) -> bool:
        """Tell whether a gradient flows from other branches to the first one's tokens."""
        embedded: list[torch.Tensor] = []

        def catch(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        hook = self._model.get_input_embeddings().register_forward_hook(catch)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                batch = {key: value.clone() for key, value in self._batch.items()}
                others = torch.cat(self._watch(batch)[1:])
                generator = torch.Generator(others.device).manual_seed(0)
                weights = torch.rand(others.shape, generator=generator, device=others.device)
                (gradient,) = torch.autograd.grad((others * weights).sum(), embedded[0])
        finally:
            hook.remove()
        first = self._leaves[0]
        return bool(gradient[0, first.start : first.stop].any())

    def _watch(self, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        keep = torch.zeros(batch["input_ids"].shape, dtype=torch.bool, device=self._model.device)
        keep[0, [c for columns in self._columns for c in columns]] = True
        logits = _kept_logits(self._model, batch, keep).flatten(0, -2)
        return list(logits.split([len(columns) for columns in self._columns]))


class _CacheProbe:
    """A prompt's second half and another of its length, grown on a cache as decoding does it."""

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int]) -> None:
        self._model = model
        cut = len(prompt) // 2
        self._stem, own = list(prompt[:cut]), list(prompt[cut:])
        self._branches = [_others(torch.tensor(own)).tolist(), own]
        self.examples = [
            {"input_ids": self._stem + branch, "labels": [IGNORE] * (cut + 1) + branch[1:]}
            for branch in self._branches
        ]
        self.watched = [range(cut, len(prompt))] * 2

    def run(self, change: str) -> list[torch.Tensor]:
        """Run it; see ``Probe``."""
        stem, (sister, own) = self._stem, self._branches
        if change == "stem":
            stem = _others(torch.tensor(stem)).tolist()
        elif change == "sister":
            sister = _others(torch.tensor(sister)).tolist()
        tree = TokenTree(self._model)
        if change == "positions":
            tree = _MovedTree(self._model)
            tree.moved = len(own)
        root = tree.plant([stem])[0]
        branches = [Branch(root, tokens, len(tokens)) for tokens in (sister, own)]
        return list(tree.grow([branches]).split(len(own)))


class _MovedTree(TokenTree):
    """A tree whose last tokens stand elsewhere than they should."""

    moved = 0

    def _forward(
        self,
        ids: np.ndarray,
        positions: np.ndarray | None = None,
        visible: np.ndarray | None = None,
        logits_to_keep: int = 0,
    ) -> torch.Tensor:
        if positions is not None:
            positions = positions.copy()
            positions[:, -self.moved :] += _move(int(positions[0, -self.moved]))
        return super()._forward(ids, positions, visible, logits_to_keep)


def _others(ids: torch.Tensor) -> torch.Tensor:
    """Return other tokens in the place of each."""
    return torch.where(ids > 0, ids - 1, 1)


def _move(position: int) -> int:
    """Return how far to move a branch: back, since some models know no later positions."""
    return -min(position, 16) or 16


def why_not_shared(model: Any, probe: Probe, row: "RowProbe | None" = None) -> str:
    """Tell why a model's sequences must not share prefixes; "" where they may.

    What is asked is exact: other tokens in one branch move no logit of another one, not by the
    last bit; the stem's tokens and a branch's own positions do move them. Where a model has
    experts, other tokens change how many are sent to each, and by that the order of sums: there no
    gradient may flow between branches. Then the logits of the last branch, which stands farthest
    from its stem, are compared with those of its sequence alone: they may differ as much as when
    every product is rounded otherwise (``TOLERANCE``).

    Args:
        model: in any state; it is put back into it.
        probe: what is run.
        row: the same as a row, to take gradients of; only asked where ``probe`` is none.
    """
    carried = recurrent_layers(model.config)
    if carried:
        return f"{carried} carry what one question says into the next, whatever the mask"
    kind = model.config.get_text_config()._attn_implementation
    if kind not in ("sdpa", "eager"):
        return _other_attention(kind)
    training = model.training
    model.eval()
    try:
        return _try(model, probe, row)
    finally:
        model.train(training)


def _try(model: Any, probe: Probe, row: "RowProbe | None") -> str:
    alone = _run_last_alone(model, probe)
    with _rounded_otherwise(model):
        rounded = _run_last_alone(model, probe)
    name = type(model).__name__
    try:
        base, sister, stem, moved = map(probe.run, ("", "sister", "stem", "positions"))
        leaks = not _equal(base[1:], sister[1:])
        if leaks and _has_experts(model.config):
            leaks = (row or cast(RowProbe, probe)).gradient_crosses()
    except Exception as error:  # architectures fail in many ways; plain batches work for all
        if is_out_of_memory(error):
            raise
        return f"this architecture takes no tree mask ({type(error).__name__}: {error})"
    faults = {
        "lets one question see another, whatever the mask": leaks,
        "does not see the shared context through a tree's mask": _equal(base, stem),
        "ignores the positions that it is given": _equal(base[-1:], moved[-1:]),
    }
    found = [f"{name} {fault}" for fault, is_there in faults.items() if is_there]
    return found[0] if found else _compare(name, base[-1], alone, rounded)


def _compare(name: str, shared: torch.Tensor, alone: torch.Tensor, rounded: torch.Tensor) -> str:
    """Tell where logits are further off than roundings make them; "" where they are not."""
    plain = alone.double()
    scale = (plain - plain.mean(-1, keepdim=True)).norm().clamp(min=1e-30).item()
    gap, noise = ((logits.double() - plain).norm().item() for logits in (shared, rounded))
    if gap <= TOLERANCE * noise:
        return ""
    return (
        f"{name} gives other logits where contexts are shared: off by {gap / scale:.1e}, and other "
        f"roundings make no more than {noise / scale:.1e}"
    )


def _equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@torch.no_grad()
def _run_last_alone(model: Any, probe: Probe) -> torch.Tensor:
    """Return the watched logits of the last branch's sequence by itself."""
    ids = torch.tensor([probe.examples[-1]["input_ids"]], device=model.device)
    keep = torch.zeros(ids.shape, dtype=torch.bool, device=model.device)
    keep[0, list(probe.watched[-1])] = True
    with exact_head(model):
        return _kept_logits(model, {"input_ids": ids}, keep).flatten(0, -2)


@contextlib.contextmanager
def _rounded_otherwise(model: Any) -> Iterator[None]:
    """Let every product be rounded otherwise, by up to a unit in the last place, in ``with``.

    That tells how far a model's logits depend on the order of sums, in its own weights and types.
    An example padded beside another does not tell it: on a CPU that often changes no bit, and a
    row does.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def jitter(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(0)
        shape = output.shape
        unit = torch.rand(shape, generator=generators[device], device=device) * 2 - 1
        return output * (1 + unit.to(output.dtype) * torch.finfo(output.dtype).eps)

    head = model.get_output_embeddings()  # the last product is not followed by others
    products = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    hooks = [m.register_forward_hook(jitter) for m in products if m is not head]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _has_experts(config: Any) -> bool:
    counts = (value for key, value in vars(config.get_text_config()).items() if "expert" in key)
    return any(isinstance(count, int) and count > 1 for count in counts)


_CHECKED: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()


def check_tree(model: PreTrainedModel, prompt: Sequence[int]) -> None:
    """Ask ``why_not_shared`` before decoding, once a model.

    Raises:
        ValueError: this architecture's questions cannot share their context.
    """
    if model in _CHECKED:
        return
    probe = _CacheProbe(model, prompt)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return batch_rows([Tree.build(row["paragraphs"]) for row in rows], 0)

    why = why_not_shared(model, probe, RowProbe(model, collate, [probe.examples]))
    if why:
        raise ValueError(
            f"{type(model).__name__} cannot evaluate questions that share their context: {why}. It "
            "needs layers of attention alone that take a 4D mask, position ids and a key/value "
            "cache, as Llama, Mistral, Qwen, Gemma and Phi have them"
        )
    _CHECKED.add(model)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed, on a GPU or a CPU (where torch has no class for it)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "DefaultCPUAllocator" in str(error) or "CUDA out of memory" in str(error)
    )
