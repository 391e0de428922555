"""Rules that hold for the whole repository: light imports, one version, no code that runs data, honest documents."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import fastserve
from fastserve.core.config import EngineConfig, ServeConfig
from tests.conftest import REPOSITORY

SOURCES = sorted((REPOSITORY / "fastserve").rglob("*.py"))
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
HELP = {
    "typer",
    "click",
    "shellingham",
    "annotated_doc",
    "rich",
    "pygments",
    "markdown_it",
    "mdurl",
    "typing_extensions",
}
HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "numpy", "tokenizers")

# Modules that turn data into code, and functions that run text.
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_ATTRIBUTES = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("numpy", "load"),
    ("np", "load"),
    ("os", "system"),
    ("os", "popen"),
}

# The options, as users know them. A change here is a change of the interface: say so in CHANGELOG.md.
ENGINE_OPTIONS = [
    "model",
    "dtype",
    "device",
    "kernels",
    "backend",
    "scheduler",
    "max_batch_sequences",
    "max_batch_tokens",
    "target_tpot_ms",
    "burst_ms",
    "max_model_len",
    "max_waiting",
    "kv_cache_memory",
    "kv_cache_max_memory",
    "quantization",
    "kv_cache_dtype",
    "kv_host_cache",
    "kv_disk_cache",
    "kv_disk_folder",
    "kv_replacement",
    "block_size",
    "prefix_caching",
    "speculation",
    "draft_model",
    "lora",
    "max_loras",
    "max_lora_rank",
    "num_threads",
    "seed",
    "trust_remote_code",
]
SERVER_OPTIONS = [
    "host",
    "port",
    "name",
    "more_models",
    "model_repository",
    "api_key",
    "api_key_file",
    "chat_template",
    "tool_call_format",
    "reasoning",
    "drain_timeout",
    "stall_timeout",
    "max_body_bytes",
    "max_request_tokens",
    "max_queued_tokens",
    "request_timeout",
    "response_store_bytes",
    "state_folder",
    "max_state_bytes",
    "metrics_compat",
]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    return result.stdout


@pytest.mark.parametrize("code", ["import fastserve", "import fastserve.cli.main", "import fastserve.core.config"])
def test_importing_is_light(code: str) -> None:
    loaded = json.loads(run_python(f"import json, sys; {code}; print(json.dumps(sorted(sys.modules)))"))
    assert "fastserve" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_names_of_the_package_are_lazy_and_exist() -> None:
    loaded = run_python(
        "import sys, fastserve; fastserve.SamplingParams; assert 'torch' not in sys.modules; "
        "print(all(hasattr(fastserve, name) for name in fastserve.__all__), 'torch' in sys.modules)"
    )
    assert loaded.split() == ["True", "True"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastserve.nothing


def test_help_imports_only_what_prints_it() -> None:
    """What is not imported takes no time."""
    told = "atexit.register(lambda: print('loaded', *{name.split('.')[0] for name in sys.modules}))"
    run = "sys.argv[1:] = ['--help']; runpy.run_module('fastserve.cli.main', run_name='__main__')"
    *_, last = run_python(f"import atexit, runpy, sys; {told}; {run}").splitlines()
    assert last.startswith("loaded ")
    loaded = {name for name in last.split()[1:] if name not in sys.stdlib_module_names and name[0] != "_"}
    assert {"fastserve", "typer"} <= loaded <= {"fastserve", *HELP}


def test_the_version_has_one_source() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "fastserve/__init__.py"
    assert f"## [{fastserve.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_pins_satisfy_the_requirements() -> None:
    """Every direct dependency is pinned, to a version that pyproject allows."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != "fastserve":
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None and pin in requirement.specifier, f"{requirement} is pinned to {pin}"


def banned_uses(source: str) -> Iterator[str]:
    """What a file must not do, as "line: what"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            names = [module]
            if any((module, alias.name) in BANNED_ATTRIBUTES for alias in node.names):
                yield f"{node.lineno}: from {module} import load or the like"
        elif isinstance(node, ast.Call):
            names = []
            if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
                yield f"{node.lineno}: {node.func.id}()"
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                name = (node.func.value.id, node.func.attr)
                if name in BANNED_ATTRIBUTES:
                    yield f"{node.lineno}: {'.'.join(name)}()"
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"{node.lineno}: shell=True"
        else:
            continue
        for name in names:
            if name in BANNED_MODULES:
                yield f"{node.lineno}: import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_code_runs_data(path: Path) -> None:
    assert list(banned_uses(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import os, shelve",
        "from torch import load",
        "torch.load(file)",
        "yaml.load(text)",
        "np.load(file, allow_pickle=True)",
        "eval('1')",
        "def f():\n    exec(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
    ],
)
def test_the_ban_finds(source: str) -> None:
    assert len(list(banned_uses(source))) == 1


def test_model_eval_is_no_eval() -> None:
    assert list(banned_uses("model.eval(); json.load(file); re.compile(x); subprocess.run(c, shell=False)")) == []


def test_options_are_the_published_ones() -> None:
    engine = [item.name for item in fields(EngineConfig)]
    server = [item.name for item in fields(ServeConfig)]
    assert engine == ENGINE_OPTIONS
    assert server == ENGINE_OPTIONS + SERVER_OPTIONS


# What documents name in `code`: paths of this repository, and path:symbol.
PATH = re.compile(
    r"^(?:\./)?("
    r"(?:fastserve|tests|benchmarks|docs|configs|examples|csrc|console|\.ci)/[\w./-]*"
    r"|[A-Z][\w.]*\.(?:md|toml)|Makefile|LICENSE|pyproject\.toml|constraints\.txt"
    r")(?::([\w.]+))?$"
)
# Short form inside the package: `engine/engine.py:Engine.step`.
SHORT = re.compile(r"^([a-z_]+/[\w/]+\.py)(?::([\w.]+))?$")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def named_paths(text: str) -> Iterator[tuple[str, str]]:
    """(path from the root, symbol or "") of everything a document names in backquotes."""
    for code in re.findall(r"`([^`\n]+)`", text):
        if match := PATH.match(code):
            yield match[1], match[2] or ""
        elif match := SHORT.match(code):
            yield f"fastserve/{match[1]}", match[2] or ""


def symbols(path: Path) -> set[str]:
    """Names a Python file defines: functions, classes, Class.method, and module variables."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found.add(node.name)
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(f"{node.name}.{item.name}")
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_documents_name_only_what_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = []
    for path, symbol in named_paths(text):
        file = REPOSITORY / path
        if not file.exists():
            missing.append(path)
        elif symbol and symbol not in symbols(file):
            missing.append(f"{path}:{symbol}")
    for link in LINK.findall(text):
        if not (document.parent / link).exists():
            missing.append(f"link {link}")
    assert missing == []


def test_the_documents_check_finds() -> None:
    text = "see `fastserve/core/errors.py:FastServeError`, `core/config.py:EngineConfig.load` and `docs/none.md`"
    assert list(named_paths(text)) == [
        ("fastserve/core/errors.py", "FastServeError"),
        ("fastserve/core/config.py", "EngineConfig.load"),
        ("docs/none.md", ""),
    ]
    assert "EngineConfig.load" in symbols(REPOSITORY / "fastserve/core/config.py")
    assert "EngineConfig.nothing" not in symbols(REPOSITORY / "fastserve/core/config.py")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_serving_path_is_under_its_limits() -> None:
    """7,500 is for lines that are not empty, comments and docstrings among them; both counts are printed."""
    made = subprocess.run(["make", "--no-print-directory", "size"], capture_output=True, text=True, cwd=REPOSITORY)
    assert made.returncode == 0, made.stdout + made.stderr
    counts = re.findall(r"^(?:serving path|the same|encoders) .*: (\d+) of (\d+) lines", made.stdout, re.MULTILINE)
    (filled, limit), (path, _), (others, _) = ((int(count), int(most)) for count, most in counts)
    assert limit == 7500 and filled < limit and filled < path
    rooms = [REPOSITORY / "fastserve" / room for room in ("scheduler", "engine", "models", "kernels")]
    lines = [line for room in rooms for file in room.rglob("*.py") for line in file.read_text().splitlines()]
    assert path + others == len(lines)
    assert filled <= sum(bool(line.strip()) for line in lines) < len(lines)


def test_every_option_is_documented() -> None:
    text = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    missing = [item.name for item in fields(ServeConfig) if f"`{item.name}`" not in text]
    assert missing == []


def test_every_metric_is_documented() -> None:
    from fastserve.core import metrics

    text = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    names = [metric.name for metric in metrics.CATALOGUE]
    assert names and [name for name in names if f"`{metrics.PREFIX}{name}" not in text] == []
