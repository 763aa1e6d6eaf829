"""What is run together: the same passes for a paragraph, whatever stands beside it."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import make_records, tiny_model, tiny_tokenizer

from llama_squad import evaluation, generation
from llama_squad.collator import ConversationEncoder
from llama_squad.config import TestArguments
from llama_squad.generation import Generator, Reply, Span, exact_head
from llama_squad.predictors import LocalModel, Prediction, batch_paragraphs
from llama_squad.results import config_path


@pytest.mark.parametrize("size", [1, 4, 32])
def test_the_batch_size_parts_no_paragraph(size):
    records = make_records(5, [3, 1, 7])
    parts = [
        [record["id"] for record in group]
        for batch in batch_paragraphs(records, size)
        for group in batch
    ]
    assert [len(part) for part in parts] == [3, 1, 7, 3, 1]
    assert [*itertools.chain(*parts)] == [record["id"] for record in records]
    assert max(sum(map(len, batch)) for batch in batch_paragraphs(records, size)) <= max(size, 7)


def test_a_very_long_paragraph_is_parted_in_one_way():
    records = make_records(1, [150])
    for size in (1, 64, 500):
        batches = list(batch_paragraphs(records, size))
        assert [len(group) for batch in batches for group in batch] == [64, 64, 22]


def test_prompts_are_run_in_the_same_shapes_alone_and_beside_others(monkeypatch):
    records = make_records(3, [3, 5, 2])
    model = tiny_model(dtype=torch.bfloat16)
    local = LocalModel(model, ConversationEncoder(tiny_tokenizer()))
    shapes = []
    forward = type(model).forward

    def watched(self, **kwargs):
        if kwargs["past_key_values"].get_seq_length() == 0:
            shapes.append((kwargs["input_ids"].shape, kwargs["attention_mask"].shape))
        return forward(self, **kwargs)

    local.answer(next(batch_paragraphs(records[:1], 1)))  # which checks the tree, once
    monkeypatch.setattr(type(model), "forward", watched)
    alone = [p for batch in batch_paragraphs(records, 1) for p in local.answer(batch)]
    one_by_one = list(shapes)
    shapes.clear()
    (batch,) = batch_paragraphs(records, 32)
    together = local.answer(batch)
    assert len(one_by_one) == 3
    assert shapes == one_by_one
    for a, b in zip(alone, together, strict=True):
        assert a.reply.no_answer_log_prob == b.reply.no_answer_log_prob


def test_logits_of_16_bit_weights_are_float32():
    model = tiny_model(dtype=torch.bfloat16)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state
        with exact_head(model):
            logits = model(ids).logits
        assert model(ids).logits.dtype == torch.bfloat16  # and the head is as it was
    expected = F.linear(hidden.float(), model.lm_head.weight.float())
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_default_batch_grows_with_a_gpus_memory(monkeypatch):
    encoder = ConversationEncoder(tiny_tokenizer())
    generator = Generator(tiny_model(), encoder)
    assert generator.batch_size() == 32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    needed = generator._memory_needed(
        [generation.Paragraph("", [[0] * 400 + [i + 1] * 40 for i in range(10)])]
    )
    sizes = []
    for times in (1, 13, 26, 60, 1000):
        monkeypatch.setattr(generation, "free_memory", lambda times=times: times * needed)
        sizes.append(generator.batch_size())
    assert sizes == [32, 64, 128, 256, 512]


def audit_of(pairs, monkeypatch):
    """Audit made-up replies: (ours, the best one's), each of text and log-probability."""
    records = [{"id": str(i), "context": f"c{i}", "question": "?"} for i in range(len(pairs))]

    class Fixed:
        def __init__(self, side):
            self.side = side

        def answer(self, batch):
            found = []
            for group in batch:
                for record in group:
                    text, score = pairs[int(record["id"])][self.side]
                    ids = [ord(char) for char in text]
                    reply = Reply(text, ids, score, Span(text, score), certain=True)
                    found.append(Prediction(record, "", reply))
            return found

    args = dataclasses.replace(TestArguments(), audit=len(pairs), batch_size=4)
    return evaluation.audit(Fixed(0), Fixed(1), records, args)


def test_audit_compares_against_the_noise(monkeypatch):
    same = [(("a", -1.0), ("a", -1.02)), (("b", -2.0), ("b", -2.0))]
    near, far = (("c", -1.0), ("d", -0.99)), (("e", -1.0), ("f", -0.9))
    found = audit_of([*same, near, far], monkeypatch)
    assert (found.questions, found.best) == (4, 3)
    assert found.noise == pytest.approx(0.02)
    assert "0.02" in str(found)
    exact = audit_of([(("a", -1.0), ("a", -1.0)), near], monkeypatch)
    assert (exact.best, exact.noise) == (1, 1e-4)
    assert "differ" not in str(exact)


def test_a_file_of_several_batch_sizes_says_so_in_16_bits(tmp_path, capsys):
    output = tmp_path / "results.csv"
    config_path(output).write_text('{"batch_size": 8}')
    for dtype, size, said in (
        ("float32", 32, False), ("bfloat16", 8, False), ("bfloat16", 32, True)
    ):  # fmt: skip
        evaluation._say_if_mixed(output, {"dtype": dtype, "batch_size": size}, False)
        assert ("--batch_size 8" in capsys.readouterr().err) is said
