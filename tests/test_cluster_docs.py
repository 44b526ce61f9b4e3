"""docs/clusters.md: the programs take its commands, its files are there, its facts are those of the files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config
from ray.scripts.scripts import cli as ray_cli

from search.cli import app
from search.config import Config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "clusters.md"
HEADED = ("cluster.yaml", "configs/cluster-onprem.yaml", "configs/cluster-slurm.sbatch")
PROGRAMS: dict[str, Any] = {"ray": ray_cli, "rankfront": typer.main.get_command(app)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def commands(shell: str) -> Iterator[list[str]]:
    """Every command in lines of shell, `bash -c` looked into, without variables set before it."""
    lexer = shlex.shlex(shell, posix=True, punctuation_chars="();&|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set("();&|"):
            words.append(word)
            continue
        while words and (words[0] == "exec" or re.match(r"[A-Za-z_]\w*=", words[0])):
            words = words[1:]
        if words:
            yield words
        if words[-3:-1] == ["bash", "-c"]:
            yield from commands(words[-1])
        words = []


def shown() -> list[list[str]]:
    """The commands of the page's blocks and those at the top of the files that `ray` and `sbatch` read."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    for name in HEADED:
        comment = (ROOT / name).read_text(encoding="utf-8").partition("\n\n")[0]
        # "#   name   command   (remark)", or a line that goes on with the command of the one before
        lines += re.findall(r"^#   +(?:[a-z ]+?  +)?(\S.*?)(?:   .*)?$", comment, re.M)
    return [words for line in lines for words in commands(line)]


def mentioned() -> list[list[str]]:
    """The commands in the page's prose and tables, which may lack what they are about."""
    found = re.findall(r"`((?:ray|rankfront) [^`]*)`", PAGE.read_text(encoding="utf-8"))
    return [words for line in found for words in commands(line)]


def parsed(words: list[str]) -> None:
    """Have a program read its command line, down to the last subcommand; nothing is run.

    Raises:
        UsageError: click's, or typer's of that name: an unknown command or option, a value of another type.
    """
    words = [re.sub("^PORT$", "8265", word) for word in words]
    program = Path(words[0]).name
    context = PROGRAMS[program].make_context(program, words[1:])
    while hasattr(context.command, "resolve_command"):
        name, command, rest = context.command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, rest, parent=context)


def ours() -> list[list[str]]:
    return [words for words in shown() if Path(words[0]).name in PROGRAMS and len(words) > 1]


@pytest.mark.parametrize("words", ours(), ids=" ".join)
def test_ray_and_rankfront_take_every_command(words: list[str]) -> None:
    parsed(words)


def test_commands_that_are_only_mentioned_exist() -> None:
    assert mentioned()
    for words in mentioned():
        try:
            parsed(words)
        except Exception as error:
            # by their names, as typer holds a copy of click
            if type(error).__name__ not in ("MissingParameter", "NoArgsIsHelpError"):
                raise


@pytest.mark.parametrize(
    "line",
    [
        "ray job submit --adress http://127.0.0.1:8265 -- true",
        "ray ub cluster.yaml",
        "rankfront search --trails 3",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    """Guards the tests above."""
    with pytest.raises(Exception, match=r"[Nn]o such (command|option)"):
        parsed(shlex.split(line))


def test_the_commands_that_matter_are_shown() -> None:
    names = {" ".join(word for word in words[:3] if not word.startswith("-")) for words in ours()}
    for start in (
        "ray up",
        "ray attach",
        "ray job submit",
        "ray down",
        "ray get-auth-token",
        "rankfront search",
    ):
        assert any(name.startswith(start) for name in names), start


def test_files_that_commands_name_are_there() -> None:
    named = {
        word.rpartition("=")[2]
        for words in shown()
        for word in words
        if re.search(r"(^|=)(configs/|cluster\.yaml|constraints\.txt)", word) and "NAME" not in word
    }
    assert {"cluster.yaml", "configs/cluster-slurm.sbatch", "configs/cluster-kuberay.yaml"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_page_says_where_a_number_of_nodes_is_kept() -> None:
    """What `ray up --min-workers` sets, beside the types, is gone from what nodes are started by."""
    page = PAGE.read_text(encoding="utf-8")
    found = re.search(r"`min_workers: (\d+)` under `available_node_types: (\w+):` ", page)
    assert found is not None
    count, kind = int(found[1]), found[2]
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))

    def kept() -> int:
        return prepare_config(config)["available_node_types"][kind]["min_workers"]

    config["min_workers"] = count  # as the option does
    assert kept() == 0
    config["available_node_types"][kind]["min_workers"] = count
    assert kept() == count
    assert not any("--min-workers" in words for words in shown())


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    assert [target for target in local if not (PAGE.parent / target).exists()] == []
    assert "docs/clusters.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_keys_of_the_config_that_are_shown_exist() -> None:
    for block in blocks("yaml"):
        data = yaml.safe_load(block)
        if isinstance(data, dict):  # a list is lines of a cluster file
            assert set(data) <= set(Config.model_fields)


def test_every_way_of_starting_a_driver_by_hand_names_its_cluster() -> None:
    """Where Ray runs and RAY_ADDRESS is unset, Ray refuses a search that would start a cluster of its own."""
    page = PAGE.read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.match(r"cd .*rankfront search", line)]
    lines += [
        line
        for name in HEADED[:2]
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if line.startswith("#") and "rankfront search" in line
    ]
    assert len(lines) == 4
    assert all("RAY_ADDRESS=auto rankfront search" in line for line in lines)


def test_the_ports_are_those_of_the_files() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in HEADED:
        text = (ROOT / name).read_text(encoding="utf-8")
        for port in re.findall(r"--(?:port|object-manager-port)=(\d+)|RAY_PORT:-(\d+)", text):
            assert re.search(rf"^\| {''.join(port)}\b", page, re.M)
