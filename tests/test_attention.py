"""Attention in blocks: the same as over the whole row, of fewer products."""

from typing import Any

import pytest
import torch
from helpers import collator, difference, encode_paragraphs, make_records, tiny_model

from llama_squad import attention
from llama_squad.attention import blocks_of, mark_blocks
from llama_squad.training.trainer import answer_loss
from llama_squad.tree import shareable_prefix

PARAGRAPHS = encode_paragraphs(make_records(4, [2, 3, 1, 2]))
ROW = collator()([{"paragraphs": PARAGRAPHS}])


def marked(mask: torch.Tensor, block_tokens: int | None = None) -> list[attention.Block]:
    """Mark a mask, and return its blocks."""
    blocks = blocks_of(mark_blocks(mask, block_tokens))
    assert blocks is not None
    return blocks


@pytest.mark.parametrize("block_tokens", [1, 7, 64, 200])
@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_hold_all_that_is_seen(block_tokens: int, rows: int) -> None:
    batch = collator()([{"paragraphs": PARAGRAPHS}, {"paragraphs": PARAGRAPHS[:2]}][:rows])
    visible = batch["attention_mask"]
    blocks = marked(visible, block_tokens)
    assert [rows.start for rows, _, _ in blocks[1:]] == [rows.stop for rows, _, _ in blocks[:-1]]
    assert (blocks[0][0].start, blocks[-1][0].stop) == (0, visible.shape[2])
    assert max(rows.stop - rows.start for rows, _, _ in blocks) <= block_tokens
    assert sum(int(mask.sum()) for _, _, mask in blocks) == int(visible.sum())
    for queries, keys, mask in blocks:
        assert torch.equal(visible[:, :, queries][..., keys], mask)


@pytest.mark.parametrize("past", [50, 200])
def test_blocks_of_queries_after_a_cache(past: int) -> None:
    """The keys before the first query are those of a cache."""
    visible = ROW["attention_mask"][:, :, past:].clone()
    blocks = marked(visible, 64)
    assert sum(int(mask.sum()) for _, _, mask in blocks) == int(visible.sum())
    for queries, keys, mask in blocks:
        assert torch.equal(visible[:, :, queries][..., keys], mask)


def test_a_paragraph_is_cut_from_the_next() -> None:
    blocks = marked(ROW["attention_mask"], 300)
    pairs = sum(mask.shape[2] * mask.shape[3] for _, _, mask in blocks)
    assert pairs < 0.5 * ROW["attention_mask"].numel()
    ends = {queries.stop for queries, _, _ in blocks[:-1]}
    positions = ROW["position_ids"][0].tolist()
    # what all paragraphs share comes first; positions jump back to its end where the next begins
    prefix = int(shareable_prefix([e for p in PARAGRAPHS for e in p]))
    starts = {at for at, depth in enumerate(positions) if depth == prefix}
    assert ends <= starts, "a cut through a paragraph that fits into a block"


def test_blocks_are_copies_of_their_mask() -> None:
    """A view would keep the row's mask, which keeps the blocks: memory that nothing frees."""
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    mark_blocks(mask)
    blocks = blocks_of(mask)
    assert blocks
    places = {block.untyped_storage().data_ptr() for _, _, block in blocks}
    assert mask.untyped_storage().data_ptr() not in places


def test_short_rows_and_single_tokens_stay_whole() -> None:
    assert blocks_of(mark_blocks(torch.ones(2, 1, 4, 600, dtype=torch.bool))) is None
    assert len(marked(torch.ones(2, 1, 385, 385, dtype=torch.bool).tril())) == 2


@pytest.mark.parametrize("kind", ["all", "recomputed"])
@pytest.mark.parametrize("block_tokens", [16, 300])
def test_blocks_change_neither_loss_nor_gradients(
    kind: str, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    if kind == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 10**9)
    whole = answer_loss(model, ROW)[0]
    whole.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    called = []
    real = attention.Products.apply
    monkeypatch.setattr(attention, "BLOCK_TOKENS", block_tokens)

    def counted(*args: Any) -> Any:
        called.extend(args[3])  # a layer's blocks
        return real(*args)

    monkeypatch.setattr(attention.Products, "apply", counted)
    loss = answer_loss(model, ROW)[0]
    loss.backward()
    layers = model.config.num_hidden_layers * (2 if kind == "recomputed" else 1)
    assert len(called) > layers, "nothing was run in blocks"
    torch.testing.assert_close(loss, whole)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_products_round_like_torchs_own(rows: int, autocast: bool) -> None:
    batch = collator()([{"paragraphs": PARAGRAPHS}, {"paragraphs": PARAGRAPHS[:2]}][:rows])
    visible, past = batch["attention_mask"][:, :, 30:], 30
    keys, queries = visible.shape[3], visible.shape[3] - past
    torch.manual_seed(0)
    # six heads on two of keys, which are wider than the values
    shapes = (6, queries, 16), (2, keys, 16), (2, keys, 8), (6, queries, 8)
    query, key, value, given = (torch.randn(rows, *shape) for shape in shapes)
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True

    def run(mask: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.bfloat16().to(dtype).requires_grad_() for x in (query, key, value))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            found = attention.attend(module, q, k, v, mask, scaling=0.3)[0]
        wanted = given.bfloat16().to(dtype).transpose(1, 2)
        return [found, *torch.autograd.grad(found, (q, k, v), wanted)]

    exact = run(visible, torch.float64)
    whole, blocks = (
        run(visible, torch.bfloat16),
        run(mark_blocks(visible.clone(), 64), torch.bfloat16),
    )
    assert all(found.dtype == torch.bfloat16 for found in blocks)
    assert (blocks[0] - exact[0]).norm() < 1.6 * (whole[0] - exact[0]).norm()
    for right, ours in zip(exact, blocks, strict=True):
        assert (ours - right).norm() < 0.01 * right.norm()
    for right, ours in zip(
        exact, run(mark_blocks(visible.clone(), 64), torch.float64), strict=True
    ):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_without_gradients_they_round_like_torchs_own(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_by_products", lambda dtype: dtype == torch.bfloat16)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 300, 16).bfloat16() for heads in (6, 2, 2))
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True

    def run(dtype: torch.dtype, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.to(dtype) for x in (query, key, value))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            return attention.attend(module, q, k, v, mask, scaling=0.3)[0].double()

    marked = mark_blocks(mask.clone(), dtype=torch.bfloat16)
    assert len(blocks_of(marked) or []) == 5
    exact, torchs = (run(dtype, mask) for dtype in (torch.float64, torch.bfloat16))
    assert (run(torch.bfloat16, marked) - exact).norm() < 1.6 * (torchs - exact).norm()


def test_what_products_do_not_compute_is_refused() -> None:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    query, key, value = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    row = torch.nn.Module(), query, key, value, mark_blocks(mask, 4)
    with pytest.raises(ValueError, match="does not support `softcap`"):
        attention.attend(*row, softcap=2.0)
    squares = attention.attend(*row)[0].pow(2).sum()
    (slope,) = torch.autograd.grad(squares, query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral"])
def test_windows_in_blocks(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_tree import tree_model

    monkeypatch.setattr(attention, "BLOCK_TOKENS", 32)
    model = tree_model(architecture, sliding_window=24)
    shared = [collator()([{"paragraphs": PARAGRAPHS}])]
    separate = [collator()([example]) for paragraph in PARAGRAPHS for example in paragraph]
    found = difference(model, shared, separate)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("queries", [1, 7, 40])
def test_heads_that_share_keys_as_one(key_heads: int, queries: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, queries, 6, 16).transpose(1, 2)
    key, value = torch.randn(2, 2, key_heads, 50, 16)
    mask = torch.rand(2, 1, queries, 50) < 0.5
    mask[..., 0] = True
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 6 // key_heads
    expected, _ = attention.sdpa_attention_forward(module, query, key, value, mask, scaling=0.2)
    mark_blocks(mask, 16)
    with torch.inference_mode():
        for _ in range(2):  # the second with the numbers that the first made
            found, _ = attention.attend(module, query, key, value, mask, scaling=0.2)
            torch.testing.assert_close(found, expected)


def test_a_mask_that_all_queries_share() -> None:
    """Which torch takes too; what comes back is contiguous, as from transformers' own."""
    torch.manual_seed(0)
    query, mask = torch.randn(2, 6, 5, 16), torch.arange(9).expand(2, 1, 1, 9) < 7
    key, value = torch.randn(2, 2, 2, 9, 16)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 3
    with torch.inference_mode():
        expected, _ = attention.sdpa_attention_forward(module, query, key, value, mask)
        whole = mask.expand(2, 1, 5, 9).contiguous()
        for each in (mask, whole):
            found, _ = attention.attend(module, query, key, value, each)
            torch.testing.assert_close(found, expected)
            assert found.is_contiguous()
