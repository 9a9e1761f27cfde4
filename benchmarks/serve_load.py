"""Load on the server: throughput and latency over the number of clients, and under overload.

    python -m benchmarks.serve_load --gin_file=FILE [--gin.X=V ...] [--questions=FILE] [--json=OUT]

Starts `--run_mode=serve` on a free port of the loopback interface with these gin files, and compares
it with a `Predictor` in this process that is fed with full batches of the same questions:

* closed loop: 1, 2, 4, ... 32 clients, each with one question at a time;
* open loop: arrivals at half and at twice the capacity, at random times (Poisson);
* 10,000 requests, with the server's memory and descriptors before and after.

Requests of the open loop that are rejected (429) are counted, and their latency is reported apart.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2

CLIENTS = (1, 2, 4, 8, 16, 32)
SEED = 0


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return {
        f"p{p}_ms": round(1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))], 2)
        for p in (50, 95, 99)
    }


async def closed_loop(url: str, questions: Sequence[str], clients: int, count: int) -> Any:
    """`clients` that each send their next question when the last one is answered."""
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    remaining = iter(range(count))

    async def client(http: httpx2.AsyncClient) -> None:
        for number in remaining:
            begun = time.perf_counter()
            status = await ask(http, url, questions[number % len(questions)])
            statuses[status] += 1
            seconds.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(limits=limits, timeout=120) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
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

    async def one(http: httpx2.AsyncClient, question: str) -> None:
        begun = time.perf_counter()
        status = await ask(http, url, question)
        by_status.setdefault(status, []).append(time.perf_counter() - begun)

    tasks = []
    begun = time.perf_counter()
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=120) as http:
        due = begun
        while due - begun < seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(one(http, draw.choice(questions))))
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


async def ask(http: httpx2.AsyncClient, url: str, question: str) -> int:
    """The status of one request."""
    response = await http.post(f"{url}/v1/answers", json={"questions": [question]})
    return response.status_code


def resources(pid: int) -> dict[str, int]:
    """Resident MB and open descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    kilobytes = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "resident_mb": int(kilobytes.split()[1]) // 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }
