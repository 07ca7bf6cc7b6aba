"""A vLLM server: where it is, how it is asked, and, if this process started it, its process and log."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.rollout.vllm_requests import EngineError
from appo.rollout.vllm_worker import PROTOCOL

WORKER = Path(__file__).with_name("vllm_worker.py")


@dataclass
class Server:
    """One server: where it is and, if this process started it, how."""

    url: str
    token: str = ""
    command: list[str] = field(default_factory=list)  # empty: it is somebody else's
    log: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)  # what its process has besides ours
    process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float) -> None:
        """Start the process and wait until it answers."""
        assert self.log is not None
        environment = os.environ | self.environment | {"APPO_SERVER_TOKEN": self.token}
        # Python adds the worker's own folder to its path, where vLLM's processes find the worker extension.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + timeout
        while True:
            if self.process.poll() is not None:
                raise EngineError(
                    f"vLLM server {self.url}: ended with code {self.process.returncode} before it was ready. The end "
                    f"of its log {self.log}:\n{_tail(self.log)}"
                )
            try:
                self.call("/health", timeout=5)
                return
            except (OSError, urllib.error.HTTPError):
                if time.monotonic() > deadline:
                    self.stop()
                    raise EngineError(
                        f"vLLM server {self.url}: not ready after {timeout:g} s (`engine_timeout`). The end of its log "
                        f"{self.log}:\n{_tail(self.log)}"
                    ) from None
                time.sleep(0.5)

    def stop(self) -> None:
        """End the server and the processes of its engine, which outlive it otherwise."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # the whole group ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def call(self, path: str, body: Any = None, *, timeout: float) -> Any:
        """The JSON answer. body: bytes, or what becomes JSON; None asks with GET.

        Raises OSError when nobody answers or the engine behind the server is gone, EngineError when the server says
        that something is wrong.
        """
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:2000]
            if error.code == 401:
                raise EngineError(
                    f"vLLM server {self.url}: refused the token. Set `engine_token` to the APPO_SERVER_TOKEN that the "
                    "server was started with."
                ) from error
            if error.code == 404:
                raise EngineError(
                    f"vLLM server {self.url}: has no {path}, so it is another kind of server. Start `python {WORKER} "
                    "--model FOLDER` in vLLM's environment, or correct `engine_urls`."
                ) from error
            if error.code == 503:
                raise ConnectionError(f"its engine is gone: {text}") from error
            raise EngineError(f"vLLM server {self.url}{path}: {error.code}: {text}") from error

    def info(self, timeout: float) -> dict[str, Any]:
        """Its account of itself. Raises EngineError where nobody answers, or none of ours of this version."""
        try:
            found: dict[str, Any] = self.call("/info", timeout=min(timeout, 30))
        except (OSError, ValueError) as error:  # nobody, or somebody who does not speak JSON
            raise EngineError(
                f"vLLM server {self.url}: does not answer ({error}). Start it with `python {WORKER} --model "
                "FOLDER` in its environment, or correct `engine_urls`."
            ) from error
        protocol = found.get("protocol") if isinstance(found, dict) else None
        if protocol != PROTOCOL:
            raise EngineError(
                f"vLLM server {self.url}: expected version {PROTOCOL} of the protocol, got "
                f"{protocol!r}. Start it with the vllm_worker.py of this version: {WORKER}."
            )
        return found


def own_server(python: str, model_path: str, logprobs_mode: str, arguments: dict[str, Any], log: Path) -> Server:
    """A server to be started with ``python`` on a free port of this machine. Raises EngineError for no interpreter."""
    if shutil.which(python) is None:
        raise EngineError(
            f"`vllm_python`: expected the interpreter of an environment with vLLM, got {python!r}, which is no "
            "program. Make one: `python -m venv vllm-env && vllm-env/bin/pip install vllm`."
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, str(WORKER), "--model", model_path, "--port", str(port), "--logprobs-mode", logprobs_mode,
        "--arguments", json.dumps(arguments), "--parent", str(os.getpid()),
    ]  # fmt: skip
    return Server(f"http://127.0.0.1:{port}", secrets.token_hex(16), command, log)


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
