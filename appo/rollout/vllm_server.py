"""Rollouts from vLLM servers in an environment of their own, over HTTP (``vllm_worker.py`` is the server)."""

import atexit
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from appo.data.prompts import Prompt
from appo.models.loaded import end_ids, vision_token_ids
from appo.rollout.engine import Completion, Sampling
from appo.rollout.vllm_requests import EngineError, check_prompt, completion_of, request_of
from appo.rollout.vllm_worker import PROTOCOL
from appo.rollout.weight_files import write_weights

logger = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("vllm_worker.py")


@dataclass
class Server:
    """One server: where it is and, if this process started it, how."""

    url: str
    token: str = ""
    command: list[str] = field(default_factory=list)  # empty: it is somebody else's
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float) -> None:
        """Start the process and wait until it answers."""
        assert self.log is not None
        environment = os.environ | {"APPO_SERVER_TOKEN": self.token}
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
            if error.code == 503:
                raise ConnectionError(f"its engine is gone: {text}") from error
            raise EngineError(f"vLLM server {self.url}{path}: {error.code}: {text}") from error


class VLLMServerRollout:
    """Samples on vLLM servers, in an environment of their own.

    Args:
        model: the model in training, for its special tokens; weights come by ``update_weights``.
        processor: its processor; saved beside the model's config where a server is started.
        folder: for weights, logs and the served model's folder; a server must be able to read it.
        urls: servers that run already; process r of several asks number r modulo their count.
        python: interpreter of the environment with vLLM. Process r of several starts a server of its own with it.
        model_path: what a started server serves.
        arguments: further arguments of vLLM's engine, such as ``{"tensor_parallel_size": 2}``.
        timeout: seconds for a server to start, and for a request. retries: further tries of a request whose server
            does not answer; one that this process started is started again.
        dtype: of the weights that are handed over.

    Raises:
        EngineError: no server there, an old one, one of another model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        folder: str | Path,
        *,
        urls: Sequence[str] = (),
        python: str = "",
        model_path: str = "",
        arguments: dict[str, Any] | None = None,
        token: str = "",
        timeout: float = 600.0,
        retries: int = 2,
        logprobs_mode: str = "raw_logprobs",
        dtype: torch.dtype | None = None,
    ) -> None:
        if bool(urls) == bool(python):
            raise ValueError(
                "VLLMServerRollout: expected `urls` of running servers or `python` of an environment with vLLM, got "
                f"{'both' if urls else 'neither'}. Pass one of them."
            )
        self.folder = Path(folder).absolute()
        self.timeout, self.retries, self.dtype = timeout, retries, dtype
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        tokenizer = getattr(processor, "tokenizer", processor)
        self.end_ids, self.suppressed = end_ids(model, tokenizer), vision_token_ids(model, tokenizer)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.version, self.weights = -1, Path()
        self.checksum = (0, 0)
        if urls:
            self.server = Server(urls[self.rank % len(urls)].rstrip("/"), token)
        else:
            self.server = self._own(python, model_path, logprobs_mode, arguments or {})
            self.server.start(timeout)
            atexit.register(self.close)
        self._check(logprobs_mode)

    def _own(self, python: str, model_path: str, logprobs_mode: str, arguments: dict[str, Any]) -> Server:
        if shutil.which(python) is None:
            raise EngineError(
                f"`vllm_python`: expected the interpreter of an environment with vLLM, got {python!r}, which is no "
                "program. Make one: `python -m venv vllm-env && vllm-env/bin/pip install vllm`."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            python, str(WORKER), "--model", model_path, "--port", str(port), "--logprobs-mode", logprobs_mode,
            "--arguments", json.dumps(arguments), "--parent", str(os.getpid()),
        ]  # fmt: skip
        return Server(f"http://127.0.0.1:{port}", secrets.token_hex(16), command, self.folder / f"vllm-{self.rank}.log")

    def _check(self, logprobs_mode: str) -> None:
        """That the server is one of ours, of this version, and serves this model."""
        try:
            info = self.server.call("/info", timeout=min(self.timeout, 30))
        except OSError as error:
            raise EngineError(
                f"vLLM server {self.server.url}: does not answer ({error}). Start it with `python {WORKER} --model "
                "FOLDER` in its environment, or correct `engine_urls`."
            ) from error
        if info.get("protocol") != PROTOCOL:
            raise EngineError(
                f"vLLM server {self.server.url}: expected version {PROTOCOL} of the protocol, got "
                f"{info.get('protocol')!r}. Start it with the vllm_worker.py of this version: {WORKER}."
            )
        if not self.vocabulary - 1024 <= info["vocabulary"] <= self.vocabulary:
            raise EngineError(
                f"vLLM server {self.server.url}: serves {info['model']!r} with {info['vocabulary']} tokens, the model "
                f"in training has {self.vocabulary}. Start it on the model that is trained."
            )
        if info["logprobs_mode"] != logprobs_mode:
            raise EngineError(
                f"vLLM server {self.server.url}: gives {info['logprobs_mode']}, this run needs {logprobs_mode}. Start "
                f"it with --logprobs-mode {logprobs_mode}."
            )
        self.info = info
        logger.info("rollouts by vLLM %s (transformers %s)", info["vllm"], info["transformers"])

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Completion]]:
        """See ``Rollout``. Raises EngineError when the server reads a prompt otherwise than the trainer."""
        groups = self.ask(prompts, sampling, seeds)
        for group, prompt in zip(groups, prompts, strict=True):
            check_prompt(group["prompt_token_ids"], prompt, self.server.url)
        return [[completion_of(each, self.version) for each in group["completions"]] for group in groups]

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The server's answer for each prompt: ``prompt_token_ids`` and ``completions``."""
        body = request_of(prompts, sampling, seeds, suppressed=self.suppressed, end_ids=self.end_ids)
        answer = self._ask("/generate", body)
        if answer["weight_version"] != self.version:  # somebody started the server again, without our weights
            self._load(self.server)
            answer = self._ask("/generate", body)
        if answer["weight_version"] != self.version:
            raise EngineError(
                f"vLLM server {self.server.url}: sampled with weights of version {answer['weight_version']}, this run "
                f"is at {self.version}. Does another run hand it weights?"
            )
        return answer["groups"]

    def _ask(self, path: str, body: Any) -> Any:
        """Ask, and ask again when nobody answers: a server that died is started again with the weights it had."""
        for attempt in range(self.retries + 1):
            try:
                return self.server.call(path, body, timeout=self.timeout)
            except OSError as error:
                problem = error
                logger.warning(
                    "vLLM server %s: %s (try %d of %d)", self.server.url, error, attempt + 1, self.retries + 1
                )
                if self.server.command and attempt < self.retries:
                    self.server.stop()
                    self.server.start(self.timeout)
                    self._load(self.server)
                else:
                    time.sleep(min(2.0**attempt, 30))
        remedy = (
            f"See {self.server.log}." if self.server.log else "Start it again; the run goes on from its checkpoint."
        )
        raise EngineError(
            f"vLLM server {self.server.url}: no answer in {self.retries + 1} tries ({problem}). {remedy}"
        ) from problem

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Write the weights and have every server load them. Every process calls it; see ``Rollout``."""
        before, self.weights = self.weights, self.folder / f"weights-{version}"
        self.checksum = write_weights(model, self.weights, dtype=self.dtype, write=self.rank == 0)
        self._barrier()
        if self.rank != 0:
            saved = json.loads((self.weights / "checksum.json").read_text())
            self.checksum = (saved["sum"], saved["count"])
        self.version = version
        self._load(self.server)
        self._barrier()
        if self.rank == 0 and before != Path() and before != self.weights:
            shutil.rmtree(before)

    def _load(self, server: Server) -> None:
        if self.version < 0:
            return
        try:
            server.call("/update_weights", {"path": str(self.weights), "version": self.version}, timeout=self.timeout)
            found = server.call("/checksum", {}, timeout=self.timeout)
        except OSError:
            if not server.command:
                raise EngineError(f"vLLM server {server.url}: no answer while it was handed weights.") from None
            server.stop()
            server.start(self.timeout)
            server.call("/update_weights", {"path": str(self.weights), "version": self.version}, timeout=self.timeout)
            found = server.call("/checksum", {}, timeout=self.timeout)
        for worker in found["workers"]:
            if tuple(worker) != self.checksum:
                raise EngineError(
                    f"vLLM server {server.url}: loaded weights with checksum {tuple(worker)}, the trainer's have "
                    f"{self.checksum}. Is {self.weights} the same folder on both sides?"
                )

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Stop the server that this process started, and remove the weights that were handed over."""
        self.server.stop()
        if self.rank == 0 and self.weights != Path():
            shutil.rmtree(self.weights, ignore_errors=True)


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
