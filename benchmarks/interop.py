"""Time and memory of exports and imports of a model of 124 million parameters.

    python -m pip install -r requirements-interop.txt
    python benchmarks/interop.py

Each command runs in a process of its own. Its peak is the system's (VmHWM); what the
same command takes for a model of half a megabyte, Python and JAX, is subtracted, and
the rest compared with the float32 masters. Takes four times the masters on disk.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "export hf": ["export", "--format=hf"],
    "export hf-packed": ["export", "--format=hf-packed"],
    "export q2_0": ["export", "--format=gguf", "--type=q2_0"],
    "export tq2_0": ["export", "--format=gguf", "--type=tq2_0"],
    "export tq1_0": ["export", "--format=gguf", "--type=tq1_0"],
    "export q8_0": ["export", "--format=gguf", "--type=q8_0"],
    "export f16": ["export", "--format=gguf", "--type=f16"],
    "import masters": ["import", "--from=hf"],
    "import packed": ["import", "--from=hf-packed"],
}
CHILD = """
import pathlib, sys
from vaani_jax.cli import main
status = main(sys.argv[1:])
for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        print("peak", int(line.split()[1]) * 1024)
sys.exit(status)
"""
MAKE = """
import pathlib, sys
import jax
from vaani_jax.runs.checkpoints import Checkpoints
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.runs.metadata import Metadata
from vaani_jax.text.tokenizers import ByteTokenizer

small = sys.argv[2] == "small"
model = Vaani().changed(
    vocab_size=256 if small else 50304,
    dim=256 if small else 768,
    n_layers=1 if small else 12,
    n_heads=4 if small else 12,
    ffn_dim=256 if small else 2048,
    max_seq_len=1024,
)
variables = init_variables(model, jax.random.key(0))
meta = Metadata.of(model, ByteTokenizer().to_json()).to_json()
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]) / "checkpoints")
checkpoints.save(1, {"model": variables}, meta)
checkpoints.wait()
checkpoints.close()
print("bytes", sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"])))
"""


def answer(code: str, *arguments: str) -> int:
    """The number in the last line that a process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return int(done.stdout.split()[-1])


def measure(folder: pathlib.Path, name: str) -> tuple[float, int]:
    """Seconds and peak bytes of a command on the model in a folder."""
    command, *flags = COMMANDS[name]
    if command == "import":
        kind = flags[0].removeprefix("--from=")
        source, target = folder / kind, folder / "imported"
        if not source.exists():
            told = ["--workdir", str(folder / "run"), "--output", str(source)]
            answer(CHILD, "export", f"--format={kind}", *told)
        places = ["--from", str(source), "--workdir", str(target)]
        flags = []
    else:
        target = folder / "exported"
        places = ["--workdir", str(folder / "run"), "--output", str(target)]
    began = time.perf_counter()
    peak = answer(CHILD, command, *flags, *places)
    seconds = time.perf_counter() - began
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="", help="for the models; a temporary one")
    parser.add_argument("--only", default="", help="commands, separated by commas")
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    options = parser.parse_args()
    if options.toy:
        options.only = options.only or "export tq2_0,import packed"
    names = options.only.split(",") if options.only else list(COMMANDS)
    with tempfile.TemporaryDirectory(dir=options.folder or None) as room:
        folders = {size: pathlib.Path(room) / size for size in ("small", "large")}
        masters = {
            size: answer(MAKE, str(folder / "run"), "small" if options.toy else size)
            for size, folder in folders.items()
        }
        print(f"masters: {masters['large'] / 1e6:.0f} MB")
        print("| | time | Python and JAX | peak less that | of the masters |")
        print("|---|---|---|---|---|")
        for name in names:
            _, runtime = measure(folders["small"], name)
            seconds, peak = measure(folders["large"], name)
            more = peak - runtime
            print(
                f"| {name} | {seconds:.1f} s | {runtime / 1e6:.0f} MB |"
                f" {more / 1e6:.0f} MB | {more / masters['large']:.2f} x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
