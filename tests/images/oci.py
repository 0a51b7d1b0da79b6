"""OCI archives of one layer, the same bytes for the same contents."""

import gzip
import hashlib
import io
import json
import os
import tarfile


def add(archive, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def tar(write, form=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        write(archive)
    return buffer.getvalue()


def image(name, layer, config, compress=False):
    """An archive with one image of that full name; layer is a tar file."""
    blobs = {}

    def blob(kind, data):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    def document(kind, value):
        return blob(kind, json.dumps(value, sort_keys=True).encode())

    kind = "application/vnd.oci.image"
    if compress:
        packed = blob(f"{kind}.layer.v1.tar+gzip", gzip.compress(layer, mtime=0))
    else:
        packed = blob(f"{kind}.layer.v1.tar", layer)
    described = document(f"{kind}.config.v1+json", {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    })  # fmt: skip
    manifest = document(f"{kind}.manifest.v1+json", {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": described,
        "layers": [packed],
    })
    manifest["annotations"] = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name,
    }
    manifest["platform"] = {"architecture": "amd64", "os": "linux"}
    index = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.index.v1+json",
        "manifests": [manifest],
    }

    def write(archive):
        for directory in ("blobs", "blobs/sha256"):
            add(archive, directory, type=tarfile.DIRTYPE, mode=0o755)
        for digest, data in sorted(blobs.items()):
            add(archive, f"blobs/sha256/{digest}", data, mode=0o644)
        add(archive, "index.json", json.dumps(index, sort_keys=True).encode(), mode=0o644)
        add(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}', mode=0o644)

    return tar(write)


def save(path, data):
    """Writes a file as a whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.new", "wb") as file:
        file.write(data)
    os.rename(f"{path}.new", path)
