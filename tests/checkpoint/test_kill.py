import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("random_moments", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_leaves_whole_checkpoints_only(tmp_path: Path, random_moments: int) -> None:
    script = Path(__file__).with_name("killed_saves.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(random_moments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    each, random = json.loads(done.stdout)
    # Most deaths are in the middle of something; what they leave is hidden, and gone after the next start.
    assert each["kills"] >= 25
    assert each["interrupted"] >= 15
    assert random["kills"] == random_moments
    assert random_moments < 100 or random["interrupted"] >= 20
