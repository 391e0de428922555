"""FastServe's CPU kernels against other engines on the same random Qwen3-0.6B, on this machine.

    python benchmarks/cpu_peers.py                                    # all that is installed, in every precision
    python benchmarks/cpu_peers.py --peer vllm --precision bf16       # a part; what was measured before is kept
    python benchmarks/cpu_peers.py --show                             # only the report of what is there

Three cases: decode (tokens per second of one request, 128 prompt + 128 output tokens), prefill (seconds to the first
token of 1,024), throughput (output tokens per second of 32 requests at once, prompts 64-512, outputs 32-128), and the
largest resident memory during the third. Our keys and values have as many bits as the peer's, and so have our head
and the activations of 4-bit weights where its stay in 16 (vLLM). Greedy, end tokens ignored, prefix reuse off, all
processors. Ours and the peer have a process each and take turns in every repeat, each repeat swapping who goes first;
the first run of a case is not counted; values are medians. The machine's limits are measured between the repeats. A
ratio above 1 means that ours is better; pairs are measured in different minutes, which is why each pair has figures
of ours beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from peer_process import OURS, EngineProcess

from fastserve.bench import random_model, workload
from fastserve.bench.report import Report, commit, describe_machine, emit, rounded

CASES = ("decode", "prefill", "throughput")
PRECISIONS = ("bf16", "int8", "int4")
RESULTS = Path(__file__).resolve().parent / "results" / "cpu_peers"
PAUSE = 0.3  # seconds between turns, in which an engine's threads stop spinning


def results_folder(arguments: argparse.Namespace) -> Path:
    """Where the pairs' files are: one folder per shape, so that nothing mixes."""
    return RESULTS / (arguments.shape + ("-small" if arguments.small else ""))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def our_model(shape: str, precision: str, int4: str = "int4-a8", head: str = "int8") -> Path:
    """The folder that FastServe serves in a precision; its 4-bit weights and its head are those of `peers.Peer`.

    Raises:
        subprocess.CalledProcessError: make_model.py cannot make it.
    """
    script = str(Path(__file__).resolve().parent / "make_model.py")
    weights = {"bf16": "", "int8": "int8-a8", "int4": int4}[precision]
    command = [sys.executable, script, shape, *(["--weights", weights, "--head", head] if weights else [])]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def questions(case: str, repeat: int, small: bool) -> list[workload.Prompt]:
    """The requests of a case; single prompts differ between repeats, so that nothing kept from the last one helps."""
    if case == "throughput":
        return workload.mixed_case(8 if small else 32)
    length, num_outputs = (128, 32 if small else 128) if case == "decode" else (1024, 1)
    return [workload.Prompt(workload.random_ids(length, seed=10_000 + repeat), num_outputs)]


class Limits:
    """The machine's limits, measured by our own kernels with as many threads."""

    def __init__(self) -> None:
        from fastserve.kernels.cpu import _native, create  # type: ignore[attr-defined]

        self._backend = create().native_backend
        self._meter = _native.ReadMeter(1 << 30, self._backend)
        self.isa = self._backend.isa

    def measure(self) -> dict[str, float]:
        find = self._backend.peak
        return {
            "read_gb_s": rounded(self._meter.measure() / 1e9),
            "bf16_tflop_s": rounded(find(1, 0.02) / 1e12),
            "int8_top_s": rounded(find(2, 0.02) / 1e12),
        }


def measure_case(
    engines: list[EngineProcess], case: str, repeats: int, small: bool, limits: Limits
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, float]]]:
    """Values of one case of every engine (and its memory, for many requests), and the limits around each repeat."""
    found: dict[str, dict[str, list[float]]] = {engine.name: {} for engine in engines}
    moments = [limits.measure()]
    for engine in engines:
        warm_up(engine, case, small)
        engine.forget_peak()
    for repeat in range(repeats):
        for engine in engines if repeat % 2 == 0 else engines[::-1]:
            time.sleep(PAUSE)
            value = engine.ask(case, questions(case, repeat, small))["value"]
            found[engine.name].setdefault(case, []).append(rounded(value))
        time.sleep(PAUSE)
        moments.append(limits.measure())
    if case == "throughput":
        for engine in engines:
            found[engine.name]["memory"] = [engine.peak_bytes()]
    say(f"{case}: " + ", ".join(f"{engine.name} {found[engine.name][case]}" for engine in engines))
    return found, moments


def warm_up(engine: EngineProcess, case: str, small: bool) -> None:
    """A run that is not counted; for many requests, all of them with short outputs."""
    prompts = questions(case, repeat=99, small=small)
    engine.ask(case, [workload.Prompt(item.token_ids, min(item.num_outputs, 8)) for item in prompts])


def agreement(engines: list[EngineProcess], length: int = 4) -> float:
    """Share of the first tokens of eight prompts that two engines agree on, up to the first difference: whether they
    run the same model. Rounding parts a random model's later tokens, and a coarser precision its first ones."""
    prompts = [workload.Prompt(item.token_ids, length) for item in workload.mixed_case(8)]
    answers = [[engine.ask("tokens", [item])["tokens"][0] for item in prompts] for engine in engines]
    same = 0
    for first, second in zip(*answers, strict=True):
        pairs = list(zip(first, second, strict=True))
        same += next((index for index, (a, b) in enumerate(pairs) if a != b), length)
    return rounded(same / (length * len(prompts)))


def run_pair(name: str, precision: str, cases: list[str], arguments: argparse.Namespace, limits: Limits) -> None:
    """Measure one peer in one precision beside ours; each case is merged into the pair's file as soon as it is done."""
    model = random_model.make(arguments.shape)
    say(f"== {name} {precision}")
    makers: list[tuple[str, Callable[[], Path]]] = [(name, functools.partial(peers.convert, name, precision, model))]
    if not arguments.without_ours:
        peer = peers.PEERS[name]
        makers.append((OURS, functools.partial(our_model, arguments.shape, precision, peer.our_int4, peer.our_head)))
    file = results_folder(arguments) / f"{name.replace('.', '_')}.{precision}.json"
    engines: list[EngineProcess] = []
    try:
        for engine, make in makers:
            engines.append(EngineProcess(engine, make(), precision, peers.PEERS[name]))
        for case in cases:
            found, moments = measure_case(engines, case, arguments.repeats, arguments.small, limits)
            about = {
                "measured": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
                "commit": commit(),
                "limits": moments,
                "engines": {engine.name: engine.about for engine in engines},
            }
            keep(file, case, found, about, {**describe_machine(), "isa": limits.isa})
        if len(engines) == 2 and "throughput" in cases:
            keep(file, "agreement", {}, {"share": agreement(engines)}, {})
    finally:
        for process in engines:
            process.close()


def keep(file: Path, case: str, found: dict[str, Any], about: dict[str, Any], machine: dict[str, Any]) -> None:
    """Merge one case into the pair's file; the others stay as they were measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pair: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for engine, values in found.items():
        pair.setdefault("values", {}).setdefault(engine, {}).update(values)
    pair.setdefault("cases", {})[case] = about
    pair["machine"] = machine or pair.get("machine", {})
    file.write_text(json.dumps(pair, indent=1) + "\n", encoding="utf-8")


def collect(folder: Path, skipped: dict[str, str]) -> Report:
    """The report of every pair that was measured."""
    report = Report("cpu_peers", skipped=dict(skipped))
    pairs: dict[str, Any] = {}
    for file in sorted(folder.glob("*.json")):
        pair = json.loads(file.read_text(encoding="utf-8"))
        pairs[file.stem] = pair["cases"]
        for case, about in pair["cases"].items():
            moments = about.get("limits", [])
            if moments:
                report.limits[f"{file.stem}.{case}"] = {
                    name: rounded(statistics.median(moment[name] for moment in moments)) for name in moments[0]
                }
        add_pair(report, file.stem, pair["values"])
    report.config = {"shape": folder.name, "precision": "see pairs.*.*.engines.*.precision", "pairs": pairs}
    return report


def add_pair(report: Report, label: str, values: dict[str, Any]) -> None:
    (name,) = [engine for engine in values if engine != OURS]
    ours = values.get(OURS, {})
    for case in (*CASES, "memory"):
        if case not in values[name]:
            continue
        report.add_runs(f"{label}.{case}", values[name][case])
        if case not in ours:
            report.skipped.setdefault(f"ours beside {label}", "not measured")
            continue
        report.add_runs(f"{label}.ours_{case}", ours[case])
        theirs, mine = report.metrics[f"{label}.{case}"], report.metrics[f"{label}.ours_{case}"]
        is_cost = case in ("prefill", "memory")
        report.metrics[f"ratio.{label}.{case}"] = rounded(theirs / mine if is_cost else mine / theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, peer in peers.PEERS.items() if peer.precisions]
    parser.add_argument("--peer", choices=names, action="append", help="may be repeated; all that are installed")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="may be repeated; all")
    parser.add_argument("--case", choices=CASES, action="append", help="may be repeated; all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="qwen3-0.6b", help="a decoder shape of make_model.py")
    parser.add_argument("--small", action="store_true", help="fewer tokens, to see that it runs")
    parser.add_argument("--without-ours", action="store_true", help="only the peers: no ratios")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    skipped: dict[str, str] = {}
    limits = None if arguments.show else Limits()
    for name in arguments.peer or names:
        if peers.interpreter(name) is None:
            skipped[name] = f"not installed: python benchmarks/peers.py install {name}"
            continue
        for precision in peers.PEERS[name].precisions:
            if limits is None or precision not in (arguments.precision or PRECISIONS):
                continue
            try:
                run_pair(name, precision, arguments.case or list(CASES), arguments, limits)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                skipped[f"{name}.{precision}"] = str(error)
                say(f"skipped {name} {precision}: {error}")
    emit(collect(results_folder(arguments), skipped).as_dict())


if __name__ == "__main__":
    main()
