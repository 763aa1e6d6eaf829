"""What the stages take: a dataclass per group of flags.

Each field is a flag and a key of the configuration file; ``llama_squad.config`` parses them, and
``llama_squad.checks`` checks their values.
"""

# Long: it is the table of all flags.

import dataclasses
from typing import Any, Literal

from llama_squad.prompts import PROMPTS, SYSTEM_PROMPT, ActsFrom
from llama_squad.report import Format

DEFAULT_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"


SPAN_BEAMS = 4
"""Beams of span decoding where none are given; benchmarks/RESULTS.md says why so many."""


def _option(default: Any, help_text: str, **metadata: Any) -> Any:
    extra = {"help": help_text, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=extra)
    return dataclasses.field(default=default, metadata=extra)


_DATASET_HELP = "Folder of the dataset that create_squad_dataset.py builds."

_SYSTEM_HELP = 'System prompt ("" for none).'

_PROMPT_HELP = (
    "Prompt style: one user turn, context before question (single_turn), question before context "
    "(question_first) or before and after it (question_twice: these share no contexts); or "
    "multi_turn, three with the model called turn by turn."
)

_TEMPLATE_HELP = "Jinja file with a chat template, for a tokenizer that has none of its own."


@dataclasses.dataclass(frozen=True)
class CreateArguments:
    """What ``create_squad_dataset.py`` takes."""

    dataset_name: str = _option("data/squad_v2", "Folder to write the dataset to.")
    source: str = _option("rajpurkar/squad_v2", "SQuAD v2 dataset on the Hub, or a local copy.")
    train_files: list[str] | None = _option(
        None,
        "Training files: SQuAD's JSON, or rows with context, question, answer as JSON, JSON lines, "
        "CSV or parquet (docs/own-data.md); globs allowed. Replaces --source.",
    )
    test_files: list[str] | None = _option(None, "Test files, of the same forms.")
    mend: bool = _option(
        False,
        "Take the best guess for questions that can be read in several ways: the nearest place of "
        "an answer whose offset is wrong, a number added to an id that another question has.",
    )
    skip_bad: bool = _option(
        False, "Leave out questions that cannot be used, and list them beside the dataset."
    )
    sample: bool = _option(False, "Use the small world bundled in quickstart/data.")
    feedback: str | None = _option(
        None,
        "Verdicts that were given on the page, data/feedback.jsonl: their questions go to train, "
        "with the reviewers' answers (docs/feedback.md).",
    )
    replay: float | None = _option(
        None,
        "With --feedback: keep only so many old questions for each corrected one, 100 at least, "
        "whole paragraphs at random, for a training that goes on from an adapter (default: all).",
    )
    prompt: str = _option("single_turn", _PROMPT_HELP, choices=list(PROMPTS))
    system_prompt: str = _option(SYSTEM_PROMPT, _SYSTEM_HELP)
    validation_ratio: float = _option(
        0.05, "Share of the training questions to hold out for validation, by whole titles."
    )
    seed: int = _option(42, "Seed of the split.")


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """Which model, and how it is loaded; shared by training, evaluation and the demo."""

    model_name: str = _option(DEFAULT_MODEL, "Base model: a name on the Hub, or a folder.")
    chat_template: str | None = _option(None, _TEMPLATE_HELP)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "Weights' type: auto is bfloat16 on CUDA, and on a CPU with AMX or AVX512-BF16 for a model "
        "that was saved in 16 bits; else float32, also where a model trained here was saved so.",
    )
    attn_implementation: str | None = _option(
        None, "Attention: sdpa, eager, flash_attention_2... (default: the library's choice)."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _option("nf4", "4-bit data type.")
    bnb_4bit_use_double_quant: bool = _option(
        True,
        "Quantise the quantisation constants too: 0.4 bits per parameter less, a bit slower.",
    )


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """What ``train_llama_squad.py`` takes beside ``ModelArguments`` and TRL's ``SFTConfig``."""

    dataset_name: str = _option("data/squad_v2", _DATASET_HELP)
    from_adapter: str | None = _option(
        None,
        "Go on from this adapter, a folder or a name on the Hub, instead of a new one: it brings "
        "its base model, --quantize and --dtype as it was trained with, and the LoRA settings. It "
        "stays as it is; see --output_dir.",
    )
    quantize: bool = _option(True, "QLoRA: hold the frozen base in 4 bits (--no_quantize: not).")
    full_parameters: bool = _option(
        False, "Train every weight, without LoRA (implies --no_quantize)."
    )
    lora_r: int = _option(64, "LoRA rank.")
    lora_alpha: int = _option(16, "LoRA alpha; updates are scaled by alpha / r.")
    lora_dropout: float = _option(0.1, "LoRA dropout.")
    lora_target_modules: list[str] = _option(
        ["all-linear"], "Names of the modules to adapt, or all-linear."
    )
    use_rslora: bool = _option(False, "Scale by alpha / sqrt(r) (rank-stabilised LoRA).")
    use_dora: bool = _option(False, "Weight-decomposed LoRA: slower, sometimes better.")
    alora_from: ActsFrom = _option(
        "start",
        "Where the adapter begins to act. start: everywhere, plain LoRA. The others are activated "
        "LoRA, which leaves plain chat to the base model and cannot be merged: context: from the "
        "context on; question: on the question and the reply; reply: from the opening of the reply "
        "on. With the last two the context is the base model's own, too.",
    )
    chat_share: float = _option(
        0.0,
        "Share of the training conversations that is plain chat: the base's own replies to bundled "
        "prompts, made at the first run and kept beside the dataset. They are longer than answers, "
        "so their share of the loss is larger.",
    )
    chat_kl: float = _option(
        0.0,
        "Weight of the divergence KL(base || tuned) on the replies of --chat_share, added to their "
        "loss: holds the whole distribution to the base's, at the cost of a pass of the base.",
    )
    loss_on: Literal["reply", "all"] = _option(
        "reply",
        "Where the loss falls: on the answer, or on all tokens of each example, so that a context "
        "counts once for each of its questions. Their logits take memory: see --row_tokens.",
    )
    reasoning_tokens: int = _option(
        0, "Learnable tokens between prompt and answer: room to think (0: none)."
    )
    filler: int = _option(
        0,
        'Words of filler ("blah") before the answer, hidden from all other tokens: a control for '
        "what a longer prompt alone changes.",
    )
    share_context: bool = _option(
        True, "Train the questions of a paragraph in one row that holds its context once."
    )
    row_tokens: int = _option(
        2048,
        "Token budget of a row of several paragraphs; one paragraph may need more, up to "
        "--max_seq_length.",
    )
    eval_samples: int = _option(
        200, "Validation questions answered by real generation at each evaluation (0: all)."
    )
    merge_and_push: bool = _option(
        False,
        "At the end merge the adapter into the model, and push both where --hub_model_id "
        "and a token are given.",
    )
    merged_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "Type of the merged model's weights: auto is the base's as it was loaded (--dtype). In 16 "
        "bits they are rounded at random, so that small updates survive on average; in float32 "
        "nothing is lost, in a file of twice the size.",
    )
    resume_anyway: bool = _option(
        False,
        "Go on from a checkpoint although this run lays its questions out otherwise, or follows "
        "another schedule; without it the differences are named, and refused.",
    )
    show_mask: int = _option(
        0, "Print this many examples with their supervised tokens in colour, and exit."
    )


@dataclasses.dataclass
class TrainerArguments:
    """The fields of TRL's ``SFTConfig`` that matter most, with this project's defaults.

    ``SquadSFTConfig`` of ``llama_squad.training.arguments`` adds all others. These stand here so
    that a command line can be checked, and ``--help`` shown, without the seconds that importing TRL
    takes.
    """

    output_dir: str | None = _option("results", "Folder of checkpoints, logs and the final model.")
    per_device_train_batch_size: int = _option(
        8, "Questions at once on each device, also where they share contexts."
    )
    per_device_eval_batch_size: int = _option(8, "The same for validation.")
    gradient_accumulation_steps: int = _option(1, "Batches before the weights are updated.")
    num_train_epochs: float = _option(3.0, "Epochs to train.")
    max_steps: int = _option(-1, "Steps to train, in place of epochs (-1: go by epochs).")
    learning_rate: float = _option(
        2e-7,
        "Peak learning rate. Low on purpose: at 2e-4 Llama 2 learned the task quickly and forgot "
        "English as quickly; 2e-7 keeps the chat ability.",
    )
    bf16: bool = _option(
        None,  # resolved by SquadSFTConfig, so that one given is told apart
        "Compute in bfloat16 (default: on GPUs, and CPUs with AMX or AVX512-BF16; others crawl).",
    )
    max_length: int | None = _option(
        4096,
        "Longest example and row in tokens; longer examples are left out and counted.",
        aliases=["--max_seq_length"],
    )
    train_sampling_strategy: str = _option(
        "group_by_length",
        "Order of plain batches (--no_share_context): random, sequential or group_by_length. Rows "
        "that share contexts are balanced, and shuffled.",
    )
    eval_strategy: str = _option("steps", "When to validate: no, steps or epoch.")
    eval_steps: float | None = _option(500, "Validate every so many steps (a ratio if below 1).")
    logging_steps: float = _option(10, "Log every so many steps.")
    save_steps: float = _option(500, "Save a checkpoint every so many steps.")
    report_to: None | str | list[str] = _option(  # noqa: RUF036 - the parser takes this order only
        "auto", "Trackers; auto: TensorBoard, and W&B where you are logged in to it."
    )
    resume_from_checkpoint: str | None = _option(
        None,
        "A checkpoint's folder; `latest` for the last of a run like this; `auto`: if there is one.",
    )
    hub_model_id: str | None = _option(
        None, "Repository on the Hub to push to (USER/NAME); the merged model goes to NAME-merged."
    )


@dataclasses.dataclass(frozen=True)
class EvalArguments:
    """What ``test_llama_squad.py`` takes beside ``ModelArguments``."""

    adapter_name: str | None = _option(None, "Adapter: a folder, or a name on the Hub.")
    predictor: Literal["local", "server", "encoder"] = _option(
        "local",
        "Who answers: a chat model loaded here, one behind a server, or a BERT-like encoder.",
    )
    base_url: str | None = _option(
        None,
        "Server of --predictor server (default: OpenAI's own): its model's name goes to "
        "--model_name, its key to OPENAI_API_KEY, and it always decodes freely.",
    )
    concurrency: int = _option(32, "Questions that a server is asked at once.")
    timeout: float = _option(600.0, "Seconds to wait for a server's reply.")
    temperature: float = _option(0.0, "Temperature that a server is asked for.")
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] | None = _option(
        None, "The server's name for --max_new_tokens (default: found out by asking)."
    )
    structured_output: bool = _option(
        False, "Ask the server to hold replies to the JSON schema of the answer."
    )
    dataset_name: str = _option("data/squad_v2", _DATASET_HELP)
    split: Literal["train", "val", "test"] = _option("test", "Split to answer.")
    prompt: str = _option("single_turn", _PROMPT_HELP, choices=list(PROMPTS))
    system_prompt: str = _option(SYSTEM_PROMPT, _SYSTEM_HELP)
    reasoning_tokens: int = _option(0, "Learnable tokens before the answer (the adapter knows).")
    filler: int = _option(0, "Words of filler before the answer (the adapter knows).")
    quantize: bool = _option(False, "Load the model in 4 bits.")
    decoding: Literal["span", "free"] = _option(
        "span", "span: only substrings of the context, or no answer. free: whatever is likeliest."
    )
    span_boundaries: Literal["word", "any"] = _option(
        "word",
        "Where spans may begin and end: word: at word boundaries, and they hold a letter or digit. "
        "any: at any character.",
    )
    num_beams: int | None = _option(
        None, f"Beams of the search (default: {SPAN_BEAMS} for spans, 1 for free decoding)."
    )
    length_penalty: float = _option(
        0.0,
        "Free decoding with several beams: a reply counts log P / tokens ** this, as in generate "
        "(0: the likeliest reply).",
    )
    stop_after_answer: bool = _option(
        None,  # resolved by resolve_decoding, so that one given is told apart
        "Free decoding: end a reply with the fence of its answer, as nothing after it counts "
        "(default: with one beam, where no figure changes by it). false: to see what comes next.",
    )
    batch_size: int | None = _option(
        None,
        "Questions at once, in whole paragraphs; halved by itself on out-of-memory "
        "(default: 32, more on a GPU with room for them).",
    )
    max_new_tokens: int = _option(256, "Length limit of a reply.")
    na_prob_thresh: float | None = _option(
        None, "Abstain where na_prob is above this (default: the adapter's tuned one, else 0.5)."
    )
    tune_threshold: bool = _option(
        False,
        "Pick the threshold on the validation split first, and keep it with the adapter; on a "
        "sample of it (--num_samples), for this run alone.",
    )
    tune_for: Literal["exact", "f1"] = _option(
        "exact", "Which official score --tune_threshold makes as high as it can."
    )
    no_answer_share: float | None = _option(
        None,
        "The share of questions without an answer to expect in use, for --tune_threshold and "
        "--calibrate to go by (default: that of the validation split).",
    )
    calibrate: bool = _option(
        False,
        "With --tune_threshold: fit na_prob to how often there is no answer on the validation "
        "split, too (Platt scaling), and keep that with the threshold.",
    )
    n_best: int = _option(
        0, "Find this many best spans of each question: JSON, in a column of the result file."
    )
    num_samples: int | None = _option(None, "Answer only this many questions.")
    shuffle: bool = _option(False, "Take the questions in random order (see --seed).")
    sample: Literal["questions", "paragraphs"] = _option(
        "questions",
        "What --num_samples counts out: questions, or whole paragraphs at random until they hold "
        "so many: faster, as their questions share the context, but those of one paragraph are "
        "alike, so the figures vary more.",
    )
    seed: int = _option(42, "Seed of --shuffle and --sample paragraphs.")
    output: str = _option("results/results.csv", "Result file, appended to and resumable.")
    predictions_dir: str | None = _option(
        None, "Also write the official predictions.json and na_prob.json into this folder."
    )
    overwrite: bool = _option(False, "Start the result file anew.")


def resolve_decoding(args: EvalArguments) -> EvalArguments:
    """Return the arguments with the decoding, beams and end of a reply that they mean."""
    if args.predictor == "server":
        args = dataclasses.replace(args, decoding="free")  # it knows nothing of spans
    local = args.predictor == "local"
    beams, stop = args.num_beams, args.stop_after_answer
    if beams is None:
        beams = SPAN_BEAMS if local and args.decoding == "span" else 1
    if stop is None:
        stop = local and args.decoding == "free" and beams == 1
    return dataclasses.replace(args, num_beams=beams, stop_after_answer=stop)


@dataclasses.dataclass(frozen=True)
class AppArguments:
    """What ``app.py`` takes beside ``ModelArguments``."""

    adapter_name: str | None = _option(None, "Adapter: a folder, or a name on the Hub.")
    dataset_name: str = _option("data/squad_v2", "Dataset that the random questions come from.")
    prompt: str = _option("single_turn", _PROMPT_HELP, choices=list(PROMPTS))
    system_prompt: str = _option(SYSTEM_PROMPT, _SYSTEM_HELP)
    reasoning_tokens: int = _option(0, "Learnable tokens before the answer (the adapter knows).")
    filler: int = _option(0, "Words of filler before the answer (the adapter knows).")
    quantize: bool = _option(False, "Load the model in 4 bits.")
    max_new_tokens: int = _option(512, "Length limit of a reply, in tokens.")
    chat_adapter: bool = _option(
        False,
        "Leave the adapter on in chat, too (default: the base chats). An activated one takes no "
        "part in chat.",
    )
    feedback: str = _option("data/feedback.jsonl", "File that verdicts are appended to.")
    review: str | None = _option(
        None,
        "What to review: a result file, or questions of your own, with answers or without. The "
        "splits of --dataset_name, and files to upload, are there too.",
    )
    host: str = _option("127.0.0.1", "Address to listen on; any but this machine's needs --auth.")
    port: int = _option(7860, "Port to listen on.")
    share: bool = _option(False, "Open a public Gradio link; needs --auth.")
    auth: list[str] | None = _option(
        None,
        "Who may come in: NAME:PASSWORD, several allowed, or files of such lines. Verdicts are "
        "signed with the name.",
    )


@dataclasses.dataclass(frozen=True)
class SummarizeArguments:
    """What ``summarize_results.py`` takes."""

    results: list[str] = _option(
        ["results/results.csv"],
        "Result files, one row each; NAME=FILE names the row. They may also stand first on the "
        "command line, without the flag.",
    )
    format: Format = _option("table", "Form of the summary.")
    intervals: bool = _option(
        False,
        "Show 95 %% confidence intervals below the figures, too (csv and json always hold them).",
    )
    paired: bool = _option(
        False,
        "Show what each file gains over the first one on the questions that both hold, with paired "
        "95 %% intervals.",
    )
    data: str | None = _option(
        None, "Dataset in the official SQuAD JSON form, to score --predictions on."
    )
    predictions: str | None = _option(None, "Prediction file in the official form: {id: answer}.")
    na_prob: str | None = _option(
        None, "No-answer probabilities in the official form: {id: probability}."
    )
    na_prob_thresh: float | None = _option(
        None,
        "Abstain where the no-answer probability is above this (default: as the result file says; "
        "with --predictions 1.0, never).",
    )
    output: str | None = _option(None, "Also save the summary in this file.")
    plot: str | None = _option(None, "Draw the no-answer probabilities into this folder.")
