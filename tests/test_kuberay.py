"""The KubeRay manifest and its image: fields that exist, a token everywhere, nothing exposed.

No package brings KubeRay's custom resource definitions, so the fields that the manifest uses are written down
here from its API reference (ray.io/v1, KubeRay 1.6) and from Kubernetes' own, any other one an error; and
Ray's own reader of a RayCluster resource says what it makes of it.
"""

# ruff: noqa: N815 (fields have the names that Kubernetes gives them)

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import start

from search.cli import app

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ROOT / "configs" / "cluster-kuberay.yaml"
IMAGE = ROOT / "configs" / "cluster-kuberay.Dockerfile"


class Kube(BaseModel):
    """Kubernetes refuses unknown fields of a strict request, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Kube):
    name: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)


class Selector(Kube):
    matchLabels: dict[str, str]


class Quantities(Kube):
    requests: dict[str, str] = Field(default_factory=dict)
    limits: dict[str, str] = Field(default_factory=dict)


class ClaimSpec(Kube):
    accessModes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]]
    storageClassName: str
    resources: Quantities


class Claim(Kube):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class Peer(Kube):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None


class Port(Kube):
    protocol: Literal["TCP", "UDP"] = "TCP"
    port: int


class Ingress(Kube):
    from_: list[Peer] = Field(alias="from", min_length=1)
    ports: list[Port] = Field(default_factory=list)


class PolicySpec(Kube):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress]


class Policy(Kube):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: PolicySpec


class SecretName(Kube):
    name: str
    optional: bool = False


class EnvironmentSource(Kube):
    secretRef: SecretName


class Variable(Kube):
    name: str
    value: str


class ContainerPort(Kube):
    name: str = Field(max_length=15)
    containerPort: int


class Mount(Kube):
    name: str
    mountPath: str = Field(pattern="^/")
    readOnly: bool = False


class Container(Kube):
    name: str
    image: str
    envFrom: list[EnvironmentSource] = Field(default_factory=list)
    env: list[Variable] = Field(default_factory=list)
    ports: list[ContainerPort] = Field(default_factory=list)
    resources: Quantities
    volumeMounts: list[Mount] = Field(default_factory=list)


class ClaimName(Kube):
    claimName: str


class MapName(Kube):
    name: str


class Volume(Kube):
    name: str
    persistentVolumeClaim: ClaimName | None = None
    configMap: MapName | None = None


class Security(Kube):
    fsGroup: int


class Toleration(Kube):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Kube):
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    automountServiceAccountToken: bool
    securityContext: Security | None = None
    tolerations: list[Toleration] = Field(default_factory=list)
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = Field(default_factory=list)


class Pod(Kube):
    metadata: Metadata
    spec: PodSpec


class Authentication(Kube):
    mode: Literal["disabled", "token"]


class HeadGroup(Kube):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    rayStartParams: dict[str, str]
    template: Pod


class WorkerGroup(Kube):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: dict[str, str]
    template: Pod


class ClusterSpec(Kube):
    rayVersion: str
    authOptions: Authentication
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Kube):
    entrypoint: str
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    submitterPodTemplate: Pod
    rayClusterSpec: ClusterSpec


class Job(Kube):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


KINDS: dict[str, type[Kube]] = {"PersistentVolumeClaim": Claim, "NetworkPolicy": Policy, "RayJob": Job}


def documents() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}


def ray_job() -> Job:
    return Job.model_validate(documents()["RayJob"])


def policy() -> Policy:
    return Policy.model_validate(documents()["NetworkPolicy"])


def pods(job: Job) -> Iterator[Pod]:
    """All of them: what submits, the head, the workers."""
    yield job.spec.submitterPodTemplate
    yield from ray_pods(job)


def ray_pods(job: Job) -> list[Pod]:
    cluster = job.spec.rayClusterSpec
    return [cluster.headGroupSpec.template, *(group.template for group in cluster.workerGroupSpecs)]


def pinned_ray() -> str:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    [version] = [line.removeprefix("ray==") for line in pins if line.startswith("ray==")]
    return version


def test_every_field_is_one_that_kubernetes_and_kuberay_know() -> None:
    found = documents()
    assert list(found) == ["PersistentVolumeClaim", "NetworkPolicy", "RayJob"]
    for kind, document in found.items():
        KINDS[kind].model_validate(document)


@pytest.mark.parametrize("misspelt", ["authOption", "headGroupSpecs"])
def test_an_unknown_field_is_found(misspelt: str) -> None:
    """Guards the test above."""
    document = copy.deepcopy(documents()["RayJob"])
    document["spec"]["rayClusterSpec"][misspelt] = {}
    with pytest.raises(ValidationError, match=misspelt):
        Job.model_validate(document)


def test_ray_reads_the_cluster_as_it_is_meant() -> None:
    """By the code with which Ray itself reads the resource on Kubernetes."""
    spec = documents()["RayJob"]["spec"]["rayClusterSpec"]
    resource = {"metadata": {"name": "rankfront", "namespace": "default"}, "spec": spec}
    kinds = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    head = kinds.pop("headgroup")
    assert head["resources"]["CPU"] == 0, "what scores does not run beside the driver"
    assert len(kinds) == 1, "scores from different kinds of GPU are not comparable to the last digit"
    [gpu] = kinds.values()
    assert (gpu["resources"]["CPU"], gpu["resources"]["GPU"]) == (8, 1)
    assert gpu["min_workers"] == gpu["max_workers"] >= 1


def test_ray_start_knows_every_parameter() -> None:
    cluster = ray_job().spec.rayClusterSpec
    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs):
        assert set(group.rayStartParams) <= known


def test_the_token_is_asked_for_and_no_pod_overrides_it() -> None:
    cluster = ray_job().spec.rayClusterSpec
    assert cluster.authOptions.mode == "token"
    names = [variable.name for pod in pods(ray_job()) for one in pod.spec.containers for variable in one.env]
    assert not [name for name in names if name.startswith("RAY_AUTH")]
    text = MANIFEST.read_text(encoding="utf-8")
    assert not re.search(r"\b[0-9a-f]{64}\b", text), "a token was committed"
    # KubeRay refuses authOptions below this version of Ray.
    assert SpecifierSet(">=2.52.0").contains(cluster.rayVersion)


def test_nothing_is_exposed_outside_kubernetes() -> None:
    assert ray_job().spec.rayClusterSpec.headGroupSpec.serviceType == "ClusterIP"
    assert not {"Service", "Ingress"} & set(documents())


def test_the_policy_covers_every_ray_pod_and_lets_in_only_them_and_the_operator() -> None:
    spec = policy().spec
    ours = spec.podSelector.matchLabels
    for pod in pods(ray_job()):
        assert ours.items() <= pod.metadata.labels.items()
    assert spec.policyTypes == ["Ingress"]
    cluster, operator = spec.ingress
    assert [peer.podSelector.matchLabels for peer in cluster.from_ if peer.podSelector] == [ours]
    assert len(cluster.from_) == 1
    assert [port.port for port in operator.ports] == [8265]
    [peer] = operator.from_
    assert peer.namespaceSelector is not None
    [namespace] = peer.namespaceSelector.matchLabels.values()
    assert f"--namespace {namespace}" in MANIFEST.read_text(encoding="utf-8")


def test_no_pod_can_talk_to_kubernetes() -> None:
    assert not [pod for pod in pods(ray_job()) if pod.spec.automountServiceAccountToken]


def test_every_ray_pod_sees_the_same_folders_at_the_same_paths() -> None:
    """A builder writes factors where replicas read them, and the driver its study."""
    claim = Claim.model_validate(documents()["PersistentVolumeClaim"])
    assert claim.spec.accessModes == ["ReadWriteMany"]
    for pod in ray_pods(ray_job()):
        volumes = {volume.name: volume for volume in pod.spec.volumes}
        claimed = volumes["shared"].persistentVolumeClaim
        assert claimed is not None
        assert claimed.claimName == claim.metadata.name
        [container] = pod.spec.containers
        assert {mount.name: mount.mountPath for mount in container.volumeMounts} == {
            "shared": "/shared",
            "study": "/study",
        }
        cached = {variable.name: variable.value for variable in container.env}
        assert cached["HF_HOME"].startswith("/shared/")


def test_the_entrypoint_is_a_search_of_the_mounted_config_in_the_shared_folder() -> None:
    shell, flag, line = shlex.split(ray_job().spec.entrypoint)
    assert (shell, flag) == ("bash", "-c")
    go, run = (shlex.split(part) for part in line.split("&&"))
    assert go == ["cd", "/shared"]
    assert run[:3] == ["exec", "rankfront", "search"]
    assert "search" in {command.name for command in app.registered_commands}
    assert run[3] == "/study/study.yaml"


def test_every_pod_runs_the_image_of_one_build() -> None:
    images = {container.image for pod in pods(ray_job()) for container in pod.spec.containers}
    assert len(images) == 1


def test_the_image_holds_the_pinned_ray_on_a_python_that_suits() -> None:
    text = IMAGE.read_text(encoding="utf-8")
    [(version, python)] = re.findall(r"^FROM rayproject/ray:([\d.]+)-py(\d+)$", text, re.MULTILINE)
    assert version == pinned_ray() == ray_job().spec.rayClusterSpec.rayVersion
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SpecifierSet(project["requires-python"]).contains(f"{python[0]}.{python[1:]}")


def test_the_image_is_built_from_what_is_there() -> None:
    lines = IMAGE.read_text(encoding="utf-8").splitlines()
    copied = [
        source
        for line in lines
        if line.startswith("COPY")
        for source in shlex.split(line)[1:-1]
        if not source.startswith("--")
    ]
    assert {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "search", "actors"} <= set(copied)
    assert [source for source in copied if not (ROOT / source).exists()] == []
    [install] = [line for line in lines if line.startswith("RUN pip install")]
    assert "-c constraints.txt" in install
