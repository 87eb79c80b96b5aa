"""What must hold of the rendered manifests: functions from objects to sentences about what is wrong, none where all is
well. And what the schemas say: Kubernetes' own by kubernetes-validate, KubeRay's from its CRDs."""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import kubernetes_validate
import yaml

from edt_core.store.cache import BYTES_VARIABLE, parse_bytes

Object = dict[str, Any]
Check = Callable[[Sequence[Object]], Iterator[str]]

GPU = "nvidia.com/gpu"
KUBERAY = "ray.io/v1"
SECRET_NAME = re.compile(r"KEY|PASSWORD|TOKEN|SECRET|CREDENTIAL")
_FULL = 0.95  # share of a volume that the cache may take: downloads in progress and locks take more
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


class Pod(NamedTuple):
    """A pod template and where it is."""

    where: str
    template: Object
    is_head: bool = False

    @property
    def spec(self) -> Object:
        return self.template["spec"]


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] == kind]


def embedded_jobs(objects: Sequence[Object]) -> list[Object]:
    """The RayJobs that ConfigMaps hold for a CronJob to create."""
    texts = [text for thing in of_kind(objects, "ConfigMap") for text in thing.get("data", {}).values()]
    found = [yaml.safe_load(text) for text in texts if "kind: RayJob" in text]
    return [dict(job) for job in found]


def job_specs(objects: Sequence[Object]) -> list[Object]:
    """The spec of every run: RayJobs, those of RayCronJobs, those in ConfigMaps."""
    jobs = [*of_kind(objects, "RayJob"), *embedded_jobs(objects)]
    return [job["spec"] for job in jobs] + [cron["spec"]["jobTemplate"] for cron in of_kind(objects, "RayCronJob")]


def cluster_specs(objects: Sequence[Object]) -> list[Object]:
    """The spec of every Ray cluster: that stands, or that a job brings."""
    brought = [job["rayClusterSpec"] for job in job_specs(objects) if "rayClusterSpec" in job]
    return [cluster["spec"] for cluster in of_kind(objects, "RayCluster")] + brought


def ray_pods(objects: Sequence[Object]) -> Iterator[Pod]:
    for cluster in cluster_specs(objects):
        yield Pod("head", cluster["headGroupSpec"]["template"], is_head=True)
        for group in cluster["workerGroupSpecs"]:
            yield Pod(f"group {group['groupName']}", group["template"])


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    yield from ray_pods(objects)
    for cron in of_kind(objects, "CronJob"):
        yield Pod("CronJob", cron["spec"]["jobTemplate"]["spec"]["template"])


def containers(objects: Sequence[Object]) -> Iterator[tuple[Pod, Object]]:
    for pod in pods(objects):
        for container in [*pod.spec["containers"], *pod.spec.get("initContainers", [])]:
            yield pod, container


def size(text: str) -> float:
    """A quantity of memory in bytes."""
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)", text)
    assert found, text
    return int(found[1]) * _UNITS[found[2]]


def authentication(objects: Sequence[Object]) -> Iterator[str]:
    for cluster in cluster_specs(objects):
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield "a Ray cluster without token authentication"
        if not cluster.get("rayVersion"):
            yield "a Ray cluster without rayVersion, which KubeRay refuses with token authentication"


def resources(objects: Sequence[Object]) -> Iterator[str]:
    asked = [(f"{pod.where}/{container['name']}", container) for pod, container in containers(objects)]
    asked += [("autoscaler", cluster.get("autoscalerOptions", {})) for cluster in cluster_specs(objects)]
    for where, container in asked:
        given = container.get("resources", {})
        for kind in ("requests", "limits"):
            missing = {"cpu", "memory"} - set(given.get(kind, {}))
            if missing:
                yield f"{where} has no {kind} of {sorted(missing)}"
        if given.get("requests", {}).get(GPU) != given.get("limits", {}).get(GPU):
            yield f"{where} requests another number of GPUs than its limit"


def gpu_groups(objects: Sequence[Object]) -> Iterator[str]:
    for pod, container in containers(objects):
        if GPU in container.get("resources", {}).get("limits", {}):
            tolerated = [t for t in pod.spec.get("tolerations", []) if t.get("key") == GPU]
            if not any(t.get("operator") == "Exists" and t.get("effect") == "NoSchedule" for t in tolerated):
                yield f"{pod.where} takes GPUs and does not tolerate their nodes' taint"


def shared_memory(objects: Sequence[Object]) -> Iterator[str]:
    for pod in ray_pods(objects):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.spec["containers"][0]["volumeMounts"]}
        in_memory = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
        limit = pod.spec["containers"][0]["resources"].get("limits", {}).get("memory", "0Gi")
        if in_memory.get("medium") != "Memory" or size(in_memory["sizeLimit"]) >= size(limit):
            yield f"{pod.where} has no /dev/shm in memory that is smaller than its memory"
        cache = volumes.get(mounts.get("/cache", ""), {}).get("emptyDir", {})
        if "sizeLimit" not in cache:
            yield f"{pod.where} has no bounded cache"
        elif cache_bytes(pod) > _FULL * size(cache["sizeLimit"]):
            yield f"{pod.where} would be evicted: its cache may grow to more than the volume's limit"


def cache_bytes(pod: Pod) -> float:
    """How large the node's cache of remote files may grow in a pod; without a bound, half of the node's disk."""
    variables = {entry["name"]: entry.get("value") for entry in pod.spec["containers"][0]["env"]}
    return parse_bytes(variables[BYTES_VARIABLE]) if BYTES_VARIABLE in variables else math.inf


def replicas(objects: Sequence[Object]) -> Iterator[str]:
    for cluster in cluster_specs(objects):
        if not cluster.get("enableInTreeAutoscaling"):
            yield "a Ray cluster that does not scale"
        for group in cluster["workerGroupSpecs"]:
            if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield f"group {group['groupName']}: minReplicas <= replicas <= maxReplicas does not hold"


def privileges(objects: Sequence[Object]) -> Iterator[str]:
    for pod in pods(objects):
        context = pod.spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("runAsUser") == 0:
            yield f"{pod.where} may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.where} has no seccomp profile"
        if any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.where} shares the host's namespaces"
        if any("hostPath" in volume for volume in pod.spec.get("volumes", [])):
            yield f"{pod.where} mounts the host's files"
        if not (pod.is_head or pod.spec.get("serviceAccountName")) and pod.spec.get(
            "automountServiceAccountToken", True
        ):
            yield f"{pod.where} gets a token of Kubernetes that it does not need"
    contexts = [(pod.where, container.get("securityContext", {})) for pod, container in containers(objects)]
    contexts += [("autoscaler", c["autoscalerOptions"].get("securityContext", {})) for c in cluster_specs(objects)]
    for where, context in contexts:
        if context.get("allowPrivilegeEscalation", True) or context.get("privileged") or context.get("runAsUser") == 0:
            yield f"{where} may gain privileges"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{where} keeps capabilities"


def secrets(objects: Sequence[Object]) -> Iterator[str]:
    if of_kind(objects, "Secret"):
        yield "a Secret among the manifests: the user makes it"
    for pod, container in containers(objects):
        for entry in container.get("env", []):
            if SECRET_NAME.search(entry["name"]) and "secretKeyRef" not in entry.get("valueFrom", {}):
                yield f"{pod.where}: {entry['name']} is not from a Secret"
        if any("secretRef" in source for source in container.get("envFrom", [])):
            yield f"{pod.where} takes a whole Secret: name the keys"
    for thing in of_kind(objects, "ConfigMap"):
        for name, text in thing.get("data", {}).items():
            if SECRET_NAME.search(name.upper()) or re.search(r"(PASSWORD|SECRET\w*|TOKEN)\s*[:=]\s*\S", text):
                yield f"ConfigMap {thing['metadata']['name']}: {name} looks like a secret"


def services(objects: Sequence[Object]) -> Iterator[str]:
    for thing in of_kind(objects, "Service"):
        if thing["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"Service {thing['metadata']['name']} is reached from outside"
    for cluster in cluster_specs(objects):
        head = cluster["headGroupSpec"]
        if head.get("serviceType") != "ClusterIP" or head.get("enableIngress") or "headService" in head:
            yield "the head's Service is not a plain ClusterIP"
    if of_kind(objects, "Ingress"):
        yield "an Ingress among the manifests"


def images(objects: Sequence[Object]) -> Iterator[str]:
    for pod, container in containers(objects):
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        if not tag or tag == "latest":
            yield f"{pod.where}: the image {container['image']} has no fixed tag"


def entrypoints(objects: Sequence[Object]) -> Iterator[str]:
    for job in job_specs(objects):
        words = job["entrypoint"].split()
        if words[:2] != ["edt", "run"] or words[words.index("--address") + 1] != "auto" or "--store" not in words:
            yield f"a job does not run the pipeline on its cluster and store: {job['entrypoint']}"
        if "--no-overlap" not in words:
            yield "a job without --no-overlap"
        if ("rayClusterSpec" in job) == ("clusterSelector" in job):
            yield "a job with no cluster, or with two"
        if "rayClusterSpec" in job and not job.get("shutdownAfterJobFinishes"):
            yield "a job that leaves its cluster behind"
        names = {cluster["metadata"]["name"] for cluster in of_kind(objects, "RayCluster")}
        if "clusterSelector" in job and job["clusterSelector"].get("ray.io/cluster") not in names:
            yield f"a job for a cluster that is not there: {job['clusterSelector']}"


def references(objects: Sequence[Object]) -> Iterator[str]:
    made = {(thing["kind"], thing["metadata"].get("name")) for thing in objects}
    for pod, container in containers(objects):
        wanted = [("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])]
        volumes = pod.spec.get("volumes", [])
        wanted += [("ConfigMap", volume["configMap"]["name"]) for volume in volumes if "configMap" in volume]
        if name := pod.spec.get("serviceAccountName"):
            wanted.append(("ServiceAccount", name))
        yield from (
            f"{pod.where} wants {kind} {name}, which nothing makes" for kind, name in wanted if (kind, name) not in made
        )


def access(objects: Sequence[Object]) -> Iterator[str]:
    """The schedule's rights: RayJobs may be created, nothing else."""
    for role in of_kind(objects, "Role"):
        if role["rules"] != [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]:
            yield f"Role {role['metadata']['name']} may do more than create RayJobs"
    for binding in of_kind(objects, "RoleBinding"):
        if not all(subject.get("namespace") for subject in binding["subjects"]):
            yield "a RoleBinding to a service account without namespace: set `namespace:` in the kustomization"
    if of_kind(objects, "ClusterRole") or of_kind(objects, "ClusterRoleBinding"):
        yield "rights in the whole Kubernetes cluster"


def network(objects: Sequence[Object]) -> Iterator[str]:
    policies = of_kind(objects, "NetworkPolicy")
    if len(policies) != 1:
        yield f"{len(policies)} NetworkPolicies instead of one"
        return
    (policy,) = policies
    selected = policy["spec"]["podSelector"]["matchLabels"]
    for pod in ray_pods(objects):
        if not selected.items() <= pod.template.get("metadata", {}).get("labels", {}).items():
            yield f"the NetworkPolicy does not cover {pod.where}"
    if "Ingress" not in policy["spec"]["policyTypes"]:
        yield "the NetworkPolicy lets everybody in"
    for rule in policy["spec"]["ingress"]:
        peers = [peer.get("podSelector", {}).get("matchLabels") for peer in rule.get("from", [])]
        if not peers or not all(peers):
            yield "the NetworkPolicy has a rule for everybody"
        ports = [port["port"] for port in rule.get("ports", [])]
        if selected not in peers and ports != [8265]:
            yield "the NetworkPolicy lets others to more than the dashboard"


CHECKS: tuple[Check, ...] = (
    authentication, resources, gpu_groups, shared_memory, replicas, privileges, secrets, services, images, entrypoints,
    references, access, network,
)  # fmt: skip


def problems(objects: Sequence[Object]) -> list[str]:
    """All that is wrong with the objects of one kustomization."""
    return [problem for check in CHECKS for problem in check(objects)]


def kubernetes_problems(thing: Object) -> list[str]:
    """What Kubernetes' own schema says of a core object; unknown fields are wrong."""
    try:
        kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{thing['kind']}: {error}"]
    return []


class KubeRay:
    """The schemas of KubeRay's CRDs, from a folder of the operator's files."""

    def __init__(self, folder: Path) -> None:
        self.schemas: dict[tuple[str, str], Mapping[str, Any]] = {}
        for path in sorted(folder.glob("*.yaml")):
            crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            for version in crd["spec"]["versions"]:
                name = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
                self.schemas[name] = closed(version["schema"]["openAPIV3Schema"])

    def problems(self, thing: Object) -> list[str]:
        schema = self.schemas[thing["apiVersion"], thing["kind"]]
        found = jsonschema.Draft7Validator(schema).iter_errors(thing)
        return [f"{error.json_path}: {error.message[:300]}" for error in found]


def closed(schema: Any) -> Any:
    """The schema with unknown fields forbidden wherever the API server would drop them without a word."""
    schema = copy.copy(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = closed(schema[key])
    if "properties" in schema:
        schema["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    return schema
