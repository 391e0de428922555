"""Compress a folder with llm-compressor: METHOD IDS FOLDER OUT.

METHOD is rtn, gptq or awq, all with 4-bit weights in groups of 128. IDS is a JSON file with the windows of token ids to
calibrate on. Runs in the environment of the peer "llm-compressor".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS: dict[str, Any] = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "awq": AWQModifier}


def main() -> None:
    method, ids, folder, out = sys.argv[1:5]
    # It pins memory for an accelerator although there is none, and stops.
    if not torch.cuda.is_available() and hasattr(IntermediatesCache, "_pin_intermediate"):
        IntermediatesCache._pin_intermediate = lambda *args, **options: None
    windows = json.loads(Path(ids).read_text(encoding="utf-8"))
    masks = [[1] * len(window) for window in windows]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": masks}),
        recipe=MODIFIERS[method](targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        output_dir=out,
    )


if __name__ == "__main__":
    main()
