"""How much of the tuning a merge has kept, on questions of val (of train where there is none).

Three models score the same gold answers: the base, base and adapter, and the merged one as it lies
on disk. May use the trainer's loss; loads and writes nothing itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llama_squad.supervised import answer_logits
from llama_squad.tree import widen

MEASURED_QUESTIONS = 64
"""The same ones for all three models, so that few of them tell what was lost."""

TOLERATED_LOSS = 0.02
"""Share of the tuning's gain that a merge may lose before the run warns of it."""


@dataclass(frozen=True)
class Sample:
    """Questions to measure on.

    Args:
        batches: of ``SquadDataCollator``, on the CPU.
        questions: how many they hold.
    """

    batches: list[Mapping[str, torch.Tensor]]
    questions: int

    @classmethod
    def take(
        cls,
        features: Iterable[Mapping[str, Any]],
        collator: Any,
        questions: int = MEASURED_QUESTIONS,
    ) -> "Sample":
        """Take examples, or rows that share contexts, from the front of a dataset."""
        batches, taken = [], 0
        for feature in features:
            batches.append(collator([feature]))
            taken += sum(map(len, feature.get("paragraphs", [[feature]])))
            if taken >= questions:
                break
        return cls(batches, taken)


@dataclass(frozen=True)
class MergeError:
    """What base, base + adapter, and merged model make of the same questions.

    Losses are means over the supervised tokens. A shift is the mean absolute difference of the
    logits there, over the whole vocabulary, from those of base + adapter.
    """

    questions: int
    dtype: str
    base_loss: float
    adapter_loss: float
    merged_loss: float
    base_shift: float
    merged_shift: float

    @property
    def kept(self) -> float | None:
        """The share of the adapter's gain that the merged model has; None where there is none."""
        gain = self.base_loss - self.adapter_loss
        return (self.base_loss - self.merged_loss) / gain if gain > 0 else None

    def table(self) -> str:
        """Return the table of the log and of the model card, in Markdown."""
        kept = "the adapter gains nothing here" if self.kept is None else f"{self.kept:.2%} kept"
        return f"""\
| on {self.questions} questions | loss | mean absolute logit difference |
|---|--:|--:|
| base | {self.base_loss:.6f} | {self.base_shift:.6f} |
| base + adapter | {self.adapter_loss:.6f} | 0 |
| merged, in {self.dtype} ({kept}) | {self.merged_loss:.6f} | {self.merged_shift:.6f} |"""

    def warning(self) -> str:
        """Return what is to be said where too much was lost; "" where it was not."""
        if self.kept is None or self.kept >= 1 - TOLERATED_LOSS:
            return ""
        cure = "" if self.dtype == "float32" else ": --merged_dtype float32 keeps it"
        return f"Warning: the merge lost {1 - self.kept:.1%} of what the tuning gained{cure}."


class MergeMeter:
    """Measures the adapter on its base when made, and the merged model when that is there.

    Args:
        model: the ``PeftModel`` before it is merged.
        sample: the questions. The adapter's logits for them stay in memory, on the CPU.
    """

    def __init__(self, model: Any, sample: Sample) -> None:
        self._sample = sample
        self._logits: list[torch.Tensor] = []
        self._base_loss = self._adapter_loss = self._base_shift = 0.0
        model.eval()
        for batch in sample.batches:
            loss, logits = _score(model, batch)
            with model.disable_adapter():
                base_loss, base_logits = _score(model, batch)
            self._adapter_loss += loss
            self._base_loss += base_loss
            self._base_shift += (base_logits - logits).abs().sum().item()
            self._logits.append(logits)

    def measure(self, merged: Any, dtype: torch.dtype) -> MergeError:
        """Measure the merged model, whose weights were written in ``dtype``."""
        merged.eval()
        loss = shift = 0.0
        for batch, expected in zip(self._sample.batches, self._logits, strict=True):
            batch_loss, logits = _score(merged, batch)
            loss += batch_loss
            shift += (logits - expected).abs().sum().item()
        tokens = sum(map(len, self._logits))
        numbers = sum(logits.numel() for logits in self._logits)
        return MergeError(
            questions=self._sample.questions,
            dtype=str(dtype).removeprefix("torch."),
            base_loss=self._base_loss / tokens,
            adapter_loss=self._adapter_loss / tokens,
            merged_loss=loss / tokens,
            base_shift=self._base_shift / numbers,
            merged_shift=shift / numbers,
        )


@torch.no_grad()
def _score(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Return the summed loss of a batch, and its logits (supervised tokens, vocabulary)."""
    logits, wanted = answer_logits(model, {k: v.to(model.device) for k, v in batch.items()})
    logits = widen(logits)
    return F.cross_entropy(logits, wanted, reduction="sum").item(), logits.cpu()
