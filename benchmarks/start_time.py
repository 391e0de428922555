"""From process start to the first token, and peak memory, in fresh processes: what a user waits for and pays.

    python benchmarks/start_time.py FOLDER --repeats 5

Each run starts an interpreter, imports FastServe, loads the model and generates one token of a short prompt, the
folder's pages being in the page cache (one run before the counted ones sees to that). Prints one JSON line:
metrics.start_to_first_token_s, its parts, and peak_rss_mb (of the process; of which file pages).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from fastserve.bench.report import Report, emit

_CHILD = """
import json, resource, sys, time
options = json.loads(sys.argv[1])
marks = {"interpreter": time.time()}
from fastserve import LLM, SamplingParams
import torch, fastserve.engine.engine
marks["imports"] = time.time()
llm = LLM(**options)
marks["load"] = time.time()
llm.generate([list(range(1, 9))], SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
marks["first_token"] = time.time()
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
memory = {name: int(status[name].split()[0]) / 1e3 for name in ("VmHWM", "VmRSS", "RssFile")}
print(json.dumps({"marks": marks, "memory": memory}))
"""


def run_once(options: dict[str, object]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by phase, and megabytes."""
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(options)], check=True, capture_output=True, text=True, timeout=300
    )
    found = json.loads(done.stdout.splitlines()[-1])
    seconds, before = {}, started
    for name, moment in found["marks"].items():
        seconds[name], before = moment - before, moment
    return {**seconds, "start_to_first_token": before - started}, found["memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--options", default="{}", help="JSON of further options of LLM, such as kv_cache_memory")
    arguments = parser.parse_args()
    options = {"model": arguments.model, **json.loads(arguments.options)}
    run_once(options)
    runs = [run_once(options) for _ in range(arguments.repeats)]
    report = Report("start_time", config=options, repeats=arguments.repeats)
    for name in runs[0][0]:
        report.add_runs(f"{name}_s", [seconds[name] for seconds, _ in runs])
    for name, metric in (("VmHWM", "peak_rss_mb"), ("VmRSS", "rss_mb"), ("RssFile", "rss_file_mb")):
        report.add_runs(metric, [memory[name] for _, memory in runs])
    for name, value in report.metrics.items():
        print(f"{name:26s} {value:10.3f}", file=sys.stderr)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
