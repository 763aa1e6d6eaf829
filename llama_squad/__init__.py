"""Fine-tune a chat model to answer with the exact words of a context, as JSON, or to abstain."""

__version__ = "1.0.0"
