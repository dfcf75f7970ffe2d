"""The page in its own process, and visitors that send the same requests as a browser; page_load.py measures with them."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PROGRAM = Path(__file__).resolve().parent.parent / "apps" / "denoise.py"
API = "/gradio_api"


class PageError(ValueError):
    """The page did not start, refused a request or failed; the message is one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A running page."""

    address: str
    pid: int
    config: dict[str, Any]
    """The configuration that the page sends to every browser: components and events."""

    def peak_memory(self) -> int | None:
        """Peak bytes of the process since its start; None if the system does not report it."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


@contextmanager
def served(options: Sequence[str], *, timeout: float = 300.0) -> Iterator[Server]:
    """Start apps/denoise.py with `options`. Raises PageError if it ends, or does not answer within `timeout` seconds."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(PROGRAM), "--port", str(port), *options]
        environment = os.environ | {"GRADIO_TEMP_DIR": folder}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + timeout
            config = None
            while config is None:
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    said = log.read().strip().splitlines() or ["it said nothing"]
                    raise PageError(f"the page did not start: {said[-1]}")
                time.sleep(0.2)
                config = _config(address)
            yield Server(address=address, pid=process.pid, config=config)
        finally:
            process.terminate()
            process.wait()


def _config(address: str) -> dict[str, Any] | None:
    try:
        return httpx.get(f"{address}/config", timeout=10).raise_for_status().json()
    except httpx.HTTPError:
        return None


@dataclass(kw_only=True, slots=True)
class Visit:
    """The observations of a visitor, in seconds after pressing Denoise."""

    first_preview: float | None = None
    """Time when the first two images were downloaded; None if only the result came."""
    total: float = 0.0
    """Time of the result."""
    facts: str = ""
    """The line under the result."""


@dataclass(kw_only=True, slots=True)
class Visitor:
    """A visitor with the page open, who uploads a photograph and presses Denoise with the defaults of the page."""

    server: Server
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    asked: float = 0.0
    """Time when Denoise was pressed, by time.perf_counter."""
    _client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self._client = httpx.Client(base_url=self.server.address, timeout=None)

    def upload(self, photo: Path) -> dict[str, Any]:
        """Upload a photograph; return its value for `ask`."""
        with photo.open("rb") as file:
            sent = self._client.post(f"{API}/upload", files={"files": (photo.name, file)})
        return {"path": sent.raise_for_status().json()[0], "orig_name": photo.name, "meta": {"_type": "gradio.FileData"}}

    def ask(self, image: dict[str, Any]) -> None:
        """Press Denoise. Raises PageError if the queue is full."""
        self.asked = time.perf_counter()
        before, event = self._event("ask_for_result"), self._event("show_denoising")
        self._client.post(f"{API}/run/predict", json=self._body(before, [])).raise_for_status()
        components = {component["id"]: component["props"] for component in self.server.config["components"]}
        values = [components[number].get("value") for number in event["inputs"]]
        values[0] = image
        values[1] = "My photo is already noisy"  # what the page sets for an upload
        joined = self._client.post(f"{API}/queue/join", json=self._body(event, values))
        if joined.status_code != 200:
            raise PageError(str(joined.json().get("detail", joined.text)))

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield the messages of the page after `ask`, until the result. Raises PageError for a failed request."""
        with self._client.stream("GET", f"{API}/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line.removeprefix("data:"))
                if message["msg"] == "process_completed" and not message["success"]:
                    raise PageError(str(message["output"].get("error")))
                yield message
                if message["msg"] in ("process_completed", "close_stream"):
                    return

    def wait(self) -> Visit:
        """Watch the page until the result."""
        visit = Visit()
        for message in self.messages():
            if message["msg"] == "process_generating" and visit.first_preview is None:
                for picture in message["output"]["data"][0]:
                    self._client.get(f"{API}/file={picture['path']}").raise_for_status()
                visit.first_preview = time.perf_counter() - self.asked
            if message["msg"] == "process_completed":
                visit.facts = message["output"]["data"][1]
        visit.total = time.perf_counter() - self.asked
        return visit

    def queue_size(self) -> int:
        """Return the number of waiting requests of all visitors."""
        return int(self._client.get(f"{API}/queue/status").raise_for_status().json()["queue_size"])

    def _event(self, name: str) -> dict[str, Any]:
        return next(event for event in self.server.config["dependencies"] if event["api_name"] == name)

    def _body(self, event: dict[str, Any], values: list[Any]) -> dict[str, Any]:
        return {"data": values, "fn_index": event["id"], "session_hash": self.session}
