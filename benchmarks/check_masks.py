"""Check the mask of every training question under many tokenizers and chat templates.

For each question of the real SQuAD 2.0 training set, the supervised tokens must decode exactly to
the JSON answer and the end of the turn, the prompt's tokens must be those that precede them, and
no control token may come from the question or the context. Exits with 1 where one does not hold.

    python benchmarks/check_masks.py                      # all of them, about 20 minutes on 2 cores
    python benchmarks/check_masks.py --limit 2000         # the first 2,000 questions

``--data`` holds ``squad_v2/train-*.json`` and the folders ``tokenizers/NAME`` (llama2, llama3,
qwen2_5_rebuilt, smollm2_360m).
"""

import argparse
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from multiprocessing import Pool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHARED = ROOT.parent / "shared" / "data"
# tokenizer, template, what stands between the answer and the end of turn, and that end
CASES = [
    ("llama2", "llama2", " </s>"),
    ("llama3", "llama3", "<|eot_id|>"),
    ("llama3", "llama3_1", "<|eot_id|>"),
    ("qwen2_5_rebuilt", "qwen2_5", "<|im_end|>"),
    ("qwen2_5_rebuilt", "qwen3", "<|im_end|>"),
    ("smollm2_360m", "qwen2_5", "<|im_end|>"),
    ("llama2", "mistral", "</s>"),
]
BATCH = 500


def load_tokenizer(data: Path, name: str, template: str) -> Any:
    """Load the tokenizer of that name in the ``data`` folder, with a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(data / "tokenizers" / name))
    tokenizer.chat_template = chat_template(template)
    return tokenizer


def chat_template(name: str) -> str:
    """Read a template of this repository or of TRL."""
    folder = find_spec("trl").submodule_search_locations[0]  # type: ignore[union-attr, index]
    own = ROOT / "configs" / "chat_templates" / f"{name}.jinja"
    trls = Path(folder) / "chat_templates" / f"{name}.jinja"
    return (own if own.is_file() else trls).read_text(encoding="utf-8")


def batches(records: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Cut the records into batches."""
    return (records[start : start + BATCH] for start in range(0, len(records), BATCH))


def faults(
    encoder: Any, records: Sequence[Mapping[str, Any]], prompt: str, end: str
) -> Iterator[str]:
    """Yield what is wrong with the masks of some records."""
    from llama_squad.answers import format_answer
    from llama_squad.encoding import IGNORE
    from llama_squad.prompts import build_messages, gold_answer

    tokenizer = encoder.tokenizer
    conversations = [build_messages(record, prompt) for record in records]
    prompts = encoder.encode_prompts([messages[:-1] for messages in conversations])
    controls = None
    for record, example, prompt_ids in zip(
        records, encoder.encode(conversations), prompts, strict=True
    ):
        ids, labels = example["input_ids"], example["labels"]
        supervised = [i for i, label in enumerate(labels) if label != IGNORE]
        first, last = supervised[0], supervised[-1]
        expected = format_answer(gold_answer(record)) + end
        decoded = tokenizer.decode([labels[i] for i in supervised]).lstrip(" ")
        if normal(decoded) != normal(expected) or supervised != list(range(first, last + 1)):
            yield f"{record['id']}: supervised {decoded!r}, expected {expected!r}"
        if labels[first : last + 1] != ids[first : last + 1] or ids[:first] != prompt_ids:
            yield f"{record['id']}: the prompt's tokens are not those of generation"
        count = sum(token_id in encoder._control for token_id in ids)
        controls = count if controls is None else controls
        if count != controls:
            yield f"{record['id']}: {count} control tokens instead of {controls}"


def normal(text: str) -> str:
    """Return the text as Qwen's tokenizer has it: it normalises to NFC."""
    return unicodedata.normalize("NFC", text)


def check(job: tuple[str, str, str, str, int | None, Path]) -> tuple[str, int, list[str], float]:
    """Check one tokenizer with one template and one prompt style."""
    from llama_squad.data import read_files
    from llama_squad.encoding import ChatEncoder

    name, template, end, prompt, limit, data = job
    started = time.perf_counter()
    records = read_files([str(data / "squad_v2" / "train-*.json")])[:limit]
    encoder = ChatEncoder(load_tokenizer(data, name, template))
    found = [fault for batch in batches(records) for fault in faults(encoder, batch, prompt, end)]
    label = f"{name} + {template}, {prompt}"
    return label, len(records), found, time.perf_counter() - started


def main() -> None:
    """Check all cases, one process per core."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="default: ../shared/data")
    parser.add_argument("--limit", type=int, help="questions to check (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cases = [(*case, "single_turn") for case in CASES]
    cases += [(*case, "multi_turn") for case in CASES[:2]]
    jobs = [(*case, args.limit, args.data) for case in cases]
    bad = 0
    with Pool(args.processes) as pool:
        for label, count, found, seconds in pool.imap(check, jobs):
            print(f"{label:45} {count:>8,} questions {len(found):>6} exceptions {seconds:6.0f} s")
            for fault in found[:5]:
                print("   ", fault)
            bad += len(found)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
