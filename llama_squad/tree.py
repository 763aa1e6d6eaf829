"""Token sequences that share prefixes: their layout in a row, and the masks of both trees.

Training runs a row of examples in one pass (``Tree``, ``batch_rows``), decoding lets branches grow
on a key/value cache (``llama_squad.decoding.cache``). Both build their masks here (``make_masks``),
for each attention of ``MASK_FORMS`` and for layers that see a window. Whether a model may share
contexts at all is asked in ``llama_squad.tree_check``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llama_squad.activation import ADAPTER_MASK
from llama_squad.attention import mark_blocks
from llama_squad.encoding import IGNORE, Encoded

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
    adapted: list[bool] = field(default_factory=list)
    """Where an activated adapter acts; empty where there is none."""
    chat: list[bool] = field(default_factory=list)
    """Which tokens are plain chat; empty where no example says so."""
    weights: list[int] = field(default_factory=list)
    """How many examples each token's label is that of."""

    @classmethod
    def build(cls, paragraphs: Sequence[Sequence[Encoded]]) -> "Tree":
        """Share the prefix of all examples, then each paragraph's own, then branch.

        Cuts are made where the ids of whole examples part, at most before the last prompt token:
        a branch holds the token that predicts its first label, and a prefix holds no label. Where
        all tokens have labels, cuts are made a token earlier, so that what follows a prefix is one
        token; it is predicted once, in front of the first branch, for all of them.
        """
        tree = cls([], [], [], [])
        examples = [example for paragraph in paragraphs for example in paragraph]
        root = shareable_prefix(examples)
        tree._append(examples[0], 0, root, [len(examples)] * 2)
        for paragraph in paragraphs:
            start = len(tree.input_ids)
            stem = shareable_prefix(paragraph)
            tree._append(paragraph[0], root, stem, [len(examples), len(paragraph)])
            before = len(paragraph if stem > root else examples)
            for example in paragraph:
                begin = len(tree.input_ids)
                tree._append(example, stem, len(example["input_ids"]), [before, 1])
                tree.leaves.append(range(begin, len(tree.input_ids)))
            tree.ends[start : start + stem - root] = [len(tree.input_ids)] * (stem - root)
        tree.ends[:root] = [len(tree.input_ids)] * root
        return tree

    def _append(self, example: Encoded, start: int, stop: int, held_by: Sequence[int]) -> None:
        """Append tokens of an example; ``held_by``: how many hold the token before, and these."""
        labels, held = example["labels"][start:stop], [held_by[1]] * (stop - start)
        if labels:
            held[0] = held_by[0]  # the token before predicts the first one for all of them
            if self.position_ids[-1:] != [start - 1]:  # and does not stand here
                labels[0] = IGNORE
        self.weights += [0 if x == IGNORE else n for x, n in zip(labels, held, strict=True)]
        self.input_ids += example["input_ids"][start:stop]
        self.labels += labels
        self.position_ids += range(start, stop)
        self.ends += [len(self.input_ids)] * (stop - start)
        for index in range(*example.get("hidden", (0, 0))):
            if start <= index < stop:
                column = len(self.ends) - stop + index
                self.ends[column] = column + 1  # it sees, and is seen by itself alone
        if "adapter_from" in example:
            self.adapted += [index >= example["adapter_from"] for index in range(start, stop)]
        if "chat" in example:
            self.chat += [example["chat"]] * (stop - start)


def shareable_prefix(examples: Sequence[Encoded]) -> int:
    """Return how many leading tokens the examples may hold once."""
    prompt = min(_prompt_length(example) for example in examples)
    common = common_prefix([example["input_ids"] for example in examples])
    whole = all(_prompt_length(example) <= 1 for example in examples)  # labels on all tokens
    shared = max(common - 1, 0) if whole else min(prompt - 1, common)
    shared = min([shared, *(e["hidden"][0] for e in examples if "hidden" in e)])
    return adapted_alike(shared, [e["adapter_from"] for e in examples if "adapter_from" in e])


def adapted_alike(shared: int, adapter_from: Sequence[int]) -> int:
    """Return how many of the tokens that sequences share the adapter treats alike in all of them.

    ``adapter_from`` are the first tokens that it acts on, or empty.
    """
    return min(shared, *adapter_from) if len(set(adapter_from)) > 1 else shared


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

    def pad(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (length - len(values))]

    # a pad attends to itself alone, and no token to it: a row without any key would be NaN
    ends = torch.tensor([t.ends + list(range(len(t.ends) + 1, length + 1)) for t in trees])
    position = torch.arange(length)
    causal = position[None, :] <= position[:, None]
    visible = position[None, :, None] < ends[:, None, :]
    batch = {
        "input_ids": torch.tensor([pad(t.input_ids, pad_token_id) for t in trees]),
        "labels": torch.tensor([pad(t.labels, IGNORE) for t in trees]),
        "position_ids": torch.tensor([pad(t.position_ids, 0) for t in trees]),
        "attention_mask": (causal & visible)[:, None],
    }
    if trees[0].adapted:
        batch[ADAPTER_MASK] = torch.tensor([pad(t.adapted, False) for t in trees])
    if trees[0].chat:
        batch["chat"] = torch.tensor([pad(t.chat, False) for t in trees])
    if max(weight for tree in trees for weight in tree.weights) > 1:
        batch["weights"] = torch.tensor([pad(t.weights, 0) for t in trees])
    return batch


NOT_OF_MODEL = ("labels", "counts", "chat", "weights")
"""What a batch holds that a model does not take, or not here."""


def kept_logits(model: Any, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    """Run a batch; return the logits at the tokens that ``keep`` marks, in the model's type.

    ``keep`` is bool, of shape (rows, length); the logits are of shape (kept tokens, vocabulary).
    """
    features: dict[str, Any] = {k: v for k, v in inputs.items() if k not in NOT_OF_MODEL}
    mask, positions = features.get("attention_mask"), features.get("position_ids")
    if mask is not None and mask.dim() == 4 and positions is not None:
        # of DDP, FSDP and DeepSpeed, whose wrappers have no configuration
        inner = model.module if hasattr(model, "module") else model
        features["attention_mask"] = make_masks(inner, mask, positions, positions)
    return model(**features, logits_to_keep=keep, use_cache=False).logits


def gather_hidden(model: Any) -> None:
    """Let a model that is spread over devices return its hidden states where its inputs are.

    What ``kept_logits`` keeps is marked there; transformers looks it up in the hidden states, which
    otherwise lie where the last layer is.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    first = getattr(hook, "execution_device", None) or embedding.weight.device
    gather = AlignDevicesHook(first, io_same_device=True, skip_keys="past_key_values")
    add_hook_to_module(model.base_model, gather, append=True)


NO_NUMBERS = (
    "the model gives logits that are no numbers: in float16 it may overflow, so take --dtype "
    "bfloat16 or float32; else its weights are damaged"
)
"""Said of logits that are infinite or NaN."""


def widen(logits: torch.Tensor) -> torch.Tensor:
    """Return numbers in float32 at least."""
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

    Returns:
        A mask of the shape of ``visible``, in the form that ``MASK_FORMS`` has for the model's
        attention; or one by the name of each kind of layer.

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


def _added_to_scores(model: Any, visible: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(model.dtype).min)


MASK_FORMS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "sdpa": lambda model, visible: mark_blocks(visible, dtype=model.dtype),
    "eager": _added_to_scores,
}
"""Attention, by the name that transformers has for it → the form in which it takes a mask, made of
the model and what is visible: bool, of shape (rows, 1, queries, keys). Others share no contexts."""


def refused_attention(model: Any) -> str:
    """Tell why a model's attention cannot hold a tree; "" where it has one of ``MASK_FORMS``."""
    kind = _attention(model)
    if kind in MASK_FORMS:
        return ""
    return f"{kind} attention cannot hold a tree of questions: take --attn_implementation sdpa"


def _attention(model: Any) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _in_form(model: Any, visible: torch.Tensor) -> torch.Tensor:
    if refusal := refused_attention(model):
        raise ValueError(refusal)
    return MASK_FORMS[_attention(model)](model, visible)


def ask_no_router(model: Any) -> None:
    """Let a mixture of experts take no balancing loss, which cannot be had of a tree's mask."""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", None):
        config.output_router_logits = False


def rope_limit(config: Any) -> int | None:
    """Return the most tokens for which rotary embeddings do not depend on a pass's longest one."""
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    limits = [
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
        if rope.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed, on a GPU or a CPU (where torch has no class for it)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "DefaultCPUAllocator" in str(error) or "CUDA out of memory" in str(error)
    )
