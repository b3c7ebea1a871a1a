"""The loop around the step: rates, measurements, checkpoints, and when to stop."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from paceline.checkpoint import Checkpoint, Saved, SavedWeights, load, steps
from paceline.comm.ranks import Coordinates
from paceline.data.client_loader import ClientLoader
from paceline.errors import NonFiniteError, TrainError
from paceline.evaluate.held_out import Evaluation
from paceline.sync.base import Serving
from paceline.track import Trackers
from paceline.train import state
from paceline.train.assemble import Parts
from paceline.train.average import over_replicas
from paceline.train.clients import privacy_words
from paceline.train.early_stop import EarlyStop
from paceline.train.hooks import Hook, StepEvent
from paceline.train.memory import used_bytes
from paceline.train.policy import After, StopRequest, after
from paceline.train.remote import RemoteClients
from paceline.train.replica import holding
from paceline.train.resume import check_room, check_same_everywhere, check_same_run, find, identity
from paceline.train.spikes import Spikes
from paceline.train.work import Position, work_of


class Loop:
    """Runs the steps of one rank; ``steps()`` yields each when it is done.

    The position is two numbers, the step and the sequences consumed: everything else that a step needs is a function of
    them, of the seed and of the weights.
    """

    def __init__(self, parts: Parts, *, hooks: tuple[Hook, ...] = (), stop_request: StopRequest | None = None) -> None:
        self.parts = parts
        self.step = 0
        self.sequences_seen = 0
        self.tokens_seen = 0
        self.stop_request = stop_request or StopRequest()
        self.evaluation: Evaluation | None = None
        """The newest."""
        self.trackers: Trackers | None = None
        """Who is told; the leader's only."""
        self._hooks = hooks
        self._spikes = Spikes(parts.config.spikes)
        self._early_stop = EarlyStop(parts.config.early_stop)
        self._has_ended = False
        self._work = work_of(parts)
        parts.sync.start(parts.built.replica)
        self._resume()
        check_same_everywhere(self.parts, self.step)
        if parts.checkpointer:
            check_room(parts, self._checkpoints)

    @property
    def coordinates(self) -> Coordinates:
        """Who this rank is."""
        return self.parts.world.coordinates

    def steps(self) -> Iterator[StepEvent]:
        """Train up to ``train.steps``, or until some rank is asked to stop; saves at the end.

        Where the loss leaps the run goes back, so steps may come more than once. With early stopping the weights are in
        the end those of the best held-out loss, and ``step`` is theirs.
        """
        config = self.parts.config
        while not self.is_done:
            before = self.step
            try:
                event, stop = self._one_step()
            except NonFiniteError as error:
                if not self._spikes.is_on:
                    raise
                bad = self.parts.batches.at(self.step + 1).sequences
                self._go_back(self.step - self._spikes.in_a_row, str(error), self.sequences_seen + bad)
                continue
            for hook in self._hooks:
                hook(event)
            # Nothing is due at a step that other replicas are not done with.
            todo = (
                after(config, self.step, stop) if self.step > before else After(evaluate=False, save=False, stop=False)
            )
            if self.parts.checkpointer:
                self._tell_saved(self.parts.checkpointer.poll())
            if self.trackers:
                self.trackers.step(event.values())
            if event.skipped:
                self._tell_skipped(event)
            if not event.skipped and self._spikes.observe(event.loss):
                yield event
                self._go_back(self.step - self._spikes.in_a_row, self._spikes.words(event.loss, self.step))
                if stop:
                    break
                continue
            is_best = todo.evaluate and self._evaluated()
            if todo.save or is_best or self._early_stop.is_over:
                self.save()
            if stop and self.trackers:
                self.trackers.event("stop", f"asked to stop after step {self.step}: saved", step=self.step)
            yield event
            if todo.stop:
                break
        if self.is_done:
            self._take_the_best()
            self._has_ended = True
        sync = self.parts.sync
        if self.trackers and isinstance(sync, Serving) and (words := sync.words()):
            self.trackers.event("sync", words, step=self.step)

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its end: that of ``train.steps``, or by early stopping."""
        return self._has_ended or self._early_stop.is_over or self.step >= self.parts.config.train.steps

    def _evaluated(self) -> bool:
        """Measure the held-out part as the config says; whether it is the best so far."""
        loss, every = self.evaluate().loss, self.parts.config.evaluate.every
        self.parts.rate.evaluated(self.step, loss)
        counts = self.step == self.parts.config.train.steps or (every > 0 and self.step % every == 0)
        is_best = counts and self._early_stop.observe(self.step, loss)
        if is_best and self.parts.checkpointer:
            self.parts.checkpointer.pinned = self.step
        return is_best

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is on disk; ``CheckpointError`` if it could not be written."""
        if self.parts.checkpointer:
            self._tell_saved(self.parts.checkpointer.wait())

    def _tell_saved(self, saves: list[Saved]) -> None:
        for saved in saves if self.trackers else ():
            text = f"{saved.path} ({saved.rank_bytes / 2**20:.1f} MiB in {saved.write_s:.2f} s)"
            self.trackers.event("checkpoint", text, step=saved.step)  # type: ignore[union-attr]

    def _tell_skipped(self, event: StepEvent) -> None:
        if self.trackers:
            what, now = (
                "a gradient" if math.isfinite(event.loss) else "the loss",
                self.parts.built.replica.loss_scale.value,
            )
            text = f"{what} overflowed at loss scale {event.loss_scale:g}: step skipped, the scale is {now:g} now"
            self.trackers.event("skip", text, step=event.step)

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The model's state as transformers names it, whole; of ranks that share it, from the last save.

        Of the parameters the average, where that is to be exported; of replicas that differ, the mean over them. Raises
        ``TrainError`` after a step in which replicas do not agree.
        """
        parts = self.parts
        if not parts.sync.is_agreed(self.step):
            raise TrainError(
                f"after step {self.step} replicas hold different weights. Take them after the last step of the run, or "
                "after a multiple of the steps between their exchanges"
            )
        averages = parts.built.replica.averages()
        if self.coordinates.ranks > 1 or (parts.variant.count > 1 and (averages or parts.average.is_exported)):
            return SavedWeights(load(self._checkpoints, self.step), averaged=parts.average.is_exported)
        learned = {name: p.detach() for name, p in parts.built.replica.local.items()} | averages
        learned |= parts.average.tensors if parts.average.is_exported else {}
        return {name: learned.get(name, value) for name, value in parts.built.model.state_dict().items()}

    def evaluate(self) -> Evaluation:
        """Measure the held-out part, and continue the prompts, by weights that stand for all replicas; on all ranks."""
        evaluation = self._measure()
        if self.trackers:
            self.trackers.evaluation(evaluation.values())
        return evaluation

    def _measure(self) -> Evaluation:
        with holding(self.parts.built.replica, self._measured()):
            measured = self.parts.evaluator.measure(self.step, self._total)
        self.evaluation = replace(measured, averaged=self.parts.average.is_measured)
        return self.evaluation

    def _measured(self) -> Mapping[str, torch.Tensor]:
        """What is evaluated in place of the parameters of now, by name; none for what stays. All ranks call it."""
        parts, replica = self.parts, self.parts.built.replica
        if averages := parts.average.measured or replica.averages():
            return averages if parts.variant.count == 1 else over_replicas(parts.world.link, averages)
        return {} if parts.sync.is_agreed(self.step) else parts.sync.agreed(replica)

    def save(self) -> None:
        """Write a checkpoint of this step in the background; of replicas that hold the same, one writes."""
        parts = self.parts
        if parts.checkpointer is None:
            return
        self._tell_saved(parts.checkpointer.wait())
        replica = parts.built.replica
        if isinstance(parts.sync, Serving):
            parts.sync.gather(replica)
        average = parts.average.tensors
        tensors = state.tensors(parts.built.model, replica, parts.sync, parts.variant, average=average)
        parts.checkpointer.save(self.step, state.owned(tensors, replica), self._values())
        if self.trackers and isinstance(parts.loader, ClientLoader | RemoteClients):
            words = privacy_words(parts.config, parts.loader.clients, self.step)
            if words is not None:
                self.trackers.event("privacy", words, step=self.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what runs in the background; an error of its own does not hide one on its way."""
        with ExitStack() as stack:
            if self.trackers:
                stack.callback(self.trackers.close)
            if self.parts.checkpointer:
                stack.push(self.parts.checkpointer)
            stack.callback(self.parts.loader.close)
            if error is not None:
                if self.trackers:
                    with suppress(TrainError):  # the files may be what failed
                        self.trackers.event("error", str(error) or type(error).__name__, step=self.step)
                raise error

    def _one_step(self) -> tuple[StepEvent, bool]:
        parts, built, rate = self.parts, self.parts.built, self.parts.rate
        start, done = time.perf_counter(), self._position
        step, seen = self._work.next(done)
        factor = rate.factor(step, seen)
        built.replica.set_rate_factor(factor)
        loss_scale = built.replica.loss_scale
        scaled_by = loss_scale.value if loss_scale.is_dynamic else None
        learned = self._work.learn(done, rate=factor, stop=self.stop_request.asked)
        result = learned.result
        ends_cycle = rate.ends_cycle(step, seen)
        parts.average.stepped(step, ends_cycle=ends_cycle)
        if parts.perturb.stepped(step, built.replica, ends_cycle=ends_cycle):
            self._spikes.forget()
            if self.trackers:
                self.trackers.event("perturb", f"weights shrunk and perturbed after step {step}", step=step)
        step_s = time.perf_counter() - start
        length = parts.batches.full.sequence_tokens
        tokens = learned.sequences * length
        tokens_per_s = tokens / step_s * learned.pace
        event = StepEvent(
            step=learned.at.step,
            loss=result.loss,
            lr=parts.optimizer_config.lr * factor,
            gradient_norm=result.gradient_norm,
            tokens=tokens,
            tokens_seen=self.tokens_seen + (learned.at.sequences - done.sequences) * length,
            sequences_seen=learned.at.sequences,
            tokens_per_s=tokens_per_s,
            mfu=tokens_per_s * parts.flops_per_token / parts.peak_flops_per_s,
            step_s=step_s,
            data_wait_s=parts.loader.wait_s,
            memory_bytes=used_bytes(parts.world.device.torch_device),
            time=time.time(),
            skipped=result.skipped,
            skipped_steps=loss_scale.skipped_steps,
            loss_scale=scaled_by,
        )
        self.step, self.sequences_seen = learned.reached
        self.tokens_seen += (learned.reached.sequences - done.sequences) * length
        return event, result.stop

    @property
    def _position(self) -> Position:
        return Position(self.step, self.sequences_seen)

    def _values(self) -> dict[str, Any]:
        """The scalars of a checkpoint. Random numbers have no state of their own: they follow from seed and step."""
        return {
            "step": self.step,
            "sequences_seen": self.sequences_seen,
            "tokens_seen": self.tokens_seen,
            "rate": self.parts.rate.state(),
            "average": self.parts.average.values(),
            **({"spikes": self._spikes.state()} if self._spikes.is_on else {}),
            "early_stop": self._early_stop.state(),
            **identity(self.parts),
            "config": self.parts.config.tree(),
        }

    def _resume(self) -> None:
        checkpoint = find(self._checkpoints, self.parts.config.checkpoint.resume)
        if checkpoint is None:
            return
        with checkpoint:
            checkpoint.verify()
            check_same_run(checkpoint, self.parts)
            self._restore(checkpoint)
        self._go_on_from_here()

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Be where the run was when it saved this."""
        parts, built = self.parts, self.parts.built
        values: Any = checkpoint.values
        state.restore(
            built.model,
            built.replica,
            parts.sync,
            parts.variant,
            checkpoint,
            self._layout,
            average=parts.average.restored(values.get("average")),
        )
        if isinstance(parts.sync, Serving):
            parts.sync.restored()
        parts.rate.restore(values.get("rate"))
        self._spikes.restore(values.get("spikes"))
        self._early_stop.restore(values.get("early_stop"))
        self.step = values["step"]
        self.sequences_seen = values["sequences_seen"]
        self.tokens_seen = values["tokens_seen"]

    def _go_on_from_here(self) -> None:
        """Leave the checkpoints that come after this step."""
        if checkpointer := self.parts.checkpointer:
            checkpointer.pinned = self._early_stop.best
            if self.coordinates.is_leader:  # the folder is one; others wait for it in the next step
                checkpointer.set_aside_after(self.step)

    def _go_back(self, before: int, why: str, seen: int | None = None) -> None:
        """Go on from the newest checkpoint of step ``before`` at most, without the sequences ``seen`` since.

        ``TrainError`` if there is none, or the run has been there too often.
        """
        config = self.parts.config
        assert config.spikes is not None
        self._all_saved()
        known = [step for step in steps(self._checkpoints) if step <= before]
        if not known:
            raise TrainError(
                f"{why}, and there is no checkpoint before it to go back to. Use a smaller checkpoint.every than "
                f"{config.checkpoint.every}, a lower optimizer.lr or a longer warm-up"
            )
        skipped = self.parts.batches.sequences(self.step + 1, self.step + config.spikes.skip)
        seen = (self.sequences_seen if seen is None else seen) + skipped
        at = self.step
        with load(self._checkpoints, known[-1]) as checkpoint:
            first: Any = checkpoint.values["sequences_seen"]
            self._spikes.goes_back(known[-1], first, seen)
            self._restore(checkpoint)
        self.sequences_seen = seen
        check_same_everywhere(self.parts, self.step)
        self._go_on_from_here()
        if self.trackers:
            text = f"{why}: back to step {self.step}, and sequences {first:,} to {seen - 1:,} are left out"
            self.trackers.event("rollback", text, step=at, to=self.step)

    def _take_the_best(self) -> None:
        """At the end of a run that may end early: the weights of the best held-out loss."""
        best, at = self._early_stop.best, self.step
        if best is None or best == at:
            return
        self._all_saved()
        why = f"{self._early_stop.words(at)}; " if self._early_stop.is_over else ""
        with load(self._checkpoints, best) as checkpoint:
            self._restore(checkpoint)
        self._measure()
        if self.trackers:
            self.trackers.event("stop", f"{why}the weights are those of step {best}", step=at)

    def _all_saved(self) -> None:
        """No rank looks at the checkpoints before all have written."""
        self.finish_saving()
        self._total((0.0,))

    def _total(self, values: tuple[float, ...]) -> list[float]:
        """Over all ranks of all replicas; where one may be gone each measures everything by itself."""
        own, _ = self.parts.built.replica.total(values)
        if self.parts.config.is_elastic:
            return own
        total = torch.tensor(own, dtype=torch.float64, device=self.parts.world.device.torch_device)
        self.parts.world.link.all_reduce(total).wait()
        return total.tolist()

    @property
    def _checkpoints(self) -> Path:
        return Path(self.parts.config.train.output) / "checkpoints"

    @property
    def _layout(self) -> dict[str, int]:
        return {"replicas": self.coordinates.replicas}
