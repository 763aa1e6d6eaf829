"""Who may come in to the page. Loads nothing: a command line is checked with it."""

import ipaddress
import os
from pathlib import Path

from llama_squad.arguments import AppArguments
from llama_squad.folders import check_file


def who_may_come_in(args: AppArguments) -> list[tuple[str, str]]:
    """Return names and passwords. Raises ValueError: there are none, and others can reach the page.

    Whoever can reach the page can write to the feedback file.
    """
    words: list[str] = []
    for word in args.auth or []:
        is_pair = ":" in word and not os.path.isfile(word)  # not Path's, which may raise
        if not is_pair:
            check_file("--auth", word)
        try:
            lines = [word] if is_pair else Path(word).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--auth: cannot read {word}: {error}") from error
        words += filter(str.strip, lines)
    pairs = [(name, password) for name, _, password in (word.partition(":") for word in words)]
    if not all(name and password for name, password in pairs):
        raise ValueError("--auth takes NAME:PASSWORD, or files of such lines")
    if not pairs and (args.share or not _only_here(args.host)):
        open_to = "--share opens" if args.share else f"--host {args.host} opens"
        raise ValueError(f"{open_to} the page to others: say who may come in, --auth NAME:PASSWORD")
    return pairs


def _only_here(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
