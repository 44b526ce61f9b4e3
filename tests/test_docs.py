"""Tables in the docs that come from the code are the code's."""

import re
from pathlib import Path

import pytest

from search.config_page import page
from search.identity import RESUME_RULES

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    "fixed": "must be equal",
    "content": "may be named differently, the content must be equal",
    "free": "may change",
}


def test_resume_table_is_the_one_the_code_decides_by():
    text = (ROOT / "docs" / "resume.md").read_text()
    shown = [line for line in text.splitlines() if line.startswith("| `")]
    assert shown == [f"| `{rule.key}` | {WORDS[rule.verdict]} | {rule.why} |" for rule in RESUME_RULES]


def test_the_config_keys_are_those_of_the_sections():
    assert (ROOT / "docs" / "config.md").read_text() == page()


SECTIONS = {part.strip(): rest for part, _, rest in (s.partition("\n") for s in page().split("## ")[1:])}


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_is_explained_where_it_stands(title):
    """Named, as code, in what the section says of itself."""
    prose, _, table = SECTIONS[title].partition("| key |")
    keys = re.findall(r"^\| `(?:\S*\.)?(\w+)` \|", table, re.MULTILINE)
    assert keys
    assert [key for key in keys if not re.search(rf"`{key}\b", prose)] == []


@pytest.mark.parametrize(
    ("key", "takes", "default"),
    [
        ("objectives", "list of 2 to 3, each: text", "`[budget.model, nll]`"),
        ("space.levels", "whole number (>= 1, <= 1000)", "`20`"),
        ("references.uniform", "list, each: number (> 0, <= 1)", "`[0.95, 0.9, 0.8, 0.7, 0.6]`"),
        ("sampler.lowest", "number (> 0, < 1) or null", "`null`"),
        ("storage", "`auto`, `pivoted` or `factored`", "`auto`"),
        ("constraints", "mapping of text to number", "`{}`"),
        ("targets.include", "list, each: text", "`['*']`"),
        ("text.join", "text", r'`"\n\n"`'),
        ("model.source", "text", "required"),
        ("calibration.text", "section with the keys of `text` or null", "`null`"),
        ("replicas.count", "`auto` or whole number (>= 1)", "`auto`"),
        ("scoring.tokens", "section, below", "`{search: 8192, test: 32768, choice: 16384}`"),
        ("scoring.corpora[].tokens.test", "whole number (>= 1)", "required"),
        ("stop.plateau.tolerance", "number (>= 0)", "`0.001`"),
    ],
)
def test_what_a_key_takes_is_said_in_words(key, takes, default):
    assert f"| `{key}` | {takes} | {default} |" in page().splitlines()


def test_every_relative_link_of_the_readme_exists():
    readme = (ROOT / "README.md").read_text()
    targets = [part.split(")")[0] for part in readme.split("](")[1:]]
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_config_in_the_readme_is_the_shipped_one():
    shown = (ROOT / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    shipped = (ROOT / "configs" / "llama-3.2-1b.yaml").read_text().splitlines(keepends=True)
    assert shown == "".join(line for line in shipped if not line.startswith("#"))
