"""Drives a model over a paged cache without the engine: ragged steps, chunked prompts, greedy output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastserve.kernels.interface import Batch
from fastserve.models.attention import PagedContext
from fastserve.models.encoder import RaggedBatch
from fastserve.models.encoder_decoder import EncoderDecoder
from fastserve.models.loader import LoadedModel


@dataclass
class _Sequence:
    token_ids: list[int]
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)


class PagedDriver:
    """Sequences by name, over one pool of blocks that are handed out in a scattered order."""

    def __init__(self, loaded: LoadedModel, num_blocks: int = 256, block_size: int = 8) -> None:
        shape = loaded.model.shape
        size = (num_blocks, block_size, shape.num_kv_heads, shape.head_size)
        self._model, self._kernels, self._block_size = loaded.model, loaded.kernels, block_size
        # Nothing may depend on what a block held before.
        self._keys = [torch.full(size, 1e4, dtype=shape.dtype) for _ in range(shape.num_layers)]
        self._values = [torch.full(size, -1e4, dtype=shape.dtype) for _ in range(shape.num_layers)]
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self.sequences: dict[str, _Sequence] = {}

    def add(self, name: str, token_ids: list[int]) -> None:
        self.sequences[name] = _Sequence(list(token_ids))

    def step(self, num_tokens: dict[str, int]) -> dict[str, Tensor]:
        """Run the next tokens of each named sequence; name -> logits [tokens, V] of those tokens."""
        ids, positions, slots, starts, lens, tables = [], [], [], [0], [], []
        for name, count in num_tokens.items():
            sequence = self.sequences[name]
            start, end = sequence.num_computed, sequence.num_computed + count
            assert end <= len(sequence.token_ids)
            while len(sequence.block_ids) * self._block_size < end:
                sequence.block_ids.append(self._free.pop())
            for position in range(start, end):
                block = sequence.block_ids[position // self._block_size]
                slots.append(block * self._block_size + position % self._block_size)
            ids += sequence.token_ids[start:end]
            positions += range(start, end)
            starts.append(starts[-1] + count)
            lens.append(end)
            tables.append(list(sequence.block_ids))
            sequence.num_computed = end
        batch = Batch(
            input_ids=ids,
            positions=positions,
            slot_mapping=slots,
            query_starts=starts,
            context_lens=lens,
            block_tables=tables,
            logit_rows=list(range(len(ids))),
            request_ids=list(num_tokens),
        )
        context = PagedContext(self._kernels, self._keys, self._values, batch)
        logits = self._model.logits(self._model.forward(*batch.tensors()[:2], context))
        return dict(
            zip(num_tokens, logits.split([b - a for a, b in zip(starts, starts[1:], strict=False)]), strict=True)
        )

    def prompt_logits(self, chunk_size: int) -> dict[str, Tensor]:
        """All logits of the tokens that wait, in chunks of at most this many tokens per sequence and step."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.sequences}
        while True:
            waiting = {name: len(item.token_ids) - item.num_computed for name, item in self.sequences.items()}
            counts = {name: min(chunk_size, count) for name, count in waiting.items() if count}
            if not counts:
                return {name: torch.cat(parts) for name, parts in rows.items()}
            for name, logits in self.step(counts).items():
                rows[name].append(logits)

    def generate(self, num_tokens: int, chunk_size: int = 1024) -> dict[str, list[int]]:
        """Greedy output of every sequence, all decoding together."""
        output: dict[str, list[int]] = {name: [] for name in self.sequences}
        logits = self.prompt_logits(chunk_size)
        for index in range(num_tokens):
            for name, rows in logits.items():
                token_id = int(rows[-1].argmax())
                output[name].append(token_id)
                self.sequences[name].token_ids.append(token_id)
            if index + 1 < num_tokens:
                logits = self.step(dict.fromkeys(self.sequences, 1))
        return output


@torch.inference_mode()
def decode_from_source(loaded: LoadedModel, source: list[int], target: list[int], block_size: int = 16) -> Tensor:
    """Logits [T, V] of one pass of an encoder-decoder over a whole answer, its source in blocks of its own."""
    model = loaded.model
    assert isinstance(model, EncoderDecoder)
    shape = model.shape
    num_source, num_target = (-(-len(ids) // block_size) for ids in (source, target))
    size = (num_source + num_target + 2, block_size, shape.num_kv_heads, shape.head_size)
    keys, values = ([torch.zeros(size, dtype=shape.dtype) for _ in range(shape.num_layers)] for _ in range(2))
    for layer, (key, value) in enumerate(model.source_keys_values(RaggedBatch.of([source], [[]], model.device))):
        loaded.kernels.store_kv(key, value, keys[layer], values[layer], torch.arange(len(source)))
    places, first = list(range(len(target))), num_source + 2
    batch = Batch(
        target,
        places,
        [place + first * block_size for place in places],
        [0, len(target)],
        [len(target)],
        [list(range(first, first + num_target))],
        places,
        source_lens=[len(source)],
        source_tables=[list(range(num_source))],
    )
    hidden = model.forward(*batch.tensors()[:2], PagedContext(loaded.kernels, keys, values, batch))
    return model.logits(hidden)
