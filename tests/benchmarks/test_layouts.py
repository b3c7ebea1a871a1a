import json
import os
import subprocess
import sys

import pytest

from paceline.errors import PlanError


@pytest.fixture
def layouts(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    import layouts

    return layouts


def test_a_line_for_each_layout_with_its_share_of_the_states_of_one_process(layouts, monkeypatch, capsys):
    def measure(case, model, **_):
        if case.layout.tensor > 1:
            raise PlanError("layout.tensor=3 does not divide the 8 attention heads")
        mebibytes = 400 // case.ranks + 4
        return layouts.Result(
            layout=case.name,
            ranks=case.ranks,
            tokens_per_s=1234.5,
            peak_bytes=600 * 2**20,
            state_bytes=mebibytes * 2**20,
            sent_bytes=2.5 * 2**20,
            loss=9.01,
        )

    monkeypatch.setattr(layouts, "measure", measure)
    results = layouts.compare(layouts.parse("shard=4; tensor=3"), layouts.MODEL, steps=1, warmup=1)
    assert [result.layout for result in results] == ["one process", "shard=4"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["one", "process", "1", "1,234", "600", "404.0", "1.00", "2.5", "9.0100"]
    assert shown[2].split() == ["shard=4", "4", "1,234", "600", "104.0", "0.26", "2.5", "9.0100"]
    assert shown[3].split(maxsplit=1) == ["tensor=3", "refused: layout.tensor=3 does not divide the 8 attention heads"]


def test_the_default_layouts_can_be_had(layouts):
    for case in layouts.parse(layouts.DEFAULT):
        layouts.plan(case)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_zero_3_over_four_ranks_holds_at_most_a_third_of_the_states(root):
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/layouts.py", "--quick", "--layouts", "shard=4,zero=3; tensor=2", "--json"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone, shard, tensor = json.loads(done.stdout.splitlines()[-1])
    assert shard["state_bytes"] <= 0.35 * alone["state_bytes"]
    assert 0.5 * alone["state_bytes"] <= tensor["state_bytes"] <= 0.6 * alone["state_bytes"]
    assert shard["loss"] == pytest.approx(alone["loss"], rel=1e-5) == tensor["loss"]
    assert alone["sent_bytes"] == 0 < tensor["sent_bytes"]
