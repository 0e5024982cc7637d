"""What cannot be answered is said in OpenAI's form: by name, with what was got and what was expected; never as 422."""

import json
import socket

import httpx
import openai
import pytest

from palm_rlhf.serving.http.request_bodies import RequestLimits
from palm_rlhf.serving.protocol.openai_parameters import CHAT, COMPLETION
from palm_rlhf.serving.protocol.schema import shown

HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"Content-Type": "application/json"}
CHATS, TEXTS, SCORES = "/v1/chat/completions", "/v1/completions", "/v1/score"


@pytest.fixture(scope="module")
def http(server):
    """A client of the server, without OpenAI's."""
    with httpx.Client(base_url=server[0], timeout=900, headers=JSON) as http:
        yield http


@pytest.fixture
def refused(http):
    """Posts a body and returns the error, whose form is checked."""

    def post(path, body, status=400, **options):
        reply = http.post(path, **{"json" if isinstance(body, dict) else "content": body}, **options)
        assert reply.status_code == status, reply.text
        assert reply.headers["content-type"] == "application/json"
        assert set(reply.json()) == {"error"}
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        return reply.json()["error"]

    return post


BAD_VALUES = [
    ("temperature", [-0.1, 2.1, "hot", True, [], {}, 10**400]),
    ("top_p", [-0.1, 1.1, "all"]),
    ("max_tokens", [-1, 1.5, "many", True, 2**31]),
    ("n", [0, 129, 1.5, "two"]),
    ("best_of", [0, 129]),
    ("max_completion_tokens", [0, "x"]),
    ("top_k", [-2, 0.5, "all"]),
    ("min_p", [-0.1, 1.1, "x"]),
    ("repetition_penalty", [0, -1, 101, "x"]),
    ("stop", [["a", ""], [1], ["a"] * 65, "x" * 257, {}]),
    ("ignore_eos", [1, "yes"]),
    ("stream", ["yes", 1]),
    ("stream_options", [True, {"include_usage": 1}, {"other": True}, {"continuous_usage_stats": 1}]),
    ("seed", ["one", 1.5, 2**63]),
    ("presence_penalty", [-2.1, 2.1, "x"]),
    ("frequency_penalty", [-2.1, 2.1, "x"]),
    ("logit_bias", [[], {"1": 101}, {"1": "x"}, {"x": 1}, {"-1": 1}, {"1.5": 1}, {"²": 1}, {"261": 1}]),
    ("user", [1, "x" * 513]),
    ("safety_identifier", [1, "x" * 513]),
    ("prompt_cache_key", [1, "x" * 513]),
    ("metadata", [[], {"a": 1}, {"x" * 65: "a"}, {"a": "x" * 513}, {str(n): "a" for n in range(17)}]),
    ("model", [1, []]),
]
BAD_CHATS = [
    ("messages", ["Hello", [], {}, [1]]),
    ("max_tokens", [0]),
    ("prompt_logprobs", [-1, 21, True]),
    ("logprobs", [1, "x"]),
    ("top_logprobs", [-1, 21, 5]),  # 5: without logprobs
    ("continue_final_message", [1, "yes", True]),  # true: after a user
    ("add_generation_prompt", [0, "no", False]),  # false: without continue_final_message
    ("response_format", ["text", {"type": "xml"}, {}]),
    ("tools", [{}, [1], [{}], [{"type": "function", "function": {"name": ""}}]]),
    ("tool_choice", ["any", {"type": "function"}]),
    ("parallel_tool_calls", ["x"]),
    ("chat_template_kwargs", ["x", [], {"enable_thinking": 1}, {"enable_thinking": True}]),  # unread here
]
BAD_TEXTS = [
    ("prompt", [1, [], {}, [1, "a"], [[]], [-1], [1.5], [261], [[1], [261]]]),
    ("logprobs", [True, 6, -1]),
    ("echo", [1, "yes"]),
    ("add_special_tokens", [0, "no"]),
    ("prompt_logprobs", [-1, 21, True]),
]


def cases(table):
    return [(name, value) for name, values in table for value in values]


@pytest.mark.parametrize("name, value", cases([*BAD_VALUES, *BAD_CHATS]))
def test_a_bad_value_of_a_chat_is_named(refused, name, value):
    error = refused(CHATS, {"model": "parrot", "messages": HELLO, name: value})
    assert error["param"].startswith(name)
    assert name in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name, value", cases([*BAD_VALUES, *BAD_TEXTS]))
def test_a_bad_value_of_a_completion_is_named(refused, name, value):
    error = refused(TEXTS, {"model": "parrot", "prompt": "a", name: value})
    assert error["param"].startswith(name)


def test_every_field_has_a_bad_value_in_the_tables_above():
    for tables, schema in (((BAD_VALUES, BAD_CHATS), CHAT), ((BAD_VALUES, BAD_TEXTS), COMPLETION)):
        supported = {name for name, value in schema["properties"].items() if set(value) != {"enum", "description"}}
        assert {name for table in tables for name, _ in table} == supported


@pytest.mark.parametrize("name", ["functions", "audio", "prediction", "web_search_options", "suffix", "whatever"])
def test_a_field_that_is_not_supported_is_refused_by_name_unless_it_is_null(refused, http, name):
    chat, text = ({"model": "parrot", **asked} for asked in ({"messages": HELLO}, {"prompt": "a"}))
    for path, body in ((CHATS, chat), (TEXTS, text), (SCORES, {**text, "replies": ["b"]})):
        error = refused(path, {**body, name: True})
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert "not supported" in error["message"]
        assert http.post(path, json={**body, name: None}).status_code == 200


def test_messages_are_checked_inside(refused):
    for messages, param in (
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([*HELLO, {"role": "user"}], "messages[1].content"),
        ([{"role": "tool", "content": "a"}], "messages"),  # which the template of this model does not know
        ([{"role": "user", "content": "a", "name": "x" * 65}], "messages[0].name"),
        ([{"role": "user", "content": "a", "nickname": "me"}], "messages[0].nickname"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "a"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
    ):
        assert refused(CHATS, {"model": "parrot", "messages": messages})["param"] == param


def test_where_no_form_of_a_parameter_fits_the_error_is_of_the_one_that_came_furthest(refused):
    for prompt, param, expected in (
        ([1, "a"], "prompt[1]", ['prompt[1] is "a"', "an integer from 0"]),
        (["a", 1], "prompt[1]", ["prompt[1] is 1", "a string"]),
        ([[1], [2, "a"]], "prompt[1][1]", ['prompt[1][1] is "a"', "an integer from 0"]),
        ([1.5], "prompt[0]", ["prompt[0] is 1.5", "an integer from 0", "a string", "an array"]),
        (1, "prompt", ["prompt is 1", "a string", "an array"]),
    ):
        error = refused(TEXTS, {"model": "parrot", "prompt": prompt})
        assert error["param"] == param
        assert all(part in error["message"] for part in expected), error["message"]
    error = refused(CHATS, {"model": "parrot", "messages": [1]})
    assert error["message"] == "messages[0] is 1; expected an object"


def test_no_more_of_a_large_value_is_written_than_is_shown():
    assert shown(["a", {"é": None}]) == '["a", {"\\u00e9": null}]'
    assert shown([1] * 30 + [object()]) == f"[{'1, ' * 25}1..."  # JSON cannot write what follows
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "[" * 77 + "..."


def test_what_is_required_is_named(refused):
    assert refused(CHATS, {"messages": HELLO})["param"] == "model"
    assert refused(CHATS, {"model": "parrot", "messages": None})["param"] == "messages"
    assert refused(TEXTS, {"model": "parrot"})["param"] == "prompt"
    assert refused(SCORES, {"prompt": "a"})["param"] == "replies"
    assert refused(SCORES, {"replies": ["a"]})["param"] == "messages"
    assert refused(SCORES, {"replies": ["a"], "prompt": "a", "messages": HELLO})["param"] == "messages"
    assert refused(SCORES, {"replies": [""], "prompt": "a"})["param"] == "replies[0]"


def test_fields_that_exclude_each_other(refused):
    chat = {"model": "parrot", "messages": HELLO}
    assert refused(CHATS, {**chat, "max_tokens": 5, "max_completion_tokens": 6})["param"] == "max_tokens"
    assert refused(CHATS, {**chat, "n": 3, "best_of": 2})["param"] == "best_of"
    assert refused(CHATS, {**chat, "stream": True, "best_of": 2})["param"] == "best_of"
    assert refused(CHATS, {**chat, "stream_options": {"include_usage": True}})["param"] == "stream_options"


def test_an_overflow_of_the_context_has_both_numbers(refused, client):
    long = [{"role": "user", "content": "x" * 300}]
    error = refused(CHATS, {"model": "parrot", "messages": long})
    assert "303 tokens" in error["message"] and "256 tokens" in error["message"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    error = refused(TEXTS, {"model": "parrot", "prompt": "x" * 200, "max_tokens": 57})
    assert "257" in error["message"] and "256" in error["message"]
    assert refused(TEXTS, {"model": "parrot", "prompt": "x" * 256})["code"] == "context_length_exceeded"
    assert refused(SCORES, {"prompt": "x" * 200, "replies": ["a", "x" * 57]})["param"] == "replies[1]"
    with pytest.raises(openai.BadRequestError, match="256 tokens"):
        client.chat.completions.create(model="parrot", messages=long)
    for name, body in (("messages", {"messages": HELLO * 100_000}), ("prompt", {"prompt": "x" * 10**6})):
        error = refused(CHATS if name == "messages" else TEXTS, {"model": "parrot", **body})  # at once
        assert (error["param"], error["code"]) == (name, "context_length_exceeded")
        assert "256 tokens" in error["message"] and "00000 tokens" in error["message"]
    exact = client.completions.create(model="parrot", prompt="x" * 200, max_tokens=56, logit_bias={256: -100})
    assert exact.usage.total_tokens == 256


def test_an_unknown_model_is_not_found(refused, client):
    error = refused(CHATS, {"model": "gpt-7", "messages": HELLO}, status=404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "parrot" in error["message"]
    with pytest.raises(openai.NotFoundError, match="gpt-7"):
        client.models.retrieve("gpt-7")


NO_OBJECTS = [b"[]", b'"x"', b"null", b"1", b'{"a": NaN}', b'{"a": Infinity}']


@pytest.mark.parametrize("body", [b"", b"{", b"nope", b"[" * 10**5, b"\xff\xfe", b"1" * 10**5, *NO_OBJECTS])
def test_bad_json_is_said(refused, body):
    assert refused(CHATS, body)["code"] == "invalid_json"


def test_half_a_surrogate_pair_breaks_nothing(http, refused):
    body = b'{"model": "parrot", "prompt": "a\\ud800b", "max_tokens": 2, "stop": "\\udfff", "user": "\\ud800"}'
    assert http.post(TEXTS, content=body).status_code == 200
    assert refused(TEXTS, b'{"model": "\\ud800", "prompt": "a"}', 404)["code"] == "model_not_found"
    assert refused(TEXTS, b'{"model": "parrot", "prompt": "a", "\\ud800": 1}')["code"] == "unsupported_parameter"


def test_what_a_page_of_another_site_could_send_is_refused(http, refused):
    body = json.dumps({"model": "parrot", "messages": HELLO}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "x"):
        error = refused(CHATS, body, status=415, headers={"Content-Type": kind})
        assert error["code"] == "invalid_content_type"
        assert kind.partition(";")[0] in error["message"] and "application/json" in error["message"]
    assert httpx.post(str(http.base_url.join(CHATS)), content=body).status_code == 415  # without any
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert http.post(CHATS, content=body, headers={"Content-Type": kind}).status_code == 200


def test_paths_and_methods_that_are_not_there(http):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHATS, 405), ("DELETE", "/v1/models", 405)):
        reply = http.request(method, path)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_keys_are_asked_for_where_there_are_any(start_server):
    url, _ = start_server(api_keys=("secret-1", "secret-2"))
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer secret"}, 401),
        ({"Authorization": "Bearer secret-10"}, 401),
        ({"Authorization": "secret-1"}, 401),
        ({"Authorization": "Basic secret-1"}, 401),
        ({"Authorization": "Bearer sécret".encode()}, 401),
        ({"Authorization": "Bearer secret-1"}, 200),
        ({"Authorization": "bearer secret-2"}, 200),
    ):
        reply = httpx.get(f"{url}/v1/models", headers=headers)
        assert reply.status_code == status, headers
        if status == 401:
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert "secret" not in reply.text
            assert httpx.post(f"{url}/v1/anything", headers=headers).status_code == 401
    assert httpx.get(f"{url}/healthz").status_code == 200
    description = httpx.get(f"{url}/openapi.json").json()
    assert description["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert description["paths"][CHATS]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in description["paths"]["/healthz"]["get"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="parrot", messages=HELLO)


def test_a_body_has_a_limit(start_server):
    url, _ = start_server(limits=RequestLimits(max_body=1000))
    for content in (b" " * 1001, iter([b" " * 600] * 2)):  # with a length, and in chunks without one
        reply = httpx.post(url + CHATS, content=content, headers=JSON)
        assert reply.status_code == 413
        assert "1000 bytes" in reply.json()["error"]["message"]
    assert httpx.post(url + CHATS, content=b" " * 1000, headers=JSON).status_code == 400


def test_a_body_that_does_not_come_is_not_waited_for_long(start_server):
    url, _ = start_server(limits=RequestLimits(body_timeout=0.2))
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=900) as connection:
        head = f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50"
        connection.sendall(f"{head}\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(1000)


def test_a_full_queue_says_when_to_come_again(start_server, eventually):
    url, engine = start_server(max_batch=1, queue=3)  # of which places a client has half
    endless = {"model": "parrot", "prompt": "a", "max_tokens": 250, "logit_bias": {"256": -100}, "stream": True}
    with httpx.Client(base_url=url, timeout=900) as client:
        with client.stream("POST", TEXTS, json=endless), client.stream("POST", TEXTS, json=endless):
            assert engine.num_running + engine.num_waiting == 2
            reply = client.post(TEXTS, json={"model": "parrot", "prompt": "a"})
            assert reply.status_code == 429
            assert int(reply.headers["Retry-After"]) >= 1
            assert reply.json()["error"]["code"] == "queue_full"
            for name, more in (("n", {"n": 3}), ("best_of", {"best_of": 3}), ("prompt", {"prompt": ["a"] * 3})):
                reply = client.post(TEXTS, json={"model": "parrot", "prompt": "a", **more})
                assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
        eventually(lambda: engine.num_running + engine.num_waiting == 0)
        assert client.post(TEXTS, json={"model": "parrot", "prompt": "a"}).status_code == 200


def test_a_reply_that_takes_too_long(start_server):
    url, _ = start_server(timeout=0.01)
    body = {"model": "parrot", "prompt": "a", "max_tokens": 250, "logit_bias": {"256": -100}}
    reply = httpx.post(url + TEXTS, json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    *_, error, done, _ = httpx.post(url + TEXTS, json={**body, "stream": True}).text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert done == "data: [DONE]"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIError, match="longer than"):
            list(client.completions.create(**body, stream=True))


def test_without_a_reward_model_nothing_is_scored(start_server, checkpoint):
    from palm_rlhf.serving.served_model import load

    url, _ = start_server(load(checkpoint, device="cpu"))
    reply = httpx.post(url + CHATS, json={"model": "parrot", "messages": HELLO, "n": 1, "best_of": 2})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "best_of")
    reply = httpx.post(url + SCORES, json={"prompt": "a", "replies": ["b"]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "no_reward_model")


def test_a_dead_engine_is_told(start_server):
    url, engine = start_server()
    engine.close()
    assert httpx.get(f"{url}/healthz").status_code == 503
    reply = httpx.post(url + CHATS, json={"model": "parrot", "messages": HELLO})
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "server_error")
