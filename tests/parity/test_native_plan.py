"""The recorded step against the same network operation by operation: equal to the bit, for every family and precision.

Also what ends a recording, and that a sequence's tokens in bf16 and int8 do not depend on batch, chunks or preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastserve import LLM, SamplingParams
from fastserve.bench.rounding import quantize
from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.quantized import QuantScheme
from fastserve.kernels.cpu import CPUKernels, create
from fastserve.kernels.interface import Batch, PackedLinear, Weight
from fastserve.kernels.reference import Kernels
from fastserve.models import loader, rope
from fastserve.models.attention import PagedContext
from fastserve.models.loader import load_model
from tests import folders
from tests.parity.test_engine_identity import PROMPTS, tokens

BLOCK_SIZE, NUM_BLOCKS = 8, 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, max_tokens=24, ignore_eos=True, seed=17)

pytestmark = pytest.mark.skipif(create().native_backend is None, reason="the native library was not built")


class QuantizingKernels(CPUKernels):
    """Packs every linear in one scheme, whatever the folder holds."""

    def __init__(self, scheme: QuantScheme) -> None:
        super().__init__(create().native_backend)
        self._scheme = scheme

    def pack_linear(
        self, weight: Weight | Sequence[Weight], bias: Tensor | None, is_gated: bool = False
    ) -> PackedLinear:
        parts = weight if isinstance(weight, Sequence) else [weight]
        return super().pack_linear([quantize(part, self._scheme) for part in parts], bias, is_gated)


SCHEMES = {
    "w8a16": QuantScheme(8),
    "w8a8": QuantScheme(8, activation_bits=8),
    "w4a16": QuantScheme(4, 32, is_symmetric=False),
    "w4a8": QuantScheme(4, 32, activation_bits=8),
}


@pytest.fixture
def use_scheme(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the loader quantise what it loads."""

    def use(name: str) -> None:
        kernels = QuantizingKernels(SCHEMES[name]) if name in SCHEMES else create()
        monkeypatch.setattr(loader.select, "select", lambda *_: (kernels, []))

    return use


class Cached:
    """A network over a paged cache of its own: one step as logits of some rows."""

    def __init__(self, model: object, kernels: Kernels) -> None:
        self.model, self.kernels = model, kernels
        shape = model.shape
        size = (NUM_BLOCKS, BLOCK_SIZE, shape.num_kv_heads, shape.head_size)
        self.keys = [torch.zeros(size, dtype=shape.dtype) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(size, dtype=shape.dtype) for _ in range(shape.num_layers)]

    def network(self, kernels: Kernels, batch: Batch) -> Tensor:
        context = PagedContext(kernels, self.keys, self.values, batch)
        ids, positions, _, rows = batch.tensors()
        return self.model.head(self.model.forward(ids, positions, context, rows), kernels)

    def of_all_tokens(self, batch: Batch) -> Tensor:
        """The same operation by operation, every token going through every layer."""
        context = PagedContext(self.kernels, self.keys, self.values, batch)
        ids, positions, _, rows = batch.tensors()
        return self.model.head(self.model.forward(ids, positions, context)[rows], self.kernels)


def make_step(spans: list[tuple[int, int, int]], seed: int, logit_rows: list[int] | None = None) -> Batch:
    """spans: (index of the sequence, first position, tokens); every sequence has 8 blocks, in a scattered order."""
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).view(-1, 8)
    positions = torch.cat([torch.arange(start, start + count) for _, start, count in spans])
    rows = torch.cat([blocks[index][torch.arange(start, start + count) // BLOCK_SIZE] for index, start, count in spans])
    starts = [0]
    for _, _, count in spans:
        starts.append(starts[-1] + count)
    ids = torch.randint(3, folders.VOCAB_SIZE, positions.shape, generator=torch.Generator().manual_seed(seed))
    return Batch(
        input_ids=ids.tolist(),
        positions=positions.tolist(),
        slot_mapping=(rows * BLOCK_SIZE + positions % BLOCK_SIZE).tolist(),
        query_starts=starts,
        context_lens=[start + count for _, start, count in spans],
        block_tables=[blocks[index].tolist() for index, _, _ in spans],
        logit_rows=[start - 1 for start in starts[1:]] if logit_rows is None else logit_rows,
    )


STEPS = [
    make_step([(0, 0, 33), (1, 0, 5)], 1),
    make_step([(0, 33, 1), (1, 5, 11), (2, 0, 1)], 2, logit_rows=[0, 12]),
    make_step([(2, 1, 20)], 3, logit_rows=[]),  # a chunk that nobody samples from
    make_step([(0, 34, 1), (1, 16, 1), (2, 21, 1), (3, 0, 1), (4, 0, 1), (5, 0, 1)], 4),
    make_step([(1, 17, 1)], 5),
    make_step([(3, 1, 63), (0, 35, 2)], 6),
    make_step([(0, 37, 1), (1, 18, 1), (2, 22, 2)], 7),  # as many as threads still norm for themselves
]
FOLDERS = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama3", {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "wide-heads": ("qwen3", {"head_dim": 64}),  # a thread's part of a projection is whole heads
    "mistral": ("mistral", {"hidden_size": 72, "head_dim": 20}),  # odd sizes: padded K, a narrow last panel
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "gpt-neox": ("gpt-neox", {}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo2": ("olmo2", {}),
    "opt": ("opt", {}),
    "phi": ("phi", {}),
    "smollm3": ("smollm3", {}),
}
CASES = [(name, dtype) for name in FOLDERS for dtype in ("float32", "bfloat16")]
CASES += [(name, scheme) for scheme in SCHEMES for name in ("qwen3", "wide-heads")] + [("gpt2", "w8a8")]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_recorded_step_is_the_operations_one_by_one(
    name: str, precision: str, use_scheme: Callable[[str], None], tmp_path: Path
) -> None:
    use_scheme(precision)
    family, options = FOLDERS[name]
    folder = folders.FAMILIES[family](tmp_path / name, **options)
    dtype = "bfloat16" if precision in SCHEMES else precision
    loaded = load_model(ModelFolder.open(str(folder)), dtype=dtype, backend="native")
    one_by_one, whole = Cached(loaded.model, loaded.kernels), Cached(loaded.model, loaded.kernels)
    recorded = loaded.kernels.record(whole.network, longest=64)
    assert not isinstance(recorded, str), recorded
    with torch.inference_mode():
        for step in STEPS:
            expected = one_by_one.of_all_tokens(step)
            chosen = recorded.run(step, choose=True)
            assert torch.equal(recorded.logits(), expected)
            assert chosen == loaded.kernels.argmax(expected).tolist()
            assert recorded.run(step, choose=False) == []
            assert torch.equal(recorded.logits(), expected)
            for ours, theirs in zip(whole.keys + whole.values, one_by_one.keys + one_by_one.values, strict=True):
                assert torch.equal(ours, theirs)
    assert expected.float().std() > 0.1


def test_what_cannot_be_recorded_says_why(tmp_path: Path) -> None:
    loaded = load_model(ModelFolder.open(str(folders.llama(tmp_path))), backend="native")
    cached = Cached(loaded.model, loaded.kernels)

    def reason(change: Callable[[Tensor], Tensor]) -> str:
        return loaded.kernels.record(lambda kernels, batch: change(cached.network(kernels, batch)), longest=64)

    assert "computes a tensor itself (aten.add" in reason(lambda logits: logits + 1.0)
    assert "changes a tensor itself (aten.add_" in reason(lambda logits: logits.add_(1.0))
    assert "reads numbers itself (aten.item" in reason(lambda logits: logits * logits[0, 0].item())
    assert "tensor of 4 rows" in reason(lambda logits: loaded.kernels.argmax(torch.empty(4, 2)))


def test_a_step_whose_lists_do_not_fit_together_is_refused(tmp_path: Path) -> None:
    loaded = load_model(ModelFolder.open(str(folders.llama(tmp_path))), backend="native")
    cached = Cached(loaded.model, loaded.kernels)
    recorded = loaded.kernels.record(cached.network, longest=64)
    step = STEPS[1]
    for name in ("positions", "slot_mapping", "query_starts", "context_lens", "block_tables"):
        with pytest.raises(ValueError, match=r"a step needs a position|of other numbers of sequences"):
            recorded.run(replace(step, **{name: getattr(step, name)[:-1]}), choose=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.qwen3(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.mark.parametrize("precision", ["bfloat16", "w8a16", "w8a8", "w4a8"])
def test_tokens_do_not_depend_on_batch_chunks_or_preemption(
    folder: Path, precision: str, use_scheme: Callable[[str], None]
) -> None:
    use_scheme(precision)

    def generate(**options: object) -> tuple[list[list[int]], LLM]:
        llm = LLM(folder, dtype="bfloat16", backend="native", max_model_len=160, prefix_caching=False, **options)
        assert "one native call" in llm.engine.report
        return tokens(llm.generate(PROMPTS, GREEDY)) + tokens(llm.generate(PROMPTS, SAMPLED)), llm

    alone, llm = generate(max_batch_sequences=1)
    small = 40 * llm.engine.memory.block_bytes  # 640 tokens for 32 sequences of 29 to 122
    assert generate(max_batch_sequences=32)[0] == alone
    assert generate(max_batch_sequences=16, max_batch_tokens=16)[0] == alone
    preempted, llm = generate(kv_cache_memory=small, speculation="off")  # guesses would end sequences sooner
    assert preempted == alone
    assert llm.engine.stats().num_preemptions > 0


def test_long_rotation_tables_are_there_before_the_recording(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "_FIRST_ROWS", 16)
    llm = LLM(folder, backend="native", max_model_len=160)
    assert "one native call" in llm.engine.report
    monkeypatch.undo()
    [answer] = tokens(llm.generate(PROMPTS[:1], GREEDY))
    assert answer == tokens(LLM(folder, backend="native", max_model_len=160).generate(PROMPTS[:1], GREEDY))[0]
