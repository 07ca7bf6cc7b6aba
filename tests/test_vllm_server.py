"""The client of vLLM servers against a server of the same protocol that this test plays: what goes over the wire, and
every way in which a server can be wrong. The real server is tested by ``make test-vllm``."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from appo.data.prompts import Prompt
from appo.data.records import Record
from appo.data.video import Clip
from appo.rollout.engine import Sampling
from appo.rollout.vllm_extension import Checksum
from appo.rollout.vllm_server import EngineError, VLLMServerRollout, request_of
from appo.rollout.vllm_worker import PROTOCOL, read_tensors
from appo.rollout.weight_files import described_weights, weights_of, write_weights
from appo.tasks.tiny import build_tiny

SAMPLING = Sampling(2, 4)


class Played:
    """A server of the protocol with one fault or none."""

    def __init__(self, **faults):
        self.faults, self.version, self.checksum, self.calls = faults, -1, [0, 0], []
        self.loaded = []
        self.routes = {
            "/update_weights": self.update_weights,
            "/update_adapters": self.update_weights,
            "/checksum": lambda body: {"workers": [self.checksum]},
            "/generate": self.generate,
        }
        played = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                result = played.info()
                self.answer(*result) if isinstance(result, tuple) else self.answer(result)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                played.calls.append(self.path)
                if (
                    played.faults.get("token")
                    and self.headers.get("Authorization") != f"Bearer {played.faults['token']}"
                ):
                    return self.answer({"error": "wrong or missing token"}, 401)
                if self.path == "/generate" and played.faults.get("dies", 0) > 0:
                    played.faults["dies"] -= 1
                    return self.connection.close()
                if self.path == "/generate" and played.faults.get("engine_dies", 0) > 0:
                    played.faults["engine_dies"] -= 1
                    return self.answer({"error": "EngineDeadError: EngineCore encountered an issue."}, 503)
                result = played.routes[self.path](body)
                self.answer(*result) if isinstance(result, tuple) else self.answer(result)

            def answer(self, value, code=200):
                data = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def info(self):
        standard = {
            "protocol": PROTOCOL, "vllm": "9", "transformers": "9", "model": "m", "vocabulary": 315,
            "logprobs_mode": "raw_logprobs", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "lora_rank": 0, "workers": 1, "weight_transfer": "", "weight_version": self.version,
        }  # fmt: skip
        return standard | self.faults.get("info", {})

    def update_weights(self, body):
        given = json.loads(body)
        sums = Checksum()
        for file in Path(given["path"]).glob("*.safetensors"):
            for tensor in load_file(file).values():
                sums.add(tensor)
        self.loaded.append(Path(given["path"]).name)
        self.version, self.checksum = given["version"], self.faults.get("checksum", [sums.total, sums.count])
        return {}

    def generate(self, body):
        tensors, request = read_tensors(body)
        if self.faults.get("forgets"):
            self.faults["forgets"], self.version = False, -1
        self.request, self.tensors = request, tensors
        groups = [
            {
                "prompt_token_ids": [*prompt["token_ids"], *self.faults.get("more", [])],
                "completions": [
                    {"ids": [5, 6, 7][: i + 1], "logprobs": [-0.5, None, -2.0][: i + 1], "finish_reason": "stop"}
                    for i in range(request["group_size"])
                ],
            }
            for prompt in request["prompts"]
        ]
        return {"weight_version": self.faults.get("version", self.version), "groups": groups}


@pytest.fixture
def tiny():
    return build_tiny()


def prompt_with_clip():
    frames = torch.arange(2 * 3 * 28 * 28, dtype=torch.int64).remainder(251).to(torch.uint8).view(2, 3, 28, 28)
    clip = Clip(
        frames=frames,
        timestamps=torch.tensor([0.0, 0.5], dtype=torch.float64),
        source_fps=8.0,
        duration=1.0,
        start=0.0,
        end=1.0,
    )
    record = Record(id="a", question="?", answer="A", kind="multiple choice")
    builder = SimpleNamespace(clips=lambda record: [clip], images=lambda record: [])
    return Prompt(record=record, input_ids=torch.tensor([1, 2, 3]), token_types=None, text="hello", builder=builder)


def rollout(server, tiny, tmp_path, **options):
    found = VLLMServerRollout(*tiny, tmp_path / "engine", urls=[server.url], **{"timeout": 5, "retries": 2} | options)
    found.update_weights(tiny[0], 0)
    return found


def test_frames_and_their_times_arrive_as_they_are():
    prompt = prompt_with_clip()
    tensors, request = read_tensors(request_of([prompt], SAMPLING, [7], suppressed=[9], end_ids=[2]))
    (asked,) = request["prompts"]
    (video,) = asked["videos"]
    np.testing.assert_array_equal(tensors[video["name"]], prompt.clips[0].frames.permute(0, 2, 3, 1).numpy())
    assert video["metadata"]["duration"] == 1.0
    times = [index / video["metadata"]["fps"] for index in video["metadata"]["frames_indices"]]
    assert times == [0.0, 0.5]
    assert video["metadata"]["do_sample_frames"] is False and asked["processor"] == {"do_resize": False}
    assert asked["text"] == "hello" and asked["seed"] == 7
    assert request["suppressed"] == [9] and request["end_ids"] == [2] and request["group_size"] == 2


def test_responses_carry_log_probabilities_and_the_version(tiny, tmp_path):
    server = Played()
    engine = rollout(server, tiny, tmp_path)
    ((first, second),) = engine.generate([prompt_with_clip()], SAMPLING, [1])
    assert first.ids.tolist() == [5] and second.ids.tolist() == [5, 6]
    assert second.logprobs[0] == -0.5 and second.logprobs[1].isnan()  # what the engine does not know is NaN
    assert first.weight_version == 0 and first.finish_reason == "stop"
    engine.update_weights(tiny[0], 3)
    assert engine.generate([prompt_with_clip()], SAMPLING, [1])[0][0].weight_version == 3
    assert [path.name for path in (tmp_path / "engine").iterdir()] == ["weights-3"]  # older ones are removed


def test_vision_tokens_are_not_to_be_sampled(tiny, tmp_path):
    server = Played()
    rollout(server, tiny, tmp_path).generate([prompt_with_clip()], SAMPLING, [1])
    tokenizer = tiny[1].tokenizer
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") in server.request["suppressed"]
    assert tokenizer.eos_token_id in server.request["end_ids"]


def test_a_request_that_got_no_answer_is_repeated(tiny, tmp_path):
    server = Played(dies=2)
    engine = rollout(server, tiny, tmp_path)
    assert len(engine.generate([prompt_with_clip()], SAMPLING, [1])[0]) == 2
    assert server.calls.count("/generate") == 3


def test_a_server_whose_engine_is_gone_is_one_that_gives_no_answer(tiny, tmp_path, monkeypatch):
    """It still listens, but nothing is behind it: the request is repeated, as for a server that was killed."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = Played(engine_dies=1)
    engine = rollout(server, tiny, tmp_path)
    assert len(engine.generate([prompt_with_clip()], SAMPLING, [1])[0]) == 2
    server.faults["engine_dies"] = 9
    with pytest.raises(EngineError, match=r"no answer in 3 tries \(its engine is gone"):
        engine.generate([prompt_with_clip()], SAMPLING, [1])


def test_a_server_that_was_started_again_is_handed_the_weights(tiny, tmp_path):
    server = Played(forgets=True)
    engine = rollout(server, tiny, tmp_path)
    assert engine.generate([prompt_with_clip()], SAMPLING, [1])[0][0].weight_version == 0
    assert server.calls.count("/update_weights") == 2


def nobody():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# Each fault of a server with the words that tell it from the others.
@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"info": {"protocol": 0}}, "version 2 of the protocol, got 0"),
        (
            {"info": {"architectures": ["Qwen3VLForConditionalGeneration"]}},
            "a Qwen3VLForConditionalGeneration, the model",
        ),
        ({"info": {"vocabulary": 32000}}, "32000 tokens, the model in training has 315"),
        ({"info": {"logprobs_mode": "processed_logprobs"}}, "--logprobs-mode raw_logprobs"),
        ({"token": "secret"}, "refused the token"),
        ({"checksum": [1, 2]}, r"checksum \(1, 2\)"),
        ({"dies": 9}, "no answer in 3 tries"),
        ({"more": [4]}, "4 tokens, the trainer as 3; they part at token 3"),
        ({"version": 8}, "version 8, this run is at 0"),
    ],
)
def test_what_is_wrong_with_a_server_is_said(faults, message, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = Played(**faults)
    with pytest.raises(EngineError, match=message) as raised:
        rollout(server, tiny, tmp_path).generate([prompt_with_clip()], SAMPLING, [1])
    assert server.url in str(raised.value)


def test_prompts_are_dealt_out_to_several_servers(tiny, tmp_path):
    """Every server has the weights and its share of the prompts; answers come back in the order of the prompts."""
    servers = [Played() for _ in range(3)]
    engine = VLLMServerRollout(*tiny, tmp_path / "engine", urls=[server.url for server in servers], timeout=5)
    engine.update_weights(tiny[0], 4)
    prompts = [prompt_with_clip() for _ in range(5)]
    for index, prompt in enumerate(prompts):
        prompt.input_ids = torch.tensor([1, 2, index])
    found = engine.ask(prompts, SAMPLING, [10, 11, 12, 13, 14])
    assert [group["prompt_token_ids"][-1] for group in found] == [0, 1, 2, 3, 4]
    asked = [[prompt["seed"] for prompt in server.request["prompts"]] for server in servers]
    assert asked == [[10, 13], [11, 14], [12]]
    assert [server.version for server in servers] == [4, 4, 4]
    alone = [engine.ask([prompts[3]], SAMPLING, [13])[0]["prompt_token_ids"][-1]]
    assert alone == [3]  # fewer prompts than servers


def test_one_of_several_servers_is_wrong(tiny, tmp_path):
    good, bad = Played(), Played(checksum=[1, 2])
    engine = VLLMServerRollout(*tiny, tmp_path / "engine", urls=[good.url, bad.url], timeout=5)
    with pytest.raises(EngineError, match=r"checksum \(1, 2\)") as raised:
        engine.update_weights(tiny[0], 0)
    assert bad.url in str(raised.value)


# An older version of this protocol, and a server that does not speak it.
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((None, 200), "version 2 of the protocol, got None"),
        (({"detail": "Not Found"}, 404), "another kind of server"),
    ],
)
def test_an_address_of_something_else(answer, message, tiny, tmp_path):
    """A web server that answers, such as vLLM's own."""
    server = Played()
    server.info = lambda: answer
    with pytest.raises(EngineError, match=message):
        rollout(server, tiny, tmp_path)


def test_an_address_where_nobody_is(tiny, tmp_path):
    with pytest.raises(EngineError, match="does not answer"):
        VLLMServerRollout(*tiny, tmp_path, urls=[nobody()], timeout=1)


def test_an_interpreter_that_is_none(tiny, tmp_path):
    with pytest.raises(EngineError, match=r"vllm_python.*no-such-python"):
        VLLMServerRollout(*tiny, tmp_path, python="no-such-python")


def test_a_server_that_ends_at_once_shows_its_log(tiny, tmp_path):
    """The interpreter of this environment has no vLLM."""
    import sys

    with pytest.raises(EngineError, match=r"(?s)before it was ready.*vllm"):
        VLLMServerRollout(*tiny, tmp_path, python=sys.executable, model_path="m", timeout=60)


# Neither, and both.
@pytest.mark.parametrize("options", [{}, {"urls": ["http://a"], "python": "b"}])
def test_either_servers_or_an_interpreter(options, tiny, tmp_path):
    with pytest.raises(ValueError, match="`urls` of running servers or `python`"):
        VLLMServerRollout(*tiny, tmp_path, **options)


def test_weights_are_those_of_the_saved_model(tiny, tmp_path):
    model = tiny[0]
    checksum = write_weights(model, tmp_path / "w")
    model.save_pretrained(tmp_path / "saved")
    saved, ours = load_file(tmp_path / "saved" / "model.safetensors"), load_file(tmp_path / "w/model-00000.safetensors")
    assert checksum[1] == sum(tensor.numel() for tensor in saved.values())
    sums = Checksum()
    for tensor in saved.values():
        sums.add(tensor)
    assert checksum == (sums.total, sums.count)
    assert sorted(t.float().sum().item() for t in saved.values()) == sorted(
        t.float().sum().item() for t in ours.values()
    )


def with_adapters(model, **options):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**settings))


def test_adapters_travel_alone_where_the_server_takes_them(tiny, tmp_path):
    """The weights below them once, also for a server that lost them; adapters after every update, with their sum."""
    server = Played(info={"lora_rank": 8})
    model = with_adapters(tiny[0])
    engine = VLLMServerRollout(model, tiny[1], tmp_path / "engine", urls=[server.url], timeout=5)
    engine.update_weights(model, 0)
    engine.update_weights(model, 1)
    assert server.loaded == ["weights-below-0", "adapters-0", "adapters-1"]
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == ["adapters-1", "weights-below-0"]
    saved = load_file(tmp_path / "engine/adapters-1/adapter_model.safetensors")
    model.save_pretrained(tmp_path / "peft")
    expected = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    below = load_file(tmp_path / "engine/weights-below-0/model-00000.safetensors")
    name = next(name for name in below if name.endswith("q_proj.weight"))
    layer = dict(model.get_base_model().named_modules())[name.removesuffix(".weight")]
    assert torch.equal(below[name], layer.base_layer.weight)
    server.faults["forgets"] = True
    assert engine.generate([prompt_with_clip()], SAMPLING, [1])[0][0].weight_version == 1
    assert server.loaded[3:] == ["weights-below-0", "adapters-1"]
    server.version = -1  # started again by somebody, and not asked since
    engine.update_weights(model, 2)
    assert server.loaded[5:] == ["weights-below-0", "adapters-2"]


# Of a larger rank, of a kind that vLLM has not, and a server without adapters.
@pytest.mark.parametrize(("options", "rank"), [({"r": 16}, 8), ({"use_dora": True}, 8), ({}, 0)])
def test_adapters_that_a_server_does_not_take_are_added_in(options, rank, tiny, tmp_path):
    server = Played(info={"lora_rank": rank})
    model = with_adapters(tiny[0], **options)
    engine = VLLMServerRollout(model, tiny[1], tmp_path / "engine", urls=[server.url], timeout=5)
    engine.update_weights(model, 0)
    engine.update_weights(model, 1)
    assert server.loaded == ["weights-0", "weights-1"]


# Plain adapters, and those with a norm of each row.
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_added_to_the_weights(dora, tiny):
    adapted = with_adapters(tiny[0], use_dora=dora)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)  # trained
    got, described = dict(weights_of(adapted)), described_weights(adapted, torch.bfloat16)
    merged = dict(adapted.merge_and_unload().named_parameters())
    assert got.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(got[name], tensor.detach(), rtol=1e-5, atol=1e-6)
    assert described == [(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in got.items()]


def test_a_checksum_does_not_depend_on_how_weights_are_joined():
    a, b = torch.randn(5, 7), torch.randn(3, 7)
    apart, joined = Checksum(), Checksum()
    apart.add(a)
    apart.add(b)
    joined.add(torch.cat([b, a]))
    assert (apart.total, apart.count) == (joined.total, joined.count)
    joined.add(torch.full((), 1e-30))
    assert (apart.total, apart.count) != (joined.total, joined.count)
