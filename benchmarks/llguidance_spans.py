"""Hold replies to spans by llguidance's grammars instead of ours: time, and gold answers admitted.

For each context of real SQuAD dev both are made anew (llguidance is given the substrings of the
context as one regular expression), and follow the tokens of training of the context's gold answers;
at each token both say what may follow. Times are the processor's. llguidance is not among the
requirements: install it first.

    pip install llguidance
    python benchmarks/llguidance_spans.py --data dev.json --model DIR --contexts 200
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import llguidance
import llguidance.hf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad import modeling
from llama_squad.answers import NO_ANSWER, escape_answer, format_answer
from llama_squad.arguments import ModelArguments
from llama_squad.decoding.spans import SpanGrammar, SpanVocabulary, reply_ids


def lark(context: str, lead: str) -> str:
    """Return the grammar of the replies that are spans of a context, after the header."""
    foot = format_answer("\0").rpartition(escape_answer("\0"))[2]
    chunks = json.dumps({"substring_chunks": [escape_answer(char) for char in context]})
    return (
        f"start: {json.dumps(lead)} ANS {json.dumps(foot)}\n"
        "ANS: SPAN\nSPAN: SUB & /[^ ](.*[^ ])?/s\n"
        f"SUB: %regex {chunks}\n"
    )


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="SQuAD's dev.json.")
    parser.add_argument("--model", required=True, help="Folder of a tokenizer.")
    parser.add_argument("--contexts", type=int, default=200)
    args = parser.parse_args()
    articles = json.loads(Path(args.data).read_text("utf-8"))["data"]
    paragraphs = [p for article in articles for p in article["paragraphs"]]
    paragraphs = paragraphs[:: max(1, len(paragraphs) // args.contexts)][: args.contexts]
    encoder = modeling.load_encoder(ModelArguments(model_name=args.model))
    vocabulary = SpanVocabulary(encoder)
    peer = llguidance.hf.from_tokenizer(encoder.tokenizer)
    lead = vocabulary.lead_text.decode()
    build: dict[str, list[float]] = {"ours": [], "llguidance": []}
    step: dict[str, list[float]] = {"ours": [], "llguidance": []}
    admitted = {"ours": 0, "llguidance": 0}
    golds = 0
    for paragraph in paragraphs:
        context = paragraph["context"]
        texts = {a["text"] for q in paragraph["qas"] for a in q["answers"]} - {NO_ANSWER}
        replies = [reply_ids(encoder, text)[len(vocabulary.header) :] for text in sorted(texts)]
        golds += len(replies)
        started = time.thread_time()
        grammar = SpanGrammar(vocabulary, context, "any")
        build["ours"].append(time.thread_time() - started)
        admitted["ours"] += sum(follow(grammar, ids, step["ours"]) for ids in replies)
        started = time.thread_time()
        matcher = llguidance.LLMatcher(peer, lark(context, lead))
        if matcher.is_error():
            sys.exit(matcher.get_error())
        matcher.compute_bitmask()  # lazy: the first mask is part of the making
        build["llguidance"].append(time.thread_time() - started)
        for ids in replies:
            admitted["llguidance"] += follow_peer(matcher.deep_copy(), ids, step["llguidance"])
    for name, made in build.items():
        steps = sorted(step[name])
        print(
            f"{name}: {1e3 * statistics.median(made):.2f} ms per context; per token "
            f"{1e6 * statistics.median(steps):.0f} µs (99 % within "
            f"{1e6 * steps[len(steps) * 99 // 100]:.0f}); {admitted[name]} of {golds} admitted"
        )


def follow(grammar: SpanGrammar, ids: list[int], times: list[float]) -> bool:
    """Follow a reply to the token that closes it, and note the time of each step."""
    state = grammar.start
    for token_id in ids:
        started = time.thread_time()
        found = grammar.successors(state)
        times.append(time.thread_time() - started)
        targets = dict(zip(found.ids or [], found.targets, strict=True))
        if token_id not in targets:
            return False
        if isinstance(targets[token_id], int):
            return True
        state = tuple(targets[token_id])
    return False


def follow_peer(matcher: llguidance.LLMatcher, ids: list[int], times: list[float]) -> bool:
    """Do the same with llguidance, up to the end of the footer."""
    for token_id in ids:
        if matcher.is_accepting():
            return True
        started = time.thread_time()
        mask = matcher.compute_bitmask()
        times.append(time.thread_time() - started)
        if not mask[token_id // 8] >> (token_id % 8) & 1 or not matcher.consume_token(token_id):
            return False
    return matcher.is_accepting()


if __name__ == "__main__":
    main()
