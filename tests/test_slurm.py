"""The Slurm script: run against stand-ins for Slurm and Ray that write down what they are called with."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import symmetric_run

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "configs" / "cluster-slurm.sbatch"
TOKEN = "0" * 64
HEAD = "10.1.2.3"

# One program under every name. Each call is logged with what matters of its environment; `srun` then runs its
# command once for each task, as node 0, 1, ..., and `ray symmetric-run` what follows `--`, on the first node.
STAND_IN = """#!{python}
import json, os, subprocess, sys
from pathlib import Path

name, words, node = Path(sys.argv[0]).name, sys.argv[1:], os.environ.get("NODE")
token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "/nowhere"))
seen = {{key: value for key, value in os.environ.items() if key.startswith("RAY_")}}
line = {{"name": name, "words": words, "node": node, "environment": seen,
        "token": token.read_text() if token.exists() else None}}
with open(os.environ["CALLS"], "a") as log:
    log.write(json.dumps(line) + "\\n")
if name == "scontrol":
    print("node-a\\nnode-b\\nnode-c")
elif name == "hostname":
    print("{head} 192.168.9.9 fe80::1 ")
elif name == "srun":
    own = [word for word in words if word.startswith("--")]
    command = words[next(i for i, word in enumerate(words) if not word.startswith("--")):]
    tasks = int(next(word for word in words if word.startswith("--ntasks=")).partition("=")[2])
    codes = []
    for task in range(tasks):
        environment = dict(os.environ, NODE=str(task))
        if os.environ.get("TOKENLESS") == str(task):
            environment["RAY_AUTH_TOKEN_PATH"] = "/nowhere/auth_token"
        codes.append(subprocess.run(command, env=environment).returncode)
    sys.exit(max(codes))
elif name == "ray" and node == "0" and "BROKEN" not in os.environ:
    sys.exit(subprocess.run(words[words.index("--") + 1:]).returncode)
elif name == "rankfront":
    sys.exit(int(os.environ.get("SEARCH_ENDS_WITH", "0")))
"""


@dataclass
class Cluster:
    """A job of three nodes, all of them this machine."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / "venv" / "bin"
        programs.mkdir(parents=True)
        for name in ("srun", "scontrol", "ray", "rankfront", "hostname"):
            program = programs / name
            program.write_text(STAND_IN.format(python=sys.executable, head=HEAD))
            program.chmod(0o755)
        self.token.parent.mkdir()
        self.token.write_text(TOKEN)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "CALLS": str(self.folder / "calls"),
            "RANKFRONT_VENV": str(self.folder / "venv"),
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_JOB_NODELIST": "node-[a-c]",
            "SLURM_CPUS_PER_TASK": "32",
            # what someone may have in their own shell, and must not reach Ray
            "RAY_AUTH_TOKEN": "another",
            "RAY_ADDRESS": "10.9.9.9:6379",
        }

    @property
    def token(self) -> Path:
        return self.folder / ".ray" / "auth_token"

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, name: str) -> list[dict[str, Any]]:
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_bash_reads_the_script() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_ray_starts_on_every_node_with_the_token_and_one_address(cluster: Cluster) -> None:
    done = cluster.run("configs/smollm2.yaml")
    assert done.returncode == 0, done.stderr
    assert f"{HEAD}:6379" in done.stdout
    starts = cluster.calls("ray")
    assert [call["node"] for call in starts] == ["0", "1", "2"]
    for call in starts:
        words = call["words"]
        assert words[0] == "symmetric-run"
        assert words[words.index("--address") + 1] == f"{HEAD}:6379"
        assert words[words.index("--min-nodes") + 1] == "3"
        assert call["token"] == TOKEN
        assert call["environment"]["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" not in call["environment"]
        assert "RAY_ADDRESS" not in call["environment"]


def test_ray_knows_every_flag(cluster: Cluster) -> None:
    """Those of `ray symmetric-run`, and those that it hands to `ray start`, on the head as on the others."""
    cluster.run("configs/smollm2.yaml")
    words = cluster.calls("ray")[0]["words"]
    flags = words[1 : words.index("--")]
    own = symmetric_run.make_context("symmetric-run", list(flags), resilient_parsing=True).params
    assert (own["address"], own["min_nodes"]) == (f"{HEAD}:6379", 3)
    handed_on = list(own["ray_args_and_entrypoint"])
    found = start.make_context("start", handed_on, resilient_parsing=True).params
    assert (found["num_cpus"], found["object_manager_port"]) == (32, 8076)
    assert found["dashboard_host"] == "127.0.0.1"
    # what `ray start` refuses on a node that is not the head, and what symmetric-run sets itself
    for forbidden in ("--port", "--include-dashboard", "--redis-shard-ports", "--head", "--block"):
        assert not [word for word in handed_on if word.partition("=")[0] == forbidden]


def test_the_search_runs_once_and_joins_that_cluster(cluster: Cluster) -> None:
    cluster.run("configs/my study.yaml", "--trials", "80")
    [call] = cluster.calls("rankfront")
    assert call["words"] == ["search", "configs/my study.yaml", "--trials", "80"]
    assert call["environment"]["RAY_ADDRESS"] == f"{HEAD}:6379"
    assert call["environment"]["RAY_AUTH_MODE"] == "token"
    assert call["node"] == "0"


def test_the_address_and_the_port_can_be_chosen(cluster: Cluster) -> None:
    cluster.run("configs/smollm2.yaml", HEAD_IP="172.16.0.1", RAY_PORT="6400")
    assert all("172.16.0.1:6400" in call["words"] for call in cluster.calls("ray"))
    assert cluster.calls("rankfront")[0]["environment"]["RAY_ADDRESS"] == "172.16.0.1:6400"


def test_every_step_takes_all_nodes_their_cores_and_the_environment(cluster: Cluster) -> None:
    cluster.run("configs/smollm2.yaml")
    steps = [call["words"] for call in cluster.calls("srun")]
    [asking] = [words for words in steps if "hostname" in words]
    assert "--nodelist=node-a" in asking
    everywhere = [words for words in steps if words is not asking]
    assert len(everywhere) == 2  # the token, Ray
    for words in everywhere:
        assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1"} <= set(words)
        assert {"--cpus-per-task=32", "--export=ALL", "--no-kill"} <= set(words)


def test_a_node_without_the_token_is_named_as_the_cause_and_ray_stays_down(cluster: Cluster) -> None:
    done = cluster.run("configs/smollm2.yaml", TOKENLESS="2")
    assert done.returncode == 1
    assert "auth_token: put it on storage that all nodes share" in done.stderr
    assert cluster.calls("ray") == []


def test_no_token_at_all_ends_before_anything_starts(cluster: Cluster) -> None:
    cluster.token.unlink()
    done = cluster.run("configs/smollm2.yaml")
    assert done.returncode != 0
    assert str(cluster.token) in done.stderr
    assert cluster.calls("ray") == []


def test_the_token_is_taken_from_the_eyes_of_others(cluster: Cluster) -> None:
    cluster.token.chmod(0o644)
    cluster.run("configs/smollm2.yaml")
    assert stat.S_IMODE(cluster.token.stat().st_mode) == 0o600


def test_the_end_of_the_search_is_that_of_the_job(cluster: Cluster) -> None:
    assert cluster.run("configs/smollm2.yaml", SEARCH_ENDS_WITH="3").returncode == 3


def test_a_ray_that_did_not_start_fails_the_job(cluster: Cluster) -> None:
    """`ray symmetric-run` ends with 0 then."""
    done = cluster.run("configs/smollm2.yaml", BROKEN="1")
    assert done.returncode == 1
    assert "Ray did not start" in done.stderr


def test_without_a_config_it_says_how_to_call_it(cluster: Cluster) -> None:
    done = cluster.run()
    assert done.returncode != 0
    assert "sbatch configs/cluster-slurm.sbatch configs/NAME.yaml" in done.stderr
    assert cluster.calls("srun") == []


def test_slurm_gives_whole_nodes_one_task_each() -> None:
    """`ray symmetric-run` ends every Ray of the user on a node, and must run once on each."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--exclusive", "--ntasks-per-node=1", "--no-kill", "--requeue"} <= set(asked)
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    unread = [line for line in lines[first_command:] if line.startswith("#SBATCH")]
    assert not unread, "Slurm reads no further than the first command"
