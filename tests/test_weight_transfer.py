"""What is said to vLLM's weight transfer (0.32, `vllm.distributed.weight_transfer`), to a server that this test plays.

There is no GPU here: NCCL and handles of GPU memory are played too. What is tested is the order of things, what each
message holds, and that every weight arrives.
"""

import base64
import pickle
import queue
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.cuda import nccl

from appo.rollout import weight_transfer
from appo.rollout.vllm_extension import Checksum
from appo.rollout.vllm_requests import EngineError
from appo.rollout.vllm_server import VLLMServerRollout
from appo.rollout.weight_files import weights_of
from appo.rollout.weight_transfer import Transfer, why_not_transfer
from appo.tasks.tiny import build_tiny

WAIT = 30


class Receiver:
    """A server: takes messages as vLLM's routes do, weights from the wire, and sums them up."""

    def __init__(self, url="http://played", *, fails=None):
        self.url, self.fails = url, fails
        self.steps, self.wire, self.weights = [], queue.Queue(), {}
        self.joined = threading.Event()

    def call(self, path, payload, *, timeout):
        if path == "/checksum":
            sums = Checksum()
            for tensor in self.weights.values():
                sums.add(tensor)
            return {"workers": [[sums.total, sums.count]]}
        step = path.removeprefix("/transfer/")
        self.steps.append((step, payload))
        if step == self.fails:
            raise EngineError(f"{self.url}: refused")
        if step == "init":
            self.joined.set()
        if step == "update":
            self.receive(payload["update_info"])
        return {}

    def receive(self, info):
        shapes = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        if "ipc_handles_pickled" in info:
            handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
            arrived = [handle["GPU-1"] for handle in handles]
        else:
            arrived = (self.wire.get(timeout=WAIT) for _ in info["names"])
        for (name, dtype, shape), tensor in zip(shapes, arrived, strict=True):
            assert str(tensor.dtype) == f"torch.{dtype}" and list(tensor.shape) == shape
            self.weights[name] = tensor.clone()


@pytest.fixture
def played(monkeypatch):
    """A GPU and NCCL: an identity names a server, whose communicator its wire is."""
    receivers = []

    def receiver(**options):
        receivers.append(Receiver(f"http://played-{len(receivers)}", **options))
        return receivers[-1]

    def init_rank(world, identity, rank):
        assert rank == 0 and world == 3
        (found,) = [r for r in receivers if r.steps and identity_of(r) == identity]
        assert found.joined.wait(WAIT), "the server is asked while this side joins"
        return found

    identities = iter(range(100))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_nccl_init_rank", None, raising=False)
    monkeypatch.setattr(nccl, "unique_id", lambda: b"%0128d" % next(identities))
    monkeypatch.setattr(nccl, "init_rank", lambda *args: retried(init_rank, *args))
    monkeypatch.setattr(nccl, "all_reduce", lambda tensors, comms: None)
    monkeypatch.setattr(nccl, "broadcast", lambda tensors, root, comms: comms[0].wire.put(tensors[0].clone()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr("torch.multiprocessing.reductions.reduce_tensor", lambda tensor: (None, tensor))
    monkeypatch.setattr(weight_transfer, "DEVICE", torch.device("cpu"))
    return receiver


def identity_of(receiver):
    return base64.b64decode(receiver.steps[0][1]["init_info"]["nccl_unique_id_b64"])


def retried(function, *arguments):
    """The server's thread may not have come yet."""
    for _ in range(WAIT * 100):
        try:
            return function(*arguments)
        except ValueError:
            threading.Event().wait(0.01)
    raise AssertionError("no server was asked to join")


# Both ways between GPUs; weights as they are, and narrowed on the way.
@pytest.mark.parametrize("kind", ["nccl", "ipc"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_weight_arrives_at_every_server(kind, dtype, played, monkeypatch):
    monkeypatch.setattr(weight_transfer, "SHARD_BYTES", 1 << 20)  # several messages by ipc
    model, _ = build_tiny()
    servers = [played(), played()]
    transfer = Transfer(kind, servers, [2, 2], timeout=WAIT)
    sums = transfer.send(model, 7, dtype)
    expected = dict(weights_of(model, dtype))
    for server in servers:
        steps = [step for step, _ in server.steps]
        assert steps[:2] == ["init", "start"] and steps[-1] == "finish" and set(steps[2:-1]) == {"update"}
        assert (len(steps) > 4) == (kind == "ipc")
        assert server.steps[-1][1] == {"version": 7}
        assert server.weights.keys() == expected.keys()
        assert all(torch.equal(server.weights[name], tensor) for name, tensor in expected.items())
        assert server.call("/checksum", {}, timeout=1)["workers"] == [list(sums)]
    again = transfer.send(model, 8, dtype)
    assert again == sums and [step for step, _ in servers[0].steps].count("init") == 1


def test_workers_of_a_server_are_counted(played):
    server = played()
    Transfer("nccl", [server], [2], timeout=WAIT)
    info = server.steps[0][1]["init_info"]
    assert info["rank_offset"] == 1 and info["world_size"] == 3 and info["packed"] is False


def test_a_server_that_refuses_is_no_endless_wait(played):
    server = played(fails="update")
    transfer = Transfer("nccl", [server], [2], timeout=WAIT)
    with pytest.raises(EngineError, match="refused"):
        transfer.send(build_tiny()[0], 1, None)


def test_a_transport_that_is_not_there_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_transfer("file") is None
    model, processor = build_tiny()
    for kind in ("nccl", "ipc"):
        with pytest.raises(EngineError, match=f"`weight_transfer`: expected file here, got {kind}: torch sees no GPU"):
            VLLMServerRollout(model, processor, tmp_path, python="python3", weight_transfer=kind)


def test_a_server_of_another_transport_is_named(tmp_path, monkeypatch):
    from played_server import Played

    monkeypatch.setattr("appo.rollout.vllm_server.refuse_transfer", lambda kind: None)
    server = Played(info={"weight_transfer": "nccl"})
    with pytest.raises(EngineError, match=r'takes weights by nccl, this run sends them by ipc.*"backend": "ipc"'):
        VLLMServerRollout(*build_tiny(), tmp_path, urls=[server.url], weight_transfer="ipc")
