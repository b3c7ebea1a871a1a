"""What servers hold of a replica: given to them at the start, and fetched from them for a save."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from paceline.comm.replica import Remote, Shard
from paceline.sync.server import messages as m
from paceline.sync.server.channel import Channel


def fill(channel: Channel, replica: Remote, shards: Sequence[Shard]) -> None:
    """Give servers parameters, and what the replica's optimizer keeps of them."""
    channel.fill(None, {shard.name: shard.local for shard in shards})
    kept = {shard.name: replica.kept(shard.name) for shard in shards}
    tensors = {
        key
        for shard in shards
        for key, value in kept[shard.name].items()
        if value.shape == shard.local.shape and value.ndim
    }
    for key in sorted(tensors):
        channel.fill(key, {name: values[key] for name, values in kept.items() if key in values})
    channel.ready(
        {
            name: {
                key: (float(value), str(value.dtype).removeprefix("torch."))
                for key, value in values.items()
                if key not in tensors
            }
            for name, values in kept.items()
            if values
        }
    )


@torch.no_grad()
def fetch_state(channel: Channel, replica: Remote, granted: m.Granted) -> None:
    """What servers keep of this rank's parameters, into the replica's own optimizer."""
    kept: dict[str, dict[str, Any]] = {}
    for told in channel.told():
        kept |= told["kept"]
    for shard in replica.shards:
        for key, number in kept.get(shard.name, {}).items():
            if number is not None:
                value, dtype = number
                replica.keep(shard.name, key, torch.tensor(value, dtype=getattr(torch, dtype)))
    for key in sorted({key for values in kept.values() for key, number in values.items() if number is None}):
        having = [shard for shard in replica.shards if key in kept.get(shard.name, {})]
        into = {shard.name: torch.zeros_like(shard.local) for shard in having}
        channel.pull(granted, into, key)
        for name, value in into.items():
            replica.keep(name, key, value)


def full_shapes(replica: Remote, shapes: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """Of whole parameters: those that are told, or of a replica whose ranks have a part of each."""
    if shapes is not None:
        return {name: tuple(shape) for name, shape in shapes.items()}
    return {
        shard.name: shard.part.full_shape if shard.part is not None else tuple(shard.local.shape)
        for shard in replica.shards
    }
