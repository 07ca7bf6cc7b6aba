"""A vLLM server of rollouts, in an environment of its own: ``python vllm_worker.py --model FOLDER``.

It needs vLLM, what vLLM brings and vllm_extension.py beside it, nothing else of this project: versions of transformers
and torch here and in the trainer never meet. `appo.rollout.vllm_server.VLLMServerRollout` starts it, or finds one that
is already running.

Every request but ``/health`` carries the token of the environment variable APPO_SERVER_TOKEN, where that is set.

    GET  /health                                    200 once the engine is up
    GET  /info                                      versions, model, weight version
    POST /generate         safetensors              frames as tensors, the rest as JSON in the header's "request"
    POST /update_weights   {"path", "version"}      weights of a folder of safetensors
    POST /update_adapters  {"path", "version"}      LoRA adapters, as peft saves them, on top of these weights
    POST /checksum                                  of the weights that were loaded last
    GET  /stats                                     tokens of prompts so far, and how many were found in the cache
    POST /sleep {"level"}, /wake                    give GPU memory back, and take it again
    POST /transfer/{init, start, update, finish}    vLLM's weight transfer (NCCL, IPC); JSON as its own routes take
"""

import argparse
import asyncio
import hmac
import json
import os
import struct
import threading
import time
from typing import Any

PROTOCOL = 2


def whole_prompts() -> dict[str, Any]:
    """Arguments of an engine on a CPU, where vLLM 0.32 fails at a request with a seed whose prompt is read in parts:
    it sets back the generator of a request that has sampled nothing yet, and a CPU's has no place to be set to."""
    from vllm.platforms import current_platform

    return {"enable_chunked_prefill": False} if current_platform.is_cpu() else {}


def read_tensors(body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, request) of a safetensors message."""
    from safetensors.numpy import load

    (size,) = struct.unpack("<Q", body[:8])
    header = json.loads(body[8 : 8 + size])
    return load(body), json.loads(header["__metadata__"]["request"])


class Engine:
    """vLLM's asynchronous engine with the version of its weights."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {
            "model": options.model,
            "limit_mm_per_prompt": {"video": 16, "image": 64},
            "logprobs_mode": options.logprobs_mode,
            "worker_extension_cls": "vllm_extension.WorkerExtension",
            "trust_remote_code": False,
            "generation_config": "vllm",  # sampling is what the request says, not what the model's folder suggests
            # Pixels as the processor makes them, which is what the trainer sees.
            "mm_device_do_normalize": False,
            **whole_prompts(),
            **json.loads(options.arguments),
        }
        self.options, self.version, self.requests = options, options.version, 0
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.adapters: Any = None  # vLLM's request for those of the trainer
        self.updating = asyncio.Lock()

    def info(self) -> dict[str, Any]:
        import torch
        import transformers
        import vllm

        config = self.llm.model_config
        return {
            "protocol": PROTOCOL,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": self.options.model,
            "architectures": list(config.hf_config.architectures or []),
            "vocabulary": config.get_vocab_size(),
            "max_model_len": config.max_model_len,
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": self.options.logprobs_mode,
            "weight_version": self.version,
            "weight_transfer": transfer.backend if (transfer := self.llm.vllm_config.weight_transfer_config) else "",
            "workers": self.llm.vllm_config.parallel_config.world_size,
            # The largest rank of adapters that it takes by themselves; 0: none.
            "lora_rank": lora.max_lora_rank if (lora := self.llm.vllm_config.lora_config) else 0,
        }

    async def generate(self, body: bytes) -> dict[str, Any]:
        tensors, request = read_tensors(body)
        version = self.version
        groups = await asyncio.gather(*(self.one(tensors, prompt, request) for prompt in request["prompts"]))
        if self.version != version:
            raise RuntimeError(f"weights changed from version {version} to {self.version} while responses were sampled")
        return {"weight_version": version, "groups": groups}

    async def one(self, tensors: dict[str, Any], prompt: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        media: dict[str, Any] = {}
        if prompt["videos"]:
            media["video"] = [(tensors[video["name"]], video["metadata"]) for video in prompt["videos"]]
        if prompt["images"]:
            from PIL import Image

            media["image"] = [Image.fromarray(tensors[name]) for name in prompt["images"]]
        given = {"prompt": prompt["text"], "multi_modal_data": media, "mm_processor_kwargs": prompt["processor"]}
        if not media:
            given = {"prompt_token_ids": prompt["token_ids"]}
        parameters = SamplingParams(
            n=request["group_size"],
            max_tokens=request["max_new_tokens"],
            temperature=request["temperature"],
            top_p=request["top_p"],
            seed=prompt["seed"],
            logprobs=0,
            logit_bias={int(token): -100.0 for token in request["suppressed"]},
            stop_token_ids=request["end_ids"],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.requests += 1
        # FINAL_ONLY: one result, with all responses.
        (result,) = [
            each
            async for each in self.llm.generate(given, parameters, f"appo-{self.requests}", lora_request=self.adapters)
        ]
        completions = [
            {
                "ids": list(output.token_ids),
                "logprobs": [
                    each[token].logprob for token, each in zip(output.token_ids, output.logprobs or [], strict=True)
                ],
                "finish_reason": output.finish_reason,
            }
            for output in sorted(result.outputs, key=lambda output: output.index)
        ]
        return {"prompt_token_ids": list(result.prompt_token_ids), "completions": completions}

    async def update(self, path: str, version: int) -> None:
        """Weights of a folder of safetensors; nothing that was computed with the old ones stays cached."""
        async with self.updating:
            await self.llm.pause_generation(mode="wait", clear_cache=True)
            try:
                await self.llm.collective_rpc("appo_load", args=(path,))
                self.adapters = None
                await self.forget()
                self.version = version
            finally:
                await self.llm.resume_generation()

    async def adapt(self, path: str, version: int) -> None:
        """Adapters of a folder on top of the weights that were loaded last."""
        from vllm.lora.request import LoRARequest

        async with self.updating:
            await self.llm.pause_generation(mode="wait", clear_cache=True)
            try:
                await self.llm.collective_rpc("appo_read", args=(path,))
                adapters = LoRARequest(f"adapters-{version}", version + 1, path)
                await self.llm.add_lora(adapters)
                await self.forget()
                self.adapters, self.version = adapters, version
            finally:
                await self.llm.resume_generation()

    async def forget(self) -> None:
        await self.llm.reset_mm_cache()
        await self.llm.reset_encoder_cache()
        await self.llm.reset_prefix_cache()

    async def transfer(self, step: str, payload: dict[str, Any]) -> None:
        """One call of vLLM's weight transfer: init, start, update or finish."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        if step == "init":
            await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(**payload))
        elif step == "start":
            await self.llm.pause_generation(mode="wait", clear_cache=True)
            await self.llm.collective_rpc("appo_watch")
            await self.llm.start_weight_update()
        elif step == "update":
            await self.llm.update_weights(WeightTransferUpdateRequest(**payload))
        elif step == "finish":
            await self.llm.finish_weight_update()
            await self.llm.collective_rpc("appo_watched")
            self.adapters = None
            await self.forget()
            self.version = int(payload["version"])
            await self.llm.resume_generation()
        else:
            raise ValueError(f"step: expected init, start, update or finish, got {step!r}")


def application(engine: Engine, token: str) -> Any:
    """The HTTP routes."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    app = FastAPI()

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        given = request.headers.get("authorization", "")
        if token and request.url.path != "/health" and not hmac.compare_digest(given, f"Bearer {token}"):
            return JSONResponse({"error": "wrong or missing token"}, 401)
        try:
            return await call_next(request)
        except Exception as error:
            # 503: the engine is gone, and only a new server will do.
            code = 503 if type(error).__name__ == "EngineDeadError" else 500
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, code)

    @app.get("/health")
    async def health() -> Any:
        await engine.llm.check_health()
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> Any:
        return engine.info()

    @app.post("/generate")
    async def generate(request: Request) -> Any:
        return await engine.generate(await request.body())

    @app.post("/update_weights")
    async def update_weights(request: Request) -> Any:
        given = await request.json()
        await engine.update(given["path"], int(given["version"]))
        return {"weight_version": engine.version}

    @app.post("/update_adapters")
    async def update_adapters(request: Request) -> Any:
        given = await request.json()
        await engine.adapt(given["path"], int(given["version"]))
        return {"weight_version": engine.version}

    @app.post("/checksum")
    async def checksum() -> Any:
        found = await engine.llm.collective_rpc("appo_checksum")
        return {"workers": found, "weight_version": engine.version}

    @app.get("/stats")
    async def stats() -> Any:
        from vllm.v1.metrics.reader import get_metrics_snapshot

        names = {"vllm:prefix_cache_queries": "prompt_tokens", "vllm:prefix_cache_hits": "cached_tokens"}
        return {names[metric.name]: metric.value for metric in get_metrics_snapshot() if metric.name in names}

    @app.post("/sleep")
    async def sleep(request: Request) -> Any:
        await engine.llm.sleep(level=int((await request.json())["level"]))
        return {}

    @app.post("/wake")
    async def wake() -> Any:
        await engine.llm.wake_up()
        await engine.forget()
        return {}

    @app.post("/transfer/{step}")
    async def transfer(step: str, request: Request) -> Any:
        await engine.transfer(step, await request.json())
        return {"weight_version": engine.version}

    return app


def end_with_parent(parent: int) -> None:
    """Exit when the process that started this one is gone: a crashed trainer leaves no server behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, 9)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model and its processor")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8377)
    parser.add_argument("--version", type=int, default=-1, help="version of the weights in --model")
    parser.add_argument("--logprobs-mode", default="raw_logprobs", choices=("raw_logprobs", "processed_logprobs"))
    parser.add_argument("--arguments", default="{}", help="JSON: further arguments of vLLM's engine")
    parser.add_argument("--parent", type=int, help="process whose end is this one's")
    options = parser.parse_args()
    if options.parent:
        end_with_parent(options.parent)

    import uvicorn

    async def serve() -> None:
        engine = Engine(options)
        try:
            app = application(engine, os.environ.get("APPO_SERVER_TOKEN", ""))
            config = uvicorn.Config(app, host=options.host, port=options.port, log_level="warning")
            await uvicorn.Server(config).serve()
        finally:
            engine.llm.shutdown()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
