"""Fine-tune a chat model to answer with the exact words of a context, as JSON, or to abstain."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_squad.reader import Reader as Reader

__version__ = "1.0.0"
__all__ = ["Reader"]


def __getattr__(name: str) -> Any:
    """Load what is asked for: importing the package alone must not load torch."""
    if name == "Reader":
        from llama_squad.reader import Reader

        return Reader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
