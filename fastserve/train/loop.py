"""The training loop that pretraining and every kind of fine-tuning share: one step after another, on any mesh.

A Task gives batches and losses; the loop owns weights, optimizers, checkpoints and the guard against divergence.
Batches follow from the step alone and dropout from (seed, step, rank), so a run that was stopped and resumed equals one
that was not, to the bit on one kind of CPU. After a NaN or a spike it goes back to the last checkpoint and leaves out
the rows since then.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastserve.core.errors import FastServeError
from fastserve.train.checkpoints import Checkpoints, Position
from fastserve.train.loss_scale import LossScale
from fastserve.train.mesh import Mesh, blocks_of
from fastserve.train.network import num_parameters
from fastserve.train.objectives import Batch, num_labels
from fastserve.train.optimizers import (
    MovingAverage,
    clip_gradients,
    make_optimizers,
    make_states,
    rate_share,
    set_rates,
)
from fastserve.train.settings import OptimizerSection, TrainSection
from fastserve.train.watch import Watch

if TYPE_CHECKING:
    import torch

    from fastserve.train.pipeline import Pipeline

_MEMORY = 0.95  # of the running mean of losses
_STEPS_BEFORE_GUARD = 20


class Task(Protocol):
    """What is learnt: batches by step, the loss of one, and what is measured now and then."""

    num_steps: int

    def micro_batches(self, step: int, rank: int, num_ranks: int) -> list[Batch]:
        """The passes of a step for one of the processes that share its batch; as many for each."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of losses over the batch's labels."""

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        """Named values for the log; called in evaluation mode, on every process."""

    def export(self, trainer: Trainer, position: Position, measured: dict[str, Any]) -> None:
        """Write a model folder; called on every process."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step was: mean loss per label, gradient norm before clipping."""

    loss: float
    gradient_norm: float


class Trainer:
    """One run of a task.

    `inputs` makes of a batch what the network is called with; a pipeline, whose stages have no whole loss, needs it.
    """

    def __init__(
        self,
        network: Any,
        task: Task,
        train: TrainSection,
        optimizer: OptimizerSection,
        *,
        mesh: Mesh,
        checkpoints: Checkpoints,
        watch: Watch,
        seed: int,
        report_every: int = 10,
        peak_flops: float = 0.0,
        inputs: Callable[[dict[str, torch.Tensor]], dict[str, Any]] | None = None,
    ) -> None:
        self.network, self.mesh, self.train = network, mesh, train
        self._task, self._section, self._seed = task, optimizer, seed
        self._checkpoints, self._watch, self._report_every, self._peak_flops = (
            checkpoints,
            watch,
            report_every,
            peak_flops,
        )
        self.num_parameters = num_parameters(network)
        if train.gradient_checkpointing:
            # The second is the first's name before transformers 5.20.
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._pipeline = self._make_pipeline(inputs) if mesh.num_stages > 1 else None
        self.model = self._pipeline.model if self._pipeline else mesh.distribute(network)
        self.named = {name: item for name, item in network.named_parameters() if item.requires_grad}
        self._optimizers = make_optimizers(network, optimizer)
        make_states(self._optimizers)
        self._average = MovingAverage(self.named, train.ema_decay) if train.ema_decay else None
        self._scale = LossScale(train.precision == "float16")
        self._loss = self._compiled_loss()
        self.position = Position()
        self._mean_loss, self._rollbacks = 0.0, 0

    def run(self) -> Position:
        """Train from the last checkpoint, if there is one, to the end; returns where it ended.

        Ctrl-C ends it after the step, on all processes, with a checkpoint; KeyboardInterrupt then follows.
        """
        try:
            if (path := self._checkpoints.latest()) is not None:
                self.position = self._checkpoints.load(path, self.tensors())
            else:
                self._save()
            with _held_interrupt() as interrupts:
                self._steps(interrupts)
        finally:
            self._watch.close()
        return self.position

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds, by name: weights, optimizer states, average."""
        names = {id(parameter): name for name, parameter in self.named.items()}
        found = {f"weights.{name}": parameter.detach() for name, parameter in self.named.items()}
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                found.update({f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()})
        if self._average:
            found.update({f"average.{name}": value for name, value in self._average.weights.items()})
        return found | self._scale.tensors()

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """All weights gathered on the CPU of the first process (empty on the others); all processes take part."""
        found = {}
        for name, parameter in self.network.named_parameters():
            whole = parameter.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            if self.mesh.is_first_of_stage:
                found[name] = whole.cpu()
        return self._pipeline.gather(found) if self._pipeline else found

    def on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        import torch

        return {name: torch.from_numpy(values).to(self.mesh.device) for name, values in batch.items()}

    def batch_loss(self, batch: Batch) -> float:
        """The sum of losses of a batch, without gradients."""
        import torch

        with torch.no_grad(), self._precision():
            if self._pipeline:
                return self._pipeline.loss(batch)
            return float(self._task.loss(self.model, self.on_device(batch)))

    def _steps(self, interrupts: list[int]) -> None:
        num_steps, mark, mark_tokens = self._task.num_steps, time.monotonic(), self.position.tokens
        if self.position.step >= num_steps:  # stopped between the last step and the end of its evaluation
            self._evaluate()
        while self.position.step < num_steps:
            step = self._step()
            if step is None:
                mark, mark_tokens = time.monotonic(), self.position.tokens
                continue
            done = self.position.step
            if done % self._report_every == 0 or done == num_steps:
                seconds = max(1e-9, time.monotonic() - mark)
                self._report(step, (self.position.tokens - mark_tokens) / seconds)
                mark, mark_tokens = time.monotonic(), self.position.tokens
            self._checkpoints.poll()
            is_stopped = self.mesh.any(bool(interrupts))
            if done % self.train.checkpoint_every == 0 or done == num_steps or is_stopped:
                self._save()
            if is_stopped:
                break
            if done % self.train.evaluate_every == 0 or done == num_steps:
                self._evaluate()
        self._checkpoints.finish()
        if self.mesh.any(bool(interrupts)):
            raise KeyboardInterrupt

    def _step(self) -> Step | None:
        """One step; None if it went wrong and the run went back."""
        step, mesh = self.position.step, self.mesh
        batches = self._task.micro_batches(step + self.position.skipped, mesh.data_rank, mesh.data_size)
        count = mesh.sum_over_data(sum(map(num_labels, batches)))
        loss, norm = self._gradients(batches, count)
        while math.isfinite(loss) and not math.isfinite(norm) and self._scale.shrink():
            loss, norm = self._gradients(batches, count)
        if self._has_diverged(loss, norm):
            self._roll_back(loss, norm)
            return None
        self._scale.grow()
        set_rates(self._optimizers, rate_share(step, self._task.num_steps, self._section))
        for optimizer in self._optimizers:
            optimizer.step()
        self._clear_gradients()
        if self._average:
            self._average.update(self.named, step)
        tokens = int(mesh.sum_over_data(sum(batch["input_ids"].size for batch in batches)))
        self.position = Position(step + 1, self.position.skipped, self.position.tokens + tokens)
        return Step(loss, norm)

    def _gradients(self, batches: list[Batch], count: float) -> tuple[float, float]:
        """Leave a step's clipped gradients in the weights; (mean loss over `count` labels, norm before clipping)."""
        import torch

        mesh, scale, pipeline = self.mesh, self._scale.value, self._pipeline
        torch.manual_seed((hash((self._seed, self.position.step, mesh.data_rank)) + mesh.stage) % 2**63)
        self._clear_gradients()
        self.model.train()
        # The exchange takes the mean over processes; the loss is the mean over all their labels.
        factor = scale * mesh.data_size / count
        total = pipeline.gradients(batches, factor) if pipeline else self._accumulate(batches, factor)
        mesh.finish_gradients()
        whole_norm = pipeline.whole_norm if pipeline else None
        norm = clip_gradients(list(self.named.values()), self._section.clip_norm or math.inf, scale, whole_norm)
        return mesh.sum_over_data(total) / count, norm

    def _accumulate(self, batches: list[Batch], factor: float) -> float:
        """Add the gradients of `factor` times the passes' losses to the weights; returns the sum of losses."""
        total = 0.0
        for index, batch in enumerate(batches):
            with self.mesh.accumulating(is_last=index == len(batches) - 1):
                with self._precision():
                    loss = self._loss(self.model, self.on_device(batch))
                (loss * factor).backward()
            total += float(loss.detach())
        return total

    def _clear_gradients(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _has_diverged(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        mean = self._mean_loss or loss
        is_guarding = self.train.spike_factor > 0 and self.position.step >= _STEPS_BEFORE_GUARD
        if is_guarding and loss > self.train.spike_factor * mean:
            return True
        self._mean_loss = _MEMORY * mean + (1 - _MEMORY) * loss
        return False

    def _roll_back(self, loss: float, norm: float) -> None:
        """Return to the last checkpoint and go on behind the rows that led here."""
        self._rollbacks += 1
        if self._rollbacks > self.train.max_rollbacks:
            raise FastServeError(
                f"the loss diverged {self._rollbacks} times (now {loss:.4g}, gradient norm {norm:.4g}, step "
                f"{self.position.step}); lower optimizer.learning_rate, lengthen warmup_steps, or look at the data"
            )
        self._checkpoints.finish()
        path = self._checkpoints.latest()
        assert path is not None, "a run begins with a checkpoint"
        reached, skipped = self.position.step, self.position.skipped
        found = self._checkpoints.load(path, self.tensors())
        self._clear_gradients()
        self.position = Position(found.step, skipped + reached - found.step + 1, found.tokens)
        self._mean_loss = 0.0
        self._watch.report(
            reached, {"rollback_to": found.step, "diverged_loss": repr(loss), "rollbacks": self._rollbacks}
        )

    def _save(self) -> None:
        self._checkpoints.save(self.tensors(), self.position)

    def _report(self, step: Step, speed: float) -> None:
        values = {
            "loss": round(step.loss, 7),
            "gradient_norm": round(step.gradient_norm, 5),
            "rate_share": round(rate_share(self.position.step - 1, self._task.num_steps, self._section), 5),
            "tokens": self.position.tokens,
            "tokens_per_second": round(speed, 1),
        }
        if self._peak_flops:
            values["mfu"] = round(6 * self.num_parameters * speed / self._peak_flops, 4)
        self._watch.report(self.position.step, values)

    def _evaluate(self) -> None:
        self._checkpoints.finish()  # an evaluation that fails, or is stopped, must not cost it
        self.model.eval()
        if self._average:
            self._average.swap(self.named)
        measured = self._task.evaluate(self)
        self._watch.report(self.position.step, {"tokens": self.position.tokens, **measured})
        self._task.export(self, self.position, measured)
        if self._average:
            self._average.swap(self.named)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        if self.train.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.mesh.device.type, getattr(torch, self.train.precision))

    def _make_pipeline(self, inputs: Callable[[dict[str, torch.Tensor]], dict[str, Any]] | None) -> Pipeline:
        from fastserve.train.pipeline import Pipeline

        assert inputs is not None, "a task that is learnt in stages says what the network is called with"
        return Pipeline(self.network, inputs, self.mesh, self._precision)

    def _compiled_loss(self) -> Any:
        """The task's loss; compiled as a whole, or block by block where processes exchange weights in between."""
        import torch

        if not self.train.compile:
            return self._task.loss
        if self.mesh.num_processes == 1:
            return torch.compile(self._task.loss, dynamic=False)
        for block in blocks_of(self.network):
            block.compile()
        return self._task.loss


@contextlib.contextmanager
def _held_interrupt() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list, so that a step is whole; a second one breaks in."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, _: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
