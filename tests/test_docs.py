"""The pages: all in the navigation, none missing, and no link from the top of the checkout into nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import config_reference
import optimizer_table
import reducer_table
import schedules_reference
import sync_table


def leaves(item: Any) -> list[str]:
    """The pages of a navigation tree."""
    if isinstance(item, str):
        return [item]
    return [page for child in (item.values() if isinstance(item, dict) else item) for page in leaves(child)]


def test_navigation_holds_every_page_once(root: Path) -> None:
    shown = leaves(yaml.safe_load((root / "mkdocs.yml").read_text())["nav"])
    pages = [str(path.relative_to(root / "docs")) for path in (root / "docs").rglob("*.md")]
    assert sorted(shown) == sorted(pages)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_of_top_pages_lead_somewhere(root: Path, page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (root / page).read_text())
    assert [target for target in targets if "://" not in target and not (root / target).exists()] == []


def test_config_reference_is_what_the_classes_say() -> None:
    up_to_date = config_reference.PAGE.read_text() == config_reference.render()
    assert up_to_date, "run `make docs`"


def test_schedules_reference_is_what_the_schedules_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["schedules_reference.py", "--check"])
    schedules_reference.main()


def test_every_schedule_and_average_has_its_section_formula_and_curve() -> None:
    text = schedules_reference.PAGE.read_text()
    for name in schedules_reference.registry.SCHEDULES:
        section = text.partition(f"### `{name}`")[2].partition("\n### ")[0]
        assert "```text\n" in section and f"schedules/{name}.svg" in section, name
    for name in ("ema", "swa"):
        assert "```text\naverage = " in text.partition(f"### `{name}`")[2].partition("\n### ")[0]


def test_optimizers_are_what_the_classes_say() -> None:
    assert optimizer_table.PAGE.read_text() == optimizer_table.render(), "run `make docs`"


def test_reducers_are_what_the_classes_say() -> None:
    assert reducer_table.PAGE.read_text() == reducer_table.render(), "run `make docs`"


def test_syncs_are_what_was_measured() -> None:
    known, guide = sync_table.read(), sync_table.GUIDE.read_text()
    assert sync_table.PAGE.read_text() == sync_table.render(known), "run `tools/sync_table.py --page`"
    assert guide == sync_table.guide(known, guide), "run `tools/sync_table.py --page`"
