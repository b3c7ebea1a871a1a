"""What each rank of a case does: train a few steps with the product's own parts, and write down what it holds."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from paceline.comm.device import claim
from paceline.comm.ranks import Coordinates
from paceline.comm.replica import Finish, Replica, Vote
from paceline.comm.world import enter
from paceline.config import Config
from paceline.errors import PlanError
from paceline.optim.sgd import SGD
from paceline.train.build import Built, build
from paceline.train.memory import used_bytes
from paceline.train.state import part_of
from paceline.train.step import train_step
from paceline.verify.cases import Case
from paceline.verify.double import in_double
from paceline.verify.subject import SEQUENCE_TOKENS, SEQUENCES, Subject
from paceline.workers.pool import Member

RATE = 0.1
CLIP_NORM = 1.0
UPDATES = 3
"""Of which gradients (the first) and parameters (the first and the last) are compared."""


def probe(member: Member, config: Config, case: Case, subject: Subject, dtype: str, steps: int, folder: str) -> Any:
    """Run one rank of a case; its boxes go to ``folder``. Returns scalars, or why the case was refused."""
    coordinates = Coordinates.of(
        member.index, replicas=case.replicas, ranks=case.grid.ranks, local_rank=member.index, local_ranks=member.size
    )
    device = claim(coordinates)
    store = member.store if member.size > 1 else None
    exact = in_double() if dtype == "float64" else nullcontext()
    with enter(coordinates, device, store, case.grid, timeout_s=60.0, loopback=True) as world, exact:
        objective = subject.goal().objective
        try:
            built = build(
                subject.model(getattr(torch, dtype)),
                subject.goal(),
                layout=case.layout,
                mesh=world.mesh,
                optimizer=SGD(lr=RATE),
                clip_norm=CLIP_NORM,
                dtype=getattr(torch, dtype),
                device=device.torch_device,
                seed=subject.seed,
            )
        except PlanError as error:
            return {"refused": str(error)}
        sync: Any = config.sync.build(world.link)  # type: ignore[attr-defined]
        seen = _Seen(built)
        sync.start(built.replica)
        losses, norms = [], []
        start_s = time.perf_counter()
        for step in range(1, steps + 1):
            built.replica.set_rate_factor(1.0)
            rows = case.share(subject.rows(step), world.data_rank, world.data_ranks)
            batches = [built.split(objective.batch(micro, seed=subject.seed, step=step)) for micro in rows]
            seen.gradients = step == 1
            result = train_step(built.replica, _Watching(sync, seen), built.schedule, batches, step=step, stop=False)  # type: ignore[arg-type]
            losses.append(result.loss)
            norms.append(result.gradient_norm)
            if step in {1, UPDATES}:
                seen.parameters(step)
        seconds = time.perf_counter() - start_s
        seen.write(Path(folder) / f"rank-{member.index:04d}.safetensors")
        return {
            "losses": losses,
            "norms": norms,
            "sent_bytes": (sum(world.mesh.tally.bytes.values()) + world.link.sent_bytes) / steps,
            "memory_bytes": used_bytes(device.torch_device),
            "tokens_per_s": steps * SEQUENCES * SEQUENCE_TOKENS / seconds,
            "replica": coordinates.replica,
        }


class _Seen:
    """Boxes of full tensors that this rank held at some point."""

    def __init__(self, built: Built) -> None:
        self.gradients = False
        self._replica = built.replica
        self._boxes: dict[str, Tensor] = {}
        self._places: dict[str, Any] = {}

    def at_finish(self) -> None:
        """Keep the gradients as they are before clipping; one that is missing is kept as such."""
        if self.gradients:
            for shard in self._replica.shards:
                if shard.gradient is not None:
                    self._keep("gradient", shard.name, shard.parameter.grad)

    def parameters(self, step: int) -> None:
        """Keep the parameters after a step."""
        for shard in self._replica.shards:
            self._keep(f"parameter after {step}", shard.name, shard.parameter.detach())

    def write(self, path: Path) -> None:
        """All that was kept, with the place of each box."""
        save_file(self._boxes, path, metadata={"places": json.dumps(self._places)})

    def _keep(self, what: str, name: str, tensor: Tensor | None) -> None:
        assert tensor is not None
        state = part_of(tensor, name, self._replica)
        for i, block in enumerate(state.blocks):
            key = f"{what}/{name}/{i}"
            self._boxes[key] = block.of(state.tensor).cpu().clone().contiguous()
            self._places[key] = [what, name, list(block.start), list(state.full_shape)]


class _Watching:
    """A sync that shows what the replica holds when a step is finished, and is otherwise the one it wraps."""

    def __init__(self, sync: Any, seen: _Seen) -> None:
        self._sync, self._seen = sync, seen
        self.begin: Callable[..., int] = sync.begin
        self.total: Callable[[Tensor], Tensor] = sync.total

    def update(self, replica: Replica) -> Finish:
        """See ``Sync``."""
        finish: Finish = self._sync.update(_Watched(replica, self._seen))
        return finish


class _Watched:
    """A replica that shows its gradients before it finishes a step."""

    def __init__(self, replica: Replica, seen: _Seen) -> None:
        self._replica, self._seen = replica, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replica, name)

    def finish(self, vote: Vote) -> Finish:
        """See ``Replica``."""
        self._seen.at_finish()
        return self._replica.finish(vote)
