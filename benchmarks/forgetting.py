"""Task gained against chat kept: what adapters of one base have learned, and what forgotten.

For the base and for each adapter, on the same questions, prompts and texts:

    task        exact match and F1 on dev questions in whole paragraphs (test_llama_squad.py)
    chat        greedy replies to the first prompts of MT-Bench and IFEval: the share that is prose,
                their length and repetition, and their perplexity under the base
    wikitext    perplexity of the first tokens of WikiText-2's test split
    benchmarks  accuracy on ARC easy, HellaSwag, PIQA and LAMBADA (eval.sh, with --eval_python)

and for each adapter the differences to the base with their paired standard errors. An activated
adapter (--alora_from) takes no part in chat, given texts and benchmarks, as in the product.

    python benchmarks/forgetting.py --base MODEL --adapter "2e-4=DIR" --adapter "8e-4=DIR"
    python benchmarks/forgetting.py --plot docs/images/forgetting.svg

What was measured is kept in --work, a batch at a time: the same command resumes where it stopped,
and adapters can be added later. Options of test_llama_squad.py come after "--".
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from forgetting_figures import (
    Figures,
    compare_chat,
    compare_rows,
    compare_windows,
    trained_with,
)

sys.path.append(str(Path(__file__).resolve().parent.parent))
from llama_squad.activation import adapter_off
from llama_squad.arguments import ModelArguments
from llama_squad.chat_check import ChatReply, judge, speak
from llama_squad.config import provenance, write_json
from llama_squad.encoding import ChatEncoder
from llama_squad.plots import plot_forgetting
from llama_squad.result_reader import read_results
from llama_squad.results import config_path
from llama_squad.rows import Row
from llama_squad.weights import weights_digest, whole_model

ROOT = Path(__file__).resolve().parent.parent
BASE = "base"
TASKS = ["local_arc_easy", "local_hellaswag", "local_piqa", "local_lambada"]
DATA_FILES = ("mt_bench_questions.jsonl", "ifeval_prompts.jsonl", "wikitext2_test.jsonl")
WINDOW = 512
"""Tokens of WikiText that are read at once; each window's first one is not predicted."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--base", help="base model (default: only draw what --output holds)")
    add("--adapter", action="append", default=[], metavar="NAME=DIR", help="an adapter; several")
    add("--results", action="append", default=[], metavar="NAME=FILE",
        help="a result file, in place of a run of test_llama_squad.py; also base=FILE")  # fmt: skip
    add("--dataset_name", default="data/squad_v2", help="dataset's folder")
    add("--questions", type=int, default=2000, help="dev questions, in whole paragraphs")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data" / "benchmarks",
        help="folder of prompts, WikiText-2 and tasks/: see docs/stages.md")  # fmt: skip
    add("--prompts", type=int, nargs=2, default=[80, 100], metavar=("MT_BENCH", "IFEVAL"))
    add("--reply_tokens", type=int, default=128, help="length limit of a chat reply")
    add("--batch_size", type=int, default=20, help="chat prompts at once")
    add("--wikitext_tokens", type=int, default=32768)
    add("--limit", type=int, default=150, help="questions of each benchmark")
    add("--eval_python", help="Python that has lm_eval (default: leave the benchmarks out)")
    add("--dtype", default="auto", help="type of the base's weights, as for the stages")
    add("--work", type=Path, default=Path("results/forgetting"), help="where all is kept")
    add("--output", type=Path, default=ROOT / "results_published" / "forgetting.json")
    add("--plot", type=Path, help="picture to draw, .svg or .png")
    arguments = list(sys.argv[1:] if argv is None else argv)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    args.test_options, args.command = arguments[cut + 1 :], arguments
    args.adapter, args.results = (dict(map(_pair, v)) for v in (args.adapter, args.results))
    if BASE in args.adapter:
        parser.error(f"no adapter may be called {BASE}")
    if args.wikitext_tokens < WINDOW:
        parser.error(f"--wikitext_tokens must be at least {WINDOW}, a window")
    if not args.base and (args.adapter or args.results or not args.plot):
        parser.error("nothing to do: measure with --base, or draw with --plot")
    if unknown := args.results.keys() - {BASE, *args.adapter}:
        parser.error(f"--results of no --adapter: {', '.join(sorted(unknown))}")
    return args


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError for a folder or file that is missing, before anything is measured."""
    for folder in args.adapter.values():
        if not Path(folder).is_dir():
            raise ValueError(f"no folder {folder}: train that adapter first")
    wanted = [args.data / name for name in DATA_FILES]
    if args.eval_python:
        wanted.append(args.data / "tasks")
    for path in (*wanted, *map(Path, args.results.values())):
        if not path.exists():
            raise ValueError(f"no {path}: docs/stages.md says what --data and --results hold")


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not value or "/" in name:
        raise SystemExit(f"forgetting.py: expected NAME=PATH, not {text}")
    return name, value


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not known yet, the base first, and draw."""
    args = parse(argv)
    try:
        if args.base:
            check_files(args)
            study = Study(args)
            for name in (BASE, *args.adapter):
                study.measure(name)
        if args.plot:
            if not args.output.is_file():
                raise ValueError(f"no {args.output} to draw: measure with --base first")
            plot_forgetting(json.loads(args.output.read_text("utf-8"))["models"], args.plot)
            print(f"Drew {args.plot}.")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"forgetting.py: {error}")


# Measuring -----------------------------------------------------------------------------------


class Study:
    """What is measured of the base and of its adapters, and where it is kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._prompts = read_prompts(args.data, args.prompts)
        self._base_digest = weights_digest(args.base)
        self._published: Figures = {"models": {}}
        settings = {name: getattr(args, name) for name in SETTINGS} | {
            "test": args.test_options,
            "base": self._base_digest or args.base,
            "dataset": Path(args.dataset_name).name,
        }
        if args.output.is_file():
            content = json.loads(args.output.read_text("utf-8"))
            if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
                raise ValueError(f"{args.output} holds no such figures: name another by --output")
            self._published, found = content, content["settings"]
            if found != {name: settings.get(name) for name in found}:  # older files say less
                raise ValueError(
                    f"{args.output} holds figures with {found}, not {settings}: "
                    "name another file by --output"
                )
            settings = found
        self._published["settings"] = settings

    def measure(self, name: str) -> None:
        """Measure the base or an adapter, and publish each part as it is known."""
        adapter = self._args.adapter.get(name)
        figures: Figures = self._published["models"].setdefault(name, {})
        if adapter:
            figures["adapter"] = adapter
            figures["trained_with"] = trained_with(adapter)
        for part, measured in self._parts(name, adapter):
            if name == BASE:
                measured.pop("paired")
            figures[part] = measured
            made = {"command": "python benchmarks/forgetting.py " + shlex.join(self._args.command)}
            write_json(self._args.output, self._published | made | provenance())
            print(f"{name}: {part} {json.dumps(measured)[:300]}", flush=True)

    def _parts(self, name: str, adapter: str | None) -> Iterable[tuple[str, Figures]]:
        yield "task", compare_rows(*(self._answers(each) for each in (BASE, name)))
        model: list[Any] = []  # loaded when it is needed, once
        base = model if name == BASE else []
        yield "chat", compare_chat(self._chat(BASE, base, base), self._chat(name, model, base))
        windows = self._wikitext(BASE, base), self._wikitext(name, model)
        yield "wikitext", compare_windows(*windows, WINDOW - 1)
        if self._args.eval_python and adapter:
            yield "benchmarks", self._benchmarks(name, adapter)

    def _kept(self, name: str, part: str, **made_from: Any) -> tuple[Path, Figures]:
        """Return where a part is kept, and what is there; it must be of the same weights."""
        adapter = self._args.adapter.get(name)
        made_from |= {
            "base": self._base_digest or self._args.base,
            "adapter": adapter and weights_digest(adapter),
            "dtype": self._args.dtype,
        }
        path = self._args.work / name / f"{part}.json"
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if content and content["made_from"] != made_from:
            raise ValueError(
                f"{path} was made from {content['made_from']}, not {made_from}: delete it, or name "
                "another folder by --work"
            )
        return path, content or {"made_from": made_from}

    def load(self, name: str, loaded: list[Any]) -> tuple[Any, ChatEncoder]:
        """Load a model, its adapter apart so that it can be switched off, and its encoder."""
        from llama_squad import modeling

        arguments = ModelArguments(model_name=self._args.base, dtype=self._args.dtype)
        if not loaded:
            modeling.choose_device()
            adapter = self._args.adapter.get(name)
            model = modeling.load_model(arguments, adapter_name=adapter, merge=False).eval()
            loaded += [model, modeling.load_encoder(arguments)]
        return loaded[0], loaded[1]

    def _answers(self, name: str) -> list[Row]:
        """Return the answered dev questions; test_llama_squad.py answers what is missing."""
        adapter = self._args.adapter.get(name)
        if name in self._args.results:
            return read_results(self._given(name, adapter))
        file = self._args.work / name / "results.csv"
        own = {"free", "--decoding=free", "--tune_threshold"} & {*self._args.test_options}
        threshold = [] if own else ["--na_prob_thresh", "0.5"]  # not the one kept with an adapter
        mark, content = self._kept(
            name, "task", options=[*threshold, *self._args.test_options],
            questions=self._args.questions, dataset=str(Path(self._args.dataset_name).resolve()),
        )  # fmt: skip
        if not mark.is_file():
            command = [
                sys.executable, str(ROOT / "test_llama_squad.py"), "--model_name", self._args.base,
                "--dtype", self._args.dtype, "--dataset_name", self._args.dataset_name,
                "--sample", "paragraphs", "--num_samples", str(self._args.questions),
                "--output", str(file), *(["--adapter_name", adapter] if adapter else []),
                *threshold, *self._args.test_options,
            ]  # fmt: skip
            subprocess.run(command, check=True)
            write_json(mark, content | {"command": command})
        return read_results(file)

    def _given(self, name: str, adapter: str | None) -> Path:
        """Return the result file that the command line gives; it must be of the same weights.

        A whole model may have been given by either flag.
        """
        path = Path(self._args.results[name])
        if config_path(path).is_file():
            made = json.loads(config_path(path).read_text("utf-8"))
            found = made.get("model_digest"), made.get("adapter_digest")
            right = self._base_digest, weights_digest(adapter)
            if found != right and not (whole_model(adapter) and right[1] in found):
                raise ValueError(
                    f"{path} was made by other weights ({found}, not {right}): leave "
                    f"--results {name} out, or name the file of these"
                )
        return path

    def _chat(self, name: str, loaded: list[Any], base: list[Any]) -> list[ChatReply]:
        """Return the replies to the chat prompts; those that are missing are made."""
        adapter = self._args.adapter.get(name)
        limit, size = self._args.reply_tokens, self._args.batch_size
        by = {"judged_by": self._base_digest} if whole_model(adapter) else {}
        path, content = self._kept(
            name, "chat", prompts=self._prompts, reply_tokens=limit, batch_size=size, **by
        )  # fmt: skip
        replies = content.setdefault("replies", [])
        while len(replies) < len(self._prompts):
            batch = self._prompts[len(replies) : len(replies) + size]
            model, encoder = self.load(name, loaded)
            ids = speak(model, encoder, batch, max_new_tokens=limit, batch_size=size)
            # a whole model has no adapter to be switched off: its base is loaded beside it
            judging = self.load(BASE, base)[0] if whole_model(adapter) else model
            with adapter_off(judging):
                replies += map(dataclasses.asdict, judge(judging, encoder, batch, ids))
            write_json(path, content)
            print(f"{name}: {len(replies)} of {len(self._prompts)} replies", flush=True)
        return [ChatReply(**reply) for reply in replies]

    def _wikitext(self, name: str, loaded: list[Any]) -> list[float]:
        """Return the log-probability of each window of WikiText, in nats."""
        tokens = self._args.wikitext_tokens
        path, content = self._kept(name, "wikitext", tokens=tokens, window=WINDOW)
        if "windows" not in content:
            model, encoder = self.load(name, loaded)
            lines = (self._args.data / DATA_FILES[2]).read_text("utf-8").splitlines()
            text = "\n".join(json.loads(line)["page"] for line in lines)
            ids = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            content["windows"] = score_windows(model, ids[:tokens])
            write_json(path, content)
        return content["windows"]

    def _benchmarks(self, name: str, adapter: str) -> Figures:
        """Return what eval.sh finds of base and adapter: task → metric → figures."""
        from llama_squad.modeling import weights_dtype

        limit = self._args.limit
        path, content = self._kept(name, "benchmarks", limit=limit, tasks=TASKS)
        if "found" not in content:
            dtype = weights_dtype(
                ModelArguments(model_name=self._args.base, dtype=self._args.dtype)
            )
            command = [
                str(ROOT / "eval.sh"), adapter, "--base", self._args.base, "--no_chat",
                "--tasks", ",".join(TASKS), "--limit", str(limit),
                "--include_path", str(self._args.data / "tasks"),
                "--dtype", str(dtype).removeprefix("torch."),
                "--output_path", str(self._args.work / "lm_eval"),
            ]  # fmt: skip
            environment = os.environ | {"PYTHON": self._args.eval_python}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            found = (self._args.work / "lm_eval" / "comparison.json").read_text("utf-8")
            content |= {"command": command, "found": json.loads(found)}
            write_json(path, content)
        return content["found"]


SETTINGS = ("questions", "prompts", "reply_tokens", "wikitext_tokens", "limit", "dtype")


def read_prompts(data: Path, counts: Sequence[int]) -> list[str]:
    """Return the first prompts of MT-Bench (first turns) and IFEval, the shortest first.

    In this order, those that are answered together are about as long.
    """
    prompts = []
    for file, count in zip(DATA_FILES[:2], counts, strict=True):
        lines = (data / file).read_text("utf-8").splitlines()[:count]
        entries = map(json.loads, lines)
        prompts += [entry["turns"][0] if "turns" in entry else entry["prompt"] for entry in entries]
    return sorted(prompts, key=len)


def score_windows(model: Any, ids: Sequence[int]) -> list[float]:
    """Return the summed log-probability of the tokens of each window of ``ids``, in nats."""
    import torch

    scores = []
    with torch.inference_mode():
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            window = torch.tensor([ids[start : start + WINDOW]], device=model.device)
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            scores.append(-loss.item())
    return scores


if __name__ == "__main__":
    main()
