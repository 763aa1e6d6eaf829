"""Put one fault at a time into a copy of the tree, and see whether the tests notice.

    python tests/seed_faults.py            # all faults, a few minutes
    python tests/seed_faults.py search     # those whose name holds "search"

The copy has no ``../shared`` beside it: what is caught here is caught in any clone. Ends with 1
where a fault was missed, with 2 where the text to replace is not there (the code has moved: aim the
entry anew), where its tests fail without it, or where they do not run with it.
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("llama_squad", "tests", "benchmarks", "configs", "quickstart")
"""Beside the files in the root: what the tests below read."""
LIMIT = 600
"""Seconds for the tests of one fault; a fault that hangs them is reported as such."""


@dataclass(frozen=True)
class Fault:
    """A text that stands once in a file, what to put in its place, and who should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # what pytest takes: files and -k, parted by spaces


COLLATOR = "tests/test_collator.py"
DECODING = "tests/test_generation.py"
FEEDBACK = "tests/test_feedback.py"
METRICS = "tests/test_metrics.py"
RESULTS = "tests/test_results.py"

FAULTS = [
    Fault(
        "feedback: a half-written line is dropped without a word",
        "llama_squad/feedback/verdicts.py",
        'write_durably(aside, [torn + b"\\n"])',
        "pass",
        FEEDBACK,
    ),
    Fault(
        "feedback: writers do not wait for one another",
        "llama_squad/feedback/verdicts.py",
        "fcntl.flock(fd, fcntl.LOCK_EX)",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        FEEDBACK,
    ),
    Fault(
        "feedback: the dataset's answer is taught, not the reviewer's",
        "llama_squad/feedback/verdicts.py",
        "found = [(self.corrected, self.corrected_start)]",
        "found = []",
        FEEDBACK,
    ),
    Fault(
        "feedback: what was trained is tested",
        "llama_squad/feedback/exchange.py",
        "merged[name] = [r for r in records if key_of(r) not in found]",
        "merged[name] = list(records)",
        FEEDBACK,
    ),
    Fault(
        "feedback: two windows get the same question",
        "llama_squad/feedback/queue.py",
        "return holder == window or now - since > LEASE_S",
        "return True",
        "tests/test_review.py",
    ),
    Fault(
        "page: the threshold does not decide",
        "llama_squad/page/desk.py",
        "reading.na_prob <= threshold",
        "reading.na_prob <= 1",
        "tests/test_app.py -k threshold",
    ),
    Fault(
        "mask: the token before the answer is trained",
        "llama_squad/encoding.py",
        "offsets[start - 1][1] > content_start",
        "offsets[start - 1][1] >= content_start",
        COLLATOR,
    ),
    Fault(
        "mask: the end of turn is not trained",
        "llama_squad/encoding.py",
        "return start, index + 1",
        "return start, index",
        COLLATOR,
    ),
    Fault(
        "mask: the tokenizer writes its own BOS",
        "llama_squad/encoding.py",
        "add_special_tokens=False,  # the template writes them",
        "add_special_tokens=True,",
        f"{COLLATOR} -k bos",
    ),
    Fault(
        "mask: control tokens in a context are control tokens",
        "llama_squad/encoding.py",
        "if self._spells_control(ids, offsets, item):",
        "if False:",
        f"{COLLATOR} -k hostile",
    ),
    Fault(
        "mask: a piece of text gets its own first space",
        "llama_squad/encoding.py",
        '"prepend_scheme") == "first"',
        '"prepend_scheme") == "never"',
        f"{COLLATOR} -k careful",
    ),
    Fault(
        "mask: an example that is too long by one is kept",
        "llama_squad/collator.py",
        'len(encoded["input_ids"]) <= max_length',
        'len(encoded["input_ids"]) <= max_length + 1',
        f"{COLLATOR} -k too_long",
    ),
    Fault(
        "training's tree: a branch sees the next one",
        "llama_squad/tree.py",
        "visible = position[None, :, None] < ends[:, None, :]",
        "visible = position[None, :, None] <= ends[:, None, :]",
        f"{COLLATOR} -k mask_of_a_row",
    ),
    Fault(
        "training's tree: positions run on from branch to branch",
        "llama_squad/tree.py",
        "self.position_ids += range(start, stop)",
        "self.position_ids += range(len(self.ends), len(self.ends) + stop - start)",
        f"{COLLATOR} -k tree_of_two",
    ),
    Fault(
        "training's tree: a branch lacks what predicts its first label",
        "llama_squad/tree.py",
        "else min(prompt - 1, common)",
        "else min(prompt, common)",
        f"{COLLATOR} -k identical_prompts",
    ),
    Fault(
        "decoding's tree: tokens see those after them",
        "llama_squad/decoding/cache.py",
        "own = np.tril(np.ones((len(new), len(new)), dtype=bool))",
        "own = np.ones((len(new), len(new)), dtype=bool)",
        f"{DECODING} -k no_answer_probability",
    ),
    Fault(
        "decoding's tree: positions run on from branch to branch",
        "llama_squad/decoding/cache.py",
        "positions[r, new] = np.arange(depth, branch.depth)",
        "positions[r, new] = past + new",
        f"{DECODING} -k no_answer_probability",
    ),
    Fault(
        "decoding's tree: a branch sees its sisters",
        "llama_squad/decoding/cache.py",
        "visible[r, 0, new[:, None], stem] = True",
        "visible[r, 0, new[:, None], :past] = True",
        f"{DECODING} -k equals_generate",
    ),
    Fault(
        "decoding's tree: dead branches are dropped, the living not renumbered",
        "llama_squad/decoding/cache.py",
        "branch.columns = renumbered[branch.columns]",
        "pass",
        f"{DECODING} -k dead_branches",
    ),
    Fault(
        "decoding's tree: a window is wider by one",
        "llama_squad/tree.py",
        "query - key < window",
        "query - key <= window",
        f"{DECODING} -k windows",
    ),
    Fault(
        "search: one beam more than asked for",
        "llama_squad/decoding/search.py",
        "self._taken[node.length, node.kind] >= self._beams",
        "self._taken[node.length, node.kind] > self._beams",
        f"{DECODING} -k without_changing_it",
    ),
    Fault(
        "search: a reply that was outdone at its length is taken",
        "llama_squad/decoding/search.py",
        "if not self._ranked or rank <= self._beams:",
        "if True:",
        f"{DECODING} -k equals_generate",
    ),
    Fault(
        "search: the end of a reply costs nothing",
        "llama_squad/decoding/scores.py",
        "log_prob=node.log_prob + total, ids",
        "log_prob=node.log_prob, ids",
        f"{DECODING} -k best_of_all",
    ),
    Fault(
        "search: what was run ahead goes to another token",
        "llama_squad/decoding/lookahead.py",
        "and child.ids[-1] == token",
        "and child.ids[-1] != token",
        "tests/test_lookahead.py",
    ),
    Fault(
        "attention: a block misses its first key",
        "llama_squad/attention.py",
        "first, stop = int(index[0])",
        "first, stop = int(index[1])",
        "tests/test_attention.py",
    ),
    Fault(
        "attention: autocast rounds the scores",
        "llama_squad/attention.py",
        'with torch.autocast("cpu", enabled=False):  # which would round',
        'with torch.autocast("cpu", torch.bfloat16):  # which would round',
        "tests/test_attention.py -k without_gradients",
    ),
    Fault(
        "decoding: what prompts begin with stays the adapter's once that is off",
        "llama_squad/decoding/kept.py",
        "for m in adapted)",
        "for m in adapted[:0])",
        "tests/test_kept.py -k switched_off",
    ),
    Fault(
        "decoding: a context that is kept is the adapter's once that is off",
        "llama_squad/decoding/kept.py",
        "for m in adapted)",
        "for m in adapted[:0])",
        "tests/test_kept.py -k shares_no_context",
    ),
    Fault(
        "decoding: a context that an activated adapter reads is taken for the base's",
        "llama_squad/decoding/kept.py",
        "if activation_of(self.model) and acts is None else",
        "if activation_of(self.model) else",
        "tests/test_kept.py -k shares_no_context",
    ),
    Fault(
        "training: the base's first pass scores the vocabulary",
        "llama_squad/supervised.py",
        "logits_to_keep=1 if shared else stem.new_empty(0)",
        "logits_to_keep=1",
        "tests/test_activation.py -k take_no_gradient",
    ),
    Fault(
        "training: an adapter from the context on leaves out the context's line",
        "llama_squad/prompts.py",
        'if where == "context":',
        'if where == "contexts":',
        "tests/test_activation.py -k first_token",
    ),
    Fault(
        "training's tree: a label that examples share counts once",
        "llama_squad/tree.py",
        "tree._append(paragraph[0], root, stem, [len(examples), len(paragraph)])",
        "tree._append(paragraph[0], root, stem, [1, 1])",
        "tests/test_shared_contexts.py -k labels_on_all",
    ),
    Fault(
        "training: what a step divides by counts a shared label once",
        "llama_squad/training/trainer.py",
        'if "weights" in batch else batch',
        "if False else batch",
        "tests/test_chat_share.py -k loss_on_all_tokens",
    ),
    Fault(
        "search: probabilities are not normalised",
        "llama_squad/decoding/scores.py",
        "norms = logits.logsumexp(-1, keepdim=True)",
        "norms = logits.amax(-1, keepdim=True)",
        f"{DECODING} -k best_of_all",
    ),
    Fault(
        "search: the answer depends on n_best",
        "llama_squad/decoding/batch.py",
        "for child in children[:most] if child is not None]",
        "for child in children if child is not None]",
        f"{DECODING} -k n_best",
    ),
    Fault(
        "search: the abstention's end of turn is not scored",
        "llama_squad/decoding/batch.py",
        "alternative).sum(1).tolist()",
        "alternative)[:, :-1].sum(1).tolist()",
        f"{DECODING} -k no_answer_probability",
    ),
    Fault(
        "search: na_prob is the chance of an answer",
        "llama_squad/decoding/constraints.py",
        "calibration(alternative - best.score)",
        "calibration(best.score - alternative)",
        f"{DECODING} -k threshold",
    ),
    Fault(
        "grammar: a span may begin with a space",
        "llama_squad/decoding/spans.py",
        "if not char.isspace():",
        "if True:",
        f"{DECODING} -k spelled_and_nothing_else",
    ),
    Fault(
        "grammar: an empty span",
        "llama_squad/decoding/spans.py",
        "if not bare or words[end] > words[offset]:",
        "if True:",
        f"{DECODING} -k spelled_and_nothing_else",
    ),
    Fault(
        "grammar: a span may begin inside of a word",
        "llama_squad/decoding/spans.py",
        "if edges[index] and chunk:",
        "if chunk:",
        f"{DECODING} -k spelled_and_nothing_else",
    ),
    Fault(
        "grammar: quotes in a context are not escaped",
        "llama_squad/decoding/spans.py",
        "chunks = [escape_answer(char).encode() for char in chars]",
        "chunks = [char.encode() for char in chars]",
        f"{DECODING} -k spelled_and_nothing_else",
    ),
    Fault(
        "grammar: a span is lost where two begin alike",
        "llama_squad/decoding/spans.py",
        "inside.setdefault(token_id, [_BARE] * still).append(end)",
        "inside.setdefault(token_id, [*[_BARE] * still, end])",
        f"{DECODING} -k spelled_and_nothing_else",
    ),
    Fault(
        "grammar: no token reaches from the lead into the answer",
        "llama_squad/decoding/spans.py",
        "self._match(self._vocabulary.beyond[left], self._starts, True, inside, closing)",
        "pass",
        f"{DECODING} -k tokens_of_training",
    ),
    Fault(
        "metrics: abstains at the threshold, not above",
        "llama_squad/metrics.py",
        "if (0.0 if math.isnan(na_prob) else na_prob) > na_prob_thresh:",
        "if (0.0 if math.isnan(na_prob) else na_prob) >= na_prob_thresh:",
        METRICS,
    ),
    Fault(
        "metrics: F1 without its recall",
        "llama_squad/metrics.py",
        "common / len(given), common / len(gold)",
        "common / len(given), common / len(given)",
        METRICS,
    ),
    Fault(
        "metrics: the worst of several gold answers",
        "llama_squad/metrics.py",
        "return 0, max(",
        "return 0, min(",
        METRICS,
    ),
    Fault(
        "metrics: articles inside of words go",
        "llama_squad/metrics.py",
        r'r"\b(a|an|the)\b"',
        r'r"\b(a|an|the)"',
        METRICS,
    ),
    Fault(
        "metrics: an abstention counts against the curve",
        "llama_squad/metrics.py",
        "elif self.answered[i]:",
        "else:",
        METRICS,
    ),
    Fault(
        "metrics: a malformed reply abstains",
        "llama_squad/metrics.py",
        'return answer.state == "no_answer"',
        'return answer.state != "answer"',
        METRICS,
    ),
    Fault(
        "metrics: the lowest of tied thresholds",
        "llama_squad/thresholds.py",
        "return Plateau((low + high) / 2, best, low, high)",
        "return Plateau(low, best, low, high)",
        METRICS,
    ),
    Fault(
        "results: best_exact is that of thresholded answers",
        "llama_squad/rows.py",
        'return Answer("answer", row["best_span"])',
        "return row_answer(row)",
        RESULTS,
    ),
    Fault(
        "results: a question that failed is not asked again",
        "llama_squad/results.py",
        "(self.failed if failed else self.done).add(id_)",
        "self.done.add(id_)",
        RESULTS,
    ),
    Fault(
        "results: a newline in a cell ends a torn row",
        "llama_squad/rows.py",
        r'if quotes % 2 == 0 and line.endswith(b"\n"):',
        r'if line.endswith(b"\n"):',
        RESULTS,
    ),
    Fault(
        "results: a torn row stays",
        "llama_squad/results.py",
        "os.ftruncate(self._fd, end)",
        "pass",
        RESULTS,
    ),
    Fault(
        "results: what was appended is not known as done",
        "llama_squad/results.py",
        'self._add(row["id"], row["state"] == "failed")',
        "pass",
        RESULTS,
    ),
    Fault(
        "results: of a question that is there twice the last counts",
        "llama_squad/results.py",
        "if place.id not in places or places[place.id].failed:",
        "if True:",
        RESULTS,
    ),
    Fault(
        "results: an unknown na_prob is read as a certain answer",
        "llama_squad/result_reader.py",
        "float(row[name]) if row[name] else None",
        "float(row[name] or 0)",
        RESULTS,
    ),
    Fault(
        "results: other settings go on with the file",
        "llama_squad/results.py",
        "if name in volatile or saved == settings:",
        "if True:",
        RESULTS,
    ),
    Fault(
        "results: a malformed reply is officially an abstention",
        "llama_squad/answers.py",
        "return self.text if self.text.strip() else MALFORMED_PREDICTION",
        "return self.text.strip()",
        RESULTS,
    ),
]


def misaimed(faults: Sequence[Fault] = FAULTS) -> list[str]:
    """Say which faults have no place in the code, or several."""
    found = []
    for fault in faults:
        count = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old)
        if count != 1:
            found.append(f"{fault.name}: {count} times in {fault.file}: {fault.old}")
    return found


def copy_tree(folder: Path) -> None:
    """Copy what the tests need, without anything that was built."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, folder)
        elif path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=ignored)


def _test(folder: Path, flags: Sequence[str], log: Path) -> None:
    """Run pytest in a forked process, which has the heavy packages already."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests"), str(folder / "benchmarks")]
    sys.dont_write_bytecode = True  # two faults in a second may have one size
    import pytest

    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *flags]))


def run_tests(folder: Path, flags: Sequence[str]) -> tuple[int | None, str]:
    """Return pytest's exit status (None: it hangs) and what it printed."""
    log = folder.parent / "log"
    process = multiprocessing.get_context("fork").Process(target=_test, args=(folder, flags, log))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return None, log.read_text()
    return process.exitcode, log.read_text()


def seed(fault: Fault, folder: Path) -> tuple[int | None, str]:
    """Run a fault's tests with the fault in its place; the file is as before afterwards."""
    path = folder / fault.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        return run_tests(folder, fault.tests.split())
    finally:
        path.write_text(sound, encoding="utf-8")


def main(words: Sequence[str]) -> int:
    """Seed the faults whose names hold all words; return the exit status."""
    faults = [fault for fault in FAULTS if all(word in fault.name for word in words)]
    if not faults or misaimed(faults):
        print("\n".join(misaimed(faults) or ["no fault of that name"]), file=sys.stderr)
        return 2
    for module in ("torch", "transformers", "peft", "datasets", "trl.trainer.sft_trainer"):
        importlib.import_module(module)  # before the forks, which share them
    worst = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name) / "main"
        copy_tree(folder)
        for tests in dict.fromkeys(fault.tests for fault in faults):
            status, said = run_tests(folder, tests.split())
            if status != 0:
                print(f"{tests} fails without any fault:\n{said[-3000:]}", file=sys.stderr)
                return 2
        for fault in faults:
            started = time.perf_counter()
            status, said = seed(fault, folder)
            verdict = {0: "MISSED", 1: "caught", None: "HANGS"}.get(status, "DOES NOT RUN")
            print(f"{verdict:8} {time.perf_counter() - started:5.0f} s  {fault.name}", flush=True)
            if status != 1:
                worst = max(worst, 1 if status == 0 else 2)
                print(said[-1500:] if status else "", file=sys.stderr)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
