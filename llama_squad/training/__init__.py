"""A training run: its flags, its rows, its loss, and what it leaves. May use TRL and datasets."""
