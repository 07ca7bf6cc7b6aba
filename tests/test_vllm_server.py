"""The client of vLLM servers against a server of the same protocol that this test plays: what goes over the wire, and
every way in which a server can be wrong. The real server is tested by ``make test-vllm``."""

import socket

import numpy as np
import pytest
import torch
from played_server import SAMPLING, Played, prompt_with_clip

from appo.rollout.vllm_server import EngineError, VLLMServerRollout, request_of
from appo.rollout.vllm_worker import read_tensors
from appo.tasks.tiny import build_tiny


@pytest.fixture
def tiny():
    return build_tiny()


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
