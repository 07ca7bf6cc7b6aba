"""appo matrix: descriptions and answers of several models, kept and gone on from; an endpoint that fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import training
from test_cli import refused, run

from appo.config import APPOConfig, ConfigError
from appo.evaluation.matrix import MatrixSettings, run_matrix
from appo.evaluation.speakers import Endpoint, EndpointError, Reply, SpeakerSettings
from appo.reports.matrix_page import gains, matrix_rows, write_matrix_page
from appo.tasks.tiny import build_tiny
from appo.yaml_files import read_yaml


class Scripted:
    """A model whose replies are a function of what it is asked; ``asked`` counts."""

    def __init__(self, reply, asked: list) -> None:
        self.reply, self.asked = reply, asked

    def say(self, records, asks, *, look):
        self.asked += [(record.id, look) for record in records]
        return [
            Reply(self.reply(record, text, look), len(text.split()), 2)
            for record, text in zip(records, asks, strict=True)
        ]


def answering(records, asked):
    """Perceiver `good` tells the answer of each record, `bad` of every second; `sharp` reads it, `dull` does not."""
    wrong = {record.id: next(o[0] for o in record.options if o[0] != record.answer) for record in records}
    even = {record.id for record in records[::2]}

    def perceive(name):
        return lambda record, text, look: f"clue {record.answer}" if name == "good" or record.id in even else "no clue"

    def reason(name):
        def reply(record, text, look):
            told = f"clue {record.answer}\n" in text and name == "sharp"
            return f"<think>.</think><answer>{record.answer if told else wrong[record.id]}</answer>"

        return reply

    def opener(name, settings, config):
        return Scripted((perceive if name in ("good", "bad") else reason)(name), asked)

    return opener


def matrix(output: Path, **changes) -> MatrixSettings:
    models = {"bad": {"model": "b"}, "good": {"model": "g", "price_read": 2.0, "price_written": 10.0}}
    values = {"data": "d.json", "output": str(output), "perceivers": models}
    return MatrixSettings.from_dict(values | {"reasoners": {"dull": {"model": "d"}, "sharp": {"model": "s"}}} | changes)


def test_accuracy_of_every_pair_and_what_each_side_brings(tmp_path: Path) -> None:
    records, asked = list(training.records()), []
    found = run_matrix(matrix(tmp_path), records, opener=answering(records, asked))
    values = {(perceiver, reasoner): each.value for perceiver, reasoner, each in matrix_rows(found)}
    assert values == {("bad", "dull"): 0, ("good", "dull"): 0, ("bad", "sharp"): 0.5, ("good", "sharp"): 1}
    assert [(name.split(",")[0], each.value) for name, each in gains(found)] == [
        ("perception", 0.0), ("perception", 0.5), ("reasoning", 0.5), ("reasoning", 1.0),
    ]  # fmt: skip
    assert [look for _, look in asked] == [True] * 16 + [False] * 32  # those that reason see nothing
    read, written, price = found.costs["perceiver good"]
    assert written == 2 * len(records) and price == pytest.approx((2 * read + 10 * written) / 1e6)
    page = write_matrix_page(tmp_path / "matrix.html", found)
    text = page.read_text()
    assert "100.0 [" in text and "<script" not in text and (tmp_path / "matrix.png").stat().st_size > 10_000


def test_replies_are_kept_and_a_model_that_is_added_is_asked_alone(tmp_path: Path) -> None:
    records, asked = list(training.records()), []
    first = run_matrix(matrix(tmp_path), records, opener=answering(records, asked))
    asked.clear()
    assert run_matrix(matrix(tmp_path), records, opener=answering(records, asked)) == first and asked == []
    more = matrix(tmp_path)
    more.reasoners["third"] = SpeakerSettings("t")
    run_matrix(more, records, opener=answering(records, asked))
    assert len(asked) == 2 * len(records)
    # A file cut short in a line loses that line; other settings of a model ask it again; another text is refused.
    file = tmp_path / "descriptions/good.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    asked.clear()
    assert run_matrix(matrix(tmp_path), records, opener=answering(records, asked)) == first
    assert [(record_id, look) for record_id, look in asked] == [(records[-1].id, True)]
    longer = matrix(tmp_path)
    longer.perceivers["bad"].max_tokens = 7
    asked.clear()
    run_matrix(longer, records, opener=answering(records, asked))
    assert len(asked) == len(records)
    file.write_text("{}\n")
    with pytest.raises(Exception, match="line 1 is no reply of a matrix"):
        run_matrix(matrix(tmp_path), records, opener=answering(records, asked))


@pytest.fixture
def server():
    """A server of the chat protocol that answers with what it was sent; ``state`` sets how it fails."""
    state = {"failures": 0, "status": 503, "requests": [], "changes": {}}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["requests"].append((self.path, self.headers.get("Authorization"), body))
            failing, state["failures"] = state["failures"] > 0, state["failures"] - 1
            message = {"role": "assistant", "content": "a dog"}
            reply = {"error": "busy"} if failing else {
                "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13},
            }  # fmt: skip
            data = json.dumps(reply | state["changes"]).encode()
            self.send_response(state["status"] if failing else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}/v1", state
    made.shutdown()
    made.server_close()


def endpoint(url: str, **changes) -> Endpoint:
    config = APPOConfig.from_dict({"fps": 2.0, "max_frames": 4, "max_pixels": 28 * 28, "engine_timeout": 5.0})
    return Endpoint("perceivers.x", SpeakerSettings("m", url=url, **changes), config)


def test_an_endpoint_gets_frames_with_their_times_and_no_key_of_the_hub(server, monkeypatch) -> None:
    url, state = server
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    record = training.records()[0]
    (reply,) = endpoint(url, max_tokens=9).say([record], ["Describe."], look=True)
    path, authorization, body = state["requests"][0]
    assert reply == Reply("a dog", 11, 2) and path == "/v1/chat/completions" and "hf_secret" not in authorization
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0.0)
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url"] * 4 + ["text"]
    assert content[0]["text"] == "<0.0 seconds>" and content[-1]["text"] == "Describe."
    assert content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    monkeypatch.setenv("MY_KEY", "k1")
    endpoint(url, key="MY_KEY", limit_name="max_completion_tokens").say([record], ["Why?"], look=False)
    _, authorization, body = state["requests"][1]
    assert authorization == "Bearer k1" and body["messages"] == [{"role": "user", "content": "Why?"}]
    assert body["max_completion_tokens"] == 1024 and not body.get("max_tokens")


def test_an_endpoint_is_asked_again_and_then_named(server, monkeypatch) -> None:
    url, state = server
    monkeypatch.setattr("appo.evaluation.speakers.time.sleep", lambda seconds: None)
    record = training.records()[0]
    state["failures"] = 2
    assert endpoint(url).say([record], ["Why?"], look=False)[0].text == "a dog" and len(state["requests"]) == 3
    state |= {"failures": 99, "requests": []}
    with pytest.raises(EndpointError, match=rf"{url}: m: no answer to .*503.*run the same command again"):
        endpoint(url).say([record], ["Why?"], look=False)
    assert len(state["requests"]) == 5
    state |= {"failures": 1, "status": 401, "requests": []}
    with pytest.raises(EndpointError, match="401"):
        endpoint(url).say([record], ["Why?"], look=False)
    assert len(state["requests"]) == 1  # what is wrong with the request does not get better
    with pytest.raises(EndpointError, match="no answer"):
        endpoint("http://127.0.0.1:9/v1").say([record], ["Why?"], look=False)


# No choice to read a text in; no counts of tokens, where tokens have a price.
@pytest.mark.parametrize(
    ("changes", "says"),
    [({"choices": []}, "with a choice and its message"), ({"usage": None}, "by which costs are counted")],
)
def test_a_reply_without_a_text_or_without_what_it_cost_is_named(server, changes, says) -> None:
    url, state = server
    state["changes"] = changes
    with pytest.raises(EndpointError, match=says):
        endpoint(url, price_read=1.0).say(training.records()[:1], ["What?"], look=False)
    if "usage" in changes:  # nothing is to be paid
        assert endpoint(url).say(training.records()[:1], ["What?"], look=False) == [Reply("a dog", 0, 0)]


def test_two_models_and_an_endpoint_that_is_stopped_in_the_middle(server, tmp_path: Path, monkeypatch) -> None:
    url, state = server
    monkeypatch.setattr("appo.evaluation.speakers.time.sleep", lambda seconds: None)
    record = training.records()[0]
    made, processor = build_tiny(0)
    made.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    settings = "settings: {fps: 2.0, max_frames: 4, max_pixels: 784, dtype: float32}\n"
    (tmp_path / "m.yaml").write_text(
        f"data: {record.meta['file']}\noutput: {tmp_path / 'out'}\nlimit: 3\n{settings}"
        f"perceivers:\n  tiny: {{model: {tmp_path / 'tiny'}, max_tokens: 4}}\n  far: {{model: m, url: '{url}'}}\n"
        f"reasoners:\n  tiny: {{model: {tmp_path / 'tiny'}, max_tokens: 4}}\n  far: {{model: m, url: '{url}'}}\n"
    )
    count = [0]
    # The endpoint ends after it has described one of three clips.
    original = Endpoint._one

    def one(self, record, text, look):
        count[0] += 1
        if count[0] == 2:
            state["failures"] = 99
        return original(self, record, text, look)

    monkeypatch.setattr(Endpoint, "_one", one)
    code, printed = run("matrix", tmp_path / "m.yaml")
    assert code == 1 and "Replies so far are kept" in printed
    kept = (tmp_path / "out/descriptions/far.jsonl").read_text()
    assert len(kept.splitlines()) == 1 and len((tmp_path / "out/descriptions/tiny.jsonl").read_text().splitlines()) == 3
    state |= {"failures": 0, "requests": []}
    code, printed = run("matrix", tmp_path / "m.yaml")
    assert code == 0 and "tiny -> far" in printed and "reasoner far" in printed
    assert len(state["requests"]) == 2 + 2 * 3  # two descriptions that were missing, answers for both perceivers
    assert (tmp_path / "out/descriptions/far.jsonl").read_text().startswith(kept)
    assert (tmp_path / "out/matrix.html").exists()


# Lines of a file that are wrong, one at a time, and what the error says.
WRONG = {
    "perceivers: 3": "`perceivers`: expected",
    "reasoners: {}": "`reasoners`: expected",
    "perceivers: {x: {modle: a}}": "`perceivers.x`: `modle`: no such field. Did you mean `model`?",
    "perceivers: {x: {model: a, price_read: -1}}": "`perceivers.x`: `price_read`: expected a number at least 0",
    "perceivers: {x: {url: 'http://h/v1'}}": "`perceivers.x`: `model`: expected text",
    "colour: red": "`colour`: no such field. Expected one of data, data_root, output",
    "perceivers: {x: {colour: red}}": "`perceivers.x`: `colour`: no such field. Expected one of model, url",
    "settings: {fpss: 2}": "`fpss`",
    "limit: 0": "`limit`: expected at least 1",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_file_that_is_wrong_names_the_field(line: str, tmp_path: Path) -> None:
    right = {
        "data": "data: d.json",
        "perceivers": "perceivers: {x: {model: a}}",
        "reasoners": "reasoners: {y: {model: b}}",
    }
    lines = right | {line.split(":")[0]: line}
    (tmp_path / "m.yaml").write_text("\n".join(lines.values()))
    assert WRONG[line] in " ".join(refused("matrix", tmp_path / "m.yaml").split())


def test_the_example_is_a_matrix() -> None:
    made = MatrixSettings.from_dict(read_yaml(Path(__file__).parents[1] / "examples/matrix.yaml"))
    assert list(made.perceivers) == ["7B", "32B"] and made.reasoners["o3"].limit_name == "max_completion_tokens"
    assert made.settings.max_frames == 32


def test_an_endpoint_without_its_key_or_with_another_kind_of_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`perceivers\.x\.key`: expected the name of an environment variable"):
        endpoint("http://h/v1", key="NO_SUCH_KEY_OF_MINE")
    with pytest.raises(ConfigError, match=r"`perceivers\.x\.url`: expected http"):
        endpoint("h:8000")
