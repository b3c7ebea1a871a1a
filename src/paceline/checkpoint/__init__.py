"""Checkpoints: safetensors files and a JSON manifest, by name, loaded under any layout, never half visible.

state.py      kinds of state; which boxes of the full tensor a rank holds
snapshot.py   the copy that is written while training goes on
manifest.py   what a checkpoint holds, where, and its checksums
exchange.py   how ranks tell each other what they wrote
disk.py       files and folders that survive a crash
commit.py     how the ranks of a save make one checkpoint, or none
writer.py     Checkpointer
reader.py     load, Checkpoint
folder.py     the names inside a folder of checkpoints
retention.py  which checkpoints stay
"""

from paceline.checkpoint.disk import check_space
from paceline.checkpoint.exchange import Exchange, LocalExchange, StoreExchange
from paceline.checkpoint.folder import newest, steps
from paceline.checkpoint.manifest import Json
from paceline.checkpoint.reader import Checkpoint, SavedWeights, load
from paceline.checkpoint.snapshot import needed_bytes
from paceline.checkpoint.state import Kind, Rule, TensorState, per_replica, tensor_state
from paceline.checkpoint.writer import Checkpointer, Saved

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "Exchange",
    "Json",
    "Kind",
    "LocalExchange",
    "Rule",
    "Saved",
    "SavedWeights",
    "StoreExchange",
    "TensorState",
    "check_space",
    "load",
    "needed_bytes",
    "newest",
    "per_replica",
    "steps",
    "tensor_state",
]
