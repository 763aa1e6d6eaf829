"""Do ``Reader`` and the shell line answer as ``test_llama_squad.py`` does, letter for letter?

    python test_llama_squad.py --adapter_name=results/final_checkpoints --num_samples 200
    python benchmarks/check_reader.py results/final_checkpoints results/results.csv 200

Asks the first questions of a result file of span decoding again, both ways, and prints how many
answers are the same.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llama_squad import __main__ as shell  # noqa: E402
from llama_squad.answers import NO_ANSWER  # noqa: E402
from llama_squad.data import load_squad  # noqa: E402
from llama_squad.reader import Reader  # noqa: E402
from llama_squad.result_reader import iter_results  # noqa: E402

Answers = dict[str, str]
"""By question; ``NO_ANSWER`` for none."""


def evaluated(results: str, dataset_name: str, number: int) -> tuple[list[dict[str, Any]], Answers]:
    """Return the first questions of a result file with their contexts, and its answers."""
    dataset = load_squad(dataset_name)
    records = {row["id"]: row for split in dataset.values() for row in split}
    rows = [row for _, row in zip(range(number), iter_results(results), strict=False)]
    keys = ("id", "context", "question")
    asked = [{key: records[row["id"]][key] for key in keys} for row in rows]
    return asked, {row["id"]: row["prediction_text"] for row in rows}


def by_reader(adapter: str, asked: Sequence[dict[str, Any]]) -> Answers:
    """Ask a ``Reader``."""
    readings = Reader(adapter)([q["question"] for q in asked], [q["context"] for q in asked])
    return {q["id"]: _text(r.answer) for q, r in zip(asked, readings, strict=True)}


def by_shell(adapter: str, asked: Sequence[dict[str, Any]]) -> Answers:
    """Ask by the shell line, ``python -m llama_squad --input``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "questions.jsonl")
        path.write_text("".join(json.dumps(q) + "\n" for q in asked), encoding="utf-8")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            shell.main(["--adapter_name", adapter, "--input", str(path)])
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    return {line["id"]: _text(line["answer"]) for line in lines}


def _text(answer: str | None) -> str:
    return NO_ANSWER if answer is None else answer


def main(argv: Sequence[str]) -> None:
    """Compare, and fail where an answer differs."""
    if len(argv) not in (3, 4):
        sys.exit("usage: check_reader.py ADAPTER RESULTS NUMBER [DATASET]")
    adapter, results, number = argv[0], argv[1], int(argv[2])
    settings = json.loads(Path(f"{results}.config.json").read_text(encoding="utf-8"))
    dataset_name = argv[3] if len(argv) > 3 else settings["dataset_name"]
    asked, expected = evaluated(results, dataset_name, number)
    failed = False
    for name, found in (
        ("Reader", by_reader(adapter, asked)), ("shell", by_shell(adapter, asked)),
    ):  # fmt: skip
        same = sum(found[id_] == answer for id_, answer in expected.items())
        print(f"{name}: {same} of {len(expected)} answers are those of {results}")
        failed |= same != len(expected)
    sys.exit(int(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
