"""Rollouts from vLLM servers in an environment of their own, over HTTP (``vllm_worker.py`` is the server)."""

import atexit
import json
import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from appo.data.prompts import Prompt
from appo.models.loaded import end_ids, unwrapped, vision_token_ids
from appo.rollout.engine import Completion, Sampling
from appo.rollout.vllm_process import WORKER, Server, own_server
from appo.rollout.vllm_requests import EngineError, check_prompt, completion_of, request_of
from appo.rollout.vllm_worker import PROTOCOL
from appo.rollout.weight_files import write_weights

logger = logging.getLogger(__name__)


class VLLMServerRollout:
    """Samples on vLLM servers, in an environment of their own.

    Args:
        model: the model in training, for its special tokens; weights come by ``update_weights``.
        processor: its processor; saved beside the model's config where a server is started.
        folder: for weights, logs and the served model's folder; a server must be able to read it.
        urls: servers that run already. Each process has a share of them to itself, and deals its prompts out to them;
            with fewer servers than processes, process r shares number r modulo their count.
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
        self.architecture = type(unwrapped(model)).__name__.removeprefix("FSDP")
        self.version, self.weights = -1, Path()
        self.checksum = (0, 0)
        if urls:
            own = urls[self.rank :: self.world] or [urls[self.rank % len(urls)]]
            self.servers = [Server(url.rstrip("/"), token) for url in own]
        else:
            log = self.folder / f"vllm-{self.rank}.log"
            self.servers = [own_server(python, model_path, logprobs_mode, arguments or {}, log)]
            self.servers[0].start(timeout)
            atexit.register(self.close)
        self.info = [self._check(server, logprobs_mode) for server in self.servers]

    def _check(self, server: Server, logprobs_mode: str) -> dict[str, Any]:
        """What the server says of itself: that it is one of ours, of this version, and serves this model."""
        try:
            info: dict[str, Any] = server.call("/info", timeout=min(self.timeout, 30))
        except (OSError, ValueError) as error:  # nobody, or somebody who does not speak JSON
            raise EngineError(
                f"vLLM server {server.url}: does not answer ({error}). Start it with `python {WORKER} --model "
                "FOLDER` in its environment, or correct `engine_urls`."
            ) from error
        protocol = info.get("protocol") if isinstance(info, dict) else None
        if protocol != PROTOCOL:
            raise EngineError(
                f"vLLM server {server.url}: expected version {PROTOCOL} of the protocol, got "
                f"{protocol!r}. Start it with the vllm_worker.py of this version: {WORKER}."
            )
        if not self.vocabulary - 1024 <= info["vocabulary"] <= self.vocabulary:
            raise EngineError(
                f"vLLM server {server.url}: serves {info['model']!r} with {info['vocabulary']} tokens, the model "
                f"in training has {self.vocabulary}. Start it on the model that is trained."
            )
        if self.architecture not in info["architectures"]:
            raise EngineError(
                f"vLLM server {server.url}: serves {info['model']!r}, a {' or '.join(info['architectures'])}, the "
                f"model in training is a {self.architecture}. Start it on the model that is trained."
            )
        if info["logprobs_mode"] != logprobs_mode:
            raise EngineError(
                f"vLLM server {server.url}: gives {info['logprobs_mode']}, this run needs {logprobs_mode}. Start "
                f"it with --logprobs-mode {logprobs_mode}."
            )
        logger.info("rollouts by vLLM %s (transformers %s) at %s", info["vllm"], info["transformers"], server.url)
        return info

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Completion]]:
        """See ``Rollout``. Raises EngineError when a server reads a prompt otherwise than the trainer."""
        groups = self.ask(prompts, sampling, seeds)
        return [[completion_of(each, self.version) for each in group["completions"]] for group in groups]

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The answer for each prompt, ``prompt_token_ids`` and ``completions``, of the servers side by side."""
        shares = [range(start, len(prompts), len(self.servers)) for start in range(len(self.servers))]
        found: dict[int, dict[str, Any]] = {}
        with ThreadPoolExecutor(len(self.servers)) as threads:
            asked = [
                threads.submit(self._ask_one, server, share, prompts, sampling, seeds)
                for server, share in zip(self.servers, shares, strict=True)
                if share
            ]
            for share, answer in zip(shares, [each.result() for each in asked], strict=False):
                found.update(zip(share, answer, strict=True))
        return [found[index] for index in range(len(prompts))]

    def _ask_one(
        self,
        server: Server,
        share: Sequence[int],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[dict[str, Any]]:
        own, own_seeds = [prompts[index] for index in share], [seeds[index] for index in share]
        body = request_of(own, sampling, own_seeds, suppressed=self.suppressed, end_ids=self.end_ids)
        answer = self._repeat(server, "/generate", body)
        if answer["weight_version"] != self.version:  # somebody started the server again, without our weights
            self._load(server)
            answer = self._repeat(server, "/generate", body)
        if answer["weight_version"] != self.version:
            raise EngineError(
                f"vLLM server {server.url}: sampled with weights of version {answer['weight_version']}, this run "
                f"is at {self.version}. Does another run hand it weights?"
            )
        groups: list[dict[str, Any]] = answer["groups"]
        for group, prompt in zip(groups, own, strict=True):
            check_prompt(group["prompt_token_ids"], prompt, server.url)
        return groups

    def _repeat(self, server: Server, path: str, body: Any) -> Any:
        """Ask, and ask again when nobody answers: a server that died is started again with the weights it had."""
        for attempt in range(self.retries + 1):
            try:
                return server.call(path, body, timeout=self.timeout)
            except OSError as error:
                problem = error
                logger.warning("vLLM server %s: %s (try %d of %d)", server.url, error, attempt + 1, self.retries + 1)
                if server.command and attempt < self.retries:
                    self._start_again(server)
                    self._load(server)
                elif attempt < self.retries:
                    time.sleep(min(2.0**attempt, 30))
        remedy = f"See {server.log}." if server.log else "Start it again; the run goes on from its checkpoint."
        raise EngineError(
            f"vLLM server {server.url}: no answer in {self.retries + 1} tries ({problem}). {remedy}"
        ) from problem

    def _start_again(self, server: Server) -> None:
        server.stop()
        server.start(self.timeout)

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Write the weights and have every server load them. Every process calls it; see ``Rollout``."""
        before, self.weights = self.weights, self.folder / f"weights-{version}"
        self.checksum = write_weights(model, self.weights, dtype=self.dtype, write=self.rank == 0)
        self._barrier()
        if self.rank != 0:
            saved = json.loads((self.weights / "checksum.json").read_text())
            self.checksum = (saved["sum"], saved["count"])
        self.version = version
        with ThreadPoolExecutor(len(self.servers)) as threads:
            list(threads.map(self._load, self.servers))
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
            self._start_again(server)
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
        for server in self.servers:
            server.stop()
        if self.rank == 0 and self.weights != Path():
            shutil.rmtree(self.weights, ignore_errors=True)
