"""What work needs of the driver's disk: another machine makes it again, or its absence is one clear message."""

import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data import digits
from edt_core.data.sources import list_source
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.folder import Folder
from jobs.runtime.process_group import interface_of, use_interface_of_node
from jobs.runtime.reach import check_here, check_server
from jobs.stages import preprocess
from jobs.stages.preprocess import image_source


def test_a_node_writes_the_digits_that_another_one_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = digits.digits_folder(None)
    digits.restore_digits(folder)
    assert len(list_source(SourceConfig(path=str(folder)))) == digits.NUM_DIGITS
    for other in (tmp_path / "sources" / "digits", digits.digits_folder(tmp_path / "store")):
        digits.restore_digits(other)  # of a local store, or of a user
        assert not other.exists()


@pytest.mark.usefixtures("here")
def test_images_that_a_machine_does_not_have_are_not_called_unreadable(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker of a shard does not find the folder that was listed."""
    folder, make = tmp_path / "images", preprocess._make_shards
    shutil.copytree(digits_folder, folder)
    source = image_source(SourceConfig(path=str(folder)))

    def elsewhere(*arguments: object) -> object:
        folder.rename(tmp_path / "on another machine")
        return make(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(preprocess, "_make_shards", elsewhere)
    out = ArtifactWriter(Folder.at(tmp_path / "out"), "images", "0" * 64)
    message = f"the folder of the images {folder} does not exist on {socket.gethostname()}"
    with pytest.raises(UserError, match=re.escape(message)):
        preprocess.preprocess(PreprocessConfig(image_size=8), {"source": source}, out, Silent())


def test_what_is_here_or_on_no_disk_passes(tmp_path: Path) -> None:
    check_here(tmp_path, "the store")
    check_here(None, "the store")
    with pytest.raises(UserError, match=r"the store .* use a disk that all of them mount at this path, or a server"):
        check_here(tmp_path / "store", "the store")


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.7"])
def test_a_server_of_this_machine_alone_is_refused_for_a_cluster_of_several(
    machines: int, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost machine does not count, nor does a second node of one machine."""
    import ray

    nodes = [{"NodeManagerAddress": f"10.0.0.{k}", "Alive": True} for k in range(machines)]
    nodes += [{"NodeManagerAddress": "10.0.0.0", "Alive": True}, {"NodeManagerAddress": "10.0.0.9", "Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    url = f"http://me:secret@{host}:5000"
    if machines == 1 or host == "10.0.0.7":
        check_server(url, "MLFLOW_TRACKING_URI")
        return
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI is http.*on each of the 2 machines") as caught:
        check_server(url, "MLFLOW_TRACKING_URI")
    assert "secret" not in str(caught.value)


def test_gloo_gets_the_interface_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's own choice is the address of the host's name, which may be of this machine alone."""
    import ray

    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    assert interface_of("127.0.0.1") == loopback
    assert interface_of("192.0.2.1") is None  # reserved for examples
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # what is set below is undone with this
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for address, name in (("192.0.2.1", None), ("127.0.0.1", loopback)):
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda address=address: address)
        use_interface_of_node()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "theirs")
    use_interface_of_node()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "theirs"
