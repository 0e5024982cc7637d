"""A loopback server that breaks as asked, and Python processes of their own."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import palm_rlhf

# The top of the package imports torch, which takes each process seconds; the data floor does not need it.
WITHOUT_TORCH = f"""
import sys, types
package = types.ModuleType("palm_rlhf")
package.__path__ = {list(palm_rlhf.__path__)!r}
sys.modules["palm_rlhf"] = package
"""


class FileServer(ThreadingHTTPServer):
    """Serves ``body``; each request follows the next of ``plans`` (``{}`` when none is left).

    ``cut``: closes the connection after so many bytes; ``stall``: sends no more, but keeps it open; ``ranges=False``:
    ignores Range; ``rewind``: a range starts so many bytes early; ``length=False``: leaves Content-Length out;
    ``status``: answers with an error; ``silent``: does not answer.
    """

    daemon_threads = True

    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body
        self.plans = []
        self.ranges = []  # the Range header of each request
        self.sent = threading.Event()  # set when a stalled reply has sent all that it will
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/corpus.zip"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        plan = self.server.plans.pop(0) if self.server.plans else {}
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        self.close_connection = True
        if "silent" in plan:
            self.server.closing.wait()
            return
        if "status" in plan:
            self.send_error(plan["status"])
            return
        body, start = self.server.body, 0
        if asked and plan.get("ranges", True):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = max(0, start - plan.get("rewind", 0))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if plan.get("length", True):
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        stop = plan.get("cut", plan.get("stall", len(body)))
        self.wfile.write(body[start : start + stop])
        self.wfile.flush()
        if "stall" in plan:
            self.server.sent.set()
            self.server.closing.wait()

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(run_server):
    """Starts a ``FileServer`` for the bytes given."""
    return lambda body: run_server(FileServer(body))


@pytest.fixture
def python(start_python, tmp_path):
    """Starts a Python process that runs the code given, in a folder of its own."""
    return lambda code, *arguments: start_python(WITHOUT_TORCH + code, *arguments, cwd=tmp_path)
