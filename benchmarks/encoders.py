"""Embedding real question + passage lengths with a random BERT-base: ours against engines that pad, in one run.

    python benchmarks/encoders.py                    # float32, bfloat16, int8; 512 requests; two interleaved repeats
    python benchmarks/encoders.py --smoke            # a tiny share of the work, to see that it runs

Lengths are those of FairytaleQA (a question and the section that it is about, cut at 512 tokens) where the shared data
is there, else a stated log-normal distribution. Peers get batches of like lengths and the best of several batch sizes;
transformers_in_order gets them as they come, which is what padding costs without sorting. Both are slow: they are asked
once, for every fourth request, and so are we beside them. On two cores all of this takes about 20 minutes.
All answer with the mean vector of each text; vectors must agree with ours (cosine over 0.999, in bfloat16 0.99, in
int8 0.95). A single idle request is timed as well (P50). Ratios above 1 mean that ours is better. Peers: transformers
in this environment; onnxruntime in it too (an ONNX file of transformers' model, fused by onnxruntime's own optimiser;
it has no bfloat16 on processors); openvino where `benchmarks/peers.py install openvino` has put it.
int8 is 8-bit weights and activations everywhere: ours with scales per token, ONNX Runtime's by its quantize_dynamic,
OpenVINO's by its NNCF.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
from peer_process import PipedProcess
from shared_data import shared_folder

from fastserve.bench import random_model
from fastserve.bench.report import Report, emit, rounded
from fastserve.core.cache import cache_folder

WORKER = Path(__file__).resolve().parent / "peer_engines" / "run_encoder.py"
BATCH_SIZES = (4, 8, 32)
MAX_LENGTH = 512
OURS, VOCABULARY = "fastserve", 30522
# The precisions that a peer has in the form that this benchmark gives it.
PEERS = {
    "transformers": ("fp32", "bf16"),
    "transformers_in_order": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
SLOW = ("transformers", "transformers_in_order")
COSINES = {"fp32": 0.999, "bf16": 0.99, "int8": 0.95}  # what others' vectors must have with ours
Sequences = list[list[int]]


class Worker(PipedProcess):
    """One engine in a process of its own."""

    def __init__(self, name: str, model: Path, precision: str, threads: int) -> None:
        python = str(peers.interpreter("openvino")) if name == "openvino" else sys.executable
        self.batch_size = BATCH_SIZES[0]
        super().__init__(name, [python, str(WORKER), name, str(model), precision, str(threads)])

    def embed(self, sequences: Sequences) -> dict[str, Any]:
        """Seconds, computed tokens, and the first vectors."""
        return self._ask({"sequences": sequences, "batch_size": self.batch_size})

    def choose_batch_size(self, sequences: Sequences) -> None:
        """The quickest for a sample."""
        seconds = {}
        for size in BATCH_SIZES if self.name != OURS else BATCH_SIZES[:1]:
            self.batch_size = size
            self.embed(sequences[:size])
            seconds[size] = self.embed(sequences)["seconds"]
        self.batch_size = min(seconds, key=lambda size: seconds[size])


def read_lengths(count: int) -> tuple[list[int], str]:
    """Tokens of `count` requests, and where they are from; a word of English is 1.3 tokens of BERT's."""
    folder = shared_folder() / "data" / "tasks"
    stories, questions = folder / "fairytaleqa_train_stories.jsonl", folder / "fairytaleqa_train_questions.jsonl"
    if stories.is_file() and questions.is_file():
        sections = {item["story"]: item["sections"] for item in map(json.loads, stories.open())}
        asked = [item for item in map(json.loads, questions.open()) if item["story"] in sections]
        asked = asked[:: max(1, len(asked) // count)][:count]
        texts = [
            f"{item['question']} {' '.join(sections[item['story']][number - 1] for number in item['sections'])}"
            for item in asked
        ]
        return [min(MAX_LENGTH, 3 + int(1.3 * len(text.split()))) for text in texts], "FairytaleQA"
    generator = np.random.default_rng(0)
    drawn = np.clip(generator.lognormal(5.2, 0.5, count), 8, MAX_LENGTH).astype(int)
    return drawn.tolist(), "log-normal, median 181 tokens (no shared data)"


def export_onnx(folder: Path, target: Path) -> tuple[Path, Path]:
    """transformers' model as an ONNX file, and that fused for the CPU by onnxruntime's optimiser. Made once."""
    raw = target.with_suffix(".raw.onnx")
    if target.is_file() and raw.is_file():
        return raw, target
    import torch
    from onnxruntime.transformers import optimizer
    from transformers import AutoModel

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    axes = {0: "batch", 1: "length"}
    names = ["input_ids", "attention_mask"]
    target.parent.mkdir(parents=True, exist_ok=True)
    example = (torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    torch.onnx.export(
        Bare(),
        example,
        str(raw),
        input_names=names,
        output_names=["hidden"],
        dynamic_axes={**dict.fromkeys(names, axes), "hidden": axes},
        opset_version=17,
        dynamo=False,
    )
    optimised = optimizer.optimize_model(str(raw), model_type="bert", num_heads=12, hidden_size=768)
    optimised.save_model_to_file(str(target))
    print(f"onnxruntime's optimiser fused {optimised.get_fused_operator_statistics()}", file=sys.stderr)
    return raw, target


def quantize_onnx(fused: Path) -> Path:
    """The same file after onnxruntime's dynamic quantisation: weights by channel, activations as they come."""
    target = fused.with_suffix(".int8.onnx")
    if not target.is_file():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        options = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of what its own fused operations give
        quantize_dynamic(str(fused), str(target), per_channel=True, weight_type=QuantType.QInt8, extra_options=options)
    return target


def check_vectors(name: str, precision: str, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Raise RuntimeError unless both sides have computed the same."""
    for one, other in zip(np.array(ours), np.array(theirs), strict=True):
        cosine = float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        if cosine < COSINES[precision]:
            raise RuntimeError(f"{name} in {precision} gave another vector: cosine {cosine:.4f}")


def compare(
    report: Report, precision: str, workers: dict[str, Worker], sequences: Sequences, repeats: int, num_single: int
) -> None:
    """Texts per second, seconds of a single request and padding of each engine, into the report; they take turns.

    What is there of `OURS` already stays: then only the ratios are new, of these sequences.
    """
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    single: dict[str, list[float]] = {name: [] for name in workers}
    waste: dict[str, float] = {}
    total = sum(map(len, sequences))
    for worker in workers.values():
        worker.choose_batch_size(sequences[:: max(1, len(sequences) // 32)])
    for repeat in range(repeats):
        names = list(workers) if repeat % 2 == 0 else list(workers)[::-1]
        answers = {name: workers[name].embed(sequences) for name in names}
        for name, answer in answers.items():
            check_vectors(name, precision, answers[OURS]["vectors"], answer["vectors"])
            seconds[name].append(answer["seconds"])
            waste[name] = 1 - total / answer["computed"]
        for ids in sequences[repeat * num_single : (repeat + 1) * num_single]:
            for name in names:
                single[name].append(workers[name].embed([ids])["seconds"])
    ours = f"{OURS}.{precision}"
    for name, worker in workers.items():
        case = f"{name}.{precision}"
        if case == ours and f"texts_per_second.{ours}" in report.metrics:
            continue
        report.add_runs(f"texts_per_second.{case}", [len(sequences) / item for item in seconds[name]])
        report.metrics[f"single_p50_seconds.{case}"] = rounded(statistics.median(single[name]))
        report.metrics[f"padding_waste.{case}"] = rounded(waste[name])
        report.config[f"batch_size.{case}"] = worker.batch_size
    report.metrics["padding_waste"] = max(report.metrics.get("padding_waste", 0.0), rounded(waste[OURS]))
    for name in workers.keys() - {OURS}:
        for key, of in (("ratio", seconds), ("ratio_single_p50", single)):
            ratio = statistics.median(of[name]) / statistics.median(of[OURS])
            report.metrics[f"{key}.{name}.{precision}"] = rounded(ratio)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--smoke", action="store_true", help="12 requests, two repeats")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.requests, options.repeats = 12, 2
    threads = len(os.sched_getaffinity(0))  # of every engine; `taskset` chooses
    folder = random_model.make("bert-base")
    lengths, source = read_lengths(options.requests)
    generator = np.random.default_rng(1)
    sequences: Sequences = [generator.integers(1000, VOCABULARY, length).tolist() for length in lengths]
    report = Report("encoders", repeats=options.repeats)
    report.config = {"shape": "bert-base, random weights", "requests": len(lengths), "tokens": sum(lengths)}
    report.config |= {"lengths": source, "threads": threads, "requests_for_transformers": len(sequences[::4])}
    for precision in options.precisions.split(","):
        workers = {OURS: Worker(OURS, folder, precision, threads)}
        try:
            for name, precisions in PEERS.items():
                reason = reason_to_skip(name, precision, precisions)
                if reason:
                    report.skipped[f"{name}.{precision}"] = reason
                    continue
                onnx = cache_folder() / "onnx" / "bert-base.onnx"
                model = folder
                if not name.startswith("transformers"):
                    raw, fused = export_onnx(folder, onnx)
                    if precision == "int8":
                        fused = quantize_onnx(fused)
                    model = fused if name == "onnxruntime" else raw  # OpenVINO fuses and quantises for itself
                workers[name] = Worker(name, model, precision, threads)
            num_single = 2 if options.smoke else 20
            quick = {name: worker for name, worker in workers.items() if name not in SLOW}
            compare(report, precision, quick, sequences, options.repeats, num_single)
            slow = {name: worker for name, worker in workers.items() if name in (OURS, *SLOW)}
            if len(slow) > 1:
                compare(report, precision, slow, sequences[::4], 1, num_single)
        finally:
            for worker in workers.values():
                worker.close()
    emit(report.as_dict())


def reason_to_skip(name: str, precision: str, precisions: tuple[str, ...]) -> str:
    """Why a peer is not compared, or ""."""
    if precision not in precisions:
        return f"no {precision} form of it is made here"
    if name == "onnxruntime":
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            return "not installed: pip install 'fastserve[export]' onnx"
    if name == "openvino" and peers.interpreter("openvino") is None:
        return "not installed: python benchmarks/peers.py install openvino"
    return ""


if __name__ == "__main__":
    main()
