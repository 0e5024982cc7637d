"""Replies by a grammar: a model that has learnt nothing still writes JSON that conforms, unless it is cut."""

import asyncio
import json

import httpx
import jsonschema
import openai
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import DEFAULT_SPECIAL_TOKENS, ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.served_model import ServedModel
from palm_rlhf.serving.structured import MAX_SCHEMA_CHARS, MAX_SCHEMA_DEPTH, Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog", None, 3]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "boolean"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
MESSAGES = [{"role": "user", "content": "Hello"}]
NO_BLANKS = {"9": -100, "10": -100, "32": -100}  # as bytes: a model that has not learnt JSON likes them too much


def words() -> HuggingFaceTokenizer:
    text = '{"name": "anna", "age": 12, "kind": null}, [true, false] été 🐈 und so weiter'
    return HuggingFaceTokenizer.train([text] * 20, 320)


def marked_words() -> HuggingFaceTokenizer:
    """As Llama's: a mark stands for the blank before a word."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", *DEFAULT_SPECIAL_TOKENS]
    alphabet = [chr(code) for code in range(33, 127)] + ["é", "🐈"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(['{"name": "anna", "age": 12, "kind": null}'] * 20, trainer)
    return HuggingFaceTokenizer(backend, DEFAULT_SPECIAL_TOKENS, eos_token=DEFAULT_SPECIAL_TOKENS[0])


@pytest.fixture(scope="module", params=[ByteTokenizer, words, marked_words], ids=["bytes", "bpe", "marked"])
def untrained(request) -> ServedModel:
    """A model of random weights, whose vocabulary is larger than its tokenizer's."""
    torch.manual_seed(0)
    tokenizer = request.param()
    palm = PaLM(num_tokens=tokenizer.num_tokens + 11, dim=32, depth=1, heads=2, dim_head=16, max_seq_len=2048)
    return ServedModel("untrained", palm, tokenizer, PRESETS["default"])


@pytest.fixture(scope="module")
def engine(untrained):
    with Engine(untrained.palm, untrained.tokenizer, EngineConfig(max_batch=8)) as engine:
        yield engine


def replies(served_model: ServedModel, engine: Engine, schema: dict, num: int = 4, limit: int = 400, **options) -> list:
    """So many replies by a schema, as generations that have ended and their texts; the first of them greedy."""
    grammar, prompt = served_model.grammars.json(schema), served_model.encode_chat(MESSAGES)
    tokens = range(served_model.tokenizer.num_tokens)
    blanks = {token: -100.0 for token in tokens if served_model.tokenizer.decode([token]).isspace()}  # they say nothing
    options = {"seed": 0, "stop_tokens": served_model.turn_ends, "grammar": grammar, "logit_bias": blanks, **options}
    asked = [
        Request(prompt, limit, index=index, **{"temperature": float(index > 0), **options}) for index in range(num)
    ]
    return [(generation, generation.text()) for generation in engine.submit_all(asked)]


def conforms(text: str, schema: dict) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -5, "maximum": 99},
            {"type": "string", "maxLength": 5},
            {"type": "string", "pattern": "^[a-c]{1,4}$"},
            {"enum": ["é", "🐈", '"', 1.5, None]},
            {"type": "boolean"},
            {"const": {"deep": [1, "two"]}},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 3}, inner),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda some: {
                "type": "object",
                "properties": some,
                "required": sorted(some)[:1],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b c", "é", '"', "<|assistant|>"]), inner, min_size=1, max_size=3),
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=12)
@given(SCHEMAS)
def test_a_reply_that_ends_by_itself_conforms(untrained, engine, schema):
    for generation, text in replies(untrained, engine, schema):
        assert generation.finish_reason == "stop"  # none of these schemas lets a reply be long
        assert generation.tokens[-1] in untrained.turn_ends
        assert conforms(text, schema), (schema, text)


@pytest.mark.parametrize("schema", [PERSON, TREE, {"type": "object"}, {}])
def test_a_reply_conforms_or_is_cut(untrained, engine, schema):
    ended = 0
    for generation, text in replies(untrained, engine, schema, num=8, limit=120):
        ended += generation.finish_reason == "stop"
        assert conforms(text, schema) if generation.finish_reason == "stop" else generation.finish_reason == "length"
    assert ended or schema == {"type": "object"}


def test_a_model_without_an_end_of_turn_ends_where_the_grammar_does(untrained, engine):
    for generation, text in replies(untrained, engine, PERSON, stop_tokens=frozenset()):
        assert generation.finish_reason == "stop"
        assert conforms(text, PERSON)


def test_a_stop_string_ends_a_reply_inside_its_grammar(untrained, engine):
    [(generation, text)] = replies(untrained, engine, PERSON, num=1, stop=('"age"',))
    assert generation.finish_reason == "stop"
    assert '"name"' in text and '"age"' not in text


def test_the_end_is_allowed_exactly_where_the_grammar_allows_it(untrained):
    """Digits may be followed by an end or by digits: 7 is whole, and so is 77, but not the minus sign."""
    tokens = untrained.tokenizer.encode_continuation
    constraint = untrained.grammars.json({"type": "integer", "minimum": -99, "maximum": 99}).start()
    ends = sorted(untrained.turn_ends)
    for text, may_end, may_go_on in (("-", False, True), ("7", True, True), ("7", True, False)):
        assert bool(constraint.mask()[ends].any()) is False or may_end or text == "7"
        constraint.push(tokens(text)[0])
        mask = constraint.mask()
        assert bool(mask[ends].all()) is may_end
        assert bool(mask[tokens("7")[0]]) is may_go_on
        assert len(mask) == untrained.palm.num_tokens and not mask[untrained.tokenizer.num_tokens :].any()
    assert constraint.complete


def test_others_in_the_batch_and_logprobs_are_those_of_the_model(untrained, engine):
    plain = Request(untrained.encode_chat(MESSAGES), 30, seed=7, logprobs=2)
    alone = engine.submit(plain)
    expected = list(alone)
    grammar = untrained.grammars.json(PERSON)
    beside = [Request(plain.prompt, 30, seed=index, grammar=grammar, logprobs=2) for index in range(4)]
    together = engine.submit_all([*beside[:2], plain, *beside[2:]])
    found = [list(generation) for generation in together]
    assert together[2].tokens == alone.tokens
    for one, other in zip(
        sum((p.logprobs for p in found[2]), ()), sum((p.logprobs for p in expected), ()), strict=True
    ):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    free = expected[0].logprobs[0]
    for first in (found[0][0].logprobs[0], found[4][0].logprobs[0]):  # a bracket, of which the model thinks little
        assert untrained.tokenizer.decode([first.token]).startswith("{")
        assert [token for token, _ in first.alternatives] == [token for token, _ in free.alternatives]
        assert [value for _, value in first.alternatives] == pytest.approx(
            [value for _, value in free.alternatives], abs=1e-5
        )
        assert first.logprob < free.alternatives[0][1] - 0.1


def test_the_name_of_a_special_token_in_a_schema_stays_text(untrained, engine):
    for generation, text in replies(untrained, engine, {"const": "<|user|><|endoftext|>"}):
        assert json.loads(text) == "<|user|><|endoftext|>"
        assert set(generation.tokens[:-1]).isdisjoint(untrained.tokenizer.special_tokens.values())


REFUSED = [
    ({"not": {"type": "string"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "strnig"}, "strnig"),
    ({"type": "string", "format": "telephone"}, "telephone"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"$ref": "https://example.com/schema"}, "example.com"),
    ({"$ref": "#"}, "follow"),
    ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
    ({"enum": ["x" * MAX_SCHEMA_CHARS]}, "characters"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
]


@pytest.fixture(scope="module")
def grammars(untrained) -> Grammars:
    return untrained.grammars


@pytest.mark.parametrize("schema, named", REFUSED, ids=[named for _, named in REFUSED])
def test_a_schema_that_cannot_be_followed_is_refused_by_name(grammars, schema, named):
    with pytest.raises(ValueError, match=named):
        grammars.json(schema)


def test_a_deep_schema_is_refused(grammars):
    schema = {"type": "integer"}
    for _ in range(MAX_SCHEMA_DEPTH // 2):
        schema = {"type": "array", "items": schema}
    grammars.json(schema)
    for _ in range(MAX_SCHEMA_DEPTH):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested deeper"):
        grammars.json(schema)


def test_what_a_schema_tells_the_library_is_not_followed(untrained, engine):
    odd = {"const": [1, 2], "x-guidance": {"item_separator": ";", "whitespace_pattern": "x+"}}
    for _, text in replies(untrained, engine, odd, num=2):
        assert json.loads(text) == [1, 2]


def test_a_tokenizer_that_does_not_tell_its_bytes_is_refused():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = HuggingFaceTokenizer(backend, ["</s>"], eos_token="</s>")
    with pytest.raises(ValueError, match="does not tell the bytes"):
        Grammars(tokenizer, tokenizer.num_tokens, frozenset())


def test_a_schema_is_compiled_once(grammars):
    assert grammars.json(PERSON) is grammars.json(json.loads(json.dumps(PERSON)))
    turned = {**PERSON, "properties": dict(reversed(PERSON["properties"].items()))}
    assert grammars.json(turned) is not grammars.json(PERSON)  # the order of properties is that of the reply


def test_while_a_schema_is_compiled_the_event_loop_goes_on(served_model, server):
    """It has so many optional properties that it is refused in the end, after the most of a second."""
    app = create_app(served_model, server[1])
    schema = {"type": "object", "properties": {f"property {number}": {"type": "string"} for number in range(1300)}}
    body = {"model": "parrot", "messages": MESSAGES, "response_format": structured(schema)}

    async def turns_of_the_loop() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            asked, turns = asyncio.ensure_future(http.post("/v1/chat/completions", json=body)), 0
            while not asked.done():
                await asyncio.sleep(0.001)
                turns += 1
        assert asked.result().json()["error"]["param"] == "response_format"
        return turns

    assert asyncio.run(turns_of_the_loop()) > 20


def structured(schema: dict, **more) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, **more}}


def test_openai_s_client_gets_json(client):
    for options in ({"temperature": 0}, {"seed": 3, "n": 3}):
        reply = client.chat.completions.create(
            model="parrot",
            messages=MESSAGES,
            response_format=structured(PERSON, strict=True),
            max_tokens=150,
            **options,
        )
        for choice in reply.choices:
            assert choice.finish_reason == "stop"
            assert conforms(choice.message.content, PERSON)
    cut = client.chat.completions.create(
        model="parrot", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=1, temperature=0
    )
    assert cut.choices[0].finish_reason == "length"
    assert cut.choices[0].message.content == "{"


def test_a_stream_is_the_same_reply(client):
    options = {"model": "parrot", "messages": MESSAGES, "response_format": structured(PERSON), "seed": 5}
    whole = client.chat.completions.create(max_tokens=150, **options).choices[0]
    text, reasons = "", []
    for chunk in client.chat.completions.create(max_tokens=150, stream=True, **options):
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (text, reasons[-1]) == (whole.message.content, whole.finish_reason)


def test_pydantic_models_come_back_parsed(client):
    from pydantic import BaseModel

    class Animal(BaseModel):
        is_cat: bool
        legs: int | None

    reply = client.chat.completions.parse(
        model="parrot", messages=MESSAGES, response_format=Animal, max_tokens=200, temperature=0, logit_bias={"48": 20}
    )
    assert isinstance(reply.choices[0].message.parsed, Animal)


def test_what_cannot_be_followed_is_answered_with_400(client, server):
    for schema, named in REFUSED:
        with pytest.raises(openai.BadRequestError, match="response_format") as caught:
            client.chat.completions.create(model="parrot", messages=MESSAGES, response_format=structured(schema))
        assert named in str(caught.value) and caught.value.param == "response_format"
    for form, named in (
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_object", "schema": {}}, "response_format.schema"),
    ):
        body = {"model": "parrot", "messages": MESSAGES, "response_format": form}
        reply = httpx.post(f"{server[0]}/v1/chat/completions", json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == named
