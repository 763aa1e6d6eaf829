"""The check that a tuned model still talks: kinds of replies, their measures, base against tuned."""

import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

from llama_squad.answers import format_answer
from llama_squad.chat_check import (
    CHAT_PROMPTS,
    ChatReply,
    classify_reply,
    judge,
    read_prompts,
    render_chat,
    speak,
    summarize_chat,
)
from llama_squad.encoding import ChatEncoder


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        ("```\n```", "empty"),
        ("Paris.", "short"),
        ("The tides are caused by the pull of the moon.", "prose"),
        (format_answer("in 1912"), "json"),
        (format_answer("?"), "json"),
        ('{"answer": "cut off in the mid', "json"),
        ("I am a helpful model " * 8, "repetitive"),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert classify_reply(text)[0] == kind


def test_measures_of_a_reply() -> None:
    kind, words, repetition = classify_reply("a b c d e a b c d e")
    assert (kind, words) == ("prose", 10)
    assert repetition == pytest.approx(2 / 7)  # of 7 sequences of four words, 2 come again


def test_summary_and_comparison() -> None:
    prose = ChatReply("p", "It is so and not otherwise.", "prose", 6, 0.0, 2.0)
    lost = ChatReply("p", "", "empty", 0, 0.0, None)
    figures = summarize_chat([prose, prose, prose, lost])
    assert figures["prose"] == 75.0 and figures["empty"] == 25.0
    assert figures["words"] == 6 and figures["perplexity"] == 2.0
    assert figures["prose_interval"] == pytest.approx((30.06, 95.44), abs=0.01)
    table = render_chat([prose] * 4, [prose, prose, lost, lost])
    # differences 0, 0, -1, -1: mean -0.5, standard deviation 0.577 over the root of 4
    assert "-50.0 ± 28.9 points" in table
    assert "| tuned | 50.0 | 0.0 | 0.0 | 0.0 | 50.0 | 3 |" in table


def test_bundled_prompts_ask_for_more_than_a_word() -> None:
    prompts = read_prompts(CHAT_PROMPTS)
    assert len(set(prompts)) == 40


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the prompts in .*none\.txt"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt")


def test_greedy_replies_and_their_perplexity() -> None:
    """A batch gives the replies of the prompts alone, and perplexity is that of their tokens."""
    tokenizer, model = tiny_tokenizer(), tiny_model().eval()
    encoder = ChatEncoder(tokenizer)
    prompts = ["Who met Kalomir?", "Hello"]

    def chat(prompts: list[str]) -> list[ChatReply]:
        return judge(model, encoder, prompts, speak(model, encoder, prompts, max_new_tokens=6))

    together = chat(prompts)
    alone = [chat([prompt])[0] for prompt in prompts]
    assert [reply.text for reply in together] == [reply.text for reply in alone]

    ids = encoder.encode_prompts([[{"role": "user", "content": prompts[0]}]], final=False)[0]
    start, losses = len(ids), []
    with torch.no_grad():
        for _ in range(6):
            log_probs = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            token = int(log_probs.argmax())
            losses.append(-log_probs[token].item())
            ids = [*ids, token]
    assert together[0].text == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert together[0].perplexity == pytest.approx(math.exp(sum(losses) / 6), rel=1e-4)
