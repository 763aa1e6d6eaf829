"""Evaluate a model on a split: resumable, in one process or several.

Reads records and a model, writes a result file (``llama_squad.results``). Each process of several
appends to a file of its own; the first one merges them, at the end and whenever a killed run is
resumed, and holds the lock of the result file throughout.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama_squad.answers import FAILED, extract_answer
from llama_squad.arguments import EvalArguments, ModelArguments
from llama_squad.calibration import Abstention, Calibration
from llama_squad.config import provenance, write_json
from llama_squad.data import sample_paragraphs
from llama_squad.decoding.replies import Reply
from llama_squad.durable import check_writable, one_line_errors
from llama_squad.folders import THRESHOLD_FILE
from llama_squad.modeling import resolve_dtype, weights_dtype
from llama_squad.predictors.base import (
    Batch,
    ConcurrentPredictor,
    Prediction,
    Predictor,
    batch_paragraphs,
)
from llama_squad.processes import of_first, share, this_process
from llama_squad.prompts import Record
from llama_squad.results import ResultsFile, check_same_settings, config_path, saved_settings
from llama_squad.rows import Row, make_row
from llama_squad.weights import weights_digest, whole_model

# What may change between two runs of one result file.
_VOLATILE = ("output", "overwrite", "batch_size", "batch_sizes", "predictions_dir",
             "tune_threshold", "tune_for", "calibrate", "no_answer_share",
             "concurrency", "timeout", "max_tokens_name", "versions", "commit")  # fmt: skip


def choose_records(split: Any, args: EvalArguments) -> list[Record]:
    """Return the questions to answer, as the flags choose them."""
    columns = [name for name in split.column_names if name != "messages"]
    if args.sample == "paragraphs":
        chosen = sample_paragraphs(split, args.num_samples or 0, args.seed)
        return list(chosen.select_columns(columns))
    indices = list(range(len(split)))
    if args.shuffle:
        random.Random(args.seed).shuffle(indices)
    return list(split.select(indices[: args.num_samples]).select_columns(columns))


def settings_of(
    args: EvalArguments,
    model_args: ModelArguments,
    abstention: Abstention,
    records: Sequence[Record],
) -> dict[str, Any]:
    """Return what a result file says of how it was made.

    With digests of the questions and of local weights: another training may write into the same
    folder, and its rows must not be taken for those of the last one.
    """
    settings = resolved_settings(args, model_args) | {"na_prob_thresh": abstention.threshold}
    if abstention.calibration != Calibration():
        settings["calibration"] = dataclasses.asdict(abstention.calibration)
    text = json.dumps(list(records), sort_keys=True, ensure_ascii=False)
    return {
        **settings,
        "questions_digest": hashlib.sha256(text.encode()).hexdigest()[:16],
        "model_digest": weights_digest(model_args.model_name),
        "adapter_digest": weights_digest(args.adapter_name),
        **provenance(),
    }


def resolved_settings(args: EvalArguments, model_args: ModelArguments) -> dict[str, Any]:
    """Return the flags, with the number format that the weights really have."""
    settings = {**dataclasses.asdict(args), **dataclasses.asdict(model_args)}
    if args.predictor == "server":
        return settings
    exact = args.predictor == "encoder" and model_args.dtype == "auto"
    loaded = model_args
    if whole := whole_model(args.adapter_name):  # which takes the place of --model_name
        loaded = dataclasses.replace(model_args, model_name=whole)
    dtype = torch.float32 if exact else weights_dtype(loaded)
    return settings | {"dtype": str(dtype).removeprefix("torch.")}


def check_outputs(args: EvalArguments) -> None:
    """Find out, before a model is loaded, whether all that a run writes can be written.

    Raises:
        ValueError: it cannot.
    """
    paths = [Path(args.output)]
    if args.predictions_dir:
        paths.append(Path(args.predictions_dir, "predictions.json"))
    if args.tune_threshold:
        paths += [validation_path(paths[0]), Path(args.adapter_name or "", THRESHOLD_FILE)]
    for path in paths:
        check_writable(path)


def check_resumable(
    args: EvalArguments,
    model_args: ModelArguments,
    abstention: Abstention,
    records: Sequence[Record],
) -> None:
    """Find out, before a model is loaded, whether the run may go on with its result file.

    A threshold or a calibration that is yet to be tuned is left to ``evaluate``.

    Raises:
        ValueError: it may not; see ``check_same_settings``.
    """
    untuned = ("na_prob_thresh", "calibration") if args.tune_threshold else ()
    if not args.overwrite:
        settings = settings_of(args, model_args, abstention, records)
        of_first(lambda: check_same_settings(Path(args.output), settings, (*_VOLATILE, *untuned)))


def evaluate(
    model: Predictor,
    records: Sequence[Record],
    output: Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int = 32,
    overwrite: bool = False,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Answer what ``output`` does not hold yet, and leave a complete result file there.

    The rows stand by paragraph, in the order of ``records``, whatever number of processes and
    interruptions there was. Questions that failed before are asked again. The first process calls
    ``finish`` at the end, while no other run can write the file.

    Raises:
        ValueError: ``output`` was made with other settings, or another run is writing it; see
            ``ResultsFile``.
    """
    process = this_process()
    batches = list(batch_paragraphs(records, batch_size))
    order = [record["id"] for batch in batches for group in batch for record in group]
    with contextlib.ExitStack() as stack:
        whole, done = _open(stack, output, settings, order, overwrite)
        # A batch that was interrupted is answered whole: the same batches give the same figures,
        # to the last bit, however often a run was killed and on however many processes it ran.
        todo = [batch for batch in batches if _ids(batch) - done]
        if whole and todo:
            _note_if_mixed(output, settings)
        mine = todo[process.process_index :: process.num_processes]
        # A failed row stays in its place until a reply can take it, at the merge.
        if whole and not whole.failed:
            own: contextlib.AbstractContextManager[ResultsFile] = contextlib.nullcontext(whole)
        else:
            own = ResultsFile(_shard_path(output, process.process_index), settings, _VOLATILE)
        with own as results:
            for rows in _progress(model, mine, done):
                results.append([row for row in rows if row["id"] not in done])
        share(None)
        if whole:
            _gather(whole, order, settings)
            whole.check_complete(order)
            finish()
        share(None)


def _open(
    stack: contextlib.ExitStack,
    output: Path,
    settings: Mapping[str, Any],
    order: Sequence[str],
    overwrite: bool,
) -> tuple[ResultsFile | None, set[str]]:
    """Lock and mend the result file, on the first process alone.

    Returns the file, there, and to all processes the questions that it holds. Raises ValueError,
    on all alike.
    """
    whole: ResultsFile | None = None

    def work() -> set[str]:
        nonlocal whole
        whole = stack.enter_context(ResultsFile(output, settings, _VOLATILE, overwrite))
        _gather(whole, order, settings, overwrite)
        return set(whole.done)

    done = of_first(work)
    return whole, done


def begun_with(args: EvalArguments) -> int | None:
    """Return the batch size that a run which goes on was begun with; None where none does."""
    paths = [Path(args.output)]
    if args.tune_threshold:
        paths.append(validation_path(paths[0]))
    sizes = [] if args.overwrite else [saved_settings(path).get("batch_size") for path in paths]
    return next((size for size in sizes if isinstance(size, int)), None)


def _note_if_mixed(output: Path, settings: Mapping[str, Any]) -> None:
    """Say, and keep beside the file, that its rows come from batches of several sizes.

    Nothing is said where that cannot show: in float32, or of servers.
    """
    local = settings.get("predictor") != "server" and "dtype" in settings
    if not local or (
        resolve_dtype(settings["dtype"]) == torch.float32 and not settings.get("quantize")
    ):
        return
    saved, size = saved_settings(output), settings.get("batch_size")
    before = saved.get("batch_sizes") or [saved.get("batch_size", size)]
    sizes = [*before, *[size] * (size not in before)]
    if len(sizes) < 2:
        return
    with one_line_errors(config_path(output)):
        write_json(config_path(output), saved | {"batch_sizes": sizes})
    print(
        f"{output} was begun with batches of {sizes[0]} questions, and holds or will hold rows "
        f"from batches of {' and '.join(map(str, sizes[1:]))}, too: in 16 bits the size of a batch "
        "shifts log-probabilities by rounding. For rows of one size --overwrite it.",
        file=sys.stderr,
    )


def _shard_path(output: Path, rank: int) -> Path:
    return output.with_name(f".{output.name}.shard{rank}")


def validation_path(output: Path) -> Path:
    """Return where the answers stand that a threshold is tuned on."""
    return output.with_name(f"{output.name}.val.csv")


def _gather(
    whole: ResultsFile,
    order: Sequence[str],
    settings: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Merge the files of all processes into the whole one, in order, and remove them."""
    name = re.compile(re.escape(f".{whole.path.name}.shard") + r"\d+")
    shards = sorted(path for path in whole.path.parent.glob(".*") if name.fullmatch(path.name))
    with contextlib.ExitStack() as stack:
        for path in shards:  # each is checked and mended, and no one may be writing it
            shard = ResultsFile(path, settings, _VOLATILE, overwrite)
            stack.enter_context(shard)
        whole.gather(shards, order)
        for path in shards:
            path.unlink()
            config_path(path).unlink(missing_ok=True)


def _ids(batch: Batch) -> set[str]:
    return {record["id"] for group in batch for record in group}


def _answers(
    model: Predictor, batches: Sequence[Batch], done: set[str]
) -> tuple[int, Iterable[list[Prediction]]]:
    """Return how many questions will be answered, and the answers as they come.

    Who takes batches is given them whole (see ``evaluate``); others get what is open in them.
    """
    if not isinstance(model, ConcurrentPredictor):
        return sum(len(_ids(batch)) for batch in batches), map(model.answer, batches)
    records = [record for batch in batches for group in batch for record in group]
    todo = [record for record in records if record["id"] not in done]
    return len(todo), model.answer_all(todo)


def _progress(
    model: Predictor,
    batches: Sequence[Batch],
    done: set[str],
) -> Iterator[list[Row]]:
    """Answer batches, as rows, with a bar: questions per second, time left, running exact match."""
    total, answers = _answers(model, batches, done)
    first = this_process().is_main_process
    if done and first:
        again = total - len(set[str]().union(*map(_ids, batches)) - done)
        why = f", {again:,} of them again, as batches are run whole" if again else ""
        print(f"Going on: {len(done):,} questions are done, {total:,} to do{why}.", file=sys.stderr)
    exact = count = 0
    with tqdm(total=total, unit=" questions", disable=not first) as bar:
        for predictions in answers:
            rows = [result_row(prediction) for prediction in predictions]
            yield rows
            exact += sum(row["Exact match"] for row in rows)
            count += len(rows)
            bar.set_postfix_str(f"exact match {100 * exact / count:.1f} %", refresh=False)
            bar.update(len(rows))


def result_row(prediction: Prediction) -> Row:
    """Return a prediction's row of the result file."""
    reply, best = prediction.reply, prediction.reply.best
    return make_row(
        prediction.record,
        prediction.failure or reply.completion,
        FAILED if prediction.failure else extract_answer(reply.completion),
        prediction.prompt_text,
        reply.na_prob,
        score=reply.score,
        best_span=best.text if best else None,
        best_span_log_prob=best.score if best else None,
        no_answer_log_prob=reply.no_answer_score,
        n_best=_n_best(reply) if reply.spans else None,
    )


def _n_best(reply: Reply) -> list[dict[str, Any]]:
    """Return a reply's spans; their probabilities and that of the abstention add up to 1.

    They are the model's own: a calibration of na_prob leaves them as they are.
    """
    assert reply.no_answer_score is not None
    scores = [span.score for span in reply.spans]
    highest = max(*scores, reply.no_answer_score)
    total = sum(math.exp(value - highest) for value in (*scores, reply.no_answer_score))
    return [
        {
            "text": span.text,
            "probability": math.exp(span.score - highest) / total,
            "log_prob": span.score,
        }
        for span in reply.spans
    ]
