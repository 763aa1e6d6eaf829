"""SQuAD records: read them, split them by title, write and load datasets.

What files may hold, and what becomes of it, is told in ``llama_squad.sources.formats`` and
``llama_squad.sources.cleaning``.
"""

import csv
import glob
import hashlib
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_squad.arguments import CreateArguments
from llama_squad.config import load_run_config, save_run_config
from llama_squad.folders import check_dataset
from llama_squad.prompts import Record, build_messages
from llama_squad.sources.cleaning import Cleaner, Dropped
from llama_squad.sources.formats import COLUMNS, InputRow, check_columns, read_rows
from llama_squad.sources.matching import context_key
from llama_squad.sources.records import paragraphs_at_random

SAMPLE = Path(__file__).parent.parent / "quickstart" / "data"
DROPPED = "dropped.csv"
"""Lists, in a dataset's folder, the questions that were left out of it."""
_BATCH = 500


# Reading -------------------------------------------------------------------------------------


def expand_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that the patterns name, in order and once each.

    A pattern that is a file's own name, brackets and all, means that file.

    Raises:
        ValueError: a pattern matches no file.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        literal = Path(pattern).is_file()
        found = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"no file matches {pattern!r} (in {Path.cwd()})")
        paths.update(dict.fromkeys(Path(name) for name in found))
    return list(paths)


def read_files(
    patterns: Sequence[str], cleaner: Cleaner | None = None, split: str = "train"
) -> list[Record]:
    """Read the records of the files that the patterns name; see ``docs/own-data.md`` for forms.

    Args:
        patterns: names, or globs.
        cleaner: keeps account over several calls (default: one that takes what is clear).
        split: the split that they are for.

    Raises:
        ValueError: there is no such file, or it is not all usable; see ``Cleaner.clean``.
    """
    cleaner = cleaner or Cleaner()
    records: list[Record] = []
    for path in expand_files(patterns):
        name = cleaner.name_file(path)
        records += cleaner.clean(read_rows(path), str(path), split, name)
    return records


def read_hub(source: str, cleaner: Cleaner) -> dict[str, list[Record]]:
    """Read SQuAD v2 from the Hub or a local copy of it: its validation split is our test split.

    Raises:
        ValueError: it cannot be had, or has other splits or columns.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(source)
    except Exception as error:  # the Hub fails in many ways; all of them end here for the user
        raise ValueError(
            f"cannot load {source!r} ({type(error).__name__}: {error}). Without the Hub, bring "
            "files: --train_files 'train-*.json' --test_files dev.json, or try --sample"
        ) from error
    splits = {}
    for name, split in (("train", "train"), ("test", "validation")):
        if split not in dataset:
            raise ValueError(f"{source!r} has no split {split!r}, only {', '.join(dataset)}")
        where = f"{source} {split}"
        check_columns(dataset[split].column_names, where)
        columns = [column for column in COLUMNS if column in dataset[split].column_names]
        rows = enumerate(dataset[split].select_columns(columns), 1)
        read = (InputRow(f"row {n}", dict(row)) for n, row in rows)
        splits[name] = cleaner.clean(read, where, name)
    return splits


def read_source(args: CreateArguments, cleaner: Cleaner) -> dict[str, list[Record]]:
    """Read the training and test records that the arguments name.

    Raises:
        ValueError: the arguments name files and the sample, or what they name is at fault.
    """
    if args.sample and (args.train_files or args.test_files):
        raise ValueError(
            "--sample is another dataset than --train_files and --test_files: "
            "give it, or files (as flags, or in the configuration)"
        )
    if args.sample:
        return {
            name: read_files([str(SAMPLE / f"{name}.json")], cleaner, name)
            for name in ("train", "test")
        }
    if args.train_files or args.test_files:
        named = {"train": args.train_files, "test": args.test_files}
        return {
            name: read_files(patterns, cleaner, name)
            for name, patterns in named.items()
            if patterns
        }
    return read_hub(args.source, cleaner)


# Splitting -----------------------------------------------------------------------------------


def check_ratio(ratio: float) -> None:
    """Refuse a share of the questions that cannot be held out. Raises ValueError."""
    if not 0 <= ratio < 1:
        raise ValueError(f"--validation_ratio must be at least 0 and below 1, not {ratio}")


def split_by_title(
    records: Sequence[Record], ratio: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split off about ``ratio`` of the questions by whole titles: (train, val).

    Titles that have a context in common stay together, so no context is in both splits.

    Raises:
        ValueError: the ratio is not in [0, 1), or there is no way to split.
    """
    check_ratio(ratio)
    if ratio == 0:
        return list(records), []
    group = _title_groups(records)
    sizes = Counter(group[record["title"]] for record in records)
    if len(sizes) < 2:
        raise ValueError(
            "all training questions share one title (or one context), so none can be held out: "
            "give --validation_ratio 0 to train without validation"
        )
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    held_out: set[str] = set()
    count, target = 0, ratio * len(records)
    for name in names[:-1]:
        # a title that would overshoot by more than is missing is passed over
        if count + sizes[name] - target <= target - count:
            held_out.add(name)
            count += sizes[name]
        if count >= target:
            break
    held_out = held_out or {min(names, key=lambda name: sizes[name])}  # all are large
    train = [record for record in records if group[record["title"]] not in held_out]
    return train, [record for record in records if group[record["title"]] in held_out]


def _title_groups(records: Sequence[Record]) -> dict[str, str]:
    """Map each title to the name of its group: titles that share a context, directly or not."""
    keys = _context_keys(records)
    titles: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        titles[keys[record["context"]]][record["title"]] = None
    group = {record["title"]: record["title"] for record in records}

    def root(title: str) -> str:
        while group[title] != title:
            title = group[title]
        return title

    for shared in titles.values():
        first, *others = shared
        for title in others:
            group[root(title)] = root(first)
    return {title: root(title) for title in group}


def _context_keys(records: Sequence[Record]) -> dict[str, str]:
    """Map each context to what it shares with those that differ in white space or Unicode form."""
    return {context: context_key(context) for context in {r["context"] for r in records}}


def count_shared(records: Sequence[Record], others: Sequence[Record]) -> int:
    """Count the records whose context, but for white space and Unicode form, others have too."""
    keys, shared = _context_keys(records), set(_context_keys(others).values())
    return sum(keys[record["context"]] in shared for record in records)


# Datasets on disk ----------------------------------------------------------------------------


def count_split(records: Sequence[Record]) -> dict[str, int]:
    """Count what a split holds."""
    return {
        "questions": len(records),
        "answerable": sum(bool(record["answers"]["text"]) for record in records),
        "paragraphs": len({(record["title"], record["context"]) for record in records}),
        "titles": len({record["title"] for record in records}),
    }


def check_target(dataset_name: str) -> None:
    """Refuse to write a dataset where something else is. Raises ValueError."""
    target = Path(dataset_name)
    if target.exists() and not (target / "dataset_dict.json").is_file():
        raise ValueError(f"{target} is there and holds no dataset: give another --dataset_name")


def built_from(dataset_name: str) -> str:
    """Name what the dataset in a folder was built from; "" where none is, or nothing tells."""
    try:
        made = load_run_config(dataset_name).get("create", {})
    except ValueError:  # damaged: it is about to be replaced
        return ""
    files = [*(made.get("train_files") or ()), *(made.get("test_files") or ())]
    return ", ".join(files) or ("the sample" if made.get("sample") else made.get("source", ""))


def write_dataset(
    splits: Mapping[str, Sequence[Record]],
    args: CreateArguments,
    progress: Any = None,
    cleaner: Cleaner | None = None,
) -> None:
    """Write the splits, each record with its messages, to ``args.dataset_name``.

    Beside them stand the configuration with all counts and, where the ``cleaner`` left questions
    out, the list of those.

    The dataset is written aside and renamed, and an older dataset there is replaced only then.

    Raises:
        ValueError: the folder holds something else than a dataset, or cannot be written.
    """
    check_target(args.dataset_name)
    target = Path(args.dataset_name)
    try:
        _replace_dataset(target, splits, args, progress, cleaner or Cleaner())
    except OSError as error:
        raise ValueError(
            f"cannot write the dataset to {target} ({error.strerror or error}): "
            "make room there, or give another --dataset_name"
        ) from error


def _replace_dataset(
    target: Path,
    splits: Mapping[str, Sequence[Record]],
    args: CreateArguments,
    progress: Any,
    cleaner: Cleaner,
) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars

    target.parent.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = aside / "old"
    try:
        dataset = DatasetDict()
        for name, records in splits.items():
            path = aside / f"{name}.arrow"
            _write_arrow(path, records, args, progress)
            dataset[name] = Dataset.from_file(str(path))
        dataset.save_to_disk(str(aside / "new"))
        counts = {name: count_split(records) for name, records in splits.items()}
        kinds = {"changed": dict(cleaner.changed), "dropped": cleaner.count_dropped()}
        save_run_config(aside / "new", "create", create=args, splits=counts, questions=kinds)
        if cleaner.dropped:
            _write_dropped(aside / "new" / DROPPED, cleaner.dropped)
        if target.exists():
            target.rename(old)
        (aside / "new").rename(target)
    finally:
        if old.exists() and not target.exists():  # stopped between the two renames
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _write_dropped(path: Path, dropped: Sequence[Dropped]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["why", "file", "place", "id"])
        writer.writerows((d.why, d.file, d.place, d.id) for d in dropped)


def _write_arrow(
    path: Path, records: Sequence[Record], args: CreateArguments, progress: Any
) -> None:
    """Stream the records with their messages into an Arrow file, a batch in memory at a time."""
    import pyarrow as pa

    text = pa.string()
    message = pa.struct([("role", text), ("content", text)])
    answers = pa.struct([("text", pa.list_(text)), ("answer_start", pa.list_(pa.int32()))])
    columns = [(name, text) for name in ("id", "title", "context", "question")]
    schema = pa.schema([*columns, ("answers", answers), ("messages", pa.list_(message))])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for start in range(0, len(records), _BATCH):
            rows = [
                {**record, "messages": build_messages(record, args.prompt, args.system_prompt)}
                for record in records[start : start + _BATCH]
            ]
            stream.write_table(pa.Table.from_pylist(rows, schema=schema))
            if progress is not None:
                progress.update(len(rows))


def load_squad(dataset_name: str) -> Any:
    """Load the ``DatasetDict`` that ``create_squad_dataset.py`` wrote.

    Raises:
        ValueError: there is none in that folder.
    """
    from datasets import load_from_disk

    check_dataset(dataset_name)
    return load_from_disk(dataset_name)


def sample_paragraphs(split: Any, questions: int, seed: int) -> Any:
    """Return whole paragraphs of a split, at random, with at least ``questions`` questions.

    0 questions, or more than there are, mean all.
    """
    if not 0 < questions < len(split):
        return split
    paragraphs = zip(split["title"], split["context"], strict=True)
    return split.select(sorted(paragraphs_at_random(paragraphs, questions, seed)))


def paragraph_key(title: str, context: str) -> str:
    """Return what stands for a paragraph: the questions of one title and context."""
    return hashlib.blake2b(f"{title}\0{context}".encode(), digest_size=12).hexdigest()
