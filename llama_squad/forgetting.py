"""Has the model forgotten anything? Two checks of a base model and of what was tuned from it.

Run by eval.sh, with a Python that has lm_eval. The lm-evaluation-harness scores texts that are
given (``harness``); then both models speak, in reply to plain prompts (``chat_check``). Reads the
tuned model; writes the harness's own files, the replies, comparison.md and the benchmarks' figures
as comparison.json to --output_path. What the base did is kept, and taken again for the next tuned
model. Both are asked the same, so the standard error of their difference is the paired one.
"""

import argparse
import dataclasses
import gc
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from llama_squad.arguments import ModelArguments
from llama_squad.config import write_json
from llama_squad.durable import aside_of, check_writable, hold, put_in_place, start_aside
from llama_squad.harness import compare, load_run, paired_errors, run_harness, stay_offline
from llama_squad.report import render_comparison
from llama_squad.sides import Side, Sides, base_key, digest_of, digests, find_sides, version
from llama_squad.weights import acts_from

if TYPE_CHECKING:
    from llama_squad.chat_check import ChatReply
    from llama_squad.encoding import ChatEncoder

RUN_FILE = "run.json"
"""What a run of the harness was made with; written last, so it marks a complete one."""

_HELP = """\
Has the model forgotten anything? Runs lm-evaluation-harness on the base model and on the tuned one,
lets both answer plain prompts, and prints them side by side. MODEL is the folder or the Hub's name
of an adapter, a merged model or a full one.

Example, with the chat template:  ./eval.sh results/final_checkpoints -- --apply_chat_template"""


class Chat(NamedTuple):
    """What the chat check needs, beside the models."""

    encoder: "ChatEncoder"
    prompts: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Run eval.sh."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = _parse(arguments[:cut])
    stay_offline()
    try:
        check_writable(args.output_path / "comparison.md")
        with hold(args.output_path / ".lock", args.output_path, "--output_path"):
            _run(args, arguments[cut + 1 :])
    except (ValueError, OSError) as error:
        _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("\neval.sh: stopped. What the base did is kept, once complete.", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"eval.sh: error: {message}", file=sys.stderr)
    sys.exit(2)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _fail(f"{message} (see --help)")

    parser = Parser(
        "eval.sh", "./eval.sh MODEL [options] [-- options of lm_eval run]", _HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL")
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
        "--dtype",
        help="type of the weights (default: auto, which is the checkpoint's for lm_eval, and the "
        "stages' for our own check; float32 on a CPU)",
    )
    parser.add_argument(
        "--batch_size", metavar="N", help="a number or auto (default: auto; 8 on a CPU)"
    )
    parser.add_argument(
        "--output_path", type=Path, default=Path("results/lm_eval"), metavar="DIR",
        help="folder of the results (default: results/lm_eval)",
    )  # fmt: skip
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat_prompts",
        type=Path,
        metavar="FILE",
        help="prompts, one per line (default: 40 of ours)",
    )
    chat.add_argument("--no_chat", action="store_true", help="only run lm_eval")
    return _resolve(parser.parse_args(arguments))


def _resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the machine."""
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.device == "cpu":
            print("No CUDA device: evaluating on the CPU.", file=sys.stderr)
    on_cpu = args.device == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "auto")
    args.batch_size = args.batch_size or ("8" if on_cpu else "auto")
    return args


def _run(args: argparse.Namespace, options: Sequence[str]) -> None:
    """Make both checks, and print each as it is known."""
    sides = find_sides(args.model, args.base)
    chat = None if args.no_chat else _prepare_chat(args, sides.tokenizer)
    key = base_key(args, sides)
    text = compare_benchmarks(args, options, sides, key)
    print(text, end="", flush=True)
    file = args.output_path / "comparison.md"
    file.write_text(text, encoding="utf-8")  # at once: the rest may fail
    if chat:
        said = "\n" + compare_chat(args, sides, chat, key)
        print(said, end="")
        file.write_text(text + said, encoding="utf-8")


# Given texts ---------------------------------------------------------------------------------


def compare_benchmarks(
    args: argparse.Namespace,
    options: Sequence[str],
    sides: Sides,
    key: Mapping[str, Any],
) -> str:
    """Run the harness on both sides, where the base's run is not there yet; return the table.

    Args:
        args: eval.sh's own flags.
        options: further options of ``lm_eval run``.
        sides: the models.
        key: see ``base_key``.

    Raises:
        ValueError: the harness fails.
    """
    command = [
        "--tasks", args.tasks, "--device", args.device, "--batch_size", args.batch_size,
        *(["--limit", args.limit] if args.limit else []),
        *(["--include_path", args.include_path] if args.include_path else []),
        *options,
    ]  # fmt: skip
    whole_key = {
        **key,
        "command": command,
        "files": digests(args.include_path, "*.yaml", "*.py"),
        "lm_eval": version("lm_eval"),
    }
    folders = args.output_path / f"base-{digest_of(whole_key)}", args.output_path / "tuned"
    if (folders[0] / RUN_FILE).is_file():
        print(f"Taking the base's run in {folders[0]} again.", file=sys.stderr)
    else:
        _evaluate(args, sides.base, sides.tokenizer, command, folders[0])
        write_json(folders[0] / RUN_FILE, whole_key)
    acts = acts_from(sides.tuned.adapter) if sides.tuned.adapter else "start"
    if acts == "start":
        _evaluate(args, sides.tuned, sides.tokenizer, command, folders[1])
    else:
        print(
            f"The adapter acts from the {acts} of its task on, and takes no part in other texts: "
            "the base's run stands for both.", file=sys.stderr,
        )  # fmt: skip
        folders = folders[0], folders[0]
    before, after = map(load_run, folders)
    errors = paired_errors(before, after)
    write_json(args.output_path / "comparison.json", compare(before, after, errors))
    return render_comparison(before.results, after.results, errors)


def _evaluate(
    args: argparse.Namespace, side: Side, tokenizer: str, command: Sequence[str], folder: Path
) -> None:
    """Run the harness on one side; its files take their place in ``folder`` once complete."""
    aside = aside_of(folder)
    start_aside(aside)
    model = side.model
    if args.quantize:
        model = str(aside / "4bit")
        _save_in_4_bits(args, side.model, tokenizer, model)
    # As JSON: a list of name=value would be split at the commas of a path.
    model_args = {"pretrained": model, "tokenizer": tokenizer, "dtype": args.dtype}
    if side.adapter:
        model_args["peft"] = side.adapter
    print(f"Evaluating {side.adapter or side.model} ...", file=sys.stderr)
    run_harness(
        [
            "--model", "hf", "--output_path", str(aside), "--log_samples",
            "--model_args", json.dumps(model_args), *command,
        ],
        folder.with_name(f"{folder.name}.log"),
    )  # fmt: skip
    if not any(aside.rglob("results_*.json")):
        raise ValueError(f"lm_eval left no figures: see {folder}.log")
    shutil.rmtree(aside / "4bit", ignore_errors=True)
    put_in_place(aside, folder)


def _save_in_4_bits(args: argparse.Namespace, model: str, tokenizer: str, folder: str) -> None:
    """Save a 4-bit copy: lm_eval's own load_in_4bit=True fails with transformers 5."""
    import torch

    from llama_squad.modeling import load_model, load_tokenizer

    arguments = ModelArguments(model_name=model, dtype=args.dtype)
    loaded = load_model(arguments, quantize=True, where=args.device)
    loaded.save_pretrained(folder)
    del loaded
    gc.collect()
    if torch.cuda.is_available():  # lm_eval runs in a process of its own, on the same GPU
        torch.cuda.empty_cache()
    load_tokenizer(ModelArguments(model_name=tokenizer)).save_pretrained(folder)


# Plain prompts -------------------------------------------------------------------------------


def _prepare_chat(args: argparse.Namespace, tokenizer: str) -> Chat | None:
    """Load what the chat check needs, before the long run; None, and said, without a template."""
    from llama_squad.chat_check import CHAT_PROMPTS, read_prompts
    from llama_squad.encoding import ChatEncoder
    from llama_squad.modeling import load_tokenizer

    prompts = read_prompts(args.chat_prompts or CHAT_PROMPTS)
    loaded = load_tokenizer(ModelArguments(model_name=tokenizer))
    if not loaded.chat_template:
        print(f"No chat check: the tokenizer of {tokenizer} has no chat template.", file=sys.stderr)
        return None
    return Chat(ChatEncoder(loaded), prompts)


def compare_chat(args: argparse.Namespace, sides: Sides, chat: Chat, key: Mapping[str, Any]) -> str:
    """Let both sides answer prompts, where the base's replies are not there yet; return the table.

    An adapter is switched on and off on weights loaded once; else one model is loaded at a time.

    Raises:
        ValueError: a model cannot be loaded.
    """
    from llama_squad import chat_check
    from llama_squad.activation import adapter_off
    from llama_squad.modeling import choose_device

    choose_device()
    whole_key = {**key, "prompts": chat.prompts}
    file = args.output_path / f"chat-base-{digest_of(whole_key)}.json"
    before = _read_replies(file)
    if before:
        print(f"Taking the base's replies in {file} again.", file=sys.stderr)
    model = _load(args, sides.tuned)
    spoken = _speak(sides.tuned, model, chat)
    if not sides.tuned.adapter:
        del model
        gc.collect()  # so that its memory is free for the base
        model = _load(args, sides.base)
    with adapter_off(model):
        after = chat_check.judge(model, *chat, spoken)
        if not before:
            before = chat_check.judge(model, *chat, _speak(sides.base, model, chat))
    for path, replies in ((file, before), (args.output_path / "chat-tuned.json", after)):
        write_json(path, {"replies": [dataclasses.asdict(reply) for reply in replies]})
    return chat_check.render_chat(before, after)


def _load(args: argparse.Namespace, side: Side) -> Any:
    from llama_squad.modeling import attach_adapter, load_model

    arguments = ModelArguments(model_name=side.model, dtype=args.dtype)
    model: Any = load_model(arguments, args.quantize, where=args.device)
    return (attach_adapter(model, side.adapter, side.model) if side.adapter else model).eval()


def _speak(side: Side, model: Any, chat: Chat) -> list[list[int]]:
    from tqdm import tqdm

    from llama_squad.chat_check import speak

    name = f"Asking {side.adapter or side.model}"
    with tqdm(total=len(chat.prompts), desc=name, unit="prompt") as bar:
        return speak(model, *chat, progress=bar.update)


def _read_replies(file: Path) -> "list[ChatReply]":
    from llama_squad.chat_check import ChatReply

    if not file.is_file():
        return []
    return [ChatReply(**reply) for reply in json.loads(file.read_text("utf-8"))["replies"]]


if __name__ == "__main__":
    main()
