"""Structured outputs: schemas hold whatever is sampled, what cannot hold is refused by name, hostile ones in time.

The draft-7 suite and JSONSchemaBench are used where the shared data has them; a few schemas of our own everywhere.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from benchmarks import schemas
from fastserve import LLM, SamplingParams, StructuredOutputs
from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import RequestError
from fastserve.core.grammars import byte_tokenizer, check, compile_for, to_grammar
from fastserve.core.request import FINISH_ERROR, Request
from fastserve.engine.grammar import GrammarCompiler
from tests import folders

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
OWN = [
    PERSON,
    {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^x[0-9]{2}$"}]},
    {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    {"type": "array", "items": [{"type": "integer"}, {"type": "null"}], "minItems": 2, "maxItems": 2},
]


def compiled(wanted: StructuredOutputs) -> Any:
    return compile_for(byte_tokenizer(), to_grammar(wanted))


def accepts(matcher: Any, text: str) -> bool:
    data = list(text.encode())
    fresh = matcher.deep_copy()
    return fresh.try_consume_tokens(data) == len(data) and fresh.is_accepting()


def walk(matcher: Any, seed: int, num_bytes: int = 400) -> str | None:
    """A random text that the masks allow; None when it has not ended in time."""
    matcher, rng, made = matcher.deep_copy(), random.Random(seed), bytearray()
    for _ in range(num_bytes):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:257]
        allowed = np.flatnonzero(bits).tolist()
        assert allowed and not matcher.is_error()
        if allowed[-1] == 256 and (len(allowed) == 1 or rng.random() < 0.5):
            return made.decode()
        # Text that closes what is open, more often than chance would.
        closing = [byte for byte in allowed if byte in b'"}]0'] if rng.random() < 0.5 else []
        byte = rng.choice(closing or [byte for byte in allowed if byte < 256])
        assert matcher.consume_token(byte)
        made.append(byte)
    return None


@pytest.mark.parametrize("schema", OWN)
def test_whatever_is_sampled_fits_the_schema(schema: dict) -> None:
    matcher = compiled(StructuredOutputs(json=schema))
    texts = [text for seed in range(30) if (text := walk(matcher, seed)) is not None]
    assert len(texts) > 5
    for text in texts:
        jsonschema.Draft7Validator(schema).validate(json.loads(text))


def test_the_check_can_fail() -> None:
    assert not accepts(compiled(StructuredOutputs(json=PERSON)), '{"name":"x","age":121}')
    assert accepts(compiled(StructuredOutputs(json=PERSON)), '{"name":"x","age":120}')


@pytest.mark.parametrize("keyword", ["not", "uniqueItems", "contains", "propertyNames", "contentMediaType"])
def test_keywords_that_are_not_supported_are_named(keyword: str) -> None:
    value = {"uniqueItems": True, "contentMediaType": "application/json"}.get(keyword, {"maxLength": 3})
    with pytest.raises(RequestError, match=keyword):
        check(StructuredOutputs(json={keyword: value}))


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": "{"},
        {"json": "[1]"},
        {"json": {"type": "strin"}},
        {"regex": "(a"},
        {"regex": "(?=a)b"},
        {"grammar": "start: oops("},
        {"grammar": "root ::= oops("},
        {"choice": [""]},
        {
            "json": {
                "anyOf": [
                    {"type": "object", "properties": {f"p{i}": {"type": "string"}, "q": {"enum": [i]}}}
                    for i in range(500)
                ]
            }
        },
    ],
)
def test_broken_grammars_are_refused(wanted: dict) -> None:
    with pytest.raises(RequestError):
        check(StructuredOutputs(**wanted))


def test_exactly_one_form() -> None:
    with pytest.raises(RequestError, match="json and regex"):
        StructuredOutputs(json={}, regex="a")
    with pytest.raises(RequestError, match="none"):
        StructuredOutputs()
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(structured_outputs=StructuredOutputs(json_object=True), ignore_eos=True)


@pytest.mark.parametrize(
    "hostile",
    [
        {"regex": "((a{1,500}){1,500}){1,500}b"},
        {"regex": "(.*a){30}.{200}(b|c.*d){30}"},
        {"json": {"type": "string", "pattern": "^(([a-z]+)+)+([0-9]{1,999}){1,99}$", "minLength": 9999}},
        {"json": {"properties": {f"p{i}": {"pattern": "(a|b|c){1,50}[^x]{3,999}"} for i in range(500)}}},
        {"grammar": "\n" * 131_000 + "root ::= oops("},
        {"grammar": "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(8000)) + 'a8000 ::= "x"'},
        {"grammar": "start: a\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + "\na: a0\na60: /x/"},
    ],
)
def test_hostile_grammars_end(hostile: dict) -> None:
    """The limit is fuel, not seconds; without it these run for hours."""
    try:
        check(StructuredOutputs(**hostile))
        walk(compiled(StructuredOutputs(**hostile)), 0, num_bytes=20)
    except (RequestError, AssertionError):
        pass  # refused, or stopped while it ran: either is an end


@pytest.mark.parametrize(("name", "share"), [("draft7", 0.55), ("bench", 0.9)])
def test_no_text_that_breaks_a_supported_schema(shared_data: Path, name: str, share: float) -> None:
    """Invalid instances are never accepted, what is made is valid, and `share` of the schemas are supported."""
    file = shared_data / "eval_fixtures" / schemas.FILES[name]
    if not file.exists():
        pytest.skip(f"{file.name} is not among the shared data")
    counts = judged([json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line])
    assert counts.problems == []
    assert counts.numbers["supported"] >= share * counts.numbers["schemas"]
    assert counts.numbers["walks_ended"] > counts.numbers["supported"]
    assert all(len(message) > 15 for message in counts.refusals)


def judged(items: list[dict[str, Any]]) -> schemas.Counts:
    """What benchmarks/schemas.py finds, with two texts for each schema."""
    folder = ModelFolder.open()
    tokenizer = Tokenizer.load(folder)
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, folder.eos_token_ids)
    walker, counts = schemas.Walker(tokenizer, compiler, 200), schemas.Counts()
    for item in items:
        schemas.judge(item, compiler, walker, 2, counts)
    return counts


def test_the_judge_finds_what_breaks_a_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    item = {"name": "x", "description": "y", "schema": {"type": "integer"}, "tests": []}
    assert judged([item]).problems == []
    item["tests"] = [{"description": "called invalid", "data": 3, "valid": False}]
    assert "an invalid instance is allowed" in judged([item]).problems[0]
    monkeypatch.setattr(schemas.Walker, "walk", lambda *_: '"text"')
    assert "was made" in judged([item]).problems[1]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = folders.llama(tmp_path_factory.mktemp("model") / "llama")
    return LLM(folder, kv_cache_memory="8MiB", max_model_len=400)


def test_a_random_model_answers_in_form(llm: LLM) -> None:
    wanted = [
        StructuredOutputs(json=PERSON),
        StructuredOutputs(choice=["a fox", "the bear"]),
        StructuredOutputs(regex=r"\d{3}-[ab]+c"),
        StructuredOutputs(grammar='\n \t start : "x" ("y" | "zz")* "."'),
        StructuredOutputs(grammar="\n \t\n" + 'root ::= "x" [0-9]+ "."'),
        StructuredOutputs(json=PERSON, begins_after="</think>"),
    ]
    params = [
        SamplingParams(temperature=1.0, seed=index, max_tokens=380, structured_outputs=one)
        for index, one in enumerate(wanted)
    ]
    outputs = [output.outputs[0] for output in llm.generate(["The fox"] * len(params), params)]
    ended = [output.finish_reason == "stop" for output in outputs]
    assert ended[:2] == [True, True] and sum(ended) >= 3
    jsonschema.validate(json.loads(outputs[0].text), PERSON)
    assert outputs[1].text in ("a fox", "the bear")
    for one, output in zip(wanted, outputs, strict=True):
        if output.finish_reason == "stop":
            assert accepts(compiled(one), output.text)


def test_an_unsupported_schema_is_refused_before_it_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="uniqueItems"):
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputs(json={"uniqueItems": True})))
    assert not llm.engine.has_work()


def test_a_refusal_is_told_although_the_cache_is_resized_meanwhile(llm: LLM) -> None:
    sampling = SamplingParams(structured_outputs=StructuredOutputs(json={"uniqueItems": True}))
    llm.engine.add(Request("refused", [5], sampling, 0.0))
    [(_, future)] = llm.engine._compiling.values()
    future.exception(timeout=60)
    llm.engine.resize_kv_cache(1 << 20)
    [output] = llm.engine.step()
    assert (output.request_id, output.finish_reason) == ("refused", FINISH_ERROR)
    assert "uniqueItems" in output.error and not llm.engine.has_work()


def test_an_answer_goes_on_in_form_after_it_lost_its_memory(tmp_path: Path) -> None:
    folder = folders.llama(tmp_path / "llama")
    schema = {"type": "array", "items": {"enum": ["fox", "bear", "sea"]}, "minItems": 12, "maxItems": 12}
    params = [
        SamplingParams(seed=seed, max_tokens=110, structured_outputs=StructuredOutputs(json=schema))
        for seed in range(4)
    ]
    roomy = LLM(folder, dtype="float32", max_model_len=160, kv_cache_memory="8MiB")
    tight = LLM(
        folder, dtype="float32", max_model_len=160, kv_cache_memory=14 * roomy.engine.memory.block_bytes
    )  # fmt: skip
    texts = [[output.outputs[0].text for output in one.generate(["The sea"] * 4, params)] for one in (roomy, tight)]
    assert tight.engine.stats().num_preemptions > 0
    assert texts[0] == texts[1]
