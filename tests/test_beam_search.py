"""The length penalty, as ``generate`` has it; how many beams there are unless told."""

from typing import Any, Never

import pytest
import torch
from helpers import make_records, tiny_model, tiny_tokenizer

from llama_squad.arguments import EvalArguments, resolve_decoding
from llama_squad.decoding.generator import Generator
from llama_squad.decoding.replies import Paragraph
from llama_squad.encoding import ChatEncoder
from llama_squad.prompts import build_messages


def ask(generator: Any, encoder: ChatEncoder) -> Any:
    messages = [build_messages(record, answer=False) for record in make_records(1, [3])]
    prompts = encoder.encode_prompts(messages)
    return prompts, generator.reply([Paragraph("", prompts)])[0]


@pytest.mark.parametrize("num_beams", [1, 3, 10])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_length_penalty_equals_generate(num_beams: int, length_penalty: float) -> None:
    encoder = ChatEncoder(tiny_tokenizer())
    model = tiny_model(initializer_range=0.4)
    liked = model.lm_head.weight.norm(dim=1).topk(12).indices.tolist()  # replies end at all lengths
    stops = [*liked, encoder.tokenizer.eos_token_id]
    model.generation_config.eos_token_id = stops
    generator = Generator(
        model, encoder, decoding="free", num_beams=num_beams, length_penalty=length_penalty,
        max_new_tokens=10,
    )  # fmt: skip
    ended = []
    for prompt, reply in zip(*ask(generator, encoder), strict=True):
        more = {"length_penalty": length_penalty} if num_beams > 1 else {}
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=num_beams, do_sample=False, max_new_tokens=10, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True, **more,
        )  # fmt: skip
        ids = output.sequences[0, len(prompt) :].tolist()
        end = [index for index, token in enumerate(ids) if token in stops]
        ids = ids[: end[0] + 1] if end else ids
        assert reply.token_ids == ids
        ended.append(len(ids))
        if num_beams > 1:
            score = reply.score / len(ids) ** length_penalty
            assert score == pytest.approx(output.sequences_scores.item(), abs=1e-4)
    assert min(ended) < 10 or length_penalty == 2


def test_a_penalty_finds_other_replies() -> None:
    encoder = ChatEncoder(tiny_tokenizer())
    model = tiny_model(initializer_range=0.4)
    model.generation_config.eos_token_id = (
        model.lm_head.weight.norm(dim=1).topk(12).indices.tolist()
    )
    lengths = []
    for penalty in (0.0, 2.0):
        generator = Generator(
            model, encoder, decoding="free", num_beams=10, length_penalty=penalty,
            max_new_tokens=10,
        )  # fmt: skip
        lengths.append(sum(len(reply.token_ids) for reply in ask(generator, encoder)[1]))
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize(
    ("given", "num_beams"),
    [
        ({}, 4),
        ({"decoding": "free"}, 1),
        ({"num_beams": 1}, 1),
        ({"decoding": "free", "num_beams": 10}, 10),
        ({"predictor": "encoder"}, 1),
    ],
)
def test_beams_unless_told(given: Any, num_beams: int) -> None:
    assert resolve_decoding(EvalArguments(**given)).num_beams == num_beams


def test_no_figure_is_fetched_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each ``item`` waits for all that was asked of it."""

    def refuse(tensor: Any) -> Never:
        raise AssertionError("item()")

    encoder = ChatEncoder(tiny_tokenizer())
    generator = Generator(tiny_model(), encoder, num_beams=3)
    ask(generator, encoder)  # which checks the tree, once
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    context = make_records(1, [3])[0]["context"]
    prompts = encoder.encode_prompts(
        [build_messages(record, answer=False) for record in make_records(1, [3])]
    )
    assert all(reply.best for reply in generator.reply([Paragraph(context, prompts)])[0])
