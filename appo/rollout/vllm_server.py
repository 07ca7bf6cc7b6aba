"""Rollouts from vLLM servers in an environment of their own, over HTTP (``vllm_worker.py`` is the server)."""

import atexit
import json
import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from appo.data.prompts import Prompt
from appo.models.loaded import end_ids, unwrapped, vision_token_ids
from appo.rollout.engine import Completion, Sampling
from appo.rollout.vllm_process import Server, own_server
from appo.rollout.vllm_requests import EngineError, check_prompt, completion_of, request_of
from appo.rollout.weight_files import adapter_rank, write_adapters, write_weights
from appo.rollout.weight_transfer import IPC_ENVIRONMENT, Transfer, refuse_transfer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handed:
    """Weights that servers were given: a folder, the request that loads it, and the checksum of what is in it."""

    folder: Path
    route: str
    checksum: tuple[int, int]
    adapters_apart: bool  # adapters are not in these weights


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
        dtype: of the weights that are handed over. weight_transfer: how, `appo.rollout.weight_transfer.KINDS`.

    Raises:
        EngineError: no way of transfer like that here, no server there, an old one, one of another model.
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
        weight_transfer: str = "file",
    ) -> None:
        if bool(urls) == bool(python):
            raise ValueError(
                "VLLMServerRollout: expected `urls` of running servers or `python` of an environment with vLLM, got "
                f"{'both' if urls else 'neither'}. Pass one of them."
            )
        refuse_transfer(weight_transfer)
        self.weight_transfer = weight_transfer
        self._transfer: Transfer | None = None  # joined when there are weights to send
        self.folder = Path(folder).absolute()
        self.timeout, self.retries, self.dtype = timeout, retries, dtype
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        tokenizer = getattr(processor, "tokenizer", processor)
        self.end_ids, self.suppressed = end_ids(model, tokenizer), vision_token_ids(model, tokenizer)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.architecture = type(unwrapped(model)).__name__.removeprefix("FSDP")
        self.version = -1
        self.handed: list[Handed] = []  # what makes a new server one with the trainer's weights
        if urls:
            own = urls[self.rank :: self.world] or [urls[self.rank % len(urls)]]
            self.servers = [Server(url.rstrip("/"), token) for url in own]
        else:
            log = self.folder / f"vllm-{self.rank}.log"
            arguments = dict(arguments or {})
            if weight_transfer != "file":
                arguments["weight_transfer_config"] = {"backend": weight_transfer}
            self.servers = [own_server(python, model_path, logprobs_mode, arguments, log)]
            self.servers[0].environment = IPC_ENVIRONMENT if weight_transfer == "ipc" else {}
            self.servers[0].start(timeout)
            atexit.register(self.close)
        self.info = [self._check(server, logprobs_mode) for server in self.servers]

    def _check(self, server: Server, logprobs_mode: str) -> dict[str, Any]:
        """The server's account of itself: that it is one of ours, of this version, and serves this model."""
        info = server.info(self.timeout)
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
        if self.weight_transfer not in ("file", info["weight_transfer"]):
            raise EngineError(
                f"vLLM server {server.url}: takes weights by {info['weight_transfer'] or 'file'}, this run sends them "
                f"by {self.weight_transfer}. Start it with --arguments "
                f"""'{{"weight_transfer_config": {{"backend": "{self.weight_transfer}"}}}}'."""
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
        if self._transfer is not None:
            raise EngineError(
                f"vLLM server {server.url}: gone, with weights that came by {self.weight_transfer} and that one "
                "process cannot send again. Start the run again: it goes on from its checkpoint."
            )
        server.stop()
        server.start(self.timeout)

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Write the weights and have every server load them. Every process calls it; see ``Rollout``.

        Of a model with LoRA adapters that every server takes by themselves, the weights below them are written once.
        """
        if self.weight_transfer != "file":
            return self._send(model, version)
        before, last, self.version = self.handed, self.version, version
        alone = 0 < adapter_rank(model) <= min(info["lora_rank"] for info in self.info)
        if alone:
            kept = [each for each in before if each.route == "/update_weights" and each.adapters_apart]
            below = kept or [self._written(model, f"weights-below-{version}", "/update_weights", apart=True)]
            fresh = [self._written(model, f"adapters-{version}", "/update_adapters", apart=True)]
            self.handed = below + fresh
            # A server that somebody started again has lost the weights below.
            fresh = fresh if kept and all(self._is_at(server, last) for server in self.servers) else self.handed
        else:
            fresh = self.handed = [self._written(model, f"weights-{version}", "/update_weights", apart=False)]
        with ThreadPoolExecutor(len(self.servers)) as threads:
            list(threads.map(lambda server: self._load(server, fresh), self.servers))
        self._barrier()
        if self.rank == 0:
            for each in before:
                if each.folder not in [kept.folder for kept in self.handed]:
                    shutil.rmtree(each.folder)

    def _is_at(self, server: Server, version: int) -> bool:
        try:
            return bool(server.call("/info", timeout=self.timeout)["weight_version"] == version)
        except OSError:
            return False

    def _send(self, model: Any, version: int) -> None:
        if self._transfer is None:
            workers = [info["workers"] for info in self.info]
            self._transfer = Transfer(self.weight_transfer, self.servers, workers, self.timeout)
        sent = Handed(self.folder, self.weight_transfer, self._transfer.send(model, version, self.dtype), False)
        self.version = version
        for server in self.servers:
            self._compare(server, sent, server.call("/checksum", {}, timeout=self.timeout)["workers"])

    def _written(self, model: Any, name: str, route: str, *, apart: bool) -> Handed:
        folder, write = self.folder / name, self.rank == 0
        if route == "/update_adapters":
            checksum = write_adapters(model, folder, dtype=self.dtype, write=write)
        else:
            checksum = write_weights(model, folder, dtype=self.dtype, write=write, adapters=not apart)
        self._barrier()
        if self.rank != 0:
            saved = json.loads((folder / "checksum.json").read_text())
            checksum = (saved["sum"], saved["count"])
        return Handed(folder, route, checksum, apart)

    def _load(self, server: Server, handed: Sequence[Handed] | None = None) -> None:
        """Have a server load weights; None: all it needs to be where the trainer is."""
        for each in self.handed if handed is None else handed:
            try:
                found = self._hand_over(server, each)
            except OSError:
                if not server.command:
                    raise EngineError(f"vLLM server {server.url}: no answer while it was handed weights.") from None
                self._start_again(server)
                return self._load_once(server)
            self._compare(server, each, found)

    def _load_once(self, server: Server) -> None:
        for each in self.handed:
            self._compare(server, each, self._hand_over(server, each))

    def _hand_over(self, server: Server, each: Handed) -> list[Any]:
        server.call(each.route, {"path": str(each.folder), "version": self.version}, timeout=self.timeout)
        workers: list[Any] = server.call("/checksum", {}, timeout=self.timeout)["workers"]
        return workers

    def _compare(self, server: Server, each: Handed, workers: Sequence[Any]) -> None:
        for worker in workers:
            if tuple(worker) != each.checksum:
                raise EngineError(
                    f"vLLM server {server.url}: loaded weights with checksum {tuple(worker)}, the trainer's have "
                    f"{each.checksum}. Is {each.folder} the same folder on both sides?"
                )

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Stop the server that this process started, and remove the weights that were handed over."""
        for server in self.servers:
            server.stop()
        for each in self.handed if self.rank == 0 else ():
            shutil.rmtree(each.folder, ignore_errors=True)
