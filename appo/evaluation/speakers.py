"""Models that describe or answer: one loaded here, or one behind an endpoint that speaks OpenAI's chat protocol."""

import base64
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from appo.config import APPOConfig, ConfigError
from appo.constraints import check_fields, setting
from appo.data.prompts import PromptBuilder
from appo.data.records import Record

FACTOR = 28  # pixels that the sides of frames sent to an endpoint are multiples of
FAILED = 5  # answers that a server may refuse in a row, each after a longer wait


class EndpointError(RuntimeError):
    """An endpoint that does not answer: the message names it, what came and what to do. Replies so far are kept."""


@dataclass(frozen=True)
class Reply:
    """One text, and the tokens that were read and written for it."""

    text: str
    read: int
    written: int


@dataclass
class SpeakerSettings:
    """One model of a matrix, by ``model`` alone or behind ``url``."""

    model: str = setting("", not_empty=True)  # folder or hub name; behind an endpoint its name there
    url: str = setting("")  # such as http://localhost:8000/v1; empty: loaded here
    key: str = setting("")  # the environment variable that holds the endpoint's key
    price_read: float = setting(0.0, at_least=0)  # of a million tokens, in any currency
    price_written: float = setting(0.0, at_least=0)
    max_tokens: int = setting(1024, at_least=1)  # of one reply
    # The endpoint's name of that limit.
    limit_name: str = setting("max_tokens", choices=("max_tokens", "max_completion_tokens"))

    def __post_init__(self) -> None:
        check_fields(self)


class Speaker(Protocol):
    """Says something about records: ``asks`` are the texts of the turns, media come along with ``look``."""

    def say(self, records: Sequence[Record], asks: Sequence[str], *, look: bool) -> list[Reply]: ...


def open_speaker(name: str, settings: SpeakerSettings, config: APPOConfig) -> Speaker:
    """The model of ``settings``, loaded or ready to be asked. Raises ConfigError naming it."""
    return Endpoint(name, settings, config) if settings.url else LocalSpeaker(settings, config)


class LocalSpeaker:
    """A model of transformers: with eyes as in training, or a language model, greedy."""

    def __init__(self, settings: SpeakerSettings, config: APPOConfig) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from appo.models.load import from_pretrained, read_config
        from appo.train.setup import DTYPES, load_model

        self.limit = settings.max_tokens
        self.config = APPOConfig.from_dict(config.to_dict() | {"model": settings.model})
        self.sees = hasattr(read_config(settings.model), "vision_config")
        self.model: Any
        if self.sees:
            self.model, self.processor = load_model(self.config, trained=False)
        else:
            self.processor = from_pretrained(AutoTokenizer, settings.model)
            self.model = from_pretrained(AutoModelForCausalLM, settings.model, dtype=DTYPES[config.dtype])

    def say(self, records: Sequence[Record], asks: Sequence[str], *, look: bool) -> list[Reply]:
        if look and not self.sees:
            raise ConfigError(f"`model`: expected one that sees, got the language model {self.config.model}.")
        return self._see(records, asks, look) if self.sees else [self._write(text) for text in asks]

    def _see(self, records: Sequence[Record], asks: Sequence[str], look: bool) -> list[Reply]:
        import dataclasses

        from appo.rollout.engine import Sampling
        from appo.rollout.model_engine import TransformersRollout

        shown = records if look else [dataclasses.replace(record, media=()) for record in records]
        of = {record.key: text for record, text in zip(shown, asks, strict=True)}
        builder = PromptBuilder(self.processor, self.model.config, self.config, ask=lambda record: of[record.key])
        prompts = [builder(record) for record in shown]
        engine = TransformersRollout(self.model, self.processor, batch_tokens=self.config.rollout_tokens)
        sampling = Sampling(group_size=1, max_new_tokens=self.limit, temperature=0.0)
        replies = []
        for prompt, (completion,) in zip(prompts, engine.generate(prompts, sampling, [0] * len(prompts)), strict=True):
            text = self.processor.tokenizer.decode(completion.ids, skip_special_tokens=True)
            replies.append(Reply(text, len(prompt), len(completion.ids)))
        return replies

    def _write(self, text: str) -> Reply:
        import torch

        ids = self.processor.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        with torch.no_grad():
            out = self.model.generate(**ids, max_new_tokens=self.limit, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        return Reply(self.processor.decode(new, skip_special_tokens=True), ids["input_ids"].shape[1], len(new))


class Endpoint:
    """A model behind a server: vLLM, SGLang, llama.cpp, transformers serve, OpenAI's own. Frames go as JPEG images."""

    def __init__(self, name: str, settings: SpeakerSettings, config: APPOConfig) -> None:
        from huggingface_hub import InferenceClient

        if not settings.url.startswith(("http://", "https://")):
            raise ConfigError(f"`{name}.url`: expected http://... or https://..., got {settings.url!r}.")
        if settings.key and settings.key not in os.environ:
            raise ConfigError(
                f"`{name}.key`: expected the name of an environment variable, got {settings.key!r}, which is not set."
            )
        self.settings, self.config = settings, config
        # A key is always given: without one the client would send the user's own token of the hub.
        key = os.environ[settings.key] if settings.key else "none"
        self.client = InferenceClient(base_url=settings.url, api_key=key, timeout=config.engine_timeout)

    def say(self, records: Sequence[Record], asks: Sequence[str], *, look: bool) -> list[Reply]:
        return [self._one(record, text, look) for record, text in zip(records, asks, strict=True)]

    def _one(self, record: Record, text: str, look: bool) -> Reply:
        content = [*(self._frames(record) if look else []), {"type": "text", "text": text}]
        limit = {self.settings.limit_name: self.settings.max_tokens}
        options: dict[str, Any] = limit if "max_tokens" in limit else {"extra_body": limit}
        for attempt in range(FAILED):
            try:
                found = self.client.chat_completion(
                    [{"role": "user", "content": content if look else text}],
                    model=self.settings.model, temperature=0.0, **options,
                )  # fmt: skip
                break
            except Exception as error:  # of the client, of HTTP, of sockets
                status = getattr(getattr(error, "response", None), "status_code", None)
                if attempt + 1 == FAILED or (status is not None and status not in (408, 409, 429) and status < 500):
                    raise EndpointError(
                        f"{self.settings.url}: {self.settings.model}: no answer to {record.place}: "
                        f"{type(error).__name__}: {' '.join(str(error).split())[:500]}. Replies so far are kept: "
                        "run the same command again when it answers."
                    ) from error
                time.sleep(min(self.config.engine_timeout, 0.5 * 2**attempt))
        choices, usage = getattr(found, "choices", None), getattr(found, "usage", None)
        if not choices or choices[0].message is None:
            raise EndpointError(
                f"{self.settings.url}: {self.settings.model}: expected a reply to {record.place} with a choice and its "
                f"message, got {str(found)[:300]}. Is it OpenAI's chat protocol that it speaks?"
            )
        if usage is None and (self.settings.price_read or self.settings.price_written):
            raise EndpointError(
                f"{self.settings.url}: {self.settings.model}: expected `usage` beside the reply to {record.place}, by "
                "which costs are counted, got none. Leave price_read and price_written out."
            )
        read, written = (0, 0) if usage is None else (usage.prompt_tokens or 0, usage.completion_tokens or 0)
        return Reply(choices[0].message.content or "", read, written)

    def _frames(self, record: Record) -> list[dict[str, Any]]:
        """Images of a record and sampled frames of its clips with their times, as data URIs."""
        from PIL import Image

        from appo.data.media import load_clip, load_image

        parts: list[dict[str, Any]] = []
        for medium in record.media:
            if medium.kind == "image":
                picture = load_image(medium, record, max_pixels=self.config.max_pixels, factor=FACTOR)
                parts.append(_picture(Image.fromarray(picture.permute(1, 2, 0).numpy())))
                continue
            clip = load_clip(medium, record, factor=FACTOR, **self.config.clip_arguments())
            for frame, stamp in zip(clip.frames, clip.timestamps.tolist(), strict=True):
                parts.append({"type": "text", "text": f"<{stamp:.1f} seconds>"})
                parts.append(_picture(Image.fromarray(frame.permute(1, 2, 0).numpy())))
        return parts


def _picture(image: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"},
    }
