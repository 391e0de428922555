"""Hugging Face folder to GGUF with llama.cpp's own converter: SOURCES FOLDER OUT.

The converter knows tokenizers by a hash of what they encode, and cannot know the one that a made folder has. The
engines here are given token ids, so any byte-level splitting rule will do; Qwen2's is named.
"""

from __future__ import annotations

import importlib
import runpy
import sys


def main() -> None:
    sources, folder, out = sys.argv[1:4]
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    text_model = importlib.import_module("conversion.base").TextModel
    text_model.get_vocab_base_pre = lambda model, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", "bf16", "--outfile", out]
    runpy.run_path(f"{sources}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
