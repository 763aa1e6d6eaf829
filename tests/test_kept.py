"""What decoding keeps between replies: packed weights, the head in float32, what prompts share."""

import math
from typing import Any
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from helpers import make_records, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from test_layers import adapted
from test_tree import tree_model

from llama_squad.activation import activate
from llama_squad.decoding import batch as batches
from llama_squad.decoding import kept, layers
from llama_squad.decoding.batch import DecodingBatch
from llama_squad.decoding.cache import TokenTree
from llama_squad.decoding.generator import Generator
from llama_squad.decoding.kept import Kept
from llama_squad.decoding.layers import LeanLayers
from llama_squad.decoding.replies import Paragraph
from llama_squad.encoding import ChatEncoder
from llama_squad.head import HEAD_ROWS, Product, exact_head
from llama_squad.lora import quicken
from llama_squad.predictors.local import LocalModel
from llama_squad.products import is_packable, pack, packed_linear

RECORDS = make_records(3, [2, 1])
BATCH = [RECORDS[:2], RECORDS[2:3], RECORDS[3:]]


def _replies(local: LocalModel) -> list[Any]:
    return [prediction.reply for prediction in local.answer(BATCH)]


def _without_prefix(model: Any, **options: Any) -> list[Any]:
    with mock.patch.object(LocalModel, "_prefix", []):
        return _replies(LocalModel(model, ChatEncoder(tiny_tokenizer()), **options))


def _same(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.score == pytest.approx(theirs.score, abs=1e-4)


def _asked(local: LocalModel) -> list[Any]:
    return [[local._messages(record) for record in group] for group in BATCH]


# What prompts share -----------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [1024, 4])  # longer contexts have a pass of their own, as a whole
@pytest.mark.parametrize("prompt", ["single_turn", "multi_turn", "question_first"])
@pytest.mark.parametrize("where", ["start", "context", "question", "reply"])
def test_replies_are_those_of_whole_prompts(
    prompt: str, where: Any, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "STEM_ALONE", alone)
    model = adapted()
    if where != "start":
        activate(model, where)
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()), prompt=prompt)
    _same(_replies(local), _without_prefix(model, prompt=prompt))
    assert [len(tokens) > 20 for tokens, _ in local.kept._held] == [True] * (alone == 1024)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("alone", [1024, 4])
def test_layers_that_see_a_window(
    architecture: str, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "STEM_ALONE", alone)
    model = tree_model(architecture, sliding_window=120).eval()
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()))
    replies = _replies(local)
    prompts = [len(ids) for part in local._paragraphs(BATCH, _asked(local)) for ids in part.prompts]
    assert min(prompts) > 120
    assert bool(local.kept._held) == (alone == 1024)
    _same(replies, _without_prefix(model))


@pytest.mark.parametrize("prompt", ["question_first", "question_twice"])
def test_questions_that_share_nothing_beyond_it(prompt: str) -> None:
    record = RECORDS[0]
    batch = [[{**record, "question": question} for question in ("Who?", "When?", "a")]]
    model, encoder = tiny_model(), ChatEncoder(tiny_tokenizer())
    local = LocalModel(model, encoder, prompt=prompt)
    found = [prediction.reply for prediction in local.answer(batch)]
    with mock.patch.object(LocalModel, "_prefix", []):
        whole = LocalModel(model, encoder, prompt=prompt).answer(batch)
    _same(found, [prediction.reply for prediction in whole])
    assert [list(tokens) for tokens, _ in local.kept._held] == [local._prefix]


def test_prompts_that_share_no_token() -> None:
    generator = Generator(tiny_model(), ChatEncoder(tiny_tokenizer()), decoding="free")
    prompts = [[7, 8, 9], [10, 11]]
    found = generator.reply([Paragraph("", prompts)])[0]
    alone = [generator.reply([Paragraph("", [ids])])[0][0] for ids in prompts]
    _same(found, alone)
    assert alone[0].score != alone[1].score


def test_it_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()))
    run, prefill = [], TokenTree.prefill

    def watched(self: Any, stem: list[int], *args: Any) -> Any:
        run.extend(stem)
        return prefill(self, stem, *args)

    local.answer(BATCH[:1])  # which checks the tree, once
    monkeypatch.setattr(TokenTree, "prefill", watched)
    for _ in range(2):
        local.answer(BATCH)
    assert run == []
    again = LocalModel(model, ChatEncoder(tiny_tokenizer()))
    for _ in range(2):
        again.answer(BATCH)
    assert run == again._prefix
    assert len(run) > 20


def test_prompts_that_begin_otherwise_are_run_whole() -> None:
    model = tiny_model()
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()))
    local.__dict__["_prefix"] = [*local._prefix[:-1], 7]
    _same(_replies(local), _without_prefix(model))
    assert not local.kept._held


def test_an_adapter_that_is_switched_off_and_on() -> None:
    """The keys of what prompts share are the adapter's or the base's, and never of both."""
    model = adapted()
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()))
    tuned = _replies(local)
    with model.disable_adapter():
        base = _replies(local)
    assert _replies(local) == tuned
    _same(base, _replies(LocalModel(tiny_model(), ChatEncoder(tiny_tokenizer()))))
    assert [reply.score for reply in base] != [reply.score for reply in tuned]


# Contexts that are asked about again -------------------------------------------------------------


def _one_by_one(local: LocalModel, records: Any = RECORDS) -> list[Any]:
    return [local.answer([[record]])[0].reply for record in records]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass of a tree's model."""
    found: list[int] = []
    forward = TokenTree._forward

    def watched(self: Any, ids: Any, *args: Any, **more: Any) -> Any:
        found.append(ids.shape[1])
        return forward(self, ids, *args, **more)

    monkeypatch.setattr(TokenTree, "_forward", watched)
    return found


@pytest.mark.parametrize("alone", [1024, 4])  # a longer context is run with what precedes it
@pytest.mark.parametrize("prompt", ["single_turn", "multi_turn", "question_first"])
@pytest.mark.parametrize("where", ["start", "context", "question", "reply"])
def test_replies_over_a_context_that_is_kept(
    prompt: str, where: Any, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "STEM_ALONE", alone)
    model, encoder = adapted(), ChatEncoder(tiny_tokenizer())
    if where != "start":
        activate(model, where)
    local = LocalModel(model, encoder, prompt=prompt, keep_contexts=True)
    found = _one_by_one(local)
    _same(found, _one_by_one(LocalModel(model, encoder, prompt=prompt)))
    assert _one_by_one(local) == found  # whatever was asked before
    assert bool(local.kept._contexts) == (prompt != "question_first")


@pytest.mark.parametrize("where", ["start", "context"])
def test_a_context_is_run_once(where: Any, passes: list[int]) -> None:
    model = adapted()
    if where != "start":
        activate(model, where)
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()), keep_contexts=True)
    records = [{**RECORDS[0], "question": question} for question in ("Who?", "When?", "a")]
    _one_by_one(local, RECORDS[3:])  # which checks the tree, and runs what all begin with
    sizes = []
    for record in records:
        passes.clear()
        _one_by_one(local, [record])
        sizes.append(max(passes))
    (ids,) = local._encoder.encode_prompts([local._messages(records[0])])
    assert sizes[0] > len(ids) - len(local._prefix) - 30 > 2 * max(sizes[1:])
    assert len(local.kept._contexts) == 2  # the last and the one before
    passes.clear()
    local.answer(BATCH)  # of several contexts none is kept
    assert len(local.kept._contexts) == 2
    assert max(passes) > sizes[0]


def test_a_base_shares_the_context_of_an_activated_adapter(passes: list[int]) -> None:
    model, encoder = adapted(), ChatEncoder(tiny_tokenizer())
    activate(model, "question")
    local = LocalModel(model, encoder, keep_contexts=True)
    tuned = _one_by_one(local, RECORDS[:1])
    passes.clear()
    with model.disable_adapter():
        base = _one_by_one(local, RECORDS[:1])
    assert len(local.kept._contexts) == 1
    shared = max(passes)
    alone = LocalModel(tiny_model(), encoder, keep_contexts=True)
    _same(base, _one_by_one(alone, RECORDS[:1]))
    assert max(passes) > 2 * shared
    assert base[0].score != tuned[0].score


@pytest.mark.parametrize("where", ["start", "context"])
def test_a_base_shares_no_context_that_an_adapter_reads(where: Any) -> None:
    model, encoder = adapted(), ChatEncoder(tiny_tokenizer())
    if where != "start":
        activate(model, where)
    local = LocalModel(model, encoder, keep_contexts=True)
    tuned = _one_by_one(local, RECORDS[:1])
    with model.disable_adapter():
        base = _one_by_one(local, RECORDS[:1])
    assert len(local.kept._contexts) == 2
    _same(base, _one_by_one(LocalModel(tiny_model(), encoder), RECORDS[:1]))
    assert _one_by_one(local, RECORDS[:1]) == tuned


def test_a_context_that_is_too_long_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LONGEST_KEPT", 60)
    local = LocalModel(tiny_model(), ChatEncoder(tiny_tokenizer()), keep_contexts=True)
    _same(_one_by_one(local), _one_by_one(LocalModel(tiny_model(), local._encoder)))
    assert not local.kept._contexts


def test_where_memory_is_short_no_context_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalModel(tiny_model(), ChatEncoder(tiny_tokenizer()), keep_contexts=True)
    expected = _one_by_one(LocalModel(tiny_model(), local._encoder))
    _one_by_one(local, RECORDS[:1])
    run = DecodingBatch.replies
    calls = []

    def short(self: Any) -> Any:
        calls.append(len(local.kept._contexts))
        if calls[-1]:
            raise torch.OutOfMemoryError
        return run(self)

    monkeypatch.setattr(DecodingBatch, "replies", short)
    _same(_one_by_one(local), expected)
    assert calls == [1] + [0] * len(RECORDS)
    monkeypatch.setattr(DecodingBatch, "replies", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError) as caught:  # it is not tried for ever
        _one_by_one(local, RECORDS[:1])
    assert "--quantize" in str(caught.value.__notes__)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_a_kept_context_under_layers_that_see_a_window(architecture: str) -> None:
    model = tree_model(architecture, sliding_window=120).eval()
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()), keep_contexts=True)
    _same(_one_by_one(local), _one_by_one(LocalModel(model, local._encoder)))
    assert local.kept._contexts


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


# Packed weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_packed_weights_give_the_same_product(dtype: torch.dtype, tokens: int) -> None:
    if not is_packable(dtype):
        pytest.skip(f"this CPU multiplies no faster by packed weights of {dtype}")
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*s).to(dtype) for s in ((96, 64), (96,), (2, tokens, 64)))
    for added in (bias, None):
        found = packed_linear(x, pack(weight), added)
        torch.testing.assert_close(found, F.linear(x, weight, added))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replies_by_packed_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = adapted(dtype), ChatEncoder(tiny_tokenizer())
    plain = LocalModel(model, encoder).answer(BATCH)  # small ones are not packed
    monkeypatch.setattr(layers, "LEAST_ENTRIES", 1)
    local = LocalModel(model, encoder)
    found = local.answer(BATCH)
    packed = local.kept.layers._packed
    assert packed is not None
    assert len(packed) == (7 * model.config.num_hidden_layers if is_packable(dtype) else 0)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.reply.token_ids == theirs.reply.token_ids
        assert ours.reply.score == pytest.approx(theirs.reply.score, abs=1e-4)


@needs_onednn
def test_weights_that_find_no_room_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "LEAST_ENTRIES", 1)
    monkeypatch.setattr(layers, "is_packable", lambda _: True)
    model = tiny_model()
    needed = sum(p.nbytes for n, p in model.named_parameters() if "proj" in n)
    for room, packs in ((needed - 1, False), (needed, True)):
        lean = LeanLayers(model)
        with lean.in_place(room):
            assert ("forward" in vars(model.model.layers[0].mlp.up_proj)) == packs
    assert not any("forward" in vars(module) for module in model.modules())


def test_weights_that_memory_does_not_hold_twice_are_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers, "LEAST_ENTRIES", 1)
    monkeypatch.setattr(layers, "is_packable", lambda _: True)
    monkeypatch.setattr(layers, "pack", mock.Mock(side_effect=MemoryError))
    model, encoder = tiny_model(), ChatEncoder(tiny_tokenizer())
    local = LocalModel(model, encoder)
    local.answer(BATCH)
    assert local.kept.layers._packed == []


def test_layers_that_others_have_replaced_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a training that goes on."""
    monkeypatch.setattr(layers, "LEAST_ENTRIES", 1)
    monkeypatch.setattr(layers, "is_packable", lambda _: True)
    model = adapted()
    quicken(model)
    lean = LeanLayers(model)
    with lean.in_place(math.inf):
        assert lean._packed == []
        assert lean._sums == {}


def test_weights_that_their_adapter_changes_are_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such an adapter adds to its layer's weight in each pass."""
    monkeypatch.setattr(layers, "LEAST_ENTRIES", 1)
    monkeypatch.setattr(layers, "is_packable", lambda _: True)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=[], init_lora_weights=False,
        target_parameters=["q_proj.weight"],
    )  # fmt: skip
    model: Any = get_peft_model(tiny_model(), config).eval()
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        with LeanLayers(model).in_place(math.inf):
            found = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, expected)
    torch.testing.assert_close(found, expected)


def test_what_is_kept_of_another_model_is_refused() -> None:
    kept = Kept(tiny_model())
    with pytest.raises(ValueError, match="of another model"):
        Generator(tiny_model(), ChatEncoder(tiny_tokenizer()), kept=kept)


@needs_onednn
def test_gradients_and_autocast_take_the_layers_own_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers, "LEAST_ENTRIES", 1)
    monkeypatch.setattr(layers, "is_packable", lambda _: True)
    model = tiny_model()
    ids = torch.arange(5, 25)[None]
    with LeanLayers(model).in_place(math.inf):
        model(ids, labels=ids).loss.backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = model(ids).logits
    assert model.model.layers[0].mlp.up_proj.weight.grad.norm() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, model(ids).logits)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packs", [False, True])
def test_a_heads_logits_are_exact_either_way(
    packs: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_squad.head._packs", lambda: packs)
    model = tiny_model(dtype=dtype, vocab_size=HEAD_ROWS + 1)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state
        with exact_head(model):
            logits = model(ids).logits
    expected = F.linear(hidden.double(), model.lm_head.weight.double())
    torch.testing.assert_close(logits, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("holds", [False, True])
def test_a_head_that_finds_no_room_is_not_kept(
    holds: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that memory does not hold after all."""
    if holds:
        monkeypatch.setattr("llama_squad.head._packs", lambda: True)
        monkeypatch.setattr("llama_squad.head.pack", mock.Mock(side_effect=MemoryError))
    model = tiny_model(dtype=dtype, vocab_size=HEAD_ROWS + 1)
    product = Product(model.lm_head)
    product.keep(math.inf if holds else 4 * model.lm_head.weight.numel() - 1)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state
        with exact_head(model, product):
            logits = model(ids).logits
    assert product._wide is None
    expected = F.linear(hidden.double(), model.lm_head.weight.double())
    torch.testing.assert_close(logits, expected.float(), rtol=1e-6, atol=1e-6)
