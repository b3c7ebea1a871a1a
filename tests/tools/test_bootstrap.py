"""When the environment is remade, and which build of torch goes into it. No pip runs here: commands are recorded."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import bootstrap

Commands = list[list[str]]


class FakeRun:
    """Stands in for ``subprocess.run``: notes the command, and fails those that ``refuse`` picks."""

    def __init__(self) -> None:
        self.commands: Commands = []
        self.environments: list[dict[str, str]] = []
        self.refuse: Callable[[list[str], dict[str, str]], bool] = lambda command, environment: False

    def __call__(
        self, command: list[str], env: dict[str, str] | None = None, capture_output: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        self.commands.append(command)
        self.environments.append(env or {})
        if "venv" in command:
            python = Path(command[-1], "bin", "python")
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return subprocess.CompletedProcess(command, int(self.refuse(command, env or {})))

    def said(self, word: str) -> bool:
        """Whether any command had this word."""
        return any(word in command for command in self.commands)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "requirements.lock").write_text("# head\ntorch==2.13.0\nnumpy==2.4.6\n")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2.13,<2.16"]\n')
    monkeypatch.setattr(bootstrap, "LOCK", tmp_path / "requirements.lock")
    monkeypatch.setattr(bootstrap, "PYPROJECT", tmp_path / "pyproject.toml")
    return tmp_path


@pytest.fixture
def pip(project: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    monkeypatch.setattr(bootstrap.subprocess, "run", fake)
    bootstrap.make_locked(project / "venv", "cpu")
    assert fake.said("venv")
    fake.commands.clear()
    fake.environments.clear()
    return fake


def test_nothing_runs_when_nothing_changed(project: Path, pip: FakeRun) -> None:
    bootstrap.make_locked(project / "venv", "cpu")
    assert pip.commands == []


def test_a_changed_lock_remakes_the_environment(project: Path, pip: FakeRun) -> None:
    bootstrap.LOCK.write_text("torch==2.13.0\nnumpy==2.4.7\n")
    bootstrap.make_locked(project / "venv", "cpu")
    assert pip.said("--clear")
    assert pip.said("-r")


def test_an_environment_whose_python_is_gone_is_remade(project: Path, pip: FakeRun) -> None:
    (project / "venv" / "bin" / "python").unlink()
    bootstrap.make_locked(project / "venv", "cpu")
    assert pip.said("--clear")


def test_another_build_of_torch_remakes_the_environment(project: Path, pip: FakeRun) -> None:
    bootstrap.make_locked(project / "venv", "default")
    assert pip.said("--clear")
    assert not pip.said("torch==2.13.0+cpu")


def test_a_changed_pyproject_installs_the_source_tree_again_and_no_more(project: Path, pip: FakeRun) -> None:
    bootstrap.PYPROJECT.write_text("[project]\ndependencies = []\n")
    bootstrap.make_locked(project / "venv", "cpu")
    assert [command[-2] for command in pip.commands] == ["-e"]


def test_an_environment_cut_off_half_way_is_remade(project: Path, pip: FakeRun) -> None:
    bootstrap.LOCK.write_text("torch==2.13.0\n")
    pip.refuse = lambda command, environment: "-r" in command
    with pytest.raises(SystemExit, match="pip could not install"):
        bootstrap.make_locked(project / "venv", "cpu")
    pip.refuse = lambda command, environment: False
    pip.commands.clear()
    bootstrap.make_locked(project / "venv", "cpu")
    assert pip.said("--clear")


def test_pips_own_sources_are_asked_first_for_the_cpu_build(project: Path, pip: FakeRun) -> None:
    bootstrap.install_torch(project / "venv", "cpu")
    assert "--dry-run" in pip.commands[0]
    assert pip.commands[1][-1] == "torch==2.13.0+cpu"
    assert "PIP_INDEX_URL" not in pip.environments[1]


def test_the_cpu_index_serves_where_pips_own_sources_have_no_cpu_build(
    project: Path, pip: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pip.refuse = lambda command, environment: "--dry-run" in command
    bootstrap.install_torch(project / "venv", "cpu")
    assert pip.environments[1]["PIP_INDEX_URL"] == bootstrap.CPU_INDEX
    assert f"(192 MB) from {bootstrap.CPU_INDEX}" in capsys.readouterr().out


def test_no_cpu_build_anywhere_is_one_line_that_says_what_to_do(project: Path, pip: FakeRun) -> None:
    pip.refuse = lambda command, environment: "torch==2.13.0+cpu" in command
    with pytest.raises(SystemExit) as stopped:
        bootstrap.install_torch(project / "venv", "cpu")
    message = str(stopped.value)
    assert "\n" not in message
    assert all(way in message for way in ("network", "PYTHON=", "PIP_FIND_LINKS", "TORCH=default"))


def test_the_newest_cpu_build_is_never_looked_for_among_builds_of_other_kinds(project: Path, pip: FakeRun) -> None:
    bootstrap.make_newest(project / "venv", "cpu")
    place = next(i for i, command in enumerate(pip.commands) if command[-1] == "torch>=2.13,<2.16")
    assert pip.environments[place]["PIP_EXTRA_INDEX_URL"] == bootstrap.CPU_INDEX
    assert not pip.said("--dry-run")


@pytest.mark.parametrize(
    ("device", "smi", "build"), [(False, None, "cpu"), (True, None, "default"), (False, "x", "default")]
)
def test_the_build_follows_the_device(
    device: bool, smi: str | None, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.sys, "platform", "linux")
    monkeypatch.setattr(bootstrap.Path, "exists", lambda path: device)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: smi)
    assert bootstrap.choose_build("auto") == build
    assert bootstrap.choose_build("cpu") == "cpu"


def test_a_python_without_ensurepip_is_told_which_package_to_install(
    project: Path, pip: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt-get install python3\.\d+-venv"):
        bootstrap.create(project / "venv")
    assert pip.commands == []
