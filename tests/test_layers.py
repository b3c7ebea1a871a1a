"""What import-linter cannot see: use of torch.distributed, and what is imported when a light module is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# A process group never leaves its replica: only these packages may reach one (workers: the store where ranks meet).
DISTRIBUTED = {"comm", "parallel", "schedule", "checkpoint", "trace", "workers"}
HEAVY = ["torch", "transformers", "tensorboard", "pyarrow"]


def names_torch_distributed(source: str) -> bool:
    """Whether the source imports torch.distributed, or reaches it through ``torch``."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if any(f"{n.name}.".startswith("torch.distributed.") for n in names):
                return True
            case ast.ImportFrom(module=str(module)) if f"{module}.".startswith("torch.distributed."):
                return True
            case ast.ImportFrom(module="torch", names=names) if any(n.name == "distributed" for n in names):
                return True
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                return True
    return False


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed.tensor as dt",
        "from torch.distributed.tensor import DTensor",
        "from torch import nn, distributed",
        "import torch\ndef f():\n    torch.distributed.barrier()",
    ],
)
def test_every_way_to_reach_torch_distributed_is_seen(source: str) -> None:
    assert names_torch_distributed(source)


def test_torch_distributed_is_used_only_where_a_process_group_may_be(root: Path) -> None:
    package = root / "src" / "paceline"
    files = {path.relative_to(package): path.read_text() for path in package.rglob("*.py")}
    users = {path for path, source in files.items() if names_torch_distributed(source)}
    assert users, "the search finds nothing, not even in comm"
    assert sorted(str(path) for path in users if path.parts[0] not in DISTRIBUTED) == []


@pytest.mark.parametrize("module", ["cli", "config", "registry", "plan", "data.prepare", "track.report"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    program = f"import sys, paceline.{module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
