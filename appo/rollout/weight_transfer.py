"""Weights from the trainer's GPUs to vLLM's without files, through vLLM's weight transfer (the setting
``weight_transfer``: nccl, ipc).

The other side is vLLM's own engine of that name (`vllm.distributed.weight_transfer`). It was read for 0.32, and what is
said to it is tested against a server that plays it; no GPU has run this module yet.

"nccl": trainer and server on different GPUs, on any machines that NCCL connects. "ipc": both on the same GPUs.
A sharded weight is gathered when its turn comes, in every process; each process sends to its own servers.
"""

import base64
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from appo.rollout.vllm_extension import Checksum
from appo.rollout.vllm_process import Server
from appo.rollout.vllm_requests import EngineError
from appo.rollout.weight_files import SHARD_BYTES, described_weights, weights_of
from appo_kernels.dtypes import dtype_name

DEVICE = torch.device("cuda")
KINDS = ("file", "nccl", "ipc")
# What a server needs in its environment to take handles of GPU memory, which travel pickled, behind its token.
IPC_ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def why_not_transfer(kind: str) -> str | None:
    """The reason that weights cannot travel in that way from here; None where they can."""
    if kind == "file":
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if kind == "nccl" and not hasattr(torch._C, "_nccl_init_rank"):
        return "this torch is built without NCCL"
    return None


def refuse_transfer(kind: str) -> None:
    """Raise EngineError naming the transport and the reason, where there is none."""
    if reason := why_not_transfer(kind):
        raise EngineError(f"`weight_transfer`: expected file here, got {kind}: {reason}.")


class Transfer:
    """Sends the weights of a model to the servers of this process. Raises EngineError for a transport there is not."""

    def __init__(self, kind: str, servers: Sequence[Server], workers: Sequence[int], timeout: float) -> None:
        """workers: GPUs of each server. timeout: seconds for a server's answer."""
        refuse_transfer(kind)
        self.kind, self.servers, self.timeout = kind, servers, timeout
        self.communicators: list[Any] = []
        if kind == "nccl":
            self.communicators = [self._join(server, count) for server, count in zip(servers, workers, strict=True)]
        else:
            for server in servers:
                self._call(server, "init", {"init_info": {"packed": False}})

    def send(self, model: Any, version: int, dtype: torch.dtype | None) -> tuple[int, int]:
        """Hand over the weights as ``version``; every process calls it. Returns the checksum of what was sent."""
        self._all("start", {})
        sums = Checksum()
        if self.kind == "nccl":
            self._broadcast(model, dtype, sums)
        else:
            self._share(model, dtype, sums)
        self._all("finish", {"version": version})
        return sums.total, sums.count

    def _join(self, server: Server, workers: int) -> Any:
        """A communicator with the server's workers, in which this process is rank 0.

        Both sides have to arrive: the server is asked by a thread. vLLM sends a number around first.
        """
        from torch.cuda import nccl

        identity = bytes(nccl.unique_id())
        info = {
            "nccl_unique_id_b64": base64.b64encode(identity).decode(),
            "rank_offset": 1,
            "world_size": 1 + workers,
            "packed": False,
        }
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(self._call, server, "init", {"init_info": info})
            communicator = nccl.init_rank(1 + workers, identity, 0)
            nccl.all_reduce([torch.zeros(1, device=DEVICE)], comms=[communicator])
            asked.result()
        return communicator

    def _broadcast(self, model: Any, dtype: torch.dtype | None, sums: Checksum) -> None:
        from torch.cuda import nccl

        described = described_weights(model, dtype)
        info = {
            "names": [name for name, _, _ in described],
            "dtype_names": [dtype_name(kind) for _, kind, _ in described],
            "shapes": [list(shape) for _, _, shape in described],
        }
        # Not in a `with`: a server that fails leaves the broadcast waiting, and its error is to be seen.
        threads = ThreadPoolExecutor(len(self.servers))
        try:
            asked = [threads.submit(self._call, server, "update", {"update_info": info}) for server in self.servers]
            for _, tensor in weights_of(model, dtype):
                _raise_failed(asked)
                tensor = tensor.to(DEVICE).contiguous()
                sums.add(tensor)
                for communicator in self.communicators:
                    nccl.broadcast([tensor], 0, comms=[communicator])
            torch.cuda.synchronize()
            for each in asked:
                each.result()
        finally:
            threads.shutdown(wait=False)

    def _share(self, model: Any, dtype: torch.dtype | None, sums: Checksum) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        for part in _parts(weights_of(model, dtype)):
            tensors = [tensor.to(DEVICE).contiguous() for _, tensor in part]  # kept until the servers have read them
            for tensor in tensors:
                sums.add(tensor)
            torch.cuda.synchronize()
            handles = [{gpu: reduce_tensor(tensor)[1]} for tensor in tensors]
            info = {
                "names": [name for name, _ in part],
                "dtype_names": [dtype_name(tensor.dtype) for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
                "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
            }
            self._all("update", {"update_info": info})
            del tensors, handles
            torch.cuda.ipc_collect()

    def _all(self, step: str, payload: dict[str, Any]) -> None:
        for server in self.servers:
            self._call(server, step, payload)

    def _call(self, server: Server, step: str, payload: dict[str, Any]) -> Any:
        try:
            return server.call(f"/transfer/{step}", payload, timeout=self.timeout)
        except OSError as error:
            raise EngineError(
                f"vLLM server {server.url}: gone while it was handed weights by {self.kind} ({error}). Start the run "
                "again: it goes on from its checkpoint."
            ) from error


def _raise_failed(asked: Sequence[Future[Any]]) -> None:
    for each in asked:
        if each.done():
            each.result()


def _parts(weights: Iterator[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in lists of at most `SHARD_BYTES`, or of one."""
    part, size = list[tuple[str, Tensor]](), 0
    for name, tensor in weights:
        if part and size + tensor.nbytes > SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += tensor.nbytes
    if part:
        yield part
