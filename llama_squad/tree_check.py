"""May this model's sequences share prefixes? The one check of training and evaluation.

What is asked is exact, by perturbation: see ``why_not_shared``. Uses ``llama_squad.tree``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn

from llama_squad.activation import ADAPTER_MASK
from llama_squad.encoding import IGNORE, Encoded
from llama_squad.head import exact_head
from llama_squad.tree import (
    NO_NUMBERS,
    Tree,
    attention_windows,
    batch_rows,
    is_out_of_memory,
    kept_logits,
    layer_kinds,
    make_masks,
    refused_attention,
    rope_limit,
    widen,
)

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


def longest_shared(model: Any) -> int | None:
    """Return how many tokens an example may have that shares a row; None where there is no limit.

    Some rotary embeddings depend on the longest sequence of a pass, so that a long example would
    change the short ones beside it. And a model may not take the masks of its own windows.
    """
    config = model.config.get_text_config()
    limits = [limit] if (limit := rope_limit(config)) else []
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
        changed = {"sister": slice(first.start, first.stop), "stem": slice(first.start)}.get(change)
        if changed is not None:
            batch["input_ids"][0, changed] = other_tokens(batch["input_ids"][0, changed])
        elif change == "positions" and "position_ids" in batch:
            moved = batch["position_ids"][0, last.start : last.stop]
            moved += move_back(int(moved[0]))
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
        logits = widen(kept_logits(self._model, batch, keep)).flatten(0, -2)
        return list(logits.split([len(columns) for columns in self._columns]))


def other_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Return other tokens in the place of each."""
    return torch.where(ids > 0, ids - 1, 1)


def move_back(position: int) -> int:
    """Return how far to move a branch: back, since some models know no later positions."""
    return -min(position, 16) or 16


def why_not_shared(model: Any, probe: Probe, row: "Callable[[], RowProbe] | None" = None) -> str:
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
        row: makes the same as a row, to take gradients of; only where ``probe`` is none itself.
    """
    carried = recurrent_layers(model.config)
    if carried:
        return f"{carried} carry what one question says into the next, whatever the mask"
    if refusal := refused_attention(model):
        return refusal
    training = model.training
    model.eval()
    try:
        return _try(model, probe, row)
    finally:
        model.train(training)


def _try(model: Any, probe: Probe, row: "Callable[[], RowProbe] | None") -> str:
    alone = _run_last_alone(model, probe)
    if not alone.isfinite().all():
        raise ValueError(NO_NUMBERS)
    with _rounded_otherwise(model):
        rounded = _run_last_alone(model, probe)
    name = type(model).__name__
    try:
        base, sister, stem, moved = map(probe.run, ("", "sister", "stem", "positions"))
        leaks = not _equal(base[1:], sister[1:])
        if leaks and _has_experts(model.config):
            leaks = (row() if row else cast(RowProbe, probe)).gradient_crosses()
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
    example = probe.examples[-1]
    ids = torch.tensor([example["input_ids"]], device=model.device)
    batch = {"input_ids": ids}
    if "adapter_from" in example:
        place = torch.arange(ids.shape[1], device=model.device)[None]
        batch[ADAPTER_MASK] = place >= example["adapter_from"]
    if "hidden" in example:
        batch = batch_rows([Tree.build([[example]])], 0)
        batch = {key: value.to(model.device) for key, value in batch.items()}
    keep = torch.zeros(ids.shape, dtype=torch.bool, device=model.device)
    keep[0, list(probe.watched[-1])] = True
    with exact_head(model):
        return widen(kept_logits(model, batch, keep)).flatten(0, -2)


@contextlib.contextmanager
def _rounded_otherwise(model: Any) -> Iterator[None]:
    """Let every product be rounded otherwise, by up to a unit in the last place, in ``with``.

    That tells how far a model's logits depend on the order of sums, in its own weights and types.
    An example padded beside another does not tell it: on a CPU that often changes no bit, and a
    row does. An adapter's layer is one product with its base's, which it may compute by itself.
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

    adapted = [m for m in model.modules() if "base_layer" in m._modules]
    plain = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    skipped = {part for m in adapted for part in m.modules() if part is not m}
    head = model.get_output_embeddings()  # the last product is not followed by others
    skipped |= set(head.modules())
    hooks = [m.register_forward_hook(jitter) for m in {*adapted, *plain} - skipped]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _has_experts(config: Any) -> bool:
    counts = (value for key, value in vars(config.get_text_config()).items() if "expert" in key)
    return any(isinstance(count, int) and count > 1 for count in counts)
