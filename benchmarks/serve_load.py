"""Load on the server: throughput and latency over the number of clients, and under overload.

    python -m benchmarks.serve_load --gin_file=FILE --questions=FILE [--gin.X=V ...] [--json=OUT]

Starts `--run_mode=serve` on a free port of the loopback interface with these gin files, and compares
it with a `Predictor` in this process that is fed with full batches of the same questions:

* closed loop: 1, 2, 4, ... 32 clients, each with one question at a time;
* open loop: arrivals at half and at twice the capacity, at random times (Poisson);
* 10,000 requests, with the server's memory and descriptors before and after;
* clients that are killed (SIGKILL) in the middle of a request, beside others that are served.

Requests of the open loop that are rejected (429) are counted, and their latency is reported apart.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2

from glimmer_jax import axes, configuration, partitioning
from glimmer_jax.modes import checks, serve
from glimmer_jax.partitioning import make_mesh
from glimmer_jax.runtime.host_memory import keep_freed_memory
from glimmer_jax.serving.predictor import Predictor
from glimmer_jax.storage.json_lines import read_json_lines

CLIENTS = (1, 2, 4, 8, 16, 32)
SEED = 0
KILLED_ROUNDS = 20
SETTLE_SECONDS = 10.0  # for a closed connection to leave the table of descriptors
# A client that sends 16 requests, every second one incomplete, and waits until it is killed.
_KILLED_CLIENT = """
import json, socket, sys, time
host, port = sys.argv[1], int(sys.argv[2])
connections = []
for number in range(16):
    body = json.dumps({"questions": [sys.argv[3]]}).encode()
    head = f"POST /v1/answers HTTP/1.1\\r\\nHost: {host}\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    request = head.encode() + body
    connection = socket.create_connection((host, port))
    connection.sendall(request[: len(request) // (1 + number % 2)])
    connections.append(connection)
print("sent", flush=True)
time.sleep(600)
"""


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return {
        f"p{p}_ms": round(1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))], 2)
        for p in (50, 95, 99)
    }


class Connections(contextlib.AbstractAsyncContextManager):
    """Kept-alive connections, as many as requests are under way.

    An HTTP library would take a tenth of the cores that it shares with the server.
    """

    def __init__(self, url: str):
        host, port = url.removeprefix("http://").split(":")
        self._address = host, int(port)
        self._head = f"POST /v1/answers HTTP/1.1\r\nHost: {host}\r\nContent-Length: "
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, question: str) -> int:
        """The status of one request; its answer is read and dropped."""
        async with asyncio.timeout(120):
            return await self._ask(question)

    async def _ask(self, question: str) -> int:
        reader, writer = await self._connection()
        body = json.dumps({"questions": [question]}).encode()
        writer.write(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        assert length is not None
        await reader.readexactly(int(length[1]))
        self._free.append((reader, writer))
        return int(head.split(None, 2)[1])

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._free:
            reader, writer = self._free.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)

    async def __aexit__(self, *exc: object) -> None:
        for _, writer in self._free:
            writer.close()
            await writer.wait_closed()


async def closed_loop(url: str, questions: Sequence[str], clients: int, count: int) -> Any:
    """`clients` that each send their next question when the last one is answered."""
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    remaining = iter(range(count))

    async def client() -> None:
        for number in remaining:
            begun = time.perf_counter()
            status = await connections.ask(questions[number % len(questions)])
            statuses[status] += 1
            seconds.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    async with Connections(url) as connections:
        await asyncio.gather(*(client() for _ in range(clients)))
    wall = time.perf_counter() - begun
    return {
        "clients": clients,
        "requests": count,
        "questions_per_s": round(count / wall, 2),
        **percentiles(seconds),
        "statuses": dict(statuses),
    }


async def open_loop(url: str, questions: Sequence[str], rate: float, seconds: float) -> Any:
    """Requests at random times, `rate` a second, whether or not earlier ones are answered."""
    draw = random.Random(SEED)
    by_status: dict[int, list[float]] = {}

    async def one(question: str) -> None:
        begun = time.perf_counter()
        status = await connections.ask(question)
        by_status.setdefault(status, []).append(time.perf_counter() - begun)

    tasks = []
    begun = time.perf_counter()
    async with Connections(url) as connections:
        due = begun
        while due - begun < seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(one(draw.choice(questions))))
            due += draw.expovariate(rate)
        await asyncio.gather(*tasks)
    wall = time.perf_counter() - begun
    answered = by_status.get(200, [])
    report = {
        "offered_per_s": round(rate, 2),
        "answered_per_s": round(len(answered) / wall, 2),
        "statuses": {status: len(values) for status, values in by_status.items()},
        **(percentiles(answered) if answered else {}),
    }
    if rejected := by_status.get(429):
        report["rejected"] = percentiles(rejected)
    return report


def killed_clients(url: str, pid: int, questions: Sequence[str]) -> dict[str, Any]:
    """What rounds of killed clients leave in the server, while one client is served."""
    host, port = url.removeprefix("http://").split(":")
    draw = random.Random(SEED)
    before = resources(pid)
    served: list[int] = []
    stop = threading.Event()

    def serve_one() -> None:
        with httpx2.Client(timeout=120) as http:
            while not stop.is_set():
                body = {"questions": [draw.choice(questions)]}
                served.append(http.post(f"{url}/v1/answers", json=body).status_code)

    thread = threading.Thread(target=serve_one)
    thread.start()
    for number in range(KILLED_ROUNDS):
        question = questions[number % len(questions)]
        arguments = [sys.executable, "-S", "-c", _KILLED_CLIENT, host, port, question]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            client.stdout.readline()
            time.sleep(draw.uniform(0, 0.2))
            client.kill()
    stop.set()
    thread.join()
    time.sleep(1)
    with httpx2.Client(timeout=120) as http:
        metrics = http.get(f"{url}/metrics").text
    after, deadline = resources(pid), time.monotonic() + SETTLE_SECONDS
    while after["descriptors"] > before["descriptors"] and time.monotonic() < deadline:
        time.sleep(0.1)
        after = resources(pid)
    waiting = re.search(r"^glimmer_queue_length (\S+)$", metrics, re.MULTILINE)
    return {
        "rounds": KILLED_ROUNDS,
        "served_beside": dict(Counter(served)),
        "waiting": float(waiting[1]) if waiting else None,
        "before": before,
        "after": after,
    }


def resources(pid: int) -> dict[str, int]:
    """Resident MB and open descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    kilobytes = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "resident_mb": int(kilobytes.split()[1]) // 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints, and with --json writes, one report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gin_file", action="append", required=True)
    parser.add_argument("--questions", required=True, help="JSON Lines of {'id', 'input'}")
    parser.add_argument("--requests", type=int, default=10_000, help="of the long run")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each other run, about")
    parser.add_argument("--json", type=Path)
    args, bindings = parser.parse_known_args(argv)
    questions = [line["input"] for _, line in read_json_lines(args.questions)]
    files = [f"--gin_file={path}" for path in args.gin_file]
    keep_freed_memory()
    report: dict[str, Any] = {"predictor": sequential(args.gin_file, bindings, questions)}
    print(json.dumps(report), flush=True)
    with serving([*files, *bindings]) as (process, url):
        runs = []
        for clients in CLIENTS:
            rate = report["predictor"]["questions_per_s"]
            count = max(4 * clients, int(rate * args.seconds))
            runs.append(asyncio.run(closed_loop(url, questions, clients, count)))
            print(json.dumps(runs[-1]), flush=True)
        capacity = runs[-1]["questions_per_s"]
        report["closed_loop"] = runs
        report["of_predictor"] = round(capacity / report["predictor"]["questions_per_s"], 3)
        for name, share in (("half_load", 0.5), ("overload", 2.0)):
            report[name] = asyncio.run(open_loop(url, questions, share * capacity, args.seconds))
            print(json.dumps({name: report[name]}), flush=True)
        before = resources(process.pid)
        long_run = asyncio.run(closed_loop(url, questions, 32, args.requests))
        report["long_run"] = {**long_run, "before": before, "after": resources(process.pid)}
        print(json.dumps({"long_run": report["long_run"]}), flush=True)
        report["killed_clients"] = killed_clients(url, process.pid, questions)
        print(json.dumps({"killed_clients": report["killed_clients"]}), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def sequential(gin_files: Sequence[str], bindings: Sequence[str], questions: Sequence[str]) -> Any:
    """`Predictor` in this process: full batches of the server's size, and one question at a time."""
    settings = serve_settings(gin_files, bindings)
    reader, corpus, size = settings["reader"], settings["corpus"], settings["batch_size"]
    smallest = partitioning.parts(make_mesh(reader.mesh).shape, axes.BATCH)
    trained = reader.read(corpus.memory_dir)
    lengths = trained.feature_lengths(settings["task_feature_lengths"])
    predictor = Predictor.load(
        reader.checkpoint_path,
        checks.lengths_for(trained.model.config, lengths),
        model=trained.model,
        passages_dir=corpus.passages_dir,
        memory_dir=corpus.memory_dir,
        vocabulary=trained.vocabulary,
        mesh=reader.mesh,
        lookup=corpus.lookup,
        retriever=settings["retriever"],
        batch_sizes=sorted({smallest, size}),
    )
    predictor.warm_up()
    asked = [{"id": str(n), "input": question} for n, question in enumerate(questions)]
    predictor.answer(asked[:size])  # builds the index
    count = min(len(asked), 100 * size)
    begun = time.perf_counter()
    predictor.answer(asked[:count])
    rate = count / (time.perf_counter() - begun)
    singles = []
    for question in asked[:50]:
        begun = time.perf_counter()
        predictor.answer([question])
        singles.append(time.perf_counter() - begun)
    return {"questions_per_s": round(rate, 2), "batch_size": size, "single": percentiles(singles)}


def serve_settings(gin_files: Sequence[str], bindings: Sequence[str]) -> dict[str, Any]:
    """The settings that `--run_mode=serve` gets from these gin files."""
    plain = [" = ".join(b.removeprefix("--gin.").split("=", 1)) for b in bindings]
    configuration.parse(gin_files, plain, [])
    return configuration.settings(serve.serve)


@contextlib.contextmanager
def serving(arguments: Sequence[str]) -> Iterator[tuple[subprocess.Popen, str]]:
    """(process, URL) of a ready server on a free port."""
    command = [sys.executable, "-m", "glimmer_jax.main", "--run_mode=serve", *arguments]
    with subprocess.Popen([*command, "--gin.PORT=0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            if found := re.search(r"http://\S+:\d+", line):
                url = found[0]
            if line.startswith("Ready."):
                break
        # One log line per request follows; an unread pipe would fill up and block the server.
        threading.Thread(target=lambda: deque(process.stdout or (), maxlen=0), daemon=True).start()
        try:
            yield process, url
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
