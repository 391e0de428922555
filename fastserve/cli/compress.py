"""`fastserve compress`: a model folder in, a smaller one out, with a report of what it lost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastserve.cli.options import Model
from fastserve.core.config import parse_bytes
from fastserve.core.errors import ConfigError

if TYPE_CHECKING:
    from fastserve.checkpoint.folder import ModelFolder

_STEP = ("method", "kind", "bits", "group_size", "symmetric", "activations", "budget", "head")
_TEXTS = ("calibration", "samples", "length", "evaluation")
_LIMITS = ("max_size", "max_loss")


def compress(
    context: typer.Context,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="The new folder.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with the steps; instead of the flags below.")] = None,
    method: Annotated[str, typer.Option(help="rtn, gptq, awq, kmeans or smoothquant.")] = "rtn",
    kind: Annotated[str, typer.Option(help="int, codebook or float (8 bits).")] = "int",
    bits: Annotated[int, typer.Option(help="2 to 8.")] = 4,
    group_size: Annotated[int | None, typer.Option(help="Weights per scale; 0: a row, -1: a tensor.")] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Without zero points.")] = True,
    activations: Annotated[str, typer.Option(help="none, dynamic or static 8-bit activations.")] = "none",
    budget: Annotated[
        float, typer.Option(help="Bits per weight on average, mixed by sensitivity; 0: all alike.")
    ] = 0.0,
    head: Annotated[str, typer.Option(help="int8: also the output projection.")] = "",
    calibration: Annotated[str, typer.Option(help='Text file, or "generated" by the model.')] = "",
    samples: Annotated[int, typer.Option(help="Windows of calibration.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    evaluation: Annotated[str, typer.Option(help="Text file on which the report compares both models.")] = "",
    auto: Annotated[bool, typer.Option("--auto", help="Try several ways and keep the best within one limit.")] = False,
    max_size: Annotated[str, typer.Option(help="With --auto: most bytes of weights, such as 300MB.")] = "",
    max_loss: Annotated[float, typer.Option(help="With --auto: most growth of perplexity; 0.01 is a hundredth.")] = 0.0,
    gguf: Annotated[
        str, typer.Option(help="Write MODEL as a GGUF file --out, with blocks of this type: f32 ... q8_0, q4_0.")
    ] = "",
    dense: Annotated[
        bool, typer.Option("--dense", help="Write MODEL with plain weights, for programs that do not read its form.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the report says as one JSON object.")] = False,
) -> None:
    """Make a model smaller and faster, and measure the loss.

    Writes a folder that serves like any other, with report.html and the same figures in its card. A run that was
    interrupted goes on when the same command is given again.
    """
    if out is None:
        raise ConfigError("name the new folder: --out DIR" + " (or FILE.gguf)" * bool(gguf))
    if gguf or dense:
        why = f"{'--gguf' if gguf else '--dense'} writes a model as it is (compress it into a folder first)"
        other = ("dense",) if gguf else ()
        _refuse(context, why, "auto", "recipe", *_STEP, *_TEXTS, *_LIMITS, *other)
        _export(model or "", out, gguf, as_json)
        return
    if auto:
        _refuse(context, "--auto chooses the steps itself", "recipe", *_STEP)
    else:
        _refuse(context, "limits go with --auto", *_LIMITS)
    if recipe is not None:
        _refuse(context, "the recipe says everything", *_STEP, *_TEXTS)
    from fastserve.compress.recipe import Calibration, Evaluation, make_recipe, read_recipe

    if auto:
        from fastserve.compress.search import search

        looked_at, judged = Calibration(calibration, samples, length), Evaluation(evaluation)
        size = parse_bytes(max_size) if max_size else 0
        _show(as_json, lambda progress: search(model or "", out, looked_at, judged, size, max_loss, progress))
        return
    if recipe is not None:
        chosen = read_recipe(recipe)
    else:
        step: dict[str, Any] = {"do": "quantize", "method": method, "kind": kind, "bits": bits, "symmetric": symmetric}
        step |= {"activations": activations, "budget": budget, "head": head}
        step |= {} if group_size is None else {"group_size": group_size}
        texts = {"calibration": {"text": calibration, "samples": samples, "length": length}}
        chosen = make_recipe({"steps": [step], **texts, "evaluation": {"text": evaluation}})
    from fastserve.compress.run import compress as run

    score = _scorer(chosen.evaluation.task, chosen.evaluation.examples) if chosen.evaluation.task else None
    _show(as_json, lambda progress: run(model or "", out, chosen, progress, score))


def _refuse(context: typer.Context, why: str, *names: str) -> None:
    """ConfigError for flags that were given and would do nothing."""
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise ConfigError(f"{why}; leave out {', '.join('--' + name.replace('_', '-') for name in given)}")


def _scorer(task: str, examples: str) -> Callable[[str], dict[str, float]]:
    """What scores a folder on examples of a task; ConfigError before work starts."""
    from fastserve.train.evaluate import score_examples
    from fastserve.train.finetune.settings import TASKS, FinetuneSettings

    known = [name for name in TASKS if name != "preference"]
    if task not in known:
        raise ConfigError(f"evaluation.task must be one of {', '.join(known)}")
    if not Path(examples).is_file():
        raise ConfigError(f"evaluation.examples = {examples!r} is no file")
    return lambda folder: score_examples(task, folder, Path(examples), FinetuneSettings())


def _export(model: str, out: Path, gguf: str, as_json: bool) -> None:
    """As a GGUF file of this type, or (no type) as a folder with plain weights."""
    from fastserve.checkpoint.folder import ModelFolder
    from fastserve.compress.dense import expand
    from fastserve.compress.gguf_export import export
    from fastserve.core.config import format_bytes

    folder = ModelFolder.open(model)
    with _progress() as progress:
        if gguf:
            key, size = "file", export(folder, out, gguf, progress).stat().st_size
        else:
            key, size = "folder", expand(folder, out, progress).weight_bytes
    print(json.dumps({key: str(out), "bytes": size}) if as_json else f"{out}  {format_bytes(size)}")


def _show(as_json: bool, work: Callable[[Callable[[str, int, int], None]], ModelFolder]) -> None:
    from fastserve.compress.report import as_text

    try:
        with _progress() as progress:
            folder = work(progress)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise
    card = json.loads((folder.path / "fastserve.json").read_text(encoding="utf-8"))["compressed"]
    print(json.dumps(card) if as_json else as_text(folder, card))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on a terminal, else a line per tenth, on stderr."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    last: dict[str, int] = {}

    def show(stage: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if last.get(stage) != tenth:
            last[stage] = tenth
            print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)

    return show
