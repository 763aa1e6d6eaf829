"""Who answers, by the flags of an evaluation. Loads the libraries of that one only."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_squad.arguments import EvalArguments, ModelArguments
from llama_squad.config import prompt_settings
from llama_squad.weights import saved_settings

if TYPE_CHECKING:
    from llama_squad.predictors.base import Predictor


def adapter_settings(parsed: Sequence[Any]) -> Mapping[str, Any]:
    """Return what trained weights bring: base model, prompt and reasoning tokens.

    Behind a server they are known where its name for them is a folder here.
    """
    if parsed[0].predictor == "server":
        folder = parsed[1].model_name
        return prompt_settings(saved_settings(None, folder)) if Path(folder).is_dir() else {}
    if parsed[0].predictor != "local":
        return {}
    return saved_settings(parsed[0].adapter_name, parsed[1].model_name)


def load_predictor(args: EvalArguments, model_args: ModelArguments) -> "Callable[..., Predictor]":
    """Load who answers; return what makes it for some options of ``Generator``.

    Raises:
        ValueError: it cannot be loaded.
    """
    chat: dict[str, Any] = {
        "prompt": args.prompt,
        "system_prompt": args.system_prompt,
        "max_new_tokens": args.max_new_tokens,
    }
    if args.predictor == "server":
        from llama_squad.predictors.server import ServerModel

        server = ServerModel(
            model_args.model_name, args.base_url, temperature=args.temperature,
            timeout=args.timeout, concurrency=args.concurrency,
            max_tokens_name=args.max_tokens_name, structured_output=args.structured_output, **chat,
        )  # fmt: skip
        return lambda **_: server
    from llama_squad import modeling

    modeling.choose_device()
    if args.predictor == "encoder":
        from llama_squad.predictors.extractive import ExtractiveModel

        reader, tokenizer = modeling.load_reader(model_args)
        return lambda na_prob_thresh, **_: ExtractiveModel(reader, tokenizer, na_prob_thresh)
    from llama_squad.predictors.local import LocalModel

    encoder = modeling.load_encoder(
        model_args, args.reasoning_tokens, args.adapter_name, args.filler
    )
    weights = modeling.load_model(model_args, args.quantize, args.adapter_name).eval()
    return partial(
        LocalModel, weights, encoder, decoding=args.decoding, num_beams=args.num_beams,
        length_penalty=args.length_penalty, span_boundaries=args.span_boundaries,
        stop_after_answer=bool(args.stop_after_answer), **chat,
    )  # fmt: skip
