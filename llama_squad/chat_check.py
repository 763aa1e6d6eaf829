"""Does a tuned model still talk? Plain prompts are answered freely, by the base and by the tuned.

Benchmarks of lm-evaluation-harness score texts that are given to the model; a model that has lost
its speech to JSON can do as well on them as its base. So here both models speak, greedily, and the
replies are told apart by kind. Reads prompts (``chat_prompts.txt``, one per line); needs only a
model and its encoder, so that an adapter can be switched on and off on weights loaded once.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from llama_squad.answers import extract_answer
from llama_squad.encoding import ChatEncoder
from llama_squad.intervals import standard_error, wilson_interval

CHAT_PROMPTS = Path(__file__).with_name("chat_prompts.txt")

Kind = Literal["prose", "short", "repetitive", "json", "empty"]

PROSE_WORDS = 5
"""A reply in prose has at least so many words."""

LOOP_SHARE = 0.5
"""A reply loops where this share of its four-word sequences has stood in it before."""


@dataclass(frozen=True)
class ChatReply:
    """One reply, and what is measured of it.

    Attributes:
        kind: "empty" has no word, "json" is an answer of the task or opens like one, "repetitive"
            loops, "short" has fewer than ``PROSE_WORDS`` words; all others are "prose".
        repetition: share of its four-word sequences that occurred in it before, in [0, 1].
        perplexity: of its tokens under the base model, given the prompt; None without a token.
    """

    prompt: str
    text: str
    kind: Kind
    words: int
    repetition: float
    perplexity: float | None


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one per line.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one per line")
    return prompts


def classify_reply(text: str) -> tuple[Kind, int, float]:
    """Return a reply's kind, its number of words and its repetition (see ``ChatReply``)."""
    words = [word for word in text.split() if any(map(str.isalnum, word))]
    repetition = _repetition(words)
    if text.lstrip().startswith(("{", "```json")) or extract_answer(text).state != "malformed":
        return "json", len(words), repetition
    if not words:
        return "empty", 0, 0.0
    if repetition > LOOP_SHARE:
        return "repetitive", len(words), repetition
    return ("prose" if len(words) >= PROSE_WORDS else "short"), len(words), repetition


def _repetition(words: Sequence[str]) -> float:
    grams = Counter(zip(*(words[shift:] for shift in range(4)), strict=False))
    return 1 - len(grams) / grams.total() if grams else 0.0


def speak(
    model: Any,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[int]]:
    """Let a model answer prompts greedily; return the ids of its replies, one per prompt.

    Apart from ``judge``, so that a tuned model and its base need not be in memory together.

    Args:
        model: a causal language model, or a PEFT model; in evaluation mode.
        encoder: the tokenizer's, with the chat template.
        prompts: what the user says, each in a conversation of its own.
        max_new_tokens: length limit of a reply.
        batch_size: prompts at once.
        progress: told the number of prompts that are new since the last call.
    """
    encoded = _encode(encoder, prompts)
    spoken: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        batch = encoded[start : start + batch_size]
        spoken += answer_greedily(model, encoder, batch, max_new_tokens)
        progress(len(batch))
    return spoken


def judge(
    base: Any,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    spoken: Sequence[Sequence[int]],
) -> list[ChatReply]:
    """Judge what ``speak`` returned, with the perplexity under ``base``."""
    replies = []
    for prompt, ids, reply in zip(prompts, _encode(encoder, prompts), spoken, strict=True):
        text = str(encoder.tokenizer.decode(list(reply), skip_special_tokens=True))
        replies.append(
            ChatReply(prompt, text, *classify_reply(text), _perplexity(base, ids, reply))
        )
    return replies


def _encode(encoder: ChatEncoder, prompts: Sequence[str]) -> list[list[int]]:
    return encoder.encode_prompts(
        [[{"role": "user", "content": prompt}] for prompt in prompts], final=False
    )


@torch.inference_mode()
def answer_greedily(
    model: Any, encoder: ChatEncoder, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return each prompt's greedy reply, without the padding and the token that ends the turn.

    The prompts are token ids, and answered all at once.
    """
    # imported here: the module loads without the search and its grammar
    from llama_squad.decoding.generator import stop_ids

    stops = stop_ids(model, encoder)
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, as `generate` wants it
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(stops),
        pad_token_id=encoder.tokenizer.pad_token_id,
    )
    return [
        list(itertools.takewhile(lambda token: token not in stops, row))
        for row in output[:, width:].tolist()
    ]


@torch.inference_mode()
def _perplexity(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> float | None:
    if not reply:
        return None
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(reply) + 1, use_cache=False).logits
    return math.exp(F.cross_entropy(logits[0, :-1].float(), ids[0, len(prompt) :]).item())


def summarize_chat(replies: Sequence[ChatReply]) -> dict[str, Any]:
    """Return the figures of some replies: shares of the kinds in %, medians of the measures.

    ``prose_interval`` is the 95 % interval (Wilson's) of the share of prose. Repetition is that of
    the replies that have a word, perplexity that of those that have a token.
    """
    count = len(replies)
    kinds = Counter(reply.kind for reply in replies)
    spoken = [reply for reply in replies if reply.words]
    perplexities = [r.perplexity for r in replies if r.perplexity is not None]
    return {
        "prompts": count,
        "prose": 100 * kinds["prose"] / count,
        "prose_interval": wilson_interval(kinds["prose"], count),
        **{kind: 100 * kinds[kind] / count for kind in ("short", "repetitive", "json", "empty")},
        "words": statistics.median(reply.words for reply in replies),
        "repetition": statistics.fmean(r.repetition for r in spoken) if spoken else None,
        "perplexity": statistics.median(perplexities) if perplexities else None,
    }


def render_chat(base: Sequence[ChatReply], tuned: Sequence[ChatReply]) -> str:
    """Write base and tuned side by side, as a markdown table.

    Both answered the same prompts, so the standard error of the share of prose is the paired one.
    """
    metrics = {"base": summarize_chat(base), "tuned": summarize_chat(tuned)}
    lines = [
        "| plain prompts | % prose | % short | % repetitive | % JSON | % empty "
        "| words | repetition | perplexity |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in metrics.items():
        shares = [
            f"{found[kind]:.1f}" for kind in ("prose", "short", "repetitive", "json", "empty")
        ]
        measures = [
            "–" if found[key] is None else f"{found[key]:{form}}"
            for key, form in (("words", ".0f"), ("repetition", ".2f"), ("perplexity", ",.2f"))
        ]
        lines.append(f"| {name} | " + " | ".join([*shares, *measures]) + " |")
    differences = [
        (after.kind == "prose") - (before.kind == "prose")
        for before, after in zip(base, tuned, strict=True)
    ]
    mean = statistics.fmean(differences)
    error = standard_error(differences) if len(base) > 1 else 0.0
    lines.append(
        f"\nProse, tuned against base: {100 * mean:+.1f} ± {100 * error:.1f} points (paired "
        f"standard error, {len(base)} prompts). Words and perplexity (under the base) are medians."
    )
    return "\n".join(lines) + "\n"
