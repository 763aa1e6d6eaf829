"""An encoder with a span head (BERT, DeBERTa), as question-answering pipelines run it."""

import itertools
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_squad.answers import NO_ANSWER, format_answer
from llama_squad.calibration import sigmoid
from llama_squad.decoding.replies import Reply, Span
from llama_squad.predictors.base import Batch, Prediction
from llama_squad.prompts import Record


class ExtractiveModel:
    """An extractive encoder that was trained on SQuAD 2.0, such as deepset/deberta-v3-large-squad2.

    A span's score is the sum of the logits of its first and last token, that of "no answer" those
    of the first token of all; of a context in several windows the best span and the least certain
    abstention count, and a question is cut, as in the official BERT baseline (Devlin et al. 2019,
    section 4.3). These sums stand where chat models have log-probabilities.

    Args:
        model: with a question-answering head, on its device, in evaluation mode.
        tokenizer: a fast one.
        na_prob_thresh: abstain where sigmoid(no answer - best span) is above this.
        window, stride: tokens of a window, and of its overlap with the next; fewer where the model
            has fewer positions.
        longest: tokens of the longest answer.
        batch_size: windows at once.

    Raises:
        ValueError: the model reads too little at once, or from the right (XLNet).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        na_prob_thresh: float = 0.5,
        *,
        window: int = 384,
        stride: int = 128,
        longest: int = 30,
        batch_size: int = 32,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._threshold, self._longest, self._batch_size = na_prob_thresh, longest, batch_size
        # RoBERTa counts positions from 2.
        positions = getattr(model.config, "max_position_embeddings", None) or window + 2
        self._window = min(window, tokenizer.model_max_length, positions - 2)
        if self._window < 32 or tokenizer.padding_side != "right":
            raise ValueError(
                f"{model.config.model_type} is no encoder for this: it reads {self._window} tokens "
                f"at once (32 at least) and pads on the {tokenizer.padding_side} (right is needed)"
            )
        self._stride = min(stride, self._window // 3)

    @torch.inference_mode()
    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs at once, in order."""
        records = list(itertools.chain.from_iterable(batch))
        windows = self._tokenizer(
            [self._cut(record["question"].strip()) for record in records],
            [record["context"] for record in records],
            truncation="only_second", max_length=self._window, stride=self._stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        offsets = windows.pop("offset_mapping")
        owners = windows.pop("overflow_to_sample_mapping").tolist()
        starts, ends = self._logits(dict(windows))
        best: dict[int, Span] = {}
        nothing: dict[int, float] = {}
        for index, owner in enumerate(owners):
            none = float(starts[index, 0] + ends[index, 0])
            nothing[owner] = min(nothing.get(owner, none), none)
            context = records[owner]["context"]
            texts = [
                context[begin:end].strip() if part == 1 else ""
                for (begin, end), part in zip(
                    offsets[index].tolist(), windows.sequence_ids(index), strict=True
                )
            ]
            found = self._best_span(starts[index], ends[index], texts)
            if found and (owner not in best or found[2] > best[owner].score):
                begin, end = int(offsets[index, found[0], 0]), int(offsets[index, found[1], 1])
                text = context[begin:end]  # of which "▁" includes its space
                start = begin + len(text) - len(text.lstrip())
                best[owner] = Span(text.strip(), found[2], start)
        return [
            self._prediction(record, best.get(number), nothing[number])
            for number, record in enumerate(records)
        ]

    def _cut(self, question: str) -> str:
        """Return the first tokens of a question: 64, or a third of a short window."""
        length = min(64, self._window // 3)
        encoded = self._tokenizer(
            question, add_special_tokens=False, truncation=True, max_length=length,
            return_offsets_mapping=True,
        )  # fmt: skip
        return question[: max((end for _, end in encoded["offset_mapping"]), default=0)]

    def _logits(self, windows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of first and last tokens [windows, length], in float32 on the CPU."""
        starts, ends = [], []
        for begin in range(0, len(windows["input_ids"]), self._batch_size):
            part = slice(begin, begin + self._batch_size)
            inputs = {name: tensor[part].to(self._model.device) for name, tensor in windows.items()}
            output = self._model(**inputs)
            starts.append(output.start_logits.float().cpu())
            ends.append(output.end_logits.float().cpu())
        return torch.cat(starts), torch.cat(ends)

    def _best_span(
        self, starts: torch.Tensor, ends: torch.Tensor, texts: Sequence[str]
    ) -> tuple[int, int, float] | None:
        """Return the first and last token and the score of the best span of a window.

        ``texts``: those of the context's tokens, "" for all others. None: there is no span.
        """
        inside = torch.tensor([bool(text) for text in texts])
        allowed = torch.ones(len(texts), len(texts)).triu().tril(self._longest - 1).bool()
        allowed &= inside[:, None] & inside[None, :]
        allowed &= ~torch.diag(torch.tensor([text == NO_ANSWER for text in texts]))
        if not allowed.any():
            return None
        scores = (starts[:, None] + ends[None, :]).masked_fill(~allowed, -torch.inf)
        first, last = divmod(int(scores.argmax()), len(texts))
        return first, last, float(scores[first, last])

    def _prediction(self, record: Record, best: Span | None, nothing: float) -> Prediction:
        margin = nothing - best.score if best else math.inf
        na_prob = sigmoid(margin)
        if best is None or na_prob > self._threshold:
            text, score = NO_ANSWER, nothing
        else:
            text, score = best.text, best.score
        reply = Reply(
            format_answer(text), [], score, best, no_answer_score=nothing, na_prob=na_prob
        )
        return Prediction(record, record["question"], reply)
