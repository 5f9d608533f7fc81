"""Where a run of `configs/medium.py` stopped, in files that travel; of gpu_stages.py.

A checkpoint with the optimizer's state in float32 has 128 MB. Here masters are as they
are, and what the optimizer keeps is rounded to 4 significant bits, in files of at most
15 MB: medium-STEP-PART.bin. So a run in several pieces is not that in one, bit for bit;
one that goes on in its own folder is untouched by this.
"""

import hashlib
import json
import pathlib
import re
import zlib
from typing import Any

PIECE_BYTES = 15_000_000
MOST_BYTES = 62_000_000  # of all pieces
DROPPED_BITS = 20  # of the 23 that a float32 has behind its first one


def _program(config: Any) -> tuple[Any, Any]:
    """The compiled functions of the run, and its mesh."""
    import dataclasses

    import jax

    from vaani_jax.data.corpus import make_tokenizer
    from vaani_jax.data.sources import load_corpus
    from vaani_jax.devices.mesh import make_mesh
    from vaani_jax.train.program import make_program

    tokenizer = make_tokenizer(config.data, load_corpus(config.data, lambda line: None))
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        whole = dataclasses.replace(config, model=model)
        return make_program(whole, mesh, config.num_steps), mesh


def pack_run(config: Any, workdir: pathlib.Path, folder: pathlib.Path) -> int:
    """Writes the last checkpoint of a run in pieces; returns their bytes."""
    import contextlib

    import jax
    import numpy as np

    from vaani_jax.runs.checkpoints import Checkpoints
    from vaani_jax.runs.workdir import Workdir
    from vaani_jax.train.start import restore
    from vaani_jax.train.state import to_items

    program, mesh = _program(config)
    paths = Workdir(workdir)
    checkpoints = Checkpoints(paths.checkpoints, read_only=True)
    with contextlib.closing(checkpoints), jax.set_mesh(mesh):
        found = restore(program, checkpoints, lambda line: None)
        if found is None:
            raise RuntimeError("the run has no checkpoint")
        step, state, _ = found
        meta = checkpoints.meta(step)
    leaves, parts = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(to_items(state))[0]:
        name, array = jax.tree_util.keystr(path), np.asarray(leaf)
        rounded = "opt_state" in name and array.dtype == np.float32 and array.ndim > 0
        packed = _packed(array, rounded)
        leaves.append([name, array.dtype.name, array.shape, rounded, len(packed)])
        parts.append(packed)
    header = {
        "step": step,
        "meta": meta,
        "metrics": paths.metrics.read_text(encoding="utf-8"),
        "leaves": leaves,
    }
    head = json.dumps(header).encode()
    return write_pieces(
        folder, step, b"".join([len(head).to_bytes(8, "little"), head, *parts])
    )


def _packed(array: Any, rounded: bool) -> bytes:
    """An array, byte by byte of all its numbers: high bytes compress well."""
    import numpy as np

    if rounded:
        bits = array.reshape(-1).view(np.uint32).astype(np.uint64)
        half = 1 << (DROPPED_BITS - 1)
        bits = (bits + half) >> DROPPED_BITS << DROPPED_BITS
        array = (np.minimum(bits, 0xFFFFFFFF) >> 16).astype(np.uint16)
    flat = np.ascontiguousarray(array).reshape(-1)
    planes = flat.view(np.uint8).reshape(-1, flat.dtype.itemsize).T
    return zlib.compress(planes.tobytes(), 6)


def _unpacked(data: bytes, dtype: str, shape: Any, rounded: bool) -> Any:
    """The inverse of `_packed`, but for what was rounded."""
    import numpy as np

    kind = np.dtype(np.uint16 if rounded else dtype)
    planes = np.frombuffer(zlib.decompress(data), np.uint8)
    flat = np.ascontiguousarray(planes.reshape(kind.itemsize, -1).T).view(kind)
    if rounded:
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.reshape(shape)


def _header(blob: bytes) -> dict[str, Any]:
    size = int.from_bytes(blob[:8], "little")
    header: dict[str, Any] = json.loads(blob[8 : 8 + size])
    return header


def unpack_run(blob: bytes, config: Any, workdir: pathlib.Path) -> None:
    """Makes a run that goes on where that in pieces stopped."""
    import contextlib

    import jax

    from vaani_jax.devices.mesh import place
    from vaani_jax.runs.checkpoints import Checkpoints
    from vaani_jax.runs.workdir import Workdir
    from vaani_jax.train.state import to_items

    header = _header(blob)
    at = 8 + int.from_bytes(blob[:8], "little")
    program, mesh = _program(config)
    shapes = to_items(program.shapes)
    shardings = jax.tree.leaves(to_items(program.shardings))
    names = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]
    ]
    if names != [leaf[0] for leaf in header["leaves"]]:
        raise RuntimeError("the pieces are of another model: run without --resume")
    arrays = []
    for leaf, sharding in zip(header["leaves"], shardings, strict=True):
        _, dtype, shape, rounded, size = leaf
        array = _unpacked(blob[at : at + size], dtype, shape, rounded)
        arrays.append(place(array, sharding))
        at += size
    items = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    paths = Workdir(workdir)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(paths.checkpoints)
        with contextlib.closing(checkpoints):
            meta = header["meta"]
            checkpoints.save(header["step"], items, meta, loss=meta.get("loss"))
            checkpoints.wait()
    paths.metrics.write_text(header["metrics"], encoding="utf-8")


def write_pieces(folder: pathlib.Path, step: int, blob: bytes) -> int:
    """Writes bytes in pieces, and removes those of earlier steps; returns their sum.

    Raises RuntimeError for more than `MOST_BYTES`.
    """
    from vaani_jax.files import write_atomically

    blob = hashlib.sha256(blob).digest() + blob
    if len(blob) > MOST_BYTES:
        raise RuntimeError(f"the state has {len(blob):,} bytes, above {MOST_BYTES:,}")
    written = set()
    for i, start in enumerate(range(0, len(blob), PIECE_BYTES)):
        path = folder / f"medium-{step}-{i}.bin"
        write_atomically(path, blob[start : start + PIECE_BYTES])
        written.add(path)
    for path in folder.glob("medium-*.bin"):
        if path not in written:
            path.unlink()
    return len(blob)


def unpieced(folder: pathlib.Path) -> bytes | None:
    """The bytes of the latest step whose pieces are whole; None where none are."""
    steps: dict[int, dict[int, pathlib.Path]] = {}
    for path in folder.glob("medium-*.bin"):
        if match := re.fullmatch(r"medium-(\d+)-(\d+)\.bin", path.name):
            step, part = map(int, match.groups())
            steps.setdefault(step, {})[part] = path
    for step in sorted(steps, reverse=True):
        parts = steps[step]
        blob = b"".join(parts[i].read_bytes() for i in sorted(parts))
        if hashlib.sha256(blob[32:]).digest() == blob[:32]:
            return blob[32:]
    return None
