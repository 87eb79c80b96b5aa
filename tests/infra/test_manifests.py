"""The Kubernetes manifests: each size with each way to run, rendered as `kubectl apply -k` does, against the schemas of
Kubernetes and KubeRay and what we hold them to. Nothing here ran on a cluster: see docs/cluster.md."""

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from edt_core.training.estimate import host_memory
from edt_core.training.start.kept import Kept, kept
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.setup.disk import disk_needs
from tests.support.manifests import (
    GPU,
    KUBERAY,
    KubeRay,
    Object,
    Pod,
    cache_bytes,
    cluster_specs,
    embedded_jobs,
    job_specs,
    kubernetes_problems,
    of_kind,
    pods,
    problems,
    ray_pods,
)
from tests.support.manifests import size as quantity

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra" / "kuberay"
GUIDE = ROOT / "docs" / "cluster.md"
SIZES = sorted(path.name for path in (INFRA / "overlays").iterdir())
WAYS = ["standing", "run", "raycronjob", "cronjob"]
CRDS = "EDT_KUBERAY_CRDS"
IMAGENET = 1_281_167
_RAY_LIMIT = 0.95  # share of a node's memory above which Ray kills workers, by default
everything = pytest.mark.parametrize(("size", "way"), [(size, way) for size in SIZES for way in WAYS])


@cache
def _built(folder: Path) -> str:
    commands = [["kubectl", "kustomize"], ["kustomize", "build"]]
    command = next((words for words in commands if shutil.which(words[0])), None)
    if command is None:
        pytest.skip("neither kubectl nor kustomize is installed: the manifests cannot be rendered")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(folder: Path) -> list[Object]:
    """The objects of a kustomization, anew at each call."""
    return list(yaml.safe_load_all(_built(folder)))


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Object]]:
    """What a user's kustomization of a size and a way to run gives."""

    def rendered(size: str, way: str) -> list[Object]:
        folder = tmp_path_factory.getbasetemp().resolve() / f"{size}-{way}"
        if not folder.exists():
            folder.mkdir()
            parts = [] if way == "standing" else [os.path.relpath(INFRA / "components" / way, folder)]
            image = {"name": "edt-pipeline", "newName": "registry.example.com/edt", "newTag": "1.2.3"}
            theirs = {
                "resources": [os.path.relpath(INFRA / "overlays" / size, folder)],
                "components": parts,
                "namespace": "edt",
                "images": [image],
            }
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(theirs))
        return built(folder)

    return rendered


@pytest.fixture(scope="module")
def kuberay() -> KubeRay:
    folder = os.environ.get(CRDS)
    if not folder:
        pytest.skip(
            f"{CRDS} is not set: give the folder of the operator's CRDs, crds/ of `helm pull kuberay-operator --untar` "
            "from KubeRay's chart repository, or helm-chart/kuberay-operator/crds of its source"
        )
    schemas = KubeRay(Path(folder))
    assert (KUBERAY, "RayCluster") in schemas.schemas, f"no CRD of RayCluster in {CRDS}={folder}"
    return schemas


@pytest.mark.parametrize("size", SIZES)
def test_an_overlay_builds_as_it_is(size: str) -> None:
    assert of_kind(built(INFRA / "overlays" / size), "RayCluster")


@everything
def test_the_manifests_hold_what_we_promise(size: str, way: str, render: Any) -> None:
    assert problems(render(size, way)) == []


@everything
def test_each_way_has_its_objects(size: str, way: str, render: Any) -> None:
    objects = render(size, way)
    shared = ["ConfigMap", "ConfigMap", "NetworkPolicy"]
    rbac = ["ConfigMap", "CronJob", "RayCluster", "Role", "RoleBinding", "ServiceAccount"]
    own = {"standing": ["RayCluster"], "run": ["RayJob"], "raycronjob": ["RayCronJob"], "cronjob": rbac}
    assert sorted(thing["kind"] for thing in objects) == sorted(shared + own[way])
    assert {thing["metadata"].get("namespace") for thing in objects} == {"edt"}


@everything
def test_kubernetes_knows_every_field(size: str, way: str, render: Any) -> None:
    objects = render(size, way)
    core = [thing for thing in objects if thing["apiVersion"] != KUBERAY]
    made = [{"apiVersion": "v1", "kind": "Pod", **pod.template} for pod in pods(objects)]  # inside KubeRay's as well
    assert core
    assert made
    assert [problem for thing in [*core, *made] for problem in kubernetes_problems(thing)] == []


@everything
def test_kuberay_knows_every_field(size: str, way: str, render: Any, kuberay: KubeRay) -> None:
    objects = render(size, way)
    theirs = [thing for thing in objects if thing["apiVersion"] == KUBERAY] + embedded_jobs(objects)
    assert theirs
    assert [problem for thing in theirs for problem in kuberay.problems(thing)] == []


def _misspell_auth(thing: Object) -> None:
    thing["spec"]["authOption"] = thing["spec"].pop("authOptions")


def _misspell_image(thing: Object) -> None:
    thing["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"


def _wrong_type(thing: Object) -> None:
    thing["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "many"


def _wrong_mode(thing: Object) -> None:
    thing["spec"]["authOptions"]["mode"] = "tokens"


def _no_name(thing: Object) -> None:
    del thing["spec"]["workerGroupSpecs"][0]["groupName"]


@pytest.mark.parametrize("spoil", [_misspell_auth, _misspell_image, _wrong_type, _wrong_mode, _no_name])
def test_the_crds_refuse(spoil: Callable[[Object], None], render: Any, kuberay: KubeRay) -> None:
    (thing,) = of_kind(render("gpu-8", "standing"), "RayCluster")
    assert kuberay.problems(thing) == []
    spoil(thing)
    assert kuberay.problems(thing)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(concurencyPolicy="Forbid"),
        lambda spec: spec.update(concurrencyPolicy=["Forbid"]),
        lambda spec: spec["jobTemplate"]["spec"]["template"]["spec"]["containers"][0].pop("name"),
    ],
)
def test_kubernetes_refuses(spoil: Callable[[Object], object], render: Any) -> None:
    (cron,) = of_kind(render("gpu-8", "cronjob"), "CronJob")
    assert kubernetes_problems(cron) == []
    spoil(cron["spec"])
    assert kubernetes_problems(cron)


def _head(objects: list[Object]) -> Object:
    return cluster_specs(objects)[0]["headGroupSpec"]


def _gpu(objects: list[Object]) -> Object:
    return cluster_specs(objects)[0]["workerGroupSpecs"][1]


def _container(group: Object) -> Object:
    return group["template"]["spec"]["containers"][0]


def _only(objects: list[Object], kind: str) -> Object:
    (thing,) = of_kind(objects, kind)
    return thing


# way to run, what is done to its objects, what must be said
SPOILT: list[tuple[str, Callable[[list[Object]], object], str]] = [
    ("standing", lambda o: cluster_specs(o)[0].pop("authOptions"), "without token authentication"),
    ("run", lambda o: cluster_specs(o)[0]["authOptions"].update(mode="disabled"), "without token authentication"),
    ("raycronjob", lambda o: cluster_specs(o)[0].pop("rayVersion"), "without rayVersion"),
    ("standing", lambda o: _container(_head(o))["resources"].pop("limits"), "has no limits"),
    ("standing", lambda o: cluster_specs(o)[0]["autoscalerOptions"].pop("resources"), "autoscaler has no requests"),
    ("standing", lambda o: _container(_gpu(o))["resources"]["requests"].update({GPU: "1"}), "another number of GPUs"),
    ("standing", lambda o: _gpu(o)["template"]["spec"].pop("tolerations"), "does not tolerate"),
    ("standing", lambda o: _gpu(o).update(minReplicas=2), "does not hold"),
    ("standing", lambda o: _gpu(o)["template"]["spec"]["volumes"][1]["emptyDir"].pop("medium"), "no /dev/shm"),
    ("standing", lambda o: _gpu(o)["template"]["spec"]["volumes"][0]["emptyDir"].clear(), "no bounded cache"),
    ("standing", lambda o: _container(_gpu(o))["env"].pop(0), "would be evicted"),
    ("standing", lambda o: _container(_head(o))["env"][0].update(value="64GiB"), "would be evicted"),
    ("standing", lambda o: _head(o)["template"]["spec"]["securityContext"].update(runAsUser=0), "may run as root"),
    ("standing", lambda o: _container(_gpu(o))["securityContext"].update(privileged=True), "may gain privileges"),
    ("standing", lambda o: _container(_gpu(o))["securityContext"].pop("capabilities"), "keeps capabilities"),
    (
        "standing",
        lambda o: _gpu(o)["template"]["spec"].pop("automountServiceAccountToken"),
        "gets a token of Kubernetes",
    ),
    ("run", lambda o: _container(_head(o))["env"].append({"name": "HF_TOKEN", "value": "x"}), "is not from a Secret"),
    ("run", lambda o: _only(o, "NetworkPolicy").update(kind="Secret"), "a Secret among the manifests"),
    ("run", lambda o: of_kind(o, "ConfigMap")[0]["data"].update(API_TOKEN="x"), "looks like a secret"),
    ("standing", lambda o: _head(o).update(serviceType="LoadBalancer"), "not a plain ClusterIP"),
    ("standing", lambda o: _container(_head(o)).update(image="registry:5000/edt"), "no fixed tag"),
    ("standing", lambda o: _container(_head(o)).update(image="edt:latest"), "no fixed tag"),
    ("raycronjob", lambda o: job_specs(o)[0].update(entrypoint="edt run x --store s --address auto"), "--no-overlap"),
    ("run", lambda o: job_specs(o)[0].pop("shutdownAfterJobFinishes"), "leaves its cluster behind"),
    ("cronjob", lambda o: o.remove(_only(o, "RayCluster")), "a cluster that is not there"),
    ("cronjob", lambda o: o.remove(_only(o, "ServiceAccount")), "which nothing makes"),
    ("cronjob", lambda o: _only(o, "Role")["rules"][0]["verbs"].append("delete"), "more than create RayJobs"),
    ("cronjob", lambda o: _only(o, "RoleBinding")["subjects"][0].pop("namespace"), "without namespace"),
    ("standing", lambda o: _head(o)["template"]["metadata"]["labels"].clear(), "does not cover head"),
    ("standing", lambda o: _only(o, "NetworkPolicy")["spec"]["ingress"].append({}), "a rule for everybody"),
    ("standing", lambda o: _only(o, "NetworkPolicy")["spec"]["ingress"][1].pop("ports"), "more than the dashboard"),
]


@pytest.mark.parametrize(("way", "spoil", "said"), SPOILT, ids=[f"{way}: {said}" for way, _, said in SPOILT])
def test_what_breaks_a_promise_is_found(
    way: str, spoil: Callable[[list[Object]], object], said: str, render: Any
) -> None:
    objects = render("gpu-8", way)
    spoil(objects)
    found = problems(objects)
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize("size", SIZES)
def test_all_ways_run_the_same_on_the_same_cluster(size: str, render: Any) -> None:
    standing, run, scheduled, plain = (render(size, way) for way in WAYS)
    (cluster,) = cluster_specs(standing)
    (job,), (nightly,), (embedded,) = job_specs(run), job_specs(scheduled), job_specs(plain)
    assert job["rayClusterSpec"] == cluster
    assert nightly == job
    assert cluster_specs(plain) == [cluster]
    for field in ("entrypoint", "runtimeEnvYAML", "submissionMode", "activeDeadlineSeconds"):
        assert embedded[field] == job[field]


@pytest.mark.parametrize("size", SIZES)
def test_the_pipeline_of_a_size_fits_it(size: str) -> None:
    config = load_config(str(INFRA / "overlays" / size / "pipeline.yaml"))
    (cluster,) = cluster_specs(built(INFRA / "overlays" / size))
    limits = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in cluster["workerGroupSpecs"]
    ]
    counts = [group["maxReplicas"] for group in cluster["workerGroupSpecs"]]
    gpus = sum(count * int(limit.get(GPU, 0)) for count, limit in zip(counts, limits, strict=True))
    cpus = sum(count * int(limit["cpu"]) for count, limit in zip(counts, limits, strict=True))
    workers = _fewest_workers(config)
    assert workers * config.train.num_cpus_per_worker <= cpus
    if config.train.use_gpu:
        assert workers <= gpus
    if config.source.kind != "digits":
        assert str(config.source.path).startswith("s3://"), "a path of one machine is on no other"


@cache
def _needs(config: str) -> Kept:
    """What a training keeps: all that is needed here of its estimate, which takes ten seconds for EDT-XL."""
    loaded = load_config(config)
    (name,) = loaded.models
    return kept(loaded.train_of(name), loaded.model_of(name, 1000), IMAGENET)


def _gpu_pods() -> list[tuple[str, Pod, int]]:
    """Each GPU pod, where it is defined, and its GPUs: of one, and of eight."""
    base = list(yaml.safe_load_all((INFRA / "base" / "raycluster.yaml").read_text()))
    found = []
    for name, objects in {"base": base, "node-of-8": built(INFRA / "overlays" / "gpu-8")}.items():
        (pod,) = (pod for pod in ray_pods(objects) if pod.where == "group gpu")
        found.append((name, pod, int(pod.spec["containers"][0]["resources"]["limits"][GPU])))
    return found


def _volume(pod: Pod, name: str) -> float:
    (limit,) = (volume["emptyDir"]["sizeLimit"] for volume in pod.spec["volumes"] if volume["name"] == name)
    return quantity(limit)


def test_a_gpu_pod_has_the_memory_of_the_largest_checkpoint() -> None:
    """Workers, one for each GPU, with the copy of EDT-XL's checkpoint, beside a full /dev/shm, as the guides state."""
    needs = _needs("imagenet256-edt-xl")
    assert needs.checkpoint == 6 * needs.weights, "weights, one EMA, four states of Adan in float32"
    gpus = []
    for name, pod, count in _gpu_pods():
        gpus.append(count)
        memory = quantity(pod.spec["containers"][0]["resources"]["requests"]["memory"])
        assert host_memory(needs, count) + _volume(pod, "shm") <= _RAY_LIMIT * memory, name
        stated = f"{(host_memory(needs, count) + _volume(pod, 'shm')) / (1 << 30):.1f} GiB"
        assert stated in GUIDE.read_text(), f"{name} needs {stated}"
    assert gpus == [1, 8]
    for guide in (GUIDE, ROOT / "docs" / "training.md"):
        assert f"{needs.checkpoint / (1 << 30):.1f} GiB" in guide.read_text()


def test_a_full_object_store_fits_the_shared_memory() -> None:
    """Ray takes 30 % of a container's memory for it, in /dev/shm; NCCL shares a few MiB more there."""
    for size_name in SIZES:
        for pod in ray_pods(built(INFRA / "overlays" / size_name)):
            memory = quantity(pod.spec["containers"][0]["resources"]["limits"]["memory"])
            if not pod.is_head:  # its store is smaller, which Ray sees to
                assert 0.3 * memory + (512 << 20) <= _volume(pod, "shm"), (size_name, pod.where)


def test_the_cache_of_a_gpu_pod_has_room_for_imagenet() -> None:
    """Latents at 256 and 512 px with a checkpoint, in a pod of 8 also the image shards. A CPU pod has the shards."""
    for name, pod, count in _gpu_pods():
        for config in ("imagenet256-edt-xl", "imagenet512-edt-s"):
            needs = disk_needs(load_config(config), IMAGENET, 1000)
            together = needs["latents"] + _needs(config).checkpoint + (needs["images"] if count == 8 else 0)
            assert together <= cache_bytes(pod), (name, config)
    (cpu,) = (pod for pod in ray_pods(built(INFRA / "overlays" / "many-nodes")) if pod.where == "group cpu")
    assert disk_needs(load_config("imagenet256-edt-s"), IMAGENET, 1000)["images"] <= cache_bytes(cpu)


def test_the_settings_are_those_that_the_guide_explains() -> None:
    """A variable of NCCL or PyTorch is set only with a reason, and each one that is set has it."""
    lines = (INFRA / "base" / "settings.env").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    own = [name for name in names if re.match(r"(TORCH_)?NCCL_|PYTORCH_|CUDA_", name)]
    assert own == ["NCCL_DEBUG"]
    text = GUIDE.read_text()
    for name in (*own, "NCCL_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_ALLOC_CONF"):
        assert f"`{name}" in text, name


def test_a_machine_that_is_silent_is_given_up_within_a_minute() -> None:
    """On Kubernetes and on one's own machines, by the same settings of Ray."""
    lines = (INFRA / "base" / "settings.env").read_text().splitlines()
    settings = [line for line in lines if line.startswith("RAY_grpc_client_keepalive_")]
    assert sum(int(line.partition("=")[2]) for line in settings) <= 60_000
    ssh = yaml.safe_load((INFRA.parent / "ray" / "cluster.yaml").read_text())
    for setting in settings:
        assert f" {setting} " in ssh["head_start_ray_commands"][-1]
        assert f" {setting} " in ssh["worker_start_ray_commands"][-1]
        assert setting in GUIDE.read_text()


def test_a_head_that_can_restart_has_its_redis(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """KubeRay knows the fields, where its CRDs are at hand; the guide says which Secret to create."""
    here = tmp_path.resolve()
    theirs = {
        "resources": [os.path.relpath(INFRA / "overlays" / "many-nodes", here)],
        "components": [os.path.relpath(INFRA / "components" / "gcs-redis", here)],
    }
    (here / "kustomization.yaml").write_text(yaml.safe_dump(theirs))
    objects = built(here)
    assert problems(objects) == []
    (cluster,) = of_kind(objects, "RayCluster")
    secret = cluster["spec"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in GUIDE.read_text()
    if os.environ.get(CRDS):
        assert request.getfixturevalue("kuberay").problems(cluster) == []


def _fewest_workers(config: PipelineConfig) -> int:
    workers = config.train.num_workers
    return workers if isinstance(workers, int) else workers[0]


def test_the_quickstart_is_the_one_that_ships() -> None:
    assert load_config(str(INFRA / "overlays" / "one-node" / "pipeline.yaml")) == load_config("quickstart")


def test_the_guide_says_which_secret_to_make(render: Any) -> None:
    text = GUIDE.read_text()
    for size in SIZES:
        for pod in pods(render(size, "standing")):
            for entry in pod.spec["containers"][0]["env"]:
                if secret := entry.get("valueFrom", {}).get("secretKeyRef"):
                    assert secret["name"] in text
                    assert f"--from-literal={secret['key']}=" in text


def test_the_guides_kustomization_builds(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    (tmp_path / "edt").symlink_to(ROOT)
    here = tmp_path.resolve() / "mine"
    here.mkdir()
    example = example.replace("../edt/", os.path.relpath(ROOT, here) + "/")
    (here / "kustomization.yaml").write_text(example)
    objects = built(here)
    assert problems(objects) == []
    before = copy.deepcopy(built(INFRA / "overlays" / "gpu-8"))
    settings = [_named(things, "edt-settings")["data"] for things in (before, objects)]
    assert settings[0] != settings[1]


def _named(objects: list[Object], name: str) -> Object:
    (thing,) = [thing for thing in objects if thing["kind"] == "ConfigMap" and thing["metadata"]["name"] == name]
    return thing
