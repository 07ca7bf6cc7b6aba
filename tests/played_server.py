"""A server of the protocol of appo.rollout.vllm_worker, played for the tests of its client."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from appo.data.prompts import Prompt
from appo.data.records import Record
from appo.data.video import Clip
from appo.rollout.engine import Sampling
from appo.rollout.vllm_extension import Checksum
from appo.rollout.vllm_worker import PROTOCOL, read_tensors

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
