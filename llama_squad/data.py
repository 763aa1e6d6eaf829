"""SQuAD records: read and check them, split them by title, write and load datasets."""

import glob
import json
import random
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_squad.config import CreateArguments, save_run_config
from llama_squad.folders import check_dataset
from llama_squad.prompts import build_messages

Record = dict[str, Any]
"""{"id", "title", "context", "question", "answers": {"text": [...], "answer_start": [...]}}, as
on the Hub; no texts where the question has no answer."""

SAMPLE = Path(__file__).parent.parent / "quickstart" / "data"
_BATCH = 500
_SURROGATE = re.compile(r"[\ud800-\udfff]")


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


def read_squad_file(path: Path) -> Iterator[Record]:
    """Yield the records of a file in the official SQuAD 1.1 or 2.0 JSON format.

    Raises:
        ValueError: the file cannot be read, or is not of that format; it says where first, and
            in how many places, after the last of the records that are.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    faults: dict[str, None] = {}

    def items(value: Any, key: str, where: str) -> list[tuple[Any, str]]:
        try:
            return [(x, f"{key}[{n}]") for n, x in enumerate(_get(value, key, list, where))]
        except ValueError as error:
            faults[str(error)] = None
            return []

    for article, in_data in items(content, "data", str(path)):
        at_article = f"{path}: {in_data}"
        for paragraph, in_article in items(article, "paragraphs", at_article):
            at = f"{at_article}.{in_article}"
            for qa, in_paragraph in items(paragraph, "qas", at):
                try:
                    title = _get(article, "title", str, at_article)
                    context = _get(paragraph, "context", str, at)
                    record = _record(qa, title, context, f"{at}.{in_paragraph}")
                except ValueError as error:
                    faults[str(error)] = None
                else:
                    yield record
    if faults:
        raise ValueError(f"{next(iter(faults))} (first of {len(faults)} such faults of the file)")


def _record(qa: Any, title: str, context: str, at: str) -> Record:
    answers = _get(qa, "answers", list, at)
    record = {
        "id": _get(qa, "id", str, at),
        "title": title,
        "context": context,
        "question": _get(qa, "question", str, at),
        "answers": {
            "text": [_get(answer, "text", str, at + ".answers") for answer in answers],
            "answer_start": [
                _get(answer, "answer_start", int, at + ".answers") for answer in answers
            ],
        },
    }
    impossible = qa.get("is_impossible", not answers)
    if bool(impossible) != (not answers):
        raise ValueError(
            f"{at} (id {record['id']}): is_impossible is {impossible}, but there are "
            f"{len(answers)} answers; an unanswerable question has none"
        )
    return record


def _get(value: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise ValueError(
            f"{where} has no {key!r}: expected the official SQuAD format, "
            '{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", '
            '"answers": [{"text", "answer_start"}]}]}]}]}'
        )
    if not isinstance(value[key], kind) or isinstance(value[key], bool):
        found = type(value[key]).__name__
        raise ValueError(f"{where}: {key!r} should be a {kind.__name__}, found a {found}")
    return value[key]


def check_records(records: Iterable[Record], where: str, seen: set[str]) -> list[Record]:
    """Return the records, checked; ``seen`` collects ids, to find those that occur twice.

    Raises:
        ValueError: what is wrong, how often, and the first case, all kinds in one message; or
            there is no record.
    """
    kept: list[Record] = []
    faults: Counter[str] = Counter()
    first: dict[str, str] = {}
    for record in records:
        for fault in _faults(record, seen):
            faults[fault] += 1
            first.setdefault(fault, record["id"])
        seen.add(record["id"])
        kept.append(record)
    if faults:
        lines = [f"{n} {fault} (first: id {first[fault]!r})" for fault, n in faults.items()]
        raise ValueError(f"{where}: " + "; ".join(lines) + ". Mend the file; nothing was written.")
    if not kept:
        raise ValueError(f"{where} holds no questions: mend it, or leave it out")
    return kept


def _faults(record: Record, seen: set[str]) -> Iterator[str]:
    context, answers = record["context"], record["answers"]
    if not record["id"]:
        yield "questions without an id"
    elif record["id"] in seen:
        yield "questions whose id was there before"
    if not context.strip():
        yield "questions with an empty context"
    if not record["question"].strip():
        yield "empty questions"
    texts = (record["id"], record.get("title") or "", context, record["question"], *answers["text"])
    if any(map(_SURROGATE.search, texts)):
        yield r"questions with half a character (a lone surrogate, \ud800 to \udfff) in their text"
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if not text.strip():
            yield "empty answers"
        elif start < 0 or not context.startswith(text, start):
            yield "answers whose answer_start does not index their text"


def read_files(patterns: Sequence[str], seen: set[str]) -> list[Record]:
    """Read and check official-format files; see ``expand_files`` and ``check_records``."""
    records: list[Record] = []
    for path in expand_files(patterns):
        records += check_records(read_squad_file(path), str(path), seen)
    return records


def read_hub(source: str, seen: set[str]) -> dict[str, list[Record]]:
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
        columns = ["id", "title", "context", "question", "answers"]
        missing = set(columns) - set(dataset[split].column_names)
        if missing:
            raise ValueError(f"{source!r} lacks the columns {', '.join(sorted(missing))}")
        rows = dataset[split].select_columns(columns)
        splits[name] = check_records(map(dict, rows), f"{source} {split}", seen)
    return splits


def read_source(args: CreateArguments) -> dict[str, list[Record]]:
    """Read the training and test records that the arguments name.

    Raises:
        ValueError: the arguments name files and the sample, or what they name is at fault.
    """
    seen: set[str] = set()
    if args.sample and (args.train_files or args.test_files):
        raise ValueError(
            "--sample is another dataset than --train_files and --test_files: "
            "give it, or files (as flags, or in the configuration)"
        )
    if args.sample:
        return {
            name: read_files([str(SAMPLE / f"{name}.json")], seen) for name in ("train", "test")
        }
    if args.train_files or args.test_files:
        named = {"train": args.train_files, "test": args.test_files}
        return {name: read_files(patterns, seen) for name, patterns in named.items() if patterns}
    return read_hub(args.source, seen)


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
        if not held_out or count + sizes[name] - target <= target - count:
            held_out.add(name)
            count += sizes[name]
        if count >= target:
            break
    train = [record for record in records if group[record["title"]] not in held_out]
    return train, [record for record in records if group[record["title"]] in held_out]


def _title_groups(records: Sequence[Record]) -> dict[str, str]:
    """Map each title to the name of its group: titles that share a context, directly or not."""
    titles: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        titles[record["context"]][record["title"]] = None
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


# Datasets on disk ----------------------------------------------------------------------------


def count_split(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
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


def write_dataset(
    splits: Mapping[str, Sequence[Record]], args: CreateArguments, progress: Any = None
) -> None:
    """Write the splits, each record with its messages, to ``args.dataset_name``.

    The dataset is written aside and renamed, and an older dataset there is replaced only then.

    Raises:
        ValueError: the folder holds something else than a dataset, or cannot be written.
    """
    check_target(args.dataset_name)
    target = Path(args.dataset_name)
    try:
        _replace_dataset(target, splits, args, progress)
    except OSError as error:
        raise ValueError(
            f"cannot write the dataset to {target} ({error.strerror or error}): "
            "make room there, or give another --dataset_name"
        ) from error


def _replace_dataset(
    target: Path, splits: Mapping[str, Sequence[Record]], args: CreateArguments, progress: Any
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
        save_run_config(aside / "new", "create", create=args, splits=counts)
        if target.exists():
            target.rename(old)
        (aside / "new").rename(target)
    finally:
        if old.exists() and not target.exists():  # stopped between the two renames
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


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
