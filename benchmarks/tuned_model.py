"""What the benchmarks of decoding ask: a model as it was tuned, or a base."""

import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

sys.path.append(str(Path(__file__).resolve().parent.parent))
from llama_squad import modeling
from llama_squad.arguments import ModelArguments
from llama_squad.config import prompt_settings
from llama_squad.encoding import ChatEncoder
from llama_squad.weights import saved_settings


def load_tuned(
    model: str, adapter: str | None, dtype: str
) -> tuple[PreTrainedModel, ChatEncoder, dict[str, Any]]:
    """Return a model in evaluation mode, its encoder, and the prompt that it was trained on.

    The last are keywords of ``LocalModel``; ``adapter`` may be a folder or a name on the Hub.
    """
    brought = saved_settings(adapter, model)
    args = ModelArguments(model_name=model, dtype=dtype)  # type: ignore[arg-type]
    tokens, filler = brought.get("reasoning_tokens", 0), brought.get("filler", 0)
    encoder = modeling.load_encoder(args, tokens, adapter, filler)
    return modeling.load_model(args, False, adapter).eval(), encoder, prompt_settings(brought)
