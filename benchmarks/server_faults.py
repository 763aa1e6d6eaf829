"""A real server that is killed midway and refuses one question: what stands in the result file?

Starts `transformers serve` and a proxy before it, which refuses one question for good and kills the
server (SIGKILL) after so many replies, then starts it anew. Runs the evaluation stage through the
proxy, then the same command again without the refusal, and compares the rows with those of the same
model loaded here (free decoding, which is greedy as temperature 0 is).

    python benchmarks/server_faults.py --model DIR --dataset data/squad_v2 --output /tmp/faults \
        --serve PYTHON_WITH_transformers[serving]
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llama_squad.data import load_squad  # noqa: E402
from llama_squad.results import read_results  # noqa: E402

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
            error = {"message": "maximum context length", "code": "context_length_exceeded"}
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
        "--dataset_name", str(Path(args.dataset).resolve()), "--num_samples", str(args.questions),
        "--max_new_tokens", str(args.max_new_tokens), "--output", str(output), *flags,
    ]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.monotonic() - start


def compare(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """Say what stands in a result file, beside that of the model loaded here."""
    here = {row["id"]: row["completion"] for row in reference}
    states = Counter(row["state"] for row in rows)
    answered = [row for row in rows if row["state"] != "failed"]
    equal = sum(row["completion"] == here[row["id"]] for row in answered)
    return (
        f"{len(rows)} rows, {len({row['id'] for row in rows})} ids, states {dict(states)}; "
        f"{equal} of the {len(answered)} answered equal the replies of the model loaded here"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--dataset", default="data/squad_v2")
    parser.add_argument("--output", required=True, type=Path, help="folder for rows and logs")
    parser.add_argument("--serve", default=sys.executable, help="Python with transformers[serving]")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    record = load_squad(args.dataset)["test"][args.questions // 3]
    serve = Serve(args.serve, args.model, args.port, args.output / "serve.log")
    serve.start()
    try:
        with Proxy(serve, "Question: " + record["question"].strip(), args.questions // 2) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            flags = [
                "--predictor", "server", "--base_url", f"http://127.0.0.1:{proxy.server_port}/v1",
                "--concurrency", str(args.concurrency),
            ]  # fmt: skip
            rows = args.output / "server.csv"
            seconds = run_stage(args, rows, *flags, "--overwrite")
            print(f"\nFirst run: {seconds:.0f} s, the server down for {proxy.down_s:.0f} s of them")
            print(f"Requests: {dict(proxy.counts)}")
            first = read_results(rows)
            proxy.refused, before = "", proxy.counts["answered"]
            run_stage(args, rows, *flags)
            asked = proxy.counts["answered"] - before
            second = read_results(rows)
            proxy.shutdown()
    finally:
        serve.kill()
    here = args.output / "local.csv"
    run_stage(args, here, "--decoding", "free", "--dtype", "float32", "--overwrite")
    reference = read_results(here)
    print("\nFirst run:", compare(first, reference))
    print(f"Second run ({asked} questions asked):", compare(second, reference))
    reasons = [re.sub(r"\s+", " ", row["completion"]) for row in first if row["state"] == "failed"]
    print("Failed:", reasons)


if __name__ == "__main__":
    main()
