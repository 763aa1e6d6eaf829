"""Adapters in decoding: PEFT's layers without their detours give what PEFT's give."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import make_records, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from llama_squad.activation import ADAPTER_MASK, activate
from llama_squad.decoding import layers
from llama_squad.decoding.cache import Branch, TokenTree
from llama_squad.decoding.layers import LeanLayers
from llama_squad.encoding import ChatEncoder
from llama_squad.predictors.local import LocalModel

IDS = torch.arange(5, 25).view(2, 10)
MASKS = {
    "no token": torch.zeros(2, 10, dtype=torch.bool),
    "the last": torch.arange(20).view(2, 10) >= 4,
    "some": torch.arange(20).view(2, 10) % 3 == 0,
    "all": torch.ones(2, 10, dtype=torch.bool),
}


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
    model: Any = get_peft_model(tiny_model(dtype=dtype), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


@torch.inference_mode()
def _logits(model: Any, lean: bool, **more: Any) -> torch.Tensor:
    if not lean:
        return model(IDS, **more).logits
    with LeanLayers(model).in_place(math.inf):
        return model(IDS, **more).logits


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_same_logits_where_the_adapter_acts_on_some_tokens(mask: torch.Tensor) -> None:
    model = adapted()
    activate(model, "question")
    found, expected = (_logits(model, lean, **{ADAPTER_MASK: mask}) for lean in (True, False))
    torch.testing.assert_close(found, expected)
    base = _logits(model, True)
    assert torch.equal(base, _logits(model, False))  # a pass without a mask is the base's
    assert torch.equal(base, found) != bool(mask.any())


def test_the_same_logits_where_it_acts_on_all() -> None:
    model = adapted()
    torch.testing.assert_close(_logits(model, True), _logits(model, False))
    assert not any("forward" in layer.__dict__ for layer in model.modules())


def test_in_16_bits_as_near_as_in_training() -> None:
    """Which is under autocast: the adapter's products are in the base's number format."""
    model = adapted(torch.bfloat16)
    exact = _logits(adapted(), False)
    with torch.autocast("cpu", torch.bfloat16):
        trained = _logits(model, False)
    assert (_logits(model, True) - exact).norm() < 1.1 * (trained - exact).norm()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_of_other_kinds_stay_as_they_are(options: Any) -> None:
    model = adapted(**options)
    assert torch.equal(_logits(model, True), _logits(model, False))


def test_replies_and_their_scores_are_those_of_pefts_layers() -> None:
    model = adapted()
    activate(model, "question")
    batch = [make_records(1, [3])]
    ours = LocalModel(model, ChatEncoder(tiny_tokenizer())).answer(batch)
    with mock.patch.object(LeanLayers, "in_place", mock.MagicMock()):
        theirs = LocalModel(model, ChatEncoder(tiny_tokenizer())).answer(batch)
    for a, b in zip(ours, theirs, strict=True):
        assert a.reply.completion == b.reply.completion
        assert a.reply.score == pytest.approx(b.reply.score, abs=1e-4)


def test_a_tree_grows_under_it() -> None:
    model = adapted()
    activate(model, "question")
    found = []
    for lean in (True, False):
        tree = TokenTree(model)
        with torch.inference_mode():
            stem = Branch(None, [5, 6, 7], wanted=0, adapter_from=2)
            branches = [stem, Branch(stem, [8, 9]), Branch(stem, [10, 11, 12])]
            if lean:
                with LeanLayers(model).in_place(math.inf):
                    found.append(tree.extend([branches]))
            else:
                found.append(tree.extend([branches]))
    torch.testing.assert_close(*found)


def test_tokens_that_no_mask_is_of_are_refused() -> None:
    model = adapted()
    activate(model, "question")
    layer = model.model.model.layers[0].self_attn.q_proj
    with torch.inference_mode(), LeanLayers(model).in_place(math.inf):
        model(IDS, **{ADAPTER_MASK: MASKS["the last"]})
        with pytest.raises(ValueError, match="rows of tokens"):
            layer(torch.zeros(10, 32))


def test_threads_that_share_a_model_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer knows of one pass where its adapter acts: the second would have it elsewhere."""
    model = adapted()
    activate(model, "question")
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()))
    batches = [[make_records(1, [n], seed=n)] for n in (1, 3)]
    alone = [[p.reply for p in local.answer(batch)] for batch in batches]
    mlp = type(model.model.model.layers[0].mlp)
    real, within, both = mlp.forward, [0], threading.Event()

    def slow(self: Any, x: torch.Tensor) -> torch.Tensor:
        within[0] += 1
        if within[0] == 2:
            both.set()
        both.wait(0.05)  # for the other thread
        found = real(self, x)
        within[0] -= 1
        return found

    monkeypatch.setattr(mlp, "forward", slow)
    with ThreadPoolExecutor(2) as pool:
        found = [[p.reply for p in answers] for answers in pool.map(local.answer, batches)]
    assert found == alone
    assert not both.is_set()


def test_no_layer_stays_lean_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    real, made = layers._Sum, list[Any]()

    def full(*args: Any) -> Any:
        if len(made) == 3:
            raise MemoryError
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(layers, "_Sum", full)
    with pytest.raises(MemoryError), LeanLayers(model).in_place(math.inf):
        pass
    assert made and not any("forward" in layer.__dict__ for layer in model.modules())


class _Elsewhere:
    """An index that has to be brought to where the layer is."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def to(self, device: torch.device) -> Any:
        return self._index


def test_the_places_of_another_gpu_are_brought_to_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model on several GPUs is told on the first one where its adapter acts."""
    model = adapted()
    activate(model, "question")
    expected = _logits(model, True, **{ADAPTER_MASK: MASKS["some"]})
    places = layers._places
    monkeypatch.setattr(layers, "_places", lambda mask: _Elsewhere(places(mask)))
    assert torch.equal(_logits(model, True, **{ADAPTER_MASK: MASKS["some"]}), expected)
