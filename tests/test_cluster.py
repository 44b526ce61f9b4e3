"""The shipped cluster files: accepted by Ray, closed to strangers, and pointing at files that exist."""

import ipaddress
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

from actors.types import Prepared
from search.cluster import Machine, Room
from search.config import load_config
from search.replicas import replica_plan
from search.terminal import override

ROOT = Path(__file__).resolve().parents[1]
AWS = ROOT / "cluster.yaml"
ON_PREM = ROOT / "configs" / "cluster-onprem.yaml"
REMOTE_CHECKOUT = "~/rankfront/"
AUTH_FILE = "~/.ray/auth_token"  # where Ray looks for the token when no variable names another place

every_file = pytest.mark.parametrize("path", [AWS, ON_PREM], ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def prepared(path: Path) -> dict[str, Any]:
    """The config as `ray up` sees it: merged with the provider's defaults. Needs no credentials."""
    config = prepare_config(read(path))
    validate_config(config)
    return config


def commands(path: Path, key: str) -> list[list[str]]:
    """The shell commands under `key`, split at `;` and `&&`, each as its words."""
    parts = (part for line in prepared(path)[key] for part in re.split(r";|&&", line))
    return [shlex.split(part) for part in parts]


def ray_starts(path: Path, key: str) -> list[list[str]]:
    """Every command under `key` that starts Ray, leading variable assignments included."""
    return [
        words
        for words in commands(path, key)
        if any(Path(a).name == "ray" and b == "start" for a, b in pairwise(words))
    ]


def assignments(words: list[str]) -> dict[str, str]:
    """The `NAME=value` words that stand before the program, so that they reach its environment."""
    found: dict[str, str] = {}
    for word in words:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", word):
            break
        name, _, value = word.partition("=")
        found[name] = value
    return found


@every_file
def test_ray_accepts_the_file(path: Path) -> None:
    config = prepared(path)
    assert config["cluster_name"].startswith("rankfront")


@every_file
def test_ray_refuses_the_file_with_a_misspelt_key(path: Path) -> None:
    """Guards the test above: the validation it relies on does reject."""
    config = prepare_config(read(path) | {"head_start_ray_comands": []})
    with pytest.raises(Exception, match="head_start_ray_comands"):
        validate_config(config)


@every_file
@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_ray_start_demands_the_token(path: Path, key: str) -> None:
    starts = ray_starts(path, key)
    assert len(starts) == 1
    assert assignments(starts[0])["RAY_AUTH_MODE"] == "token"


@every_file
def test_drivers_on_a_node_use_the_token_too(path: Path) -> None:
    assert any("export RAY_AUTH_MODE=token" in line for line in prepared(path)["initialization_commands"])


@every_file
def test_every_node_gets_the_same_token_file_and_none_is_written_down(path: Path) -> None:
    config = prepared(path)
    assert config["file_mounts"][AUTH_FILE] == AUTH_FILE
    assert any(f"chmod 600 {AUTH_FILE}" in line for line in config["initialization_commands"])
    text = path.read_text(encoding="utf-8")
    assert "RAY_AUTH_TOKEN=" not in text
    assert not re.search(r"\b[0-9a-f]{64}\b", text), "a token was committed"


@every_file
def test_the_dashboard_listens_on_loopback_only(path: Path) -> None:
    [start] = ray_starts(path, "head_start_ray_commands")
    hosts = [word.partition("=")[2] for word in start if word.startswith("--dashboard-host")]
    assert hosts == ["127.0.0.1"]


@every_file
def test_workers_join_the_port_the_head_opens(path: Path) -> None:
    [head] = ray_starts(path, "head_start_ray_commands")
    [worker] = ray_starts(path, "worker_start_ray_commands")
    [port] = [word.removeprefix("--port=") for word in head if word.startswith("--port=")]
    assert f"--address=$RAY_HEAD_IP:{port}" in worker


@every_file
def test_what_the_nodes_install_from_is_in_the_repository(path: Path) -> None:
    mounts = prepared(path)["file_mounts"]
    sources = {remote: local for remote, local in mounts.items() if remote.startswith(REMOTE_CHECKOUT)}
    assert {"constraints.txt", "pyproject.toml", "search", "actors", "configs"} <= set(sources.values())
    missing = [local for local in sources.values() if not (ROOT / local).exists()]
    assert not missing
    assert all(remote == REMOTE_CHECKOUT + local for remote, local in sources.items())


@every_file
def test_the_build_finds_every_file_pyproject_names(path: Path) -> None:
    mounted = set(prepared(path)["file_mounts"].values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = project.get("readme", "README.md")
    named = {readme if isinstance(readme, str) else readme.get("file", "README.md")}
    named |= {name for name in project.get("license-files", []) if not set(name) & set("*?[")}
    assert named <= mounted


@every_file
def test_the_pinned_versions_are_what_gets_installed(path: Path) -> None:
    installs = [
        words for words in commands(path, "setup_commands") if words[1:2] == ["install"] and "." in words
    ]
    assert len(installs) == 1
    assert installs[0][installs[0].index("-c") + 1] == "constraints.txt"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line.partition("#")[0].strip() for line in pins]
    foreign = [
        line for line in requirements if line.startswith("-") or "://" in line or re.search(r"==.*\+", line)
    ]
    assert not foreign, "a node installs from PyPI, which serves no local versions such as 2.0+cpu"


@every_file
def test_the_nodes_python_suits_the_project(path: Path) -> None:
    versions = re.findall(r"python(3\.\d+) -m venv", "\n".join(prepared(path)["setup_commands"]))
    assert len(versions) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SpecifierSet(project["requires-python"]).contains(versions[0])


@every_file
def test_results_environments_and_history_stay_behind(path: Path) -> None:
    config = prepared(path)
    assert {"runs/", ".venv/", ".git/"} <= set(config["rsync_exclude"])
    assert not {".", "./"} & set(config["file_mounts"].values()), (
        "Ray hashes whole mounts, excluded files too"
    )


def test_aws_head_is_on_demand_without_gpu_and_workers_are_spot() -> None:
    config = prepared(AWS)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert not head["node_config"]["InstanceType"].startswith(("g", "p"))  # EC2's GPU families
    assert head["max_workers"] == 0
    assert len(types) == 1, "scores from different kinds of GPU are not comparable to the last digit"
    for worker in types.values():
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["node_config"]["InstanceType"].startswith("g")
        assert (worker["min_workers"], worker["max_workers"]) == (0, 8)


def test_aws_search_line_has_gpu_nodes_come() -> None:
    """None is kept: what replicas ask for, before there is a GPU, is what the autoscaler goes by."""
    header = AWS.read_text(encoding="utf-8").partition("\n\n")[0]
    [line] = [line for line in header.splitlines() if "RAY_ADDRESS=auto rankfront search" in line]
    words = shlex.split(line.removeprefix("#"))
    overrides = dict(override(words[place + 1]) for place, word in enumerate(words) if word == "--set")
    config = load_config(ROOT / "configs" / "llama-3.2-1b.yaml", overrides)
    kind = prepared(AWS)["available_node_types"]["gpu"]
    assert (config.replicas.gpus, config.replicas.max) == (1, kind["max_workers"])
    head = Machine(8, 0, 2**35, grows=True, rooms=(Room(8, 0, 2**35),))
    nothing = Prepared("", "", (), 10**9, {}, {}, {}, {}, reused=True)
    assert replica_plan(config, nothing, head) == (kind["max_workers"], 1)


def test_aws_opens_no_port_beyond_rays_default_of_ssh() -> None:
    """Ray's own security group admits the nodes, and port 22 from outside; the file adds nothing."""
    config = prepared(AWS)
    assert "security_group" not in config["provider"]
    assert all(
        "SecurityGroupIds" not in kind["node_config"] for kind in config["available_node_types"].values()
    )


def test_on_prem_addresses_are_valid_and_distinct() -> None:
    provider = prepared(ON_PREM)["provider"]
    addresses = [ipaddress.ip_address(text) for text in [provider["head_ip"], *provider["worker_ips"]]]
    assert len(set(addresses)) == len(addresses) >= 2


def test_on_prem_keeps_every_worker() -> None:
    config = prepared(ON_PREM)
    [kind] = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])
