"""edt doctor: each check alone, no traceback whatever happens, a limit on what does not answer, and no debris."""

import json
import re
import shutil
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edt_core.data.digits import NUM_DIGITS
from edt_core.errors import UserError
from edt_core.training.estimate import estimate
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.outcome import Outcome
from pipelines.setup import doctor_checks, doctor_services, ray_probe
from pipelines.setup.disk import disk_needs
from pipelines.setup.doctor import Finding, Setup, examine
from pipelines.setup.dry_run import SourceCounts, source_counts
from pipelines.setup.hardware import Hardware, has_kernels
from tests.support.processes import wait_for
from tests.support.registry import NAME, Registry
from tests.support.runs import artifacts_of
from tests.support.small import SMALL, edt

LAPTOP = Hardware(cpus=2, memory=16 << 30, torch="2.13")
PATIENCE_S = 500  # a check that is to answer is not cut off on a busy machine
IMAGENET = ["source.path=/data", "inception.weights=/nowhere.pth"]


def setup(
    config: PipelineConfig, *, images: object = (NUM_DIGITS, 10), machine: Hardware = LAPTOP, address: str | None = None
) -> Setup:
    counted: Future[SourceCounts] = Future()
    if isinstance(images, tuple | SourceCounts):
        counted.set_result(SourceCounts(*images) if isinstance(images, tuple) else images)
    else:
        assert isinstance(images, Exception)
        counted.set_exception(images)
    found: Future[Hardware] = Future()
    found.set_result(machine)
    return Setup(config, address, None, True, counted, found)


def asked(check: Callable[[Setup], tuple[str, str, str]], who: Setup) -> Finding:
    """What one check finds, as `edt doctor` tells it."""
    (finding,) = examine(who, {"it": (check, PATIENCE_S)})  # type: ignore[dict-item]
    return finding


def digits(store: Path, *assignments: str) -> PipelineConfig:
    return load_config("quickstart", assignments, str(store))


def test_a_check_that_hangs_or_breaks_leaves_the_others_alone(tmp_path: Path) -> None:
    free = threading.Event()

    def hangs(who: Setup) -> tuple[str, str, str]:
        free.wait()
        return "ok", "", ""

    def breaks(who: Setup) -> tuple[str, str, str]:
        raise RuntimeError("first line\nsecond line")

    def refuses(who: Setup) -> tuple[str, str, str]:
        raise UserError("it is full; free some")

    checks = {
        "hangs": (hangs, 0.01),
        "breaks": (breaks, PATIENCE_S),
        "refuses": (refuses, PATIENCE_S),
        "good": (lambda who: ("ok", "fine", ""), PATIENCE_S),
    }
    try:
        found = list(examine(setup(digits(tmp_path)), checks))  # type: ignore[arg-type]
    finally:
        free.set()
    assert [finding.check for finding in found] == list(checks)
    assert [(finding.status, finding.unanswered) for finding in found] == [
        ("fail", True),
        ("fail", False),
        ("fail", False),
        ("ok", False),
    ]
    assert found[1].found == "RuntimeError: first line"
    assert (found[2].found, found[2].remedy) == ("it is full", "free some")


def test_the_store_is_left_as_it_was(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    assert "it is new" in asked(doctor_checks.store, setup(digits(new))).found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").write_text("x")
    assert asked(doctor_checks.store, setup(digits(tmp_path))).status == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    refused = asked(doctor_checks.store, setup(digits(Path("/dev/null/store"))))
    assert (refused.status, bool(refused.remedy)) == ("fail", True)


def test_a_remote_store_is_written_and_read_and_wants_a_server(s3: str) -> None:
    import fsspec

    who = setup(load_config("quickstart", [], f"{s3}/edt"))
    assert asked(doctor_checks.store, who).status == "ok"
    assert fsspec.filesystem("s3").find(s3) == []
    assert "MLFLOW_TRACKING_URI" in asked(doctor_services.mlflow, who).remedy
    nowhere = setup(load_config("quickstart", [], "s3://no-such-bucket-here/edt"))
    assert "no such bucket" in asked(doctor_checks.store, nowhere).found + asked(doctor_checks.store, nowhere).remedy


def test_disk_is_held_against_what_the_configuration_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=10**11))
    assert asked(doctor_checks.disk, setup(digits(tmp_path))).status == "ok"
    full = asked(doctor_checks.disk, setup(digits(tmp_path), images=(10**13, 10)))
    assert full.status == "fail"
    assert "source.limit" in full.remedy
    unknown = asked(doctor_checks.disk, setup(digits(tmp_path), images=UserError("none")))
    assert (unknown.status, unknown.found) == ("warn", "unknown without the images")


def test_more_workers_than_cpus_are_warned_of(tmp_path: Path) -> None:
    assert asked(doctor_checks.cpus, setup(digits(tmp_path))).status == "ok"
    many = digits(tmp_path, "train.num_workers=8", "classifier.num_cpus=3", "sample.num_cpus_per_worker=1")
    told = asked(doctor_checks.cpus, setup(many))
    assert told.status == "warn"
    assert "train.num_workers is 8 with 1 CPUs each, but there are 2 CPUs here" in told.found
    assert told.remedy.startswith("set train.num_workers=2 classifier.num_cpus=2, or use")
    assert asked(doctor_checks.cpus, setup(many, address="auto")).status == "ok"
    elastic = digits(tmp_path, "train.num_workers=[2, 8]")
    assert asked(doctor_checks.cpus, setup(elastic)).status == "ok"  # as many as there are


def test_a_store_that_cannot_be_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    who = setup(digits(Path("/proc/nowhere/store")))
    told = asked(doctor_checks.store, who)
    assert (told.status, told.found.startswith("cannot write to /proc/nowhere/store")) == ("fail", True)
    assert told.remedy == "choose another"
    disk = asked(doctor_checks.disk, who)
    assert (disk.status, disk.remedy) == ("fail", "set another --store")
    assert "free some" not in disk.found


def test_images_are_decoded_and_sideways_photos_named(tmp_path: Path, digits_folder: Path) -> None:
    from PIL import Image

    folder, exif = tmp_path / "photos", Image.Exif()
    shutil.copytree(digits_folder, folder)

    def decoding(*assignments: str) -> Finding:
        given = ("source.kind=image_folder", f"source.path={folder}", *assignments)
        config = digits(tmp_path / "store", *given)
        return asked(doctor_checks.decoding, setup(config, images=source_counts(config.source)))

    assert decoding().status == "ok"
    exif[0x0112] = 3
    Image.new("RGB", (40, 30), "red").save(folder / "0" / "phone.jpg", exif=exif)
    turned = decoding()
    assert (turned.status, "preprocess.rotate_by_exif=true" in turned.remedy) == ("warn", True)
    assert decoding("preprocess.rotate_by_exif=true").status == "ok"
    for number, status in enumerate(("warn", "fail")):
        (folder / "1" / f"broken-{number}.jpg").write_bytes(b"no image")
        broken = decoding("preprocess.rotate_by_exif=true")
        assert (broken.status, f"1/broken-{number}.jpg" in broken.found) == (status, True)
    assert "--set preprocess.max_bad_fraction=0.06" in broken.remedy
    assert decoding("preprocess.rotate_by_exif=true", "preprocess.max_bad_fraction=0.06").status == "warn"
    assert asked(doctor_checks.decoding, setup(digits(tmp_path / "store"))).status == "ok"
    unknown = asked(doctor_checks.decoding, setup(digits(tmp_path / "store"), images=UserError("none")))
    assert (unknown.status, unknown.found) == ("warn", "unknown without the images")


def test_imagenet_takes_what_the_page_on_data_says() -> None:
    """docs/data.md: 82 GB of latents for ImageNet at 256 px, 64 kB an image; 97 kB an image of WebP."""
    needs = disk_needs(load_config("imagenet256-edt-s", IMAGENET), 1_281_167, 1000)
    assert needs["latents"] == 1_281_167 * (64 << 10)
    half = disk_needs(load_config("imagenet256-edt-s", [*IMAGENET, "encode.store=fp16"]), 1_281_167, 1000)
    assert half["latents"] * 2 == needs["latents"]
    assert needs["images"] / 1_281_167 == pytest.approx(97_000 + 4096, rel=0.01)


def test_the_small_run_takes_no_more_disk_than_was_told(first: Outcome, store: Path) -> None:
    made: Counter[str] = Counter()
    for artifact in artifacts_of(first, store):
        made[artifact.manifest.kind] += sum(entry.bytes for entry in artifact.manifest.files)
    config = load_config("quickstart", SMALL)
    assert config.source.limit
    needs = disk_needs(config, config.source.limit, 10)
    assert needs["latents"] == pytest.approx(made["latents"], rel=0.1)
    assert made["checkpoint"] <= needs["checkpoints"]


def gpu_node(*free_gib: int, memory: int = 80) -> Hardware:
    """A machine with GPUs of a free memory each."""
    free = tuple(number << 30 for number in free_gib)
    gpus = ("H100",) * len(free)
    return Hardware(64, 1 << 39, gpus, memory << 30, True, "13.0", "2.28.3", "2.13", free, "580.65.06")


def test_a_gpu_node_is_described() -> None:
    config = load_config("imagenet256-edt-s", IMAGENET)
    found = asked(doctor_checks.device, setup(config, machine=gpu_node(79, 79, 78, 79)))
    assert found.status == "ok"
    for part in ("4 x H100, 80 GiB each", "CUDA 13.0", "driver 580.65.06", "NCCL 2.28.3", "bf16"):
        assert part in found.found
    assert "free memory 79, 79, 78, 79 GiB" in found.found
    used = asked(doctor_checks.device, setup(config, machine=gpu_node(79, 12, 79, 3)))
    assert (used.status, "GPU 1, 3" in used.remedy) == ("warn", True)
    broken = replace(gpu_node(79, 79, 79, 79), gpu_free=())
    assert "free memory unknown" in asked(doctor_checks.device, setup(config, machine=broken)).found
    bare = asked(doctor_checks.device, setup(config, machine=replace(broken, nccl=None, driver=None)))
    assert "no NCCL" in bare.found
    assert "driver unknown" in bare.found


def test_a_gpu_that_torch_cannot_use_is_told_with_the_reason() -> None:
    """The driver is too old, or torch is built for CPUs, or it has no kernels for the card."""
    config = load_config("imagenet256-edt-s", IMAGENET)
    hidden = Hardware(64, 1 << 39, cuda="13.0", torch="2.13.0+cu130", driver="535.54.03")
    old = asked(doctor_checks.device, setup(config, machine=hidden))
    assert (old.status, "driver 535.54.03" in old.found, "CUDA 13.0" in old.found) == ("fail", True, True)
    assert "580 or newer" in old.remedy
    wrong = asked(doctor_checks.device, setup(config, machine=replace(hidden, cuda=None, torch="2.13.0+cpu")))
    assert (wrong.status, "install the CUDA build" in wrong.remedy) == ("fail", True)
    volta = replace(gpu_node(32, 32, 32, 32, memory=32), unsupported=("V100 (compute capability 7.0)",) * 4)
    cannot = asked(doctor_checks.device, setup(config, machine=volta))
    assert cannot.status == "fail"
    assert cannot.found.endswith("; this torch has no kernels for V100 (compute capability 7.0)")
    assert asked(doctor_checks.device, setup(digits(Path("/nowhere")), machine=volta)).status == "ok"


# Of the wheel of torch 2.13 for CUDA 13.0 and, last, with PTX.
WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), WHEEL, True),  # H100
        ((8, 9), WHEEL, True),  # L4, by the kernels for 8.6
        ((7, 0), WHEEL, False),  # V100
        ((6, 0), WHEEL, False),
        ((10, 3), WHEEL, True),
        ((11, 0), WHEEL, False),
        ((13, 0), WHEEL, False),
        ((13, 0), [*WHEEL, "compute_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((7, 5), ["compute_80"], False),
        ((9, 0), ["gfx942"], False),
        ((9, 0), [], False),
    ],
)
def test_a_gpu_runs_kernels_of_its_major_version_and_older_ptx(
    capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    assert has_kernels(capability, built) == runs


def test_the_batch_that_fits_a_gpu_is_told() -> None:
    """The estimate of that micro-batch takes the room that is free, and one more sample takes more than it."""
    config = load_config("imagenet256-edt-s", IMAGENET)
    told = asked(doctor_checks.memory, setup(config, images=(10**6, 1000), machine=gpu_node(80, 9, 80, 80)))
    (largest,) = (int(text.replace(",", "")) for text in re.findall(r"up to ([\d,]+) fits", told.found))
    (name,) = config.models
    for samples, fits in ((largest, True), (largest + 1, False)):
        train = config.train_of(name).model_copy(update={"micro_batch_size": samples})
        assert (estimate(train, config.model_of(name, 1000), 1).memory <= 0.8 * (9 << 30)) == fits
    large = asked(doctor_checks.memory, setup(config, images=(10**6, 1000), machine=gpu_node(80, 80, 80, 80)))
    assert "up to 256, the whole batch, fits" in large.found
    assert "host memory about 18.2 GB of 549.8 GB" in large.found
    little = asked(
        doctor_checks.memory, setup(config, images=(10**6, 1000), machine=replace(gpu_node(80), memory=4 << 30))
    )
    assert (little.status, "more memory" in little.remedy) == ("warn", True)
    saving = load_config("imagenet256-edt-xl", [*IMAGENET, "train.activation_checkpointing=true"])
    assert "fits" in asked(doctor_checks.memory, setup(saving, images=(10**6, 1000), machine=gpu_node(80))).found
    machine = gpu_node(1, 1, 1, 1, memory=1)
    assert (
        "no micro-batch fits" in asked(doctor_checks.memory, setup(config, images=(10**6, 1000), machine=machine)).found
    )


def test_gpus_that_are_wanted_and_not_here_are_told(tmp_path: Path) -> None:
    config = load_config("imagenet256-edt-s", IMAGENET)
    here = asked(doctor_checks.device, setup(config))
    assert (here.status, "requires 4 GPUs" in here.found) == ("fail", True)
    assert asked(doctor_checks.device, setup(config, address="auto")).status == "ok"
    gpus = Hardware(64, 1 << 39, ("H100",) * 8, 80 << 30, True, "13.0", "2.28", "2.13")
    assert asked(doctor_checks.device, setup(config, machine=gpus)).status == "ok"
    assert asked(doctor_checks.memory, setup(config, images=(10**6, 1000), machine=gpus)).status == "ok"
    small = Hardware(8, 1 << 35, ("RTX",) * 4, 1 << 30, True, "13.0", None, "2.13")
    tight = asked(doctor_checks.memory, setup(config, images=(10**6, 1000), machine=small))
    assert (tight.status, "micro_batch_size" in tight.remedy) == ("fail", True)


def test_what_a_cluster_has_is_held_against_the_stages() -> None:
    short = doctor_services._shortage
    config = load_config("imagenet256-edt-s", IMAGENET)
    assert short(config, {"CPU": 64, "GPU": 8}) == ""
    assert "train edt-s-2-256 requires 16 CPUs and 4 GPUs" in short(config, {"CPU": 64, "GPU": 3})
    assert "train" in short(config, {"CPU": 4, "GPU": 8})


def test_published_weights_are_looked_for(tmp_path: Path) -> None:
    missing = asked(doctor_services.features, setup(load_config("imagenet256-edt-s", IMAGENET)))
    assert missing.status == "fail"
    assert "pt_inception-2015-12-05-6726825d.pth" in missing.found + missing.remedy
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"no tensors")
    config = load_config("imagenet256-edt-s", ["source.path=/data", f"inception.weights={wrong}"])
    assert asked(doctor_services.features, setup(config)).status == "fail"
    assert asked(doctor_services.features, setup(digits(tmp_path))).status == "ok"


def test_an_autoencoder_of_another_shape_is_told_with_the_fields_to_set(tmp_path: Path) -> None:
    def found(**values: object) -> Finding:
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = load_config("imagenet256-edt-s", [*IMAGENET, f"autoencoder.pretrained={tmp_path}"])
        return asked(doctor_services.autoencoder, setup(config))

    shape = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 8, 8, 8]}
    assert "no .safetensors" in found(**shape).found
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert found(**shape).status == "ok"
    other = found(**{**shape, "block_out_channels": [8, 8, 8]})
    assert (other.status, "autoencoder.downsample_factor=4" in other.remedy) == ("fail", True)
    assert "latents_std is set without latents_mean" in found(**shape, latents_std=[1.0] * 4).found
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    pickled = found(**shape)
    assert "use_safetensors=False" in pickled.found + pickled.remedy
    (tmp_path / "diffusion_pytorch_model.bin").rename(tmp_path / "diffusion_pytorch_model.safetensors")
    assert "AutoencoderDC and AutoencoderFSQ" in found(_class_name="UNet").found + found(_class_name="UNet").remedy


def test_mlflow_is_asked_and_nothing_is_left_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Registry(tmp_path / "store")
    registry.add("a", 5.0)
    store, client = registry.root, registry.catalog.client
    assert asked(doctor_services.mlflow, setup(digits(store))).status == "ok"
    assert [model.name for model in client.search_registered_models()] == [NAME]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret-word@127.0.0.1:{closed.getsockname()[1]}")
        refused = asked(doctor_services.mlflow, setup(digits(store)))
    assert refused.status == "fail"
    assert "secret-word" not in refused.found + refused.remedy


def test_a_ray_that_cannot_be_joined_is_one_line(tmp_path: Path) -> None:
    found = asked(doctor_services.ray, setup(digits(tmp_path), address="127.0.0.1:1"))
    assert (found.status, len(found.found.splitlines())) == ("fail", 1)
    assert "no Ray cluster answers at 127.0.0.1:1" in found.found
    assert asked(doctor_services.ray, setup(digits(tmp_path))).found == "not started (--quick)"


def test_no_probe_outlives_the_process_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own session would keep it, and what it started, after Ctrl-C or a time limit."""
    parents, killed = iter([7, 7, 1]), []
    monkeypatch.setattr(ray_probe, "_LOOK_SECONDS", 0)
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    monkeypatch.setattr("os.killpg", lambda group, number: killed.append((group, number)))
    ray_probe._end_with(7)
    assert killed == [(0, signal.SIGKILL)]
    assert list(parents) == []


@pytest.mark.extern
def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one that does not listen to SIGTERM, with what it started."""
    hangs = tmp_path / "hangs.sh"
    hangs.write_text(f"#!/bin/sh\ntrap '' TERM\nsleep 600 &\necho $$ > {tmp_path / 'pid'}\nwait; wait; sleep 600\n")
    hangs.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(hangs))
    monkeypatch.setattr(doctor_services, "_RAY_SECONDS", 2)
    monkeypatch.setattr(doctor_services, "_END_SECONDS", 0.2)
    assert doctor_services._run_probe(None, 1, []) == {"error": "no answer in 2 s"}
    wait_for(lambda: not group_of(int((tmp_path / "pid").read_text())))


def group_of(pid: int) -> list[int]:
    """The processes of a group that are more than zombies."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid and state != "Z":
                alive.append(int(stat.parent.name))
    return alive


def test_the_command_tells_all_as_json_and_by_its_exit_code(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient_checks = {name: (check, PATIENCE_S) for name, (check, _) in doctor_checks.CHECKS.items()}
    monkeypatch.setattr(doctor_checks, "CHECKS", patient_checks)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=10**11))
    given = (
        "--quick",
        "--json",
        "--store",
        str(tmp_path / "store"),
        "--set",
        "source.kind=auto",
        "--set",
        "classifier.feature_dim=16",
    )
    done = edt("doctor", *given, "--set", f"source.path={digits_folder}", cwd=tmp_path)
    found = {row["check"]: row for row in json.loads(done.stdout)}
    assert (done.returncode, set(found)) == (0, set(doctor_checks.CHECKS)), done.stdout + done.stderr
    assert "32 images of 4 classes" in found["images"]["found"]
    assert list(tmp_path.iterdir()) == []
    settings = (*given[:1], *given[2:], "--set", f"source.path={digits_folder}", "--set", "name=of $HOME")
    told = edt("doctor", *settings, cwd=tmp_path).stdout
    assert "Next: edt run quickstart --set source.kind=auto --set classifier.feature_dim=16 --set source.path=" in told
    assert f"--set 'name=of $HOME' --store {tmp_path / 'store'}" in told
    failed = edt("doctor", *given, "--set", "source.path=/nowhere", cwd=tmp_path)
    assert (failed.returncode, "Traceback" in failed.stdout + failed.stderr) == (1, False)
    told = edt("doctor", *settings, "--set", "source.path=/nowhere", cwd=tmp_path).stdout
    assert "Next: fix what failed, then run edt doctor quickstart --set source.kind=auto" in told
    assert f"--set source.path=/nowhere --store {tmp_path / 'store'} --quick" in told
    assert edt("doctor", "--set", "train.lr=-1").returncode == 2


def test_a_container_s_small_shared_memory_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB are Docker's default; Ray then keeps its objects on the disk."""
    for size, status in ((64 << 20, "warn"), (2 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, size=size: SimpleNamespace(total=size, free=size))
        found = asked(doctor_checks.shared_memory, setup(digits(tmp_path)))
        assert found.status == status
        assert ("--shm-size" in found.remedy) == (status == "warn")


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.setup import hardware

    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "_CGROUP_LIMITS", (str(limit), str(tmp_path / "of-the-other-version")))
    whole = hardware._memory()
    for text, memory in (("1073741824\n", 1 << 30), ("max\n", whole), (f"{1 << 62}\n", whole)):
        limit.write_text(text)
        assert hardware._memory() == memory
