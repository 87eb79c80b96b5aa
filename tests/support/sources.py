"""The layouts in which labelled images come: each a function of the images, giving files and the path to read."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

WNIDS = {"airplane": "n00000001", "bird": "n00000002", "cat": "n00000003"}


Images = list[tuple[str, int, bytes]]  # (name in the folder, label, bytes)


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def class_tars(images: Images) -> dict[str, bytes]:
    """Members in another order than that of their names, as in the published archives."""
    return {
        f"{wnid}.tar": tar_bytes([(name.split("/")[1], data) for name, _, data in images[::-1] if wnid in name])
        for wnid in WNIDS.values()
    }


def samples(images: Images, as_json: bool = False) -> bytes:
    members = []
    for name, label, data in images:
        key = name.removesuffix(".JPEG")
        about = (f"{key}.json", json.dumps({"label": label}).encode()) if as_json else (f"{key}.cls", b"%d" % label)
        members += [(name, data), about]
    return tar_bytes(members)


def parquet_bytes(images: Images) -> bytes:
    """As Hugging Face's `datasets` writes it, in row groups of four."""
    feature = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(WNIDS.values())}}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": name} for name, _, data in images], struct),
            "label": pa.array([label for _, label, _ in images], pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=4)
    return buffer.getvalue()


def image_folder(images: Images) -> tuple[dict[str, bytes], str]:
    return {name: data for name, _, data in images} | {"n00000001/.DS_Store": b"x", "README.txt": b"x"}, ""


def labelled(images: Images) -> tuple[dict[str, bytes], str]:
    text = "file_name,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name, _, _ in images[::-1])
    return {name: data for name, _, data in images} | {"labels.csv": text.encode()}, ""


def train_tar(images: Images) -> tuple[dict[str, bytes], str]:
    return {"t/ILSVRC2012_img_train.tar": tar_bytes(list(class_tars(images).items()))}, "t/ILSVRC2012_img_train.tar"


def renamed_train_tar(images: Images) -> tuple[dict[str, bytes], str]:
    return {"imagenet.tar": tar_bytes(list(class_tars(images).items()))}, "imagenet.tar"


def folder_of_class_tars(images: Images) -> tuple[dict[str, bytes], str]:
    return class_tars(images), ""


def shards(images: Images) -> tuple[dict[str, bytes], str]:
    names = json.dumps(list(WNIDS.values())).encode()
    return {"s-000.tar": samples(images[:10]), "s-001.tar": samples(images[10:], True), "classes.json": names}, ""


def shards_by_braces(images: Images) -> tuple[dict[str, bytes], str]:
    return shards(images)[0], "s-{000..001}.tar"


def parquet_folder(images: Images) -> tuple[dict[str, bytes], str]:
    files = {f"data/train-{k}.parquet": parquet_bytes(part) for k, part in enumerate((images[:10], images[10:]))}
    return files, ""


def parquet_glob(images: Images) -> tuple[dict[str, bytes], str]:
    files, _ = parquet_folder(images)
    return files | {"data/test-0.parquet": b"not read"}, "data/train-*.parquet"
