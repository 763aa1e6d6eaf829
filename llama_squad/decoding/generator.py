"""Answer the questions of a paragraph: its context is run once, and one search decodes them all.

**One tree per paragraph.** The prompts of a paragraph's questions begin with the same tokens. They
are run once into a key/value cache; the questions branch off it, and so does every partial reply
that the search looks at. Each token attends to its own ancestors (a 4D mask) at its own depth
(position ids), so nothing is copied and nothing is run twice (``TokenTree``).

**One search** per question (``llama_squad.decoding.search``): beam search's answer, for the model
calls of a single reply where the model is sure.

- ``free``: any tokens; the sequences of ``model.generate(num_beams=N, length_penalty=0.0,
  do_sample=False)`` on each prompt alone.
- ``span``: a span of the context or no answer. The envelope is forced and costs no steps: the
  header is part of the prompt, the tail is one pass.

``llama_squad.decoding.constraints`` holds both.
"""

import contextlib
import dataclasses
import math
import operator
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import get_int_from_env
from transformers import PreTrainedModel

from llama_squad.answers import NO_ANSWER
from llama_squad.calibration import Abstention, Calibration
from llama_squad.decoding.batch import DecodingBatch, DecodingOptions
from llama_squad.decoding.boundaries import Boundaries
from llama_squad.decoding.cache import check_tree
from llama_squad.decoding.constraints import CONSTRAINTS, Constraint
from llama_squad.decoding.kept import Kept
from llama_squad.decoding.replies import Paragraph, Reply
from llama_squad.decoding.spans import reply_ids
from llama_squad.encoding import ChatEncoder
from llama_squad.tree import common_prefix, is_out_of_memory

SEARCHED_TOKENS = 16
"""About so many tokens per beam and question are in the tree at once, to estimate its memory."""

LEAST_QUESTIONS, MOST_QUESTIONS = 32, 512
"""Bounds of the default batch size."""

LEAST_ROOM = 2**30
"""Bytes that may be taken for good where the machine does not tell what is free."""

_LOCKS: "weakref.WeakKeyDictionary[PreTrainedModel, threading.Lock]" = weakref.WeakKeyDictionary()
"""Held while a model replies: its layers are others meanwhile, and know where its adapter acts."""


class Generator:
    """Decode the replies to the questions of paragraphs.

    Args:
        model: a causal language model with ``sdpa`` or ``eager`` attention, on any device.
        encoder: the tokenizer's, with the chat template.
        decoding: "span", "free" or another of ``CONSTRAINTS``, or a constraint; see the module.
        num_beams: partial replies of one length that the search takes at most.
        max_new_tokens: length limit of a reply (in span decoding of the span).
        na_prob_thresh: the reply abstains where na_prob is above it (span decoding).
        calibration: of na_prob.
        n_best: how many distinct spans to find (span decoding). The answer is the same for any.
        length_penalty: a complete reply of several beams counts log P / tokens ** this, as with
            ``generate`` (free decoding; 0: the likeliest reply).
        span_boundaries: "word": a span begins and ends at word boundaries and holds a letter or
            digit; "any": every substring is a span.
        stop_after_answer: a reply ends with the fence of its answer (free decoding). Of one beam
            it is the same reply up to there; of several the search compares shorter ones.
        kept: what another generator of the same model keeps.

    What is made of the model is kept: its weights, adapters and device must not change while a
    generator is used. An adapter may be switched off and on. While it replies in bfloat16 on a CPU,
    float32 products of other threads are rounded to bfloat16.

    Raises:
        ValueError: ``kept`` is of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: ChatEncoder,
        *,
        decoding: str | Constraint = "span",
        num_beams: int = 1,
        max_new_tokens: int = 256,
        na_prob_thresh: float = 0.5,
        calibration: Calibration | None = None,
        n_best: int = 1,
        length_penalty: float = 0.0,
        span_boundaries: Boundaries = "word",
        stop_after_answer: bool = False,
        kept: Kept | None = None,
    ) -> None:
        if kept and kept.model is not model:
            raise ValueError("what is kept is of another model")
        stops = stop_ids(model, encoder)
        if isinstance(decoding, str):
            abstention = Abstention(na_prob_thresh, calibration or Calibration())
            decoding = CONSTRAINTS[decoding](
                encoder, stops, span_boundaries=span_boundaries, abstention=abstention,
                stop_after_answer=stop_after_answer,
            )  # fmt: skip
        self.model, self.constraint = model, decoding
        self.options = DecodingOptions(
            model, decoding, num_beams, 1 if decoding.ranked else n_best, max_new_tokens,
            length_penalty, len(stops), kept or Kept(model),
        )  # fmt: skip
        self._too_much = math.inf  # the estimated bytes of what memory did not hold

    def reply(self, paragraphs: Sequence[Paragraph]) -> list[list[Reply]]:
        """Answer all questions of several paragraphs at once: a list of replies a paragraph.

        A batch that is not likely to fit into free memory is halved, and so is one that did not
        after all; later ones that need as much are, beforehand. Threads that share a model take
        turns.

        Raises:
            ValueError: this architecture cannot share contexts (see ``check_tree``).
        """
        kept = self.options.kept
        with _LOCKS.setdefault(self.model, threading.Lock()), kept.exact_head(self._room()):
            check_tree(self.model, paragraphs[0].prompts[0])
            with kept.layers.in_place(self._room()):
                return self._reply(paragraphs)

    def _room(self) -> float:
        """Return how many bytes may be taken for good: half of what is free, as far as is known."""
        free = free_memory(self.model)
        return free / 2 if math.isfinite(free) else LEAST_ROOM

    def _reply(self, paragraphs: Sequence[Paragraph]) -> list[list[Reply]]:
        halves = _halve(paragraphs)
        needed = self.memory_needed(paragraphs)
        if needed < min(self._too_much, free_memory(self.model)) or not halves:
            try:
                return DecodingBatch(self.options, paragraphs).replies()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                forgot = any(p.stem for p in paragraphs) and self.options.kept.forget_contexts()
                if not (halves or forgot):
                    error.add_note("One question alone does not fit: --quantize the model.")
                    raise
                self._too_much = self._too_much if forgot else min(self._too_much, needed)
            # Out of the handler, which kept the failed pass's tensors alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if forgot:
                return self._reply(paragraphs)
        replies = [row for half in halves for row in self._reply(half)]
        if len(paragraphs) == 1:  # the questions of one paragraph were split
            return [[reply for row in replies for reply in row]]
        return replies

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None where it does not say."""
        return self.options.positions

    def room(self, prompt: int) -> float:
        """Return how many tokens a reply (a span) may have after a prompt of so many tokens."""
        return self.options.room(prompt)

    def batch_size(self) -> int:
        """Return how many questions to answer at once: 32, on a GPU more as its memory allows.

        Reckoned for paragraphs of ten questions and 400 tokens, for half of what is free, and a
        power of two, so that the same card gives the same number.
        """
        if not torch.cuda.is_available():
            return LEAST_QUESTIONS
        paragraph = Paragraph("", [[0] * 400 + [question + 1] * 40 for question in range(10)])
        fit = 10 * 0.5 * free_memory(self.model) / self.memory_needed([paragraph])
        power = 2 ** int(math.log2(max(fit, LEAST_QUESTIONS)))
        return min(power, MOST_QUESTIONS)

    def memory_needed(self, paragraphs: Sequence[Paragraph]) -> float:
        """Estimate the bytes of a batch: keys and values, and a pass's tensors."""
        config = self.model.config.get_text_config()
        size = self.model.dtype.itemsize
        attention_heads = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // attention_heads
        stems = [common_prefix(p.prompts) for p in paragraphs]
        branches = [
            sum(len(ids) - stem + self.options.num_beams * SEARCHED_TOKENS for ids in p.prompts)
            for p, stem in zip(paragraphs, stems, strict=True)
        ]
        length = max(map(operator.add, stems, branches))  # positions of a row, and of its one pass
        cache = 2 * config.num_hidden_layers * heads * width * length * size
        activations = length * (8 * config.hidden_size * size + length * 4)
        questions = sum(len(p.prompts) for p in paragraphs)
        logits = 8 * questions * config.vocab_size * (size + 8)
        return len(paragraphs) * cache + activations + logits


CGROUP = Path("/sys/fs/cgroup")
"""Where a container of Linux finds its own limits."""


def free_memory(model: PreTrainedModel) -> float:
    """Return the bytes that a batch may take: on the model's GPU, else of the machine if it tells.

    A model that is spread over several may take what is free on the fullest; processes of one run
    share the machine's.
    """
    weights = model.parameters() if torch.cuda.is_available() else ()
    gpus = {weight.device for weight in weights if weight.is_cuda}
    if gpus:
        return 0.9 * min(
            torch.cuda.mem_get_info(gpu)[0]
            + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
            for gpu in gpus
        )  # fmt: skip
    return 0.9 * available_memory() / get_int_from_env(["LOCAL_WORLD_SIZE"], 1)


def available_memory() -> float:
    """Return the bytes of the machine, or of the container, that are free; infinity if unknown."""
    free = math.inf
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    for folder in _own_groups():
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limit, used = (
                int((folder / f"memory.{name}").read_text()) for name in ("max", "current")
            )
            words = map(str.split, (folder / "memory.stat").read_text().splitlines())
            # files that were read are counted as used, and make room when it is needed
            cached = sum(int(n) for name, n in words if name in ("active_file", "inactive_file"))
            free = min(free, limit - used + cached)
    return max(0, free)


def _own_groups() -> list[Path]:
    """Return the control groups (version 2) that this process is in, the innermost first."""
    own = Path()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::/"):
                own = Path(line.removeprefix("0::/"))
    return [CGROUP / part for part in (own, *own.parents)]


def stop_ids(model: PreTrainedModel, encoder: ChatEncoder) -> frozenset[int]:
    """Return the tokens that end a reply: the model's own, and the chat template's end of turn."""
    found: set[int] = set()
    for source in (model.generation_config, encoder.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    end_of_turn = reply_ids(encoder, NO_ANSWER)[-1]
    if end_of_turn in encoder.tokenizer.added_tokens_decoder:
        found.add(end_of_turn)
    return frozenset(found)


def _halve(paragraphs: Sequence[Paragraph]) -> list[list[Paragraph]]:
    """Part a batch, by paragraphs or, where there is one, by its questions; [] if it cannot be."""
    if len(paragraphs) > 1:
        middle = len(paragraphs) // 2
        return [list(paragraphs[:middle]), list(paragraphs[middle:])]
    (paragraph,) = paragraphs
    middle = len(paragraph.prompts) // 2
    return [
        [
            dataclasses.replace(
                paragraph,
                prompts=paragraph.prompts[part],
                adapter_from=paragraph.adapter_from[part],
                hidden=paragraph.hidden[part],
            )
        ]
        for part in (slice(middle), slice(middle, None))
        if middle
    ]
