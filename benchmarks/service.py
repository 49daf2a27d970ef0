"""The service under load: many clients at once, what it adds to one request, and its memory over many.

    python benchmarks/service.py                     the network of chapter 8
    python benchmarks/service.py model.int8.onnx --clients 32

The service runs in a process of its own, started as a user would start it; clients keep their connections, as browsers and
libraries do. What it adds is measured one request at a time: a request, and decoding and ONNX Runtime alone in this process, in
turn, on the same picture with the same number of threads; the medians are compared. Memory is what the service's process holds
(resident set) after a tenth of the requests and at the end. Results are printed in words and as JSON.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tools import at_least, run
from vision_course.core import CourseError, provenance
from vision_course.images import read_image
from vision_course.predictor import Predictor

GOAL = 3.0  # ms that the service may add at the median


def picture(width=640, height=480):
    """A JPEG such as a telephone's camera makes, but smaller: soft shapes and some noise."""
    noise = np.random.default_rng(0)
    small = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(small, np.int16) + noise.integers(-8, 9, (height, width, 1))
    buffer = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def as_form(content):
    """Headers and body of an upload."""
    head = b'--limit\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return {"Content-Type": "multipart/form-data; boundary=limit"}, head + content + b"\r\n--limit--\r\n"


@contextmanager
def service(model):
    """The service in a process of its own: the process and its port."""
    command = [sys.executable, "-m", "vision_course.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if "http://127.0.0.1:" not in line:
            raise CourseError(f"{model}: the service did not start. Try vision-course serve {model}.")
        yield process, int(line.split("http://127.0.0.1:")[1].split("/")[0])
    finally:
        process.terminate()
        process.wait(30)


class Client:
    """One connection that is kept."""

    def __init__(self, port, content):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.headers, self.body = as_form(content)

    def ask(self):
        """The answer; an error if there is none."""
        self.connection.request("POST", "/predict", self.body, self.headers)
        reply = self.connection.getresponse()
        found = json.loads(reply.read())
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {found}")
        return found


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def load(port, content, clients, requests):
    """Seconds of each request, errors, and seconds of them all."""
    times, errors, begin = [], [], threading.Barrier(clients + 1)

    def work(count):
        try:
            client = Client(port, content)
            client.ask()
            begin.wait()
        except threading.BrokenBarrierError:
            return
        except Exception as error:
            errors.append(repr(error))
            begin.abort()
            return
        for _ in range(count):
            try:
                times.append(seconds(client.ask))
            except Exception as error:
                errors.append(repr(error))
                client = Client(port, content)

    counts = [requests // clients + (k < requests % clients) for k in range(clients)]
    threads = [threading.Thread(target=work, args=(count,)) for count in counts]
    for thread in threads:
        thread.start()
    try:
        begin.wait()
    except threading.BrokenBarrierError:
        raise CourseError(f"{clients} clients at once: not all of them got an answer ({errors[0]}).") from None
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return times, errors, time.perf_counter() - start


def added(port, content, predictor, rounds):
    """Median milliseconds of a request, and of decoding and ONNX Runtime alone."""
    client = Client(port, content)
    alone = lambda: predictor.predict(read_image(content, predictor.image_size)[None])
    rows = [(seconds(client.ask), seconds(alone)) for _ in range(rounds + 20)][20:]
    return [1000 * statistics.median(column) for column in zip(*rows)]


def memory(process, port, content, clients, requests):
    """Megabytes that the service holds after a tenth of the requests, and after all of them; and what went wrong."""
    held, errors = [], []
    for count in (requests // 10, requests - requests // 10):
        errors += load(port, content, clients, count)[1]
        held.append(psutil.Process(process.pid).memory_info().rss / 1e6)
    return held, errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default="outputs/shapes/exports/model.onnx", help="default: the network of chapter 8")
    parser.add_argument("--clients", type=at_least(1), default=16, help="at once (default 16)")
    parser.add_argument("--requests", type=at_least(1), default=1000, help="in all (default 1,000)")
    parser.add_argument("--rounds", type=at_least(1), default=300, help="requests one at a time (default 300)")
    parser.add_argument("--memory-requests", type=at_least(10), default=10_000, help="over which memory is watched (default 10,000)")
    options = parser.parse_args()
    content, predictor = picture(), Predictor(options.model)
    with service(options.model) as (process, port):
        request, alone = added(port, content, predictor, options.rounds)
        print(f"one at a time: {request:.2f} ms a request, {alone:.2f} ms decoding and ONNX Runtime alone")
        print(f"  the service adds {request - alone:.2f} ms, the goal is {GOAL}")
        times, errors, spent = load(port, content, options.clients, options.requests)
        p50, p99 = (1000 * np.percentile(times, share) for share in (50, 99))
        print(f"{options.clients} clients: {len(times) / spent:,.0f} requests a second, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
        (early, late), more = memory(process, port, content, options.clients, options.memory_requests)
        errors += more
        print(f"  {len(errors)} errors of {options.requests + options.memory_requests:,}")
        print(f"memory: {early:.0f} MB after {options.memory_requests // 10:,} requests, {late:.0f} MB after {options.memory_requests:,}")
    print(json.dumps({
        "model": options.model.name, "picture_bytes": len(content), "request_ms": request, "alone_ms": alone, "added_ms": request - alone,
        "requests_per_second": len(times) / spent, "p50_ms": p50, "p99_ms": p99, "errors": errors[:5], "memory_mb": [early, late],
        "clients": options.clients, "requests": options.requests, "provenance": provenance(),
    }))
    return int(bool(errors))


if __name__ == "__main__":
    run(main)
