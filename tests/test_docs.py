"""Tables in the docs that come from the code are the code's."""

from pathlib import Path

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
