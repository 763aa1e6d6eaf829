"""Check span decoding on all of SQuAD 2.0's dev set, under real tokenizers.

First: every gold answer must be a reply that the grammar of its context allows, in the very tokens
of training. Then: a tiny Llama with random weights, which knows nothing, answers every question by
span decoding; each reply must be valid JSON, its answer "?" or verbatim in the context. Exits with
1 where not.

    python benchmarks/check_spans.py                      # about 15 minutes on 2 cores
    python benchmarks/check_spans.py --limit 500          # the first 500 questions

``--data`` holds ``squad_v2/dev.json`` and the folders ``tokenizers/NAME`` (llama2, llama3,
qwen2_5_rebuilt).
"""

import argparse
import collections
import functools
import json
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from check_masks import BATCH, ROOT, SHARED, load_tokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT))
from llama_squad.answers import escape_answer, format_answer
from llama_squad.data import read_files
from llama_squad.decoding.spans import SpanGrammar, SpanVocabulary, span_vocabulary
from llama_squad.encoding import IGNORE, ChatEncoder
from llama_squad.predictors.base import batch_paragraphs, group_paragraphs
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import Record

CASES = [("llama2", "llama2"), ("llama3", "llama3"), ("qwen2_5_rebuilt", "qwen2_5")]


def golds_by_context(records: Sequence[Record]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Yield each context with its gold answers and the ids of their questions."""
    for group in group_paragraphs(records):
        golds: dict[str, list[str]] = collections.defaultdict(list)
        for record in group:
            for text in set(record["answers"]["text"]):
                golds[text].append(record["id"])
        yield group[0]["context"], golds


def encode_replies(encoder: ChatEncoder, texts: Sequence[str]) -> dict[str, list[int]]:
    """Return the supervised tokens of a reply that answers each text."""
    ids: dict[str, list[int]] = {}
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        conversations = [
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": format_answer(t)}]
            for t in part
        ]
        for text, example in zip(part, encoder.encode(conversations), strict=True):
            ids[text] = [label for label in example["labels"] if label != IGNORE]
    return ids


def can_spell(grammar: SpanGrammar, vocabulary: SpanVocabulary, text: str) -> bool:
    """Tell whether any tokens of the grammar spell ``text``, by depth-first search."""
    text = unicodedata.normalize(vocabulary.form, text) if vocabulary.form else text
    whole = vocabulary.lead_text + escape_answer(text).encode()
    pile = [(grammar.start, b"")]
    while pile:
        state, spelled = pile.pop()
        found = grammar.successors(state)
        for token_id, target in zip(found.ids or [], found.targets, strict=True):
            longer = spelled + vocabulary.to_bytes([token_id])
            if isinstance(target, int):
                if longer[: len(longer) - target] == whole:
                    return True
            elif whole.startswith(longer):
                pile.append((tuple(target), longer))
    return False


def check_golds(encoder: ChatEncoder, records: Sequence[Record]) -> tuple[str, int]:
    """Return what was found, and the number of questions with a gold answer out of reach."""
    vocabulary = span_vocabulary(encoder)
    size = len(vocabulary.header)
    contexts = list(golds_by_context(records))
    replies = encode_replies(encoder, sorted({text for _, golds in contexts for text in golds}))
    checked, otherwise = 0, list[str]()
    unreachable: dict[str, str] = {}
    for context, golds in contexts:
        grammar = SpanGrammar(vocabulary, context)
        for text, ids in golds.items():
            checked += 1
            if grammar.accepts(replies[text][size:]):
                continue
            if can_spell(grammar, vocabulary, text):
                otherwise.append(text)
            else:
                unreachable |= dict.fromkeys(ids, text)
    said = f"{checked:,} gold answers of {len(records):,} questions: "
    said += f"{checked - len(otherwise) - len(set(unreachable.values())):,} in training's tokens, "
    said += f"{len(otherwise)} in others, {len(unreachable)} questions with one out of reach"
    said += "".join(f"\n    in other tokens: {text!r}" for text in otherwise[:5])
    said += "".join(f"\n    out of reach: {id_} {text!r}" for id_, text in unreachable.items())
    return said, len(unreachable)


def random_llama(encoder: ChatEncoder) -> Any:
    """Return a tiny Llama with random weights."""
    torch.manual_seed(0)
    tokenizer = encoder.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def check_replies(
    encoder: ChatEncoder, records: Sequence[Record], args: argparse.Namespace
) -> tuple[str, int]:
    """Answer every question with random weights; return what was found, and the bad replies."""
    model = LocalModel(
        random_llama(encoder), encoder,
        decoding="span", num_beams=args.num_beams, span_boundaries="any",
    )  # fmt: skip
    counts: collections.Counter[str] = collections.Counter()
    batches = list(batch_paragraphs(records, args.batch_size))
    for batch in tqdm(batches, desc="replies"):
        for prediction in model.answer(batch):
            kind = judge(prediction.reply.completion, prediction.record["context"])
            counts[kind] += 1
    bad = counts["not JSON"] + counts["not in the context"]
    said = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    return f"{sum(counts.values()):,} replies: {said}", bad


def judge(completion: str, context: str) -> str:
    """Say what a reply is, by the strictest reading: the fenced JSON object, and nothing else."""
    fenced = completion.removeprefix("```json\n").removesuffix("\n```")
    try:
        (key, answer), *_ = json.loads(fenced).items()
    except (ValueError, AttributeError):
        return "not JSON"
    if key != "answer" or completion != format_answer(answer):
        return "not JSON"
    if answer == "?":
        return "abstentions"
    return "verbatim" if answer and answer in context else "not in the context"


def main() -> None:
    """Check all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="default: ../shared/data")
    parser.add_argument("--limit", type=int, help="questions to check (default: all)")
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    records: list[Any] = read_files([str(args.data / "squad_v2" / "dev.json")])[: args.limit]
    bad = 0
    for name, template in CASES:
        encoder = ChatEncoder(load_tokenizer(args.data, name, template))
        for check in (check_golds, functools.partial(check_replies, args=args)):
            started = time.perf_counter()
            said, found = check(encoder, records)
            print(f"{name}: {said} ({time.perf_counter() - started:.0f} s)", flush=True)
            bad += found
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
