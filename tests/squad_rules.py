"""SQuAD's rules written plainly over transformers' model and tokenizer: what our answers are held to.

As the evaluation scripts of BERT do it: windows of the context, start and end logits added, "no answer" by the first
token, a softmax over the twenty best. Nothing of ours is used but the file formats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUM_BEST = 20


class Reference:
    """transformers' model and tokenizer of a folder; `num_windows` of the last question."""

    def __init__(self, folder: Path, head: str) -> None:
        import transformers

        self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        model_class = getattr(transformers, f"AutoModel{head}")
        self._model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
        self.num_windows = 0
        self.difference = 0.0  # by which "no answer" was better than the best span

    @torch.inference_mode()
    def logits(self, sequences: list[list[int]]) -> list[Tensor]:
        """Logits of sequences without types."""
        return [self._model(input_ids=torch.tensor([ids])).logits[0] for ids in sequences]

    @torch.inference_mode()
    def answers(
        self, question: str, context: str, longest: int, window: int, stride: int, may_be_impossible: bool
    ) -> list[dict[str, Any]]:
        """Every answer of the n-best list, best first."""
        tokens = self._tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=window,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            padding=True,
            return_tensors="pt",
        )
        self.num_windows = len(tokens["input_ids"])
        has_types = getattr(self._model.config, "type_vocab_size", 0) > 1
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        output = self._model(**inputs, **({"token_type_ids": tokens["token_type_ids"]} if has_types else {}))
        starts, ends = output.start_logits.tolist(), output.end_logits.tolist()
        spans: dict[tuple[int, int], float] = {}
        nothing = min(row[0] + other[0] for row, other in zip(starts, ends, strict=True))
        for number in range(self.num_windows):
            sequence = tokens.sequence_ids(number)
            offsets = tokens["offset_mapping"][number].tolist()
            for first in range(len(sequence)):
                if sequence[first] != 1:
                    continue
                for last in range(first, min(first + longest, len(sequence))):
                    if sequence[last] != 1:
                        break
                    place = (offsets[first][0], offsets[last][1])
                    score = starts[number][first] + ends[number][last]
                    if place not in spans or score > spans[place]:
                        spans[place] = score
        best = sorted(spans.items(), key=lambda item: -item[1])[:NUM_BEST]
        self.difference = nothing - best[0][1]
        ranked = list(best)
        if may_be_impossible:
            ranked.append(((0, 0), nothing))
            ranked.sort(key=lambda item: -item[1])
        shares = torch.softmax(torch.tensor([score for _, score in ranked]), 0).tolist()
        return [
            {"score": share, "start": start, "end": end, "answer": context[start:end]}
            for ((start, end), _), share in zip(ranked, shares, strict=True)
        ]
