"""A real server that is killed midway and refuses one question: what stands in the result file?

Starts `transformers serve` and a proxy before it, which refuses one question for good (HTTP 400,
content_filter) and kills the server (SIGKILL) after half of the replies, then starts it anew. Runs
the evaluation stage through the proxy, then the same command again without the refusal, and
compares the rows with those of the same model loaded here (free decoding, which is greedy as
temperature 0 is). Ends with an error unless each question has one row, the refused one alone is
failed, all others are right, and the second run asks that one only.

    python benchmarks/server_faults.py --model DIR --data dev.json --output /tmp/faults

`transformers serve` needs transformers[serving], the client requirements-predictors.txt.
"""

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llama_squad.data import load_squad  # noqa: E402
from llama_squad.result_reader import read_results  # noqa: E402

START_S = 300
"""Seconds in which the server must answer."""


class Serve:
    """`transformers serve` on a port, which can be killed and started again."""

    def __init__(self, python: str, model: str, port: int, log: Path) -> None:
        self._command = [
            python, "-m", "transformers.cli.transformers", "serve", model, "--device", "cpu",
            "--dtype", "float32", "--port", str(port),
        ]  # fmt: skip
        self.port, self._log = port, log
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start, and return when it answers."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.5)
        sys.exit(f"the server does not start: see {self._log}")

    def kill(self) -> None:
        """End it at once, with whatever it was answering."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


class Proxy(ThreadingHTTPServer):
    """Passes requests on; refuses those that hold ``refused``; kills the server once."""

    daemon_threads = True

    def __init__(self, serve: Serve, refused: str, kill_after: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.serve, self.refused, self.kill_after = serve, refused, kill_after
        self.counts: Counter[str] = Counter()
        self.down_s = 0.0
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        """Count an event, and kill the server when so many replies were given."""
        with self._lock:
            self.counts[what] += 1
            due = what == "answered" and self.counts[what] == self.kill_after
        if due:
            threading.Thread(target=self._restart).start()

    def _restart(self) -> None:
        start = time.monotonic()
        self.serve.kill()
        time.sleep(3)
        self.serve.start()
        self.down_s = time.monotonic() - start


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        messages = json.loads(body)["messages"]
        if self.server.refused and self.server.refused in messages[-1]["content"]:
            self.server.count("refused")
            error = {"message": "the prompt was filtered", "code": "content_filter"}
            self._send(400, json.dumps({"error": error}).encode())
            return
        try:
            connection = HTTPConnection("127.0.0.1", self.server.serve.port, timeout=600)
            connection.request("POST", self.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except OSError:  # the client sees a lost connection, too
            self.server.count("lost")
            self.close_connection = True
            self.connection.close()
            return
        self.server.count("answered")
        self._send(response.status, content)

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def run_stage(args: argparse.Namespace, output: Path, *flags: str) -> float:
    """Run the evaluation stage; return its seconds."""
    command = [
        sys.executable, "test_llama_squad.py", "--model_name", args.model,
        "--dataset_name", str(args.dataset), "--num_samples", str(args.questions),
        "--max_new_tokens", str(args.max_new_tokens), "--output", str(output), *flags,
    ]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.monotonic() - start


def build_dataset(args: argparse.Namespace) -> None:
    """Build the dataset's folder from ``--data``, unless ``--dataset`` gave one."""
    if args.data is None:
        args.dataset = args.dataset.resolve()
        return
    args.dataset = (args.output / "squad").resolve()
    command = [
        sys.executable, "create_squad_dataset.py", "--test_files", str(args.data.resolve()),
        "--dataset_name", str(args.dataset),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)


Rows = list[dict[str, Any]]


def check(rows: Rows, reference: Rows, failed: Sequence[str]) -> list[str]:
    """Print what stands in a result file, and return what is wrong with it.

    Args:
        rows: of the result file.
        reference: those of the model loaded here.
        failed: ids of the questions that must be failed; all others must be right.
    """
    here = {row["id"]: row["completion"] for row in reference}
    counts = Counter(row["id"] for row in rows)
    states = Counter(row["state"] for row in rows)
    found = {row["id"]: row["completion"] for row in rows if row["state"] == "failed"}
    other = [
        row["id"] for row in rows
        if row["state"] != "failed" and row["completion"] != here.get(row["id"])
    ]  # fmt: skip
    answered = len(rows) - len(found)
    print(
        f"{len(rows)} rows of {len(counts)} questions, {dict(states)}: {answered - len(other)} of "
        f"{answered} answered as by the model loaded here; failed: {list(found.values())}"
    )
    return [
        *[f"{len(here.keys() - counts.keys())} missing"] * (here.keys() != counts.keys()),
        *[f"{len(rows) - len(counts)} doubled"] * (len(rows) != len(counts)),
        *[f"failed are {list(found)}, not {list(failed)}"] * (sorted(found) != sorted(failed)),
        *[f"answered otherwise: {other}"] * bool(other),
    ]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a chat model")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, help="official SQuAD JSON file")
    data.add_argument("--dataset", type=Path, default=Path("data/squad_v2"), help="built already")
    parser.add_argument("--output", required=True, type=Path, help="folder for rows and logs")
    parser.add_argument("--serve", default=sys.executable, help="Python with transformers[serving]")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    for name in ("model", "output"):
        path = Path(getattr(args, name)).resolve()
        setattr(args, name, path if name == "output" else str(path))
    return args


def ask_server(args: argparse.Namespace, refused: dict[str, Any]) -> tuple[Rows, Rows, int]:
    """Run the stage twice; return the rows of both, and how many questions the second asked."""
    serve = Serve(args.serve, args.model, args.port, args.output / "serve.log")
    serve.start()
    try:
        with Proxy(serve, "Question: " + refused["question"].strip(), args.questions // 2) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            flags = [
                "--predictor", "server", "--base_url", f"http://127.0.0.1:{proxy.server_port}/v1",
                "--concurrency", str(args.concurrency),
            ]  # fmt: skip
            rows = args.output / "server.csv"
            seconds = run_stage(args, rows, *flags, "--overwrite")
            print(f"\nFirst run: {seconds:.0f} s, the server down for {proxy.down_s:.0f} s of them")
            print(f"Requests: {dict(proxy.counts)}", flush=True)
            if not proxy.down_s:
                sys.exit("the server was not killed, or not started again, within the run")
            first = read_results(rows)
            proxy.refused, before = "", proxy.counts["answered"]
            run_stage(args, rows, *flags)
            asked = proxy.counts["answered"] - before
            proxy.shutdown()
            return first, read_results(rows), asked
    finally:
        serve.kill()


def main() -> None:
    """Run the benchmark."""
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    build_dataset(args)
    refused = load_squad(str(args.dataset))["test"][args.questions // 3]
    first, second, asked = ask_server(args, refused)
    here = args.output / "local.csv"
    run_stage(args, here, "--decoding", "free", "--dtype", "float32", "--overwrite")
    reference = read_results(here)
    print("\nFirst run: ", end="")
    faults = check(first, reference, [refused["id"]])
    print(f"Second run, {asked} asked: ", end="")
    faults += check(second, reference, [])
    faults += [f"the second run asked {asked}, not 1"] * (asked != 1)
    if faults:
        sys.exit("FAILED: " + "; ".join(faults))
    print("As it should be.")


if __name__ == "__main__":
    main()
