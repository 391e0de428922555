"""Encoder-decoders against transformers: logits, greedy tokens and beams of every family.

And an answer is the same whatever else is computed: alone, in a batch, in small steps, after preemption, with a source
found in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve import LLM, SamplingParams
from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import RequestError
from fastserve.models.encoder import RaggedBatch
from fastserve.models.encoder_decoder import EncoderDecoder
from fastserve.models.loader import load_model
from tests.encoder_decoder_folders import EOS, FAMILIES, encoder_decoder
from tests.paged_driver import decode_from_source

SOURCES = [
    [5 + (7 * index + 11 * place) % 300 for place in range(length)] for index, length in enumerate((3, 17, 16, 40))
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=24, ignore_eos=True, seed=17)
BEAMS: dict[str, Any] = dict(num_beams=4, length_penalty=0.7, early_stopping=False, no_repeat_ngram_size=3)


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_decoder(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_decoder(tmp_path_factory.mktemp("models") / "bart", "bart")


def open_llm(folder: Path, **options: Any) -> LLM:
    settings = {"kv_cache_memory": "8MiB", "num_threads": 1, "dtype": "float32", "kernels": "reference"}
    return LLM(str(folder), **{**settings, **options})


@cache
def theirs(folder: Path) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.forced_eos_token_id = model.generation_config.forced_bos_token_id = None
    return model


def generate(folder: Path, source: list[int], **options: Any) -> Any:
    return theirs(folder).generate(
        torch.tensor([source]),
        attention_mask=torch.ones(1, len(source), dtype=torch.int64),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def tokens(llm: LLM, params: SamplingParams, sources: list[list[int]] = SOURCES) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(sources, params)]


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_logits(folder: Path, kernels: str) -> None:
    """One pass of the decoder over a whole answer, its source in blocks that it shares with nobody."""
    loaded = load_model(ModelFolder.open(str(folder)), dtype="float32", kernels=kernels)
    source, target = SOURCES[1], [2, *range(50, 70)]
    found = decode_from_source(loaded, source, target)
    with torch.no_grad():
        expected = theirs(folder)(torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_greedy_tokens(folder: Path) -> None:
    """64 tokens for four sources in one batch. Ours may differ from where transformers' two best are almost equal."""
    found = tokens(open_llm(folder, kernels="auto"), GREEDY)
    for source, ours in zip(SOURCES, found, strict=True):
        made = generate(folder, source, max_new_tokens=64, min_new_tokens=64, num_beams=1, eos_token_id=None)
        expected = made.sequences[0, 1:].tolist()
        differing = next(
            (place for place, pair in enumerate(zip(ours, expected, strict=True)) if pair[0] != pair[1]), None
        )
        if differing is not None:
            first, second = made.scores[differing][0].topk(2).values.tolist()
            assert first - second < 1e-3, f"token {differing} differs"


def test_beams(folder: Path) -> None:
    """Sequences and scores of all four beams, with what folders ask for: n-grams, forced ends, least lengths."""
    llm = open_llm(folder, kernels="auto")
    params = SamplingParams(
        n=4,
        temperature=0.0,
        max_tokens=20,
        min_tokens=3,
        forced_eos_token_id=EOS,
        suppress_token_ids=(7, 8, 9),
        **BEAMS,
    )
    for source, output in zip(SOURCES, llm.generate(SOURCES, params), strict=True):
        made = generate(
            folder,
            source,
            max_new_tokens=20,
            min_new_tokens=3,
            forced_eos_token_id=EOS,
            suppress_tokens=[7, 8, 9],
            num_return_sequences=4,
            **BEAMS,
        )
        for answer, row, score in zip(
            output.outputs, made.sequences.tolist(), made.sequences_scores.tolist(), strict=True
        ):
            assert answer.token_ids == row[1 : 1 + len(answer.token_ids)]
            assert answer.score == pytest.approx(score, rel=1e-4, abs=1e-4)
            assert answer.token_ids[-1] == EOS


def test_answers_do_not_depend_on_what_else_is_computed(folder: Path) -> None:
    alone = open_llm(folder, max_batch_sequences=1, prefix_caching=False, speculation="off")
    expected = tokens(alone, SAMPLED), tokens(alone, replace(GREEDY, max_tokens=24))
    blocks = alone.engine.memory.block_bytes
    for options in (
        {"max_batch_tokens": 16, "max_batch_sequences": 8},  # sources of 17 and 40 tokens are still read at once
        {"max_batch_sequences": 8, "block_size": 4},
        {"kv_cache_memory": f"{24 * blocks}", "max_model_len": 120},  # two at a time: others lose their memory
    ):
        llm = open_llm(folder, **options)
        assert (tokens(llm, SAMPLED), tokens(llm, replace(GREEDY, max_tokens=24))) == expected, options
        assert llm.engine.stats().kv_blocks_used == 0


def test_a_preempted_answer_is_the_same(bart: Path) -> None:
    """So little memory that sequences lose theirs in the middle: sources are read again, tokens stay the same."""
    sources = [[5 + (3 * index + 7 * place) % 300 for place in range(30)] for index in range(8)]
    params = replace(GREEDY, max_tokens=90)
    expected = tokens(open_llm(bart, speculation="off"), params, sources)
    block = open_llm(bart).engine.memory.block_bytes
    for prefix_caching in (False, True):
        llm = open_llm(
            bart, kv_cache_memory=str(24 * block), max_model_len=136, prefix_caching=prefix_caching, speculation="off"
        )
        assert tokens(llm, params, sources) == expected
        assert llm.engine.stats().num_preemptions > 0


def test_a_source_that_was_seen_is_not_encoded_again(bart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are found by all of its tokens: one that only begins alike shares nothing."""
    llm, counts = open_llm(bart), []
    original = EncoderDecoder.source_keys_values

    def counting(self: EncoderDecoder, batch: RaggedBatch) -> Any:
        counts.append(batch.starts[-1])
        return original(self, batch)

    monkeypatch.setattr(EncoderDecoder, "source_keys_values", counting)
    params = replace(GREEDY, max_tokens=4)
    first = tokens(llm, params, [SOURCES[3]])
    assert tokens(llm, params, [SOURCES[3]]) == first and counts == [40]
    other = [*SOURCES[3][:32], 9, 9]
    fresh = open_llm(bart)
    assert tokens(llm, params, [other]) == tokens(fresh, params, [other])
    assert counts == [40, 34, 34]


def test_abort_frees_everything(bart: Path) -> None:
    llm = open_llm(bart)
    engine = llm.engine
    from fastserve.core.request import Request

    for index, num_beams in enumerate((1, 4)):
        sampling = SamplingParams(temperature=0.0, max_tokens=50, num_beams=num_beams, seed=0)
        engine.add(Request(f"r{index}", [*SOURCES[3], EOS], sampling, 0.0, num_source=40))
    for _ in range(5):
        engine.step()
    assert engine.stats().kv_blocks_used > 6
    engine.abort(["r0", "r1"])
    assert engine.stats().kv_blocks_used == 0 and not engine.has_work()


def test_what_cannot_be_served_is_said(bart: Path) -> None:
    llm = open_llm(bart)
    with pytest.raises(RequestError, match="takes at most 160"):
        llm.generate([[5] * 161], GREEDY)
    with pytest.raises(RequestError, match="prompt_logprobs"):
        llm.generate([[5]], SamplingParams(prompt_logprobs=1))
    with pytest.raises(RequestError, match="knows no languages"):
        llm.translate("The fox", "fr")


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_bfloat16_through_the_native_kernels(tmp_path: Path, family: str) -> None:
    """A step is one native call, and tokens do not depend on the batch."""
    folder = encoder_decoder(tmp_path / family, family, dtype="bfloat16")
    llm = open_llm(folder, dtype="bfloat16", kernels="auto")
    if "one native call" not in llm.engine.report:
        pytest.skip("the native library is not here")
    together = tokens(llm, replace(GREEDY, max_tokens=24))
    alone = open_llm(folder, dtype="bfloat16", kernels="auto", prefix_caching=False)
    assert [tokens(alone, replace(GREEDY, max_tokens=24), [source])[0] for source in SOURCES] == together
    first = alone.generate([SOURCES[1]], SamplingParams(temperature=0.0, max_tokens=1, logprobs=0))[0].outputs[0]
    with torch.no_grad():
        start = torch.tensor([[theirs(folder).generation_config.decoder_start_token_id]])
        logits = theirs(folder)(torch.tensor([SOURCES[1]]), decoder_input_ids=start).logits[0, -1]
    assert logits.log_softmax(-1)[first.token_ids[0]] > logits.log_softmax(-1).max() - 0.2
