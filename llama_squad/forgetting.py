"""Has the model forgotten anything? The lm-evaluation-harness on a base and what was tuned from it.

Run by eval.sh, with a Python that has lm_eval. Reads the tuned model's folder; writes the harness's
own files and comparison.md to --output_path. The base's run is kept and taken again for the next
tuned model. Both answer the same questions, so the standard error of their difference is that of
the questions' own differences, from the harness's logged samples.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llama_squad.config import ModelArguments, load_run_config, write_json
from llama_squad.report import render_comparison

ROOT = Path(__file__).resolve().parents[1]

RUN_FILE = "run.json"
"""What a run of the harness was made with; written last, so it marks a complete one."""

_HELP = """\
Has the model forgotten anything? Runs lm-evaluation-harness on the base model and on the tuned one,
and prints both side by side. MODEL_FOLDER holds an adapter, a merged model or a full one.

Example, with the chat template:  ./eval.sh results/final_checkpoints -- --apply_chat_template"""

Values = dict[tuple[str, str, str], float]
"""(task, number of the question, digest of the question) → what a metric gives it."""


class Run(NamedTuple):
    """What the harness found for one side."""

    results: dict[str, dict[str, Any]]
    """Task or group → {"metric,filter": figure, ...}."""
    groups: dict[str, list[str]]
    """Group → its tasks or groups."""
    values: dict[tuple[str, str], Values]
    """(task, "metric,filter") → values of the questions."""


class Side(NamedTuple):
    """One of the two models that are compared."""

    model: str
    adapter: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Run eval.sh."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = _parse(arguments[:cut])
    try:
        print(compare(args, arguments[cut + 1 :]), end="")
    except ValueError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("\neval.sh: stopped. A complete run of the base is kept.", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"eval.sh: error: {message}", file=sys.stderr)
    sys.exit(2)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _fail(f"{message} (see --help)")

    parser = Parser(
        "eval.sh", "./eval.sh MODEL_FOLDER [options] [-- options of lm_eval run]", _HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL_FOLDER")
    parser.add_argument(
        "--tasks", default="openllm", metavar="NAMES",
        help="tasks or groups, with commas (default: openllm, the Open LLM Leaderboard v1; v2 is "
        'leaderboard, which needs pip install "lm_eval[math,ifeval]")',
    )  # fmt: skip
    parser.add_argument(
        "--limit", metavar="N", help="questions per task: a number, or a share of it (default: all)"
    )
    parser.add_argument("--include_path", metavar="DIR", help="folder of your own YAML tasks")
    parser.add_argument("--base", metavar="MODEL", help="base model (default: what was tuned)")
    parser.add_argument("--quantize", action="store_true", help="hold both in 4 bits (NF4)")
    parser.add_argument(
        "--device", help="cuda, cuda:1, cpu, mps (default: cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--dtype", help="type of the weights (default: the checkpoint's; float32 on a CPU)"
    )
    parser.add_argument(
        "--batch_size", metavar="N", help="a number or auto (default: auto; 8 on a CPU)"
    )
    parser.add_argument(
        "--output_path", type=Path, default=Path("results/lm_eval"), metavar="DIR",
        help="folder of the results (default: results/lm_eval)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.device == "cpu":
            print("No CUDA device: evaluating on the CPU.", file=sys.stderr)
    on_cpu = args.device == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "auto")
    args.batch_size = args.batch_size or ("8" if on_cpu else "auto")
    return args


def compare(args: argparse.Namespace, options: Sequence[str]) -> str:
    """Run the harness on both sides, where the base's run is not there yet; return the table.

    Args:
        args: eval.sh's own flags.
        options: further options of ``lm_eval run``.

    Raises:
        ValueError: no such model, or the harness fails.
    """
    base, tuned, tokenizer = find_sides(args.model, args.base)
    command = [
        "--tasks", args.tasks, "--device", args.device, "--batch_size", args.batch_size,
        *(["--limit", args.limit] if args.limit else []),
        *(["--include_path", args.include_path] if args.include_path else []),
        *options,
    ]  # fmt: skip
    key = base_key(args, base.model, tokenizer, options)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folders = args.output_path / f"base-{digest}", args.output_path / "tuned"
    if (folders[0] / RUN_FILE).is_file():
        print(f"Taking the base's run in {folders[0]} again.", file=sys.stderr)
    else:
        _evaluate(args, base, tokenizer, command, folders[0])
        write_json(folders[0] / RUN_FILE, key)
    _evaluate(args, tuned, tokenizer, command, folders[1])
    before, after = map(_load_run, folders)
    table = render_comparison(before.results, after.results, paired_errors(before, after))
    (args.output_path / "comparison.md").write_text(table, encoding="utf-8")
    return table


def find_sides(model: str, base: str | None) -> tuple[Side, Side, str]:
    """Return the base, what was tuned from it, and the tokenizer's folder or name for both.

    Both sides take the tuned model's tokenizer, so that nothing but the weights differs.

    Raises:
        ValueError: ``model`` is no folder of an adapter or a model, or does not name its base.
    """
    folder = Path(model)
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise ValueError(
            f"{model} holds neither an adapter nor a model: give the folder of one, such as "
            "train_llama_squad.py writes to results/final_checkpoints"
        )
    if not base and adapter:
        from llama_squad.modeling import saved_settings

        try:
            base = saved_settings(model)["model_name"]
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"{model}/adapter_config.json is damaged: {first}") from error
    elif not base:
        base = load_run_config(folder).get("model", {}).get("model_name")
    if not base:
        raise ValueError(f"{model} names no base model: give it with --base")
    if not Path(base).is_dir() and (ROOT / base).is_dir():  # as seen from where it was trained
        base = str(ROOT / base)
    tokenizer = model if (folder / "tokenizer_config.json").is_file() else base
    return Side(base), Side(base, model) if adapter else Side(model), tokenizer


def base_key(
    args: argparse.Namespace, base: str, tokenizer: str, options: Sequence[str]
) -> dict[str, Any]:
    """Return all that the base's figures depend on."""
    from llama_squad.evaluation import weights_digest

    files = [
        path
        for folder, pattern in [(args.include_path, "*.yaml"), (args.include_path, "*.py"),
                                (tokenizer, "*token*"), (tokenizer, "chat_template*")]
        for path in (sorted(Path(folder).glob(pattern)) if folder else [])
        if path.is_file()
    ]  # fmt: skip
    names = ("tasks", "limit", "include_path", "quantize", "device", "dtype", "batch_size")
    return {
        **{name: getattr(args, name) for name in names},
        "options": list(options),
        "base": base,
        "weights": weights_digest(base),
        "tokenizer": None if Path(tokenizer).is_dir() else tokenizer,
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "lm_eval": _version("lm_eval"),
        "transformers": _version("transformers"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# The harness ---------------------------------------------------------------------------------


def _evaluate(
    args: argparse.Namespace,
    side: Side,
    tokenizer: str,
    command: Sequence[str],
    folder: Path,
) -> None:
    """Run the harness on one side; its files take their place in ``folder`` once complete."""
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model = side.model
    if args.quantize:
        model = str(aside / "4bit")
        _save_in_4_bits(side.model, args.dtype, model, tokenizer)
    # As JSON: a list of name=value would be split at the commas of a path.
    model_args = {"pretrained": model, "tokenizer": tokenizer, "dtype": args.dtype}
    if side.adapter:
        model_args["peft"] = side.adapter
    print(f"Evaluating {side.adapter or side.model} ...", file=sys.stderr)
    run_harness(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--output_path", str(aside),
            "--log_samples", "--model_args", json.dumps(model_args), *command,
        ],
        folder.with_name(f"{folder.name}.log"),
    )  # fmt: skip
    if not any(aside.rglob("results_*.json")):
        raise ValueError(f"lm_eval left no figures: see {folder}.log")
    shutil.rmtree(aside / "4bit", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _save_in_4_bits(model: str, dtype: str, folder: str, tokenizer: str) -> None:
    """Save a 4-bit copy: lm_eval's own load_in_4bit=True fails with transformers 5."""
    from llama_squad.modeling import load_model, load_tokenizer

    arguments = ModelArguments(model_name=model, dtype=dtype)  # type: ignore[arg-type]
    load_model(arguments, quantize=True).save_pretrained(folder)
    load_tokenizer(ModelArguments(model_name=tokenizer)).save_pretrained(folder)


def run_harness(command: Sequence[str], log: Path) -> None:
    """Run lm_eval: its output goes to ``log`` and, up to a traceback, to standard error.

    Without a network it is told so, and takes what is here already instead of trying again.

    Raises:
        ValueError: it fails; the message is its own last line.
    """
    environment = dict(os.environ)
    if not _online():
        environment["HF_HUB_OFFLINE"] = "1"
    show, last, rest = True, b"", b""
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        while chunk := process.stdout.read1(65536):  # type: ignore[attr-defined]
            file.write(chunk)
            *pieces, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
            for piece in pieces:
                show = show and not piece.startswith(b"Traceback (most recent call last)")
                last = piece if piece.strip() else last
                if show:
                    sys.stderr.buffer.write(piece)
                    sys.stderr.buffer.flush()
    if process.returncode:
        line = (rest if rest.strip() else last).decode(errors="replace").strip()
        raise ValueError(f"lm_eval failed: {line or process.returncode}{_cure(line)}. See {log}")


def _online() -> bool:
    """Tell whether the Hub answers at all."""
    if os.environ.get("HF_HUB_OFFLINE"):
        return False
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _cure(line: str) -> str:
    if re.search(r"[Oo]ffline|[Cc]onnect|couldn't reach|huggingface\.co|HTTP|resolve", line):
        return ": it is not here, and the Hub is not reached; check your network, or give a folder"
    return ""


# The comparison ------------------------------------------------------------------------------


def _load_run(folder: Path) -> Run:
    (path,) = folder.rglob("results_*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    values: dict[tuple[str, str], Values] = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = re.sub(r"^samples_(.*)_\d{4}-\d\d-\d\dT[\d.-]+$", r"\1", path.stem)
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                sample = json.loads(line)
                question = (task, str(sample["doc_id"]), str(sample.get("doc_hash")))
                for metric in sample.get("metrics", ()):
                    if isinstance(sample.get(metric), int | float):
                        key = (task, f"{metric},{sample.get('filter', 'none')}")
                        values.setdefault(key, {})[question] = float(sample[metric])
    return Run(content["results"], content.get("group_subtasks", {}), values)


def paired_errors(base: Run, tuned: Run) -> dict[tuple[str, str], float]:
    """Return (task, "metric,filter") → standard error of tuned - base over the same questions.

    It is the standard deviation of the questions' differences over the root of their number. Only
    metrics that are the mean over the questions have one (no perplexity); a group of tasks, that
    of all its questions where its figure is their mean.
    """
    errors = {}
    for task, figures in base.results.items():
        leaves = _leaves(task, base.groups)
        for key in figures:
            before, after = (
                {q: v for leaf in leaves for q, v in run.values.get((leaf, key), {}).items()}
                for run in (base, tuned)
            )
            if len(before) < 2 or before.keys() != after.keys():
                continue
            reported = figures[key], tuned.results.get(task, {}).get(key)
            if _is_mean(reported[0], before.values()) and _is_mean(reported[1], after.values()):
                changes = [after[question] - before[question] for question in before]
                errors[task, key] = statistics.stdev(changes) / len(changes) ** 0.5
    return errors


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> set[str]:
    parts = groups.get(task)
    return {leaf for part in parts for leaf in _leaves(part, groups)} if parts else {task}


def _is_mean(figure: Any, values: Iterable[float]) -> bool:
    return isinstance(figure, int | float) and abs(statistics.fmean(values) - figure) < 1e-6


if __name__ == "__main__":
    main()
