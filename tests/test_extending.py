"""What CONTRIBUTING.md says can be added in one place is added in one place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    collator,
    difference,
    encode_paragraphs,
    flatten,
    make_records,
    tiny_model,
    tiny_tokenizer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_squad import metrics, prompts, tree
from llama_squad.arguments import CreateArguments
from llama_squad.config import parse_stage
from llama_squad.decoding.cache import check_tree
from llama_squad.decoding.constraints import FreeSpeech
from llama_squad.decoding.generator import Generator
from llama_squad.decoding.replies import Paragraph, Reply
from llama_squad.decoding.search import Closing, Hypothesis, State, Successors
from llama_squad.encoding import ChatEncoder
from llama_squad.evaluation import evaluate
from llama_squad.predictors.base import Batch, Prediction
from llama_squad.report import render_summaries
from llama_squad.result_reader import read_results
from llama_squad.summary import summarize
from llama_squad.tree_check import RowProbe, why_not_shared

RECORDS = make_records(3, [2], seed=7)


def test_a_prompt_style(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        prompts.PROMPTS, "terse", lambda record: [f"{record['context']} {record['question']}"]
    )
    messages = prompts.build_messages(RECORDS[0], prompt="terse", system_prompt="")
    assert messages[0]["content"] == f"{RECORDS[0]['context']} {RECORDS[0]['question']}"
    assert messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("name", prompts.PROMPTS)
def test_the_flags_take_every_prompt_style(name: str, tmp_path: Path) -> None:
    (args,) = parse_stage("create", [CreateArguments], ["--prompt", name])
    assert args.prompt == name


class FirstWord:
    """A predictor: every answer is the first word of the context."""

    def answer(self, batch: Batch) -> list[Prediction]:
        return [
            Prediction(r, "", Reply(f'{{"answer": "{r["context"].split()[0]}"}}', [], None))
            for group in batch
            for r in group
        ]


def test_a_predictor_and_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.csv"
    evaluate(FirstWord(), RECORDS, path, {"predictor": "first word"})
    monkeypatch.setitem(metrics.STRICT_COLUMNS, "% Wrong", (lambda o: not o.right, lambda o: True))
    summary = summarize(read_results(path))
    assert summary["% Wrong"] == pytest.approx(100 - summary["% Exact Match"])
    assert "Wrong" in render_summaries({"first word": summary}, "table")


def test_an_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that transformers is told of, and the form in which it takes a mask: here its opposite."""

    def attend(module: Any, query: Any, key: Any, value: Any, hidden: Any, **kwargs: Any) -> Any:
        seen = None if hidden is None else ~hidden
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, seen, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "mine", attend)
    model, paragraphs = tiny_model(attn_implementation="mine"), encode_paragraphs(RECORDS)
    probe = RowProbe(model, collator(), paragraphs)
    assert "mine attention cannot hold a tree" in why_not_shared(model, probe)
    monkeypatch.setitem(tree.MASK_FORMS, "mine", lambda model, visible: ~visible)
    assert why_not_shared(model, probe) == ""
    check_tree(model, paragraphs[0][0]["input_ids"][:120])
    separate = [collator()([example]) for example in flatten(paragraphs)]
    found = difference(model, [collator()([{"paragraphs": paragraphs}])], separate)
    assert max(found.values()) < 1e-5, found


class YesOrNo:
    """A constraint: the reply is one of two words, and which is likelier."""

    header: Sequence[int] = ()
    alternative: Sequence[int] = ()
    opening: Sequence[int] = ()
    reserve = 0
    ranked = truncates = windowed = False
    start: State = ()

    def __init__(self, encoder: ChatEncoder) -> None:
        words = [encoder.tokenizer(text, add_special_tokens=False).input_ids
                 for text in ("yes", "no")]  # fmt: skip
        self.words = [tuple(ids) for ids in words]

    def width(self, num_beams: int) -> int:
        return 2 * num_beams

    def grammar(self, context: str) -> "YesOrNo":
        return self

    def successors(self, state: State) -> Successors:
        following = {ids[len(state)] for ids in self.words if ids[: len(state)] == state}
        return Successors(sorted(following), sorted(following))

    def step(self, ids: Sequence[int], target: Any) -> State | Closing | None:
        done = tuple(ids)
        return Closing((), str(self.words.index(done))) if done in self.words else done

    def read(self, found: Sequence[Hypothesis], alternative: float, pruned: float) -> Reply:
        best = found[0]
        return Reply(("yes", "no")[int(best.text)], list(best.ids), best.log_prob)


def test_a_constraint() -> None:
    """It finds the likelier of the two, as scoring both does."""
    encoder, model = ChatEncoder(tiny_tokenizer()), tiny_model()
    asked = [prompts.build_messages(r, answer=False) for r in RECORDS[:2]]
    paragraph = Paragraph(RECORDS[0]["context"], encoder.encode_prompts(asked))
    rules = YesOrNo(encoder)
    replies = Generator(model, encoder, decoding=rules, num_beams=4).reply([paragraph])[0]
    for prompt, reply in zip(paragraph.prompts, replies, strict=True):
        scores = [score(model, prompt, word) for word in rules.words]
        assert reply.score == pytest.approx(max(scores), abs=1e-4)
        assert reply.completion == ("yes", "no")[scores.index(max(scores))]
    free = FreeSpeech(encoder.tokenizer, frozenset())
    assert free.step([1], None) == free.start


def score(model: Any, prompt: Sequence[int], word: Sequence[int]) -> float:
    """Return the log-probability of a word's tokens after a prompt, by a plain pass."""
    import torch

    ids = torch.tensor([[*prompt, *word]])
    with torch.no_grad():
        log_probs = model(ids).logits[0].float().log_softmax(-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(float(log_probs[i, ids[0, i + 1]]) for i in places)
