"""The Ray cluster a study runs on: joined or started, and what its nodes offer from moment to moment."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray._private.state import state

from actors.types import RankfrontError
from search.shares import gpu_places

# Ray's store only ever holds allocations and scores; its default is 30% of the machine's memory.
OBJECT_STORE_BYTES = 80 * 2**20
# All of rankfront's named actors are in it: a driver finds those that an earlier one left.
NAMESPACE = "rankfront"
# Within a data centre a port answers in milliseconds; over a tunnel, in a second or two.
ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Need:
    """What one replica takes of a node: CPU cores, GPUs (below 1 a share of one), bytes of memory (0 where
    they are not counted)."""

    cpus: int
    gpus: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True)
class Room:
    """What a node has in all: CPU cores, GPUs, bytes of memory."""

    cpus: float
    gpus: float
    memory: float

    def places(self, need: Need) -> int:
        """How many replicas it has room for when nothing else runs there."""
        shares = [self.cpus / need.cpus]
        shares += [gpu_places(self.gpus, need.gpus)] if need.gpus else []
        shares += [self.memory / need.memory] if need.memory else []
        return int(min(shares))


@dataclass(frozen=True)
class Nodes:
    """The nodes that are alive, by id, and those of them that are to be vacated."""

    rooms: Mapping[str, Room]
    draining: frozenset[str] = frozenset()

    def usable(self, need: Need) -> dict[str, int]:
        """Nodes that stay and have room for a replica, and for how many."""
        found = {node: room.places(need) for node, room in self.rooms.items() if node not in self.draining}
        return {node: places for node, places in found.items() if places}


@dataclass(frozen=True)
class Machine:
    """What the cluster offers now: CPU cores, GPUs, bytes of free memory on this node.

    `grows` says that nodes may join it: of any cluster that this process did not start. `rooms` are its
    nodes, each by itself.
    """

    cores: int
    gpus: int
    memory: int
    grows: bool = False
    rooms: tuple[Room, ...] = ()

    @property
    def nodes(self) -> tuple[Room, ...]:
        """Its nodes, each by itself; where they were not looked at, all of it as one."""
        return self.rooms or (Room(self.cores, self.gpus, self.memory),)


def connect() -> Machine:
    """Join the cluster of RAY_ADDRESS, or start a local one that ends with this process.

    Raises:
        RankfrontError: RAY_ADDRESS is no address or no cluster answers there, or Ray does not start here.
    """
    # Ray would otherwise copy the driver's folder to every worker and re-install the environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        common: dict[str, Any] = {"logging_level": "error", "log_to_driver": False, "namespace": NAMESPACE}
        if address:
            _join(address, common)
        else:
            _start(common)
    total = ray.cluster_resources()
    memory = _free_memory({} if address else total)
    cores, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    return Machine(cores, gpus, memory, bool(address), tuple(cluster_nodes().rooms.values()))


def _free_memory(resources: Mapping[str, float]) -> int:
    """Bytes that are free on this node, caches among them, and no more than Ray's `resources` of it have:
    they heed a container's limit, which the kernel's own figure does not."""
    return int(min(psutil.virtual_memory().available, resources.get("memory", math.inf)))


def _join(address: str, common: Mapping[str, Any]) -> None:
    right = "HOST:PORT of a cluster's head node, or auto for the cluster that this machine is in"
    if address.startswith("ray://"):  # a client sees no node that is to be vacated, and holds no lease
        raise RankfrontError(f"RAY_ADDRESS={address}: a driver joins the cluster itself; set it to {right}")
    silence = _silence(address)
    if silence is not None:
        raise RankfrontError(
            f"RAY_ADDRESS={address}: no cluster answers there ({silence}); see that it runs and that no "
            f"firewall is between, or set it to {right}"
        )
    try:
        ray.init(**common)
    except ConnectionError as error:
        raise RankfrontError(
            f"RAY_ADDRESS={address}: no cluster answers there ({_line(error)}). Where it wants a token, set "
            "RAY_AUTH_MODE=token and have the token in ~/.ray/auth_token"
        ) from error
    except ValueError as error:
        raise RankfrontError(f"RAY_ADDRESS={address}: {_line(error)}; set it to {right}") from error
    except Exception as error:  # of no class of its own where a node does not come up in time
        raise RankfrontError(f"RAY_ADDRESS={address}: cannot be joined: {_line(error)}") from error


def _silence(address: str) -> str | None:
    """Why nothing can be reached at a HOST:PORT, None where something answers; of other addresses Ray tells.

    Ray itself would ask a closed port again and again, for minutes and without a word.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        return _line(error)
    return None


def _start(common: Mapping[str, Any]) -> None:
    try:
        # Named, as Ray would join a cluster of somebody else that runs on this machine.
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)
    except Exception as error:  # of no class of its own where a node does not come up in time
        raise RankfrontError(
            f"Ray does not start on this machine ({_line(error)}). Try again when it is less busy, or join a "
            "cluster that runs by RAY_ADDRESS=HOST:PORT or RAY_ADDRESS=auto"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def cluster_nodes() -> Nodes:
    """The nodes as they are now."""
    rooms = {
        node["NodeID"]: Room(*(node["Resources"].get(name, 0.0) for name in ("CPU", "GPU", "memory")))
        for node in ray.nodes()
        if node["Alive"]
    }
    # Ray tells of drains through its dashboard, which may not run, or by this: its own libraries do so too.
    return Nodes(rooms, frozenset(state.get_draining_nodes()))


def thread_environment(threads: int) -> dict[str, Any]:
    """Ray's runtime environment of a worker that may use so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {"env_vars": {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}}


def threads_each(machine: Machine, count: int, gpus: int) -> int:
    """Threads of each of `count` actors that `actor_options` are for: what the smallest node with room for
    one has for each of those that may be there together.

    Where no node has room, one is waited for: it is taken to be as the largest of those there are.
    """
    rooms = [room for room in machine.nodes if room.places(Need(1, gpus))]
    if not rooms:
        return max(1, int(max(room.cpus for room in machine.nodes)) // count)
    if gpus:
        shares = [int(room.cpus) // min(count, gpu_places(room.gpus, gpus)) for room in rooms]
    else:
        shares = [int(room.cpus) // math.ceil(count / len(rooms)) for room in rooms]
    return max(1, min(shares))


def actor_options(machine: Machine, threads: int, gpus: int) -> dict[str, Any]:
    """Ray's options of an actor that computes beside no replica, of so many threads and GPUs.

    It asks for one core, as more might never be free at once on a cluster that others use too. So Ray would
    put those without a GPU on one node until half of its cores are asked for; they are spread instead.
    """
    options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": thread_environment(threads)}
    return options | ({"scheduling_strategy": "SPREAD"} if not gpus and len(machine.nodes) > 1 else {})
