"""The service over real sockets: the protocol, uploads, everything that can be wrong with them, its end, and its page in a browser."""

import base64
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import HEAR_CTRL_C, after, bomb, colour_model, file_of, mutated
from PIL import Image

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed (extra serve)")
pytest.importorskip("fastapi", reason="FastAPI is not installed (extra serve)")
import uvicorn  # noqa: E402

from vision_course import serve  # noqa: E402
from vision_course.predictor import Predictor, describe_images  # noqa: E402
from vision_course.serve import make_app, open_port  # noqa: E402

MUTATIONS = int(os.environ.get("VISION_COURSE_MUTATIONS", 300))
LIMIT = 2_000_000
MANY = ("red", "green", "blue", *(f"colour {k}" for k in range(3, 30)))


@contextmanager
def running(app):
    """An application behind a real port, in a thread of this process."""
    listener = open_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    path = colour_model(tmp_path_factory.mktemp("model") / "colours.onnx")
    with running(make_app(Predictor(path), most_bytes=LIMIT)) as number:
        yield number


def call(port, method, path, body=None, headers=None):
    """Status, headers in small letters, and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, {key.lower(): value for key, value in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def form(content, field="image", filename="a.png"):
    """Headers and body of an upload."""
    name = f'; filename="{filename}"' if filename else ""
    head = f'--limit\r\nContent-Disposition: form-data; name="{field}"{name}\r\nContent-Type: application/octet-stream\r\n\r\n'
    return {"Content-Type": "multipart/form-data; boundary=limit"}, head.encode() + content + b"\r\n--limit--\r\n"


def upload(port, content, path="/predict", **names):
    headers, body = form(content, **names)
    status, _, reply = call(port, "POST", path, body, headers)
    return status, json.loads(reply)


def refused(answer, status, *words):
    """One line of JSON with what is wrong."""
    came, *_, reply = answer
    reply = json.loads(reply) if isinstance(reply, bytes) else reply
    assert came == status and list(reply) == ["error"], answer
    assert all(word in reply["error"] for word in words) and "\n" not in reply["error"] and len(reply["error"]) < 500, reply
    return True


def alive(port):
    return upload(port, RED)[1]["class"] == "red"


RED, BLUE = (file_of(Image.new("RGB", (40, 30), colour)) for colour in ((220, 40, 30), (20, 60, 210)))


# uploads

def test_an_upload_gets_the_answer_of_the_command_line(port, tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    model = Predictor(colour_model(tmp_path / "colours.onnx"))
    expected = describe_images(model, [tmp_path / "red.png"])[0]
    headers, body = form(RED)
    status, found, reply = call(port, "POST", "/predict", body, headers)
    assert status == 200 and {"image": expected["image"], **json.loads(reply)} == expected
    assert "model;dur=" in found["server-timing"] and "decode;dur=" in found["server-timing"]
    assert call(port, "POST", "/predict", body, headers)[2] == reply  # the same bytes


def test_an_overlay_shows_what_counted(port):
    pixels = np.full((64, 64, 3), 90, np.uint8)
    pixels[6:26, 38:58] = (255, 50, 50)
    status, reply = upload(port, file_of(Image.fromarray(pixels)), "/predict?overlay=true")
    overlay = reply["overlay"]
    assert status == 200 and overlay["class"] == reply["class"] == "red" and overlay["where"] == "upper right"
    assert overlay["hidden"] < reply["probability"]
    drawn = Image.open(BytesIO(base64.b64decode(overlay["image"].removeprefix("data:image/png;base64,"))))
    heat = np.ptp(np.asarray(drawn.convert("RGB"), int), axis=2)  # colour is heat, the rest is grey
    assert heat[:160, 160:].mean() > 4 * max(heat[160:].mean(), heat[:, :100].mean())
    seen = Image.open(BytesIO(base64.b64decode(overlay["seen"].removeprefix("data:image/png;base64,"))))
    assert seen.size == (16, 16)
    assert upload(port, RED, "/predict?overlay=blue")[1]["overlay"]["class"] == "blue"
    assert "overlay" not in upload(port, RED, "/predict?overlay=false")[1]
    assert refused(upload(port, RED, "/predict?overlay=purple"), 400, "purple", "red, green, blue")


def test_an_animation_says_that_one_frame_was_used(port):
    film = file_of(Image.new("RGB", (9, 9), (9, 9, 200)), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9), (200, 9, 9))])
    status, reply = upload(port, film)
    assert status == 200 and reply["class"] == "blue" and reply["notes"] == ["animated: the first frame was used"]


@pytest.mark.parametrize("content, words", [
    (b"", "is empty (0 bytes)"), (b"hello" * 99, "is not an image"), (RED[:60], "damaged or cut short"),
    (bomb(), "has 900,000,000 pixels"), (bomb(9000), "has 9,000 × 9,000 pixels"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is not an image"),
], ids=["nothing", "text", "truncated", "bomb", "smaller bomb", "a program"])
def test_a_file_that_is_no_picture_is_refused(port, content, words):
    assert refused(upload(port, content), 400, words) and alive(port)


def test_a_form_that_is_not_right_is_refused(port):
    headers, body = form(RED)
    assert refused(upload(port, RED, field="picture"), 400, "field 'image'", "'picture'")
    assert refused(upload(port, b"text", filename=None), 400, "no file in the field 'image'")
    assert refused(call(port, "POST", "/predict", b"{}", {"Content-Type": "application/json"}), 415, "'application/json'", "multipart")
    assert refused(call(port, "POST", "/predict", RED, {"Content-Type": "image/png"}), 415, "image/png")
    assert refused(call(port, "POST", "/predict", RED), 415, "multipart/form-data")
    assert refused(call(port, "POST", "/predict", body, {"Content-Type": "multipart/form-data"}), 400, "boundary")
    assert refused(call(port, "POST", "/predict", body, {"Content-Type": "multipart/form-data; boundary=other"}), 400)
    assert refused(call(port, "POST", "/predict", body[:200], headers), 400)
    undefined = {"Content-Type": headers["Content-Type"] + "; charset=undefined"}
    assert refused(call(port, "POST", "/predict", body, undefined), 400, "cannot be read")
    twice = body.removesuffix(b"--limit--\r\n") + body
    assert refused(call(port, "POST", "/predict", twice, headers), 400, "Too many files")
    assert refused(call(port, "GET", "/predict"), 405) and refused(call(port, "GET", "/nothing"), 404) and alive(port)


def test_too_much_is_refused_while_it_comes_in(port):
    assert upload(port, RED + bytes(LIMIT - 1000))[0] == 200  # what stands behind a picture does not matter
    assert refused(upload(port, RED + bytes(LIMIT)), 413, "too large; at most 2 MB")
    headers, body = form(RED + bytes(LIMIT))
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))  # without a Content-Length
    assert refused(call(port, "POST", "/predict", pieces, headers), 413, "at most 2 MB")
    assert refused(call(port, "POST", "/v2/models/colours/infer", bytes(LIMIT + 1)), 413)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as stream:  # announced, and never sent
        stream.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n")
        assert b" 413 " in stream.recv(1000) and alive(port)


# the protocol

def tensor(images, **changes):
    return {"name": "image", "shape": list(images.shape), "datatype": "UINT8", "data": images.ravel().tolist(), **changes}


def infer(port, request, path="/v2/models/colours/infer"):
    status, _, reply = call(port, "POST", path, json.dumps(request), {"Content-Type": "application/json"})
    return status, json.loads(reply)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def expected(images, tmp_path):
    return Predictor(colour_model(tmp_path / "colours.onnx")).predict(images)


def test_the_protocol_says_what_there_is(port):
    def ask(path):
        status, _, reply = call(port, "GET", path)
        return json.loads(reply) if status == 200 else status

    assert ask("/v2/health/live") == {"live": True} and ask("/v2/health/ready") == {"ready": True}
    assert ask("/v2")["name"] == "vision_course" and ask("/v2")["extensions"] == ["binary_tensor_data"]
    about = ask("/v2/models/colours")
    assert about["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}]
    assert about["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}]
    assert about["name"] == "colours" and about["versions"] == ["1"] and about["platform"] == "onnxruntime_onnx"
    assert json.loads(about["parameters"]["vision_course"])["classes"] == ["red", "green", "blue"]
    assert ask("/v2/models/colours/versions/1") == about and ask("/v2/models/colours/ready")["ready"] is True
    assert ask("/v2/models/shapes") == ask("/v2/models/colours/versions/2") == ask("/v2/models/shapes/ready") == 404
    assert ask("/openapi.json")["paths"]["/predict"]


def test_tensors_in_json(port, images, expected):
    for request in (
        {"id": "7", "inputs": [tensor(images)]},
        {"inputs": [tensor(images, data=images.tolist())], "outputs": [{"name": "probabilities"}]},
    ):
        status, reply = infer(port, request)
        assert status == 200 and reply["model_name"] == "colours" and reply.get("id") == request.get("id")
        output = reply["outputs"][0]
        assert (output["name"], output["datatype"], output["shape"]) == ("probabilities", "FP32", [5, 3])
        assert np.array_equal(np.array(output["data"], np.float32).reshape(5, 3), expected)
    assert infer(port, {"inputs": [tensor(images)]}, "/v2/models/colours/versions/1/infer")[0] == 200
    status, reply = infer(port, {"id": "\ud800", "inputs": [tensor(images)]})  # half of a character is still an id
    assert status == 200 and reply["id"] == "\ud800"
    assert refused(infer(port, {"inputs": [tensor(images, shape="\ud800")]}), 400, "shape")


@pytest.mark.parametrize("wish", [
    {"outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]}, {"parameters": {"binary_data_output": True}},
])
def test_tensors_in_binary_as_clients_of_triton_send_them(port, images, expected, wish):
    inputs = tensor(images, parameters={"binary_data_size": images.nbytes})
    del inputs["data"]
    head = json.dumps({"inputs": [inputs], **wish}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    status, found, reply = call(port, "POST", "/v2/models/colours/infer", head + images.tobytes(), headers)
    end = int(found["inference-header-content-length"])
    output = json.loads(reply[:end])["outputs"][0]
    assert status == 200 and output["shape"] == [5, 3] and output["parameters"] == {"binary_data_size": 60} and "data" not in output
    assert np.array_equal(np.frombuffer(reply[end:], np.float32).reshape(5, 3), expected)
    assert refused(call(port, "POST", "/v2/models/colours/infer", head + images.tobytes()[:-1], headers), 400, "3,839 numbers")
    assert refused(call(port, "POST", "/v2/models/colours/infer", head, {**headers, "Inference-Header-Content-Length": "9999"}), 400)


ONE = np.zeros((1, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("inputs", [None, {}, [], "image", ["image"], [[]], [tensor(ONE)] * 2, [tensor(ONE, name="pixels")], [tensor(ONE, name=1)]], ids=str)
def test_inputs_that_are_not_one_tensor_are_refused(port, inputs):
    assert refused(infer(port, {"inputs": inputs}), 400, "inputs: must be one tensor, named 'image'")


@pytest.mark.parametrize("outputs", ["all", {"name": "probabilities"}, [{"name": "logits"}], [1], [{"name": "probabilities"}] * 2], ids=str)
def test_outputs_that_are_not_the_models_are_refused(port, outputs):
    assert refused(infer(port, {"inputs": [tensor(ONE)], "outputs": outputs}), 400, "outputs: must be one tensor, named 'probabilities'")


SHAPES = ([1, 3, 16, 16], [16, 16, 3], [0, 16, 16, 3], [65, 16, 16, 3], [-1, 16, 16, 3], [True, 16, 16, 3], [1.0, 16, 16, 3], "1,16,16,3", None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_of_the_wrong_shape_is_refused(port, shape):
    assert refused(infer(port, {"inputs": [tensor(ONE, shape=shape)]}), 400, f"its shape is {shape}, it must be [1 to 64, 16, 16, 3]")


@pytest.mark.parametrize("changes, words", [
    ({"datatype": "FP32"}, "'FP32', it must be 'UINT8'"), ({"datatype": None}, "it must be 'UINT8'"),
    ({"shape": [2, 16, 16, 3]}, "holds 768 numbers, its shape asks for 1,536"), ({"parameters": {"binary_data_size": 768}}, "holds 0 numbers"),
    ({"data": None}, "list of numbers"), ({"data": "0" * 768}, "list of numbers"), ({"data": {"0": 1}}, "list of numbers"),
    *(({"data": [wrong] * 768}, "whole numbers from 0 to 255") for wrong in (0.5, 256, -1, "0", None, 10**400, {})),
    ({"data": [[1, 2], 3]}, "whole numbers"), ({"data": [[[[[1]]]]]}, "whole numbers"), ({"data": [[1, 2], "34"]}, "whole numbers"),
], ids=lambda value: str(value)[:40])
def test_a_tensor_with_the_wrong_numbers_is_refused(port, changes, words):
    assert refused(infer(port, {"inputs": [tensor(ONE, **changes)]}), 400, words)


BODIES = b"", b"{", b"[]", b"7", b"NaN", b"\xff\xfe", b"[" * 200_000, b'{"inputs":' * 9_000, b'{"inputs": [{"name": "image", "data": [1e999]}]}'


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:9]))
def test_a_body_that_is_no_json_is_refused(port, body):
    assert refused(call(port, "POST", "/v2/models/colours/infer", body), 400) and alive(port)


def test_a_model_that_is_not_here_is_refused(port):
    assert refused(infer(port, {"inputs": [tensor(ONE)]}, "/v2/models/shapes/infer"), 404, "'shapes'", "'colours'")
    assert refused(call(port, "POST", "/v2/models/colours/infer", b"\x1f\x8b", {"Content-Encoding": "gzip"}), 415, "'gzip'")


# damage, numbers, the end

def raw(port, content, patience=20):
    """Send bytes as they are; the status of the answer, or None if the service is still waiting for more or has hung up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as stream:
        try:
            stream.sendall(content)
            stream.settimeout(patience)
            reply = stream.recv(4096)
        except (TimeoutError, ConnectionError):
            return None
    return int(reply.split()[1]) if reply.startswith(b"HTTP/1.1 ") else None


def requests_to_spoil():
    headers, body = form(RED)
    lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    yield b"POST /predict HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n" % (lines.encode(), len(body)), body
    body = json.dumps({"inputs": [tensor(ONE)]}).encode()
    yield b"POST /v2/models/colours/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body), body
    inputs = {"name": "image", "shape": [1, 16, 16, 3], "datatype": "UINT8", "parameters": {"binary_data_size": 768}}
    head = json.dumps({"inputs": [inputs]}).encode()
    yield b"POST /v2/models/colours/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (
        len(head), len(head) + 768), head + bytes(768)


def test_random_damage_never_breaks_it(port):
    generator, counts, kinds = np.random.default_rng(1), {}, list(requests_to_spoil())
    for head, body in kinds:
        assert raw(port, head + body) == 200
    for number in range(MUTATIONS):
        head, body = kinds[number % len(kinds)]
        if number % 5:  # the body, with a length that fits
            spoilt = mutated(body, generator)
            content = head.replace(b"Content-Length: %d\r\n\r\n" % len(body), b"Content-Length: %d\r\n\r\n" % len(spoilt)) + spoilt
        else:
            content = mutated(head, generator) + body
        status = raw(port, content, 20 if number % 5 else 0.3)  # after a damaged head the service may wait for more
        counts[status] = counts.get(status, 0) + 1
        assert status is None or status < 500, content
    assert counts.get(400, 0) > MUTATIONS / 5 and alive(port), counts


def test_sixteen_clients_at_once(port):
    headers, body = form(RED)
    answers = []

    def client():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(20):
            connection.request("POST", "/predict", body, headers)
            reply = connection.getresponse()
            answers.append((reply.status, json.loads(reply.read()).get("class")))
        connection.close()

    clients = [threading.Thread(target=client) for _ in range(16)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert answers == [(200, "red")] * 320


def test_small_answers_are_not_held_back(port):
    headers, body = form(RED)
    connection, times = http.client.HTTPConnection("127.0.0.1", port, timeout=60), []
    for _ in range(30):
        start = time.perf_counter()
        connection.request("POST", "/predict", body, headers)
        connection.getresponse().read()
        times.append(time.perf_counter() - start)
    connection.close()
    assert min(times) < 0.03, times  # two small packets, the second waiting for the first to be acknowledged, take 0.04


def test_at_most_four_pictures_are_decoded_at_a_time(tmp_path, monkeypatch):
    held, lock, now, most = serve.read_image, threading.Lock(), 0, 0
    together = threading.Barrier(4, timeout=20)

    def counted(*given):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        together.wait()
        time.sleep(0.1)  # a fifth would have time to come
        try:
            return held(*given)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(serve, "read_image", counted)
    monkeypatch.setattr(serve, "cores", lambda: 12)  # as on a large machine
    answers = []
    with running(make_app(Predictor(colour_model(tmp_path / "colours.onnx")))) as port:
        clients = [threading.Thread(target=lambda: answers.append(upload(port, RED)[1]["class"])) for _ in range(12)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    assert answers == ["red"] * 12 and most == 4


SLOW = """
import sys, time
from vision_course import serve
from vision_course.predictor import Predictor

quick, received = Predictor.predict, serve.uploaded

def slow(self, images):
    time.sleep(0.6)
    return quick(self, images)

async def reported(request):
    content = await received(request)
    print("received", flush=True)
    return content

Predictor.predict, serve.uploaded = slow, reported
serve.run(sys.argv[1], port=0)
"""


def started(command, **options):
    """A service in a process of its own, and its port."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, (line, process.stderr.read())
    return process, int(line.split("http://127.0.0.1:")[1].split("/")[0])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_told_to_end_it_answers_what_is_under_way(tmp_path, how):
    process, port = started(after(HEAR_CTRL_C, [sys.executable, "-c", SLOW, colour_model(tmp_path / "colours.onnx")]))
    answers = []
    clients = [threading.Thread(target=lambda: answers.append(upload(port, RED)[0])) for _ in range(6)]
    try:
        for thread in clients:
            thread.start()
        assert [process.stdout.readline() for _ in clients] == ["received\n"] * 6
        process.send_signal(how)
        for thread in clients:
            thread.join(60)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert answers == [200] * 6 and process.returncode == 0 and err == "" and "has been answered" in out
    with pytest.raises(ConnectionError):
        call(port, "GET", "/v2/health/live")


def test_who_stops_sending_is_not_waited_for(tmp_path):
    patience = "import sys; from vision_course import serve; serve.PATIENCE = 0.3; serve.run(sys.argv[1], port=0, most_bytes=1000)"
    process, port = started([sys.executable, "-c", patience, colour_model(tmp_path / "colours.onnx")])
    try:
        for length, status in ((900, b" 408 "), (2000, b" 413 ")):  # the second is too large and would be thrown away
            with socket.create_connection(("127.0.0.1", port), timeout=20) as stream:
                head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
                stream.sendall(head.encode() + b"--b\r\n")
                assert status in stream.recv(1000)
        assert alive(port)
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_who_finds_all_places_taken_is_told_to_come_back(tmp_path):
    command = [sys.executable, "-c", "import sys; from vision_course import serve; serve.run(sys.argv[1], port=0)"]
    process, port = started([*command, colour_model(tmp_path / "colours.onnx")])
    try:
        guests = [socket.create_connection(("127.0.0.1", port)) for _ in range(serve.MOST_AT_ONCE)]
        end = time.monotonic() + 20
        while (status := call(port, "GET", "/v2/health/live")[0]) != 503 and time.monotonic() < end:
            time.sleep(0.05)  # the last guests may not be in yet
        assert status == 503
        guests.pop().close()
        end = time.monotonic() + 20
        while (status := call(port, "GET", "/v2/health/live")[0]) != 200 and time.monotonic() < end:
            time.sleep(0.05)
        assert status == 200
        for guest in guests:
            guest.close()
        assert alive(port)
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_the_command(course, tmp_path):
    path = colour_model(tmp_path / "colours.onnx")
    command = [sys.executable, "-m", "vision_course.cli", "serve", str(path), "--port"]
    process, port = started([*command, "0"], env=course.environment)
    try:
        assert alive(port)
        second = subprocess.run([*command, str(port)], capture_output=True, text=True, env=course.environment)
        assert second.returncode == 2 and second.stderr.count("\n") == 1 and f"port {port} on 127.0.0.1: is in use" in second.stderr
        loaded = Path(f"/proc/{process.pid}/maps")
        assert not loaded.exists() or "libtorch" not in loaded.read_text()
    finally:
        process.terminate()
        assert process.wait(30) == 0
    for *words, reason in (["none.onnx", "not there"], [__file__, "cannot be loaded"], [path, "--host", "192.0.2.1", "Look at --host"],
                           [path, "--host", "a..b", "Look at --host"]):
        wrong = course("serve", *words)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and reason in wrong.stderr


# the page

def test_the_page_asks_for_nothing_from_elsewhere(port):
    status, headers, page = call(port, "GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
    page = page.decode()
    assert "http://" not in page and "https://" not in page and "//cdn" not in page and "__FACTS__" not in page
    assert call(port, "HEAD", "/")[0] == 200


def test_no_name_of_a_class_can_break_out_of_the_page(tmp_path):
    evil = ["</script><script>alert(1)</script>", "<b>green", '"blue"']
    with running(make_app(Predictor(colour_model(tmp_path / "evil.onnx", about={"classes": evil})))) as port:
        page = call(port, "GET", "/")[2].decode()
        assert page.count("<script") == 2 and "<b>green" not in page
        assert upload(port, RED)[1]["class"] == evil[0]


@pytest.mark.parametrize("folder", ["/home/ada/photos", "C:\\Users\\ada\\photos"])
def test_where_a_folder_lies_is_nobodys_business(tmp_path, folder):
    path = colour_model(tmp_path / "own.onnx", about={"dataset": folder})
    with running(make_app(Predictor(path))) as port:
        for address in ("/", "/v2/models/own"):
            answer = call(port, "GET", address)[2].decode()
            assert "photos" in answer and "ada" not in answer


class Browser:
    """Headless Chromium, spoken to over a pipe in its DevTools protocol."""

    def __init__(self, folder):
        self.read, far_write = os.pipe()
        far_read, self.write = os.pipe()

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        wires = f"ours = os.dup({far_read}), os.dup({far_write})\nfor own, pipe in zip(ours, (3, 4)):"  # it reads from 3 and writes to 4
        wires += " os.dup2(own, pipe), os.set_inheritable(pipe, True)"
        self.process = subprocess.Popen(
            after(wires, [CHROMIUM, *flags]), pass_fds=(far_read, far_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(far_read), os.close(far_write)
        self.number, self.rest, self.events, self.session = 0, b"", [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Network", "Log"):
            self(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], 120)[0], "Chromium does not answer"
            more = os.read(self.read, 1 << 20)
            assert more, "Chromium has ended"
            self.rest += more
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def __call__(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters, **({"sessionId": self.session} if self.session else {})}
        os.write(self.write, json.dumps(request).encode() + b"\0")
        while (reply := self.message()).get("id") != self.number:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def js(self, code):
        """The value of an expression in the page."""
        result = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < deadline, (condition, self.js("document.body.innerText"))
            time.sleep(0.05)

    def open(self, address, width=1280, height=900):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(address)})")

    def choose(self, path):
        node = self("DOM.querySelector", nodeId=self("DOM.getDocument")["root"]["nodeId"], selector="#file")["nodeId"]
        self("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key, code=None, text=None):
        keys = {"key": key, "code": code or key, **({"text": text} if text else {})}
        keys["windowsVirtualKeyCode"] = {"Tab": 9, "Enter": 13, " ": 32}[key]
        self("Input.dispatchKeyEvent", type="keyDown", **keys)
        self("Input.dispatchKeyEvent", type="keyUp", **keys)

    def close(self):
        try:
            self("Browser.close")
        finally:
            os.close(self.read), os.close(self.write)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


ANSWERED = "!document.getElementById('result').hidden && document.getElementById('heat').naturalWidth > 0"


@pytest.fixture
def picture(tmp_path):
    """Red in the upper right of grey."""
    pixels = np.full((60, 60, 3), 90, np.uint8)
    pixels[6:24, 36:54] = (255, 50, 50)
    Image.fromarray(pixels).save(tmp_path / "patch.png")
    return tmp_path / "patch.png"


def test_choosing_a_picture(browser, port, picture):
    browser.events.clear()
    browser.open(f"http://127.0.0.1:{port}/")
    assert browser.js("document.getElementById('result').hidden && document.getElementById('problem').hidden")
    assert "3 classes: red, green, blue" in browser.js("document.getElementById('lead').innerText")
    browser.choose(picture)
    browser.wait(ANSWERED)
    expected = upload(port, picture.read_bytes())[1]
    shown = browser.js("document.getElementById('answer').innerText")
    assert shown == f"red {expected['probability']:.1%}".replace("%", "\u00a0%")
    rows = browser.js("[...document.querySelectorAll('.bars button')].map(b => ['.name', '.share'].map(s => b.querySelector(s).innerText))")
    ranked = sorted(expected["probabilities"].items(), key=lambda item: -item[1])
    assert rows == [[name, f"{share:.1%}".replace("%", "\u00a0%")] for name, share in ranked]
    browser.wait("document.getAnimations().length === 0")  # the bars grow
    widths = browser.js("[...document.querySelectorAll('.fill')].map(f => f.offsetWidth / f.parentElement.offsetWidth)")
    assert widths == pytest.approx([share for _, share in ranked], abs=0.02)
    assert browser.js("[...document.querySelectorAll('#set li')].map(l => l.innerText)") == expected["set"]
    assert "upper right" in browser.js("document.getElementById('heat').alt")
    assert "16 by 16" in browser.js("document.getElementById('seen').alt")
    addresses = [event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert addresses and all(address.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")) for address in addresses), addresses
    complaints = [event for event in browser.events if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not complaints


def test_dropping_a_picture_and_one_that_is_none(browser, port, picture, tmp_path):
    (tmp_path / "letter.png").write_text("Dear reader")
    browser.open(f"http://127.0.0.1:{port}/")
    for path, condition in ((tmp_path / "letter.png", "!document.getElementById('problem').hidden"), (picture, ANSWERED)):
        for kind in ("dragEnter", "dragOver", "drop"):
            browser("Input.dispatchDragEvent", type=kind, x=640, y=300, data={"items": [], "files": [str(path)], "dragOperationsMask": 1})
        browser.wait(condition)
        if path != picture:
            assert "is not an image" in browser.js("document.getElementById('problem').innerText")
            assert browser.js("document.getElementById('problem').getAttribute('role')") == "alert"
            assert browser.js("document.getElementById('result').hidden")
    assert browser.js("document.getElementById('problem').hidden")


def test_the_keyboard_is_enough(browser, port, picture):
    browser.open(f"http://127.0.0.1:{port}/")
    browser("Page.setInterceptFileChooserDialog", enabled=True)
    browser.press("Tab")
    assert browser.js("document.activeElement.id") == "file"
    outline = browser.js("getComputedStyle(document.querySelector('.drop')).outlineStyle")
    assert outline == "solid"  # one can see where one is
    browser.press("Enter", text="\r")
    deadline = time.monotonic() + 20
    while not (opened := [event for event in browser.events if event.get("method") == "Page.fileChooserOpened"]):
        assert time.monotonic() < deadline
        browser.js("1")
    browser("DOM.setFileInputFiles", files=[str(picture)], backendNodeId=opened[-1]["params"]["backendNodeId"])
    browser("Page.setInterceptFileChooserDialog", enabled=False)
    browser.wait(ANSWERED)
    browser.press("Tab")
    browser.press("Tab")
    name = browser.js("document.activeElement.dataset.name")
    assert name in ("green", "blue") and browser.js("document.activeElement.matches(':focus-visible')")
    assert "Show what speaks for it" in browser.js("document.activeElement.getAttribute('aria-label')")
    browser.press("Enter", text="\r")
    browser.wait("document.activeElement.getAttribute('aria-pressed') === 'true'")
    browser.wait(f"document.getElementById('heat').alt.includes({json.dumps(name)})")


def test_a_telephone_and_many_classes(browser, tmp_path, picture):
    classes = [*MANY[:3], "a class with a very long name indeed, longer than a line", *MANY[4:]]
    path = colour_model(tmp_path / "many.onnx", classes=classes)
    with running(make_app(Predictor(path))) as port:
        browser.open(f"http://127.0.0.1:{port}/", width=360, height=740)
        browser.choose(picture)
        browser.wait(ANSWERED)
        assert browser.js("document.querySelectorAll('.bars button').length") == 10
        browser.js("document.getElementById('more').click()")
        assert browser.js("document.querySelectorAll('.bars button').length") == 30
        assert browser.js("document.documentElement.scrollWidth") <= 360
        assert browser.js("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
        assert browser.js("Math.min(...[...document.querySelectorAll('.bars button')].map(b => b.getBoundingClientRect().height))") >= 40
        unnamed = "[...document.querySelectorAll('img')].filter(i => !i.hidden && !i.closest('label') && !i.alt).length"
        assert browser.js(unnamed) == 0 and browser.js("document.documentElement.lang") == "en"
