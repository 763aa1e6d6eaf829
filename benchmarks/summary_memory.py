"""How much memory a summary takes: the peak of summarize_results.py on files of many rows.

Writes result files as test_llama_squad.py does, runs the stage on each in a process of its own, and
prints one JSON object a file: rows, size, seconds, and the peak of its resident memory.

    nice python benchmarks/summary_memory.py --rows 200000 1000000
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad.answers import Answer, format_answer
from llama_squad.results import ResultsFile
from llama_squad.rows import Row, make_row

STAGE = Path(__file__).resolve().parent.parent / "summarize_results.py"
AT_ONCE = 10_000


def make(number: int, rng: random.Random, prompt: str) -> Row:
    """Make a row as one of dev: half without an answer, else three gold answers."""
    span = f"in the year {number}"
    golds = [span, f"the year {number}", str(number)] if number % 2 else []
    na_prob = rng.random()
    answer = Answer("no_answer", "?") if na_prob > 0.5 else Answer("answer", span)
    record = {
        "id": f"{number:024x}",
        "title": "Title",
        "question": f"When was {number} first seen by anybody who wrote it down?",
        "answers": {"text": golds},
    }
    return make_row(
        record, format_answer(answer.text), answer, prompt, na_prob, score=-1.5, best_span=span,
        best_span_log_prob=-1.5, no_answer_log_prob=-1.25,
    )  # fmt: skip


def write(path: Path, rows: int, prompt_chars: int) -> None:
    """Write a result file."""
    rng, prompt = random.Random(0), "x " * (prompt_chars // 2)
    with ResultsFile(path, {}) as file:
        for start in range(0, rows, AT_ONCE):
            numbers = range(start, min(rows, start + AT_ONCE))
            file.append([make(number, rng, prompt) for number in numbers])


def measure(path: Path) -> dict[str, float]:
    """Summarise a file; return the seconds and the peak of the resident memory."""
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(done.returncode)"
    )  # a process between, as the peak of all children before would stay
    begin = time.monotonic()
    command = [sys.executable, "-c", script, sys.executable, str(STAGE), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "peak_mb": round(int(done.stdout) * unit / 1e6, 1),
    }


def main() -> None:
    """Measure each number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 200_000, 1_000_000])
    parser.add_argument("--prompt_chars", type=int, default=1_500)
    args = parser.parse_args()
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "results.csv")
            write(path, rows, args.prompt_chars)
            size = round(path.stat().st_size / 1e6, 1)
            print(json.dumps({"rows": rows, "file_mb": size, **measure(path)}), flush=True)


if __name__ == "__main__":
    main()
