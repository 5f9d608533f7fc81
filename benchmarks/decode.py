"""Packed inference beside llama.cpp: tokens per second, bytes, bandwidth.

    python benchmarks/decode.py                              # minutes
    python benchmarks/decode.py --shapes=t512 --threads=2 --passes=3 --json
    python benchmarks/decode.py --shapes=bonsai-1.7b --threads=2 --types=Q2_0,TQ2_0

Random ternary weights; the same weights for llama.cpp as GGUF TQ2_0, and as Q4_0, its
fastest type (`pip install llama-cpp-python gguf`; without them only our side is
measured). Embeddings have 8 bits on both sides; those of `bonsai-1.7b`, which is the
shape of Ternary Bonsai 1.7B, are ternary, as all of it is, with a scale per 128 weights
(TQ2_0 has one per 256: it takes every other one). Each measurement is a process of its
own on as many cores as threads; engines take turns, and medians over the passes are
printed. Prefill reads 512 tokens; generation draws 128 from an empty context, ours with
greedy sampling in the loop, llama.cpp's without any sampling.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to measure.

    Attributes:
      layers, dim, ffn, heads, vocabulary: as everywhere.
      kv_heads, head_dim: as in `Architecture`, where 0 stands for the usual.
      family: of its blocks.
      group: inputs of a weight scale; 0 for one scale per matrix, and an embedding,
        which is the head too, in 8 bits. With groups it is ternary, as in Bonsai.
    """

    layers: int
    dim: int
    ffn: int
    heads: int
    vocabulary: int
    kv_heads: int = 0
    head_dim: int = 0
    family: str = "bitnet"
    group: int = 0

    @property
    def linears(self) -> list[tuple[str, str, int, int]]:
        """Path here, name in GGUF, inputs and outputs of each kernel of a layer."""
        size = self.head_dim or self.dim // self.heads
        q, k = self.heads * size, (self.kv_heads or self.heads) * size
        d, f = self.dim, self.ffn
        return [
            ("attn/q_proj", "attn_q", d, q),
            ("attn/k_proj", "attn_k", d, k),
            ("attn/v_proj", "attn_v", d, k),
            ("attn/o_proj", "attn_output", q, d),
            ("ffn/gate_proj", "ffn_gate", d, f),
            ("ffn/up_proj", "ffn_up", d, f),
            ("ffn/down_proj", "ffn_down", f, d),
        ]


SHAPES = {
    "t512": Shape(8, 512, 1536, 8, 256),
    "125m": Shape(12, 768, 2048, 12, 32000),
    "700m": Shape(24, 1536, 4096, 16, 32000),
    "bonsai-1.7b": Shape(28, 2048, 6144, 16, 151_936, 8, 128, "qwen3", 128),
}
USUAL = ("t512", "125m", "700m")  # without --shapes
PREFILL, GENERATE = 512, 128
REPEATS = 3  # within a process
TOYS = {
    "toy": Shape(1, 256, 256, 2, 256),
    "toy-groups": Shape(1, 256, 256, 4, 256, 2, 128, "qwen3", 128),
}
KV_DTYPE = "float32"  # our default; llama.cpp keeps 16 bits


def weights(shape: str, layer: int, index: int, k: int, n: int) -> Any:
    """Random ternary weights [n, k], int8, and their scales [n, groups], float16."""
    import numpy as np

    rng = np.random.default_rng([len(shape), layer, index])
    codes = rng.integers(-1, 2, (n, k), np.int8)
    groups = k // SHAPES[shape].group if SHAPES[shape].group else 1
    scales = np.full((n, groups), 1.2 / k**0.5, np.float16)
    if groups > 1:
        scales *= rng.uniform(0.5, 1.5, scales.shape).astype(np.float16)
    return codes, scales


def embedding(shape: str) -> Any:
    import numpy as np

    chosen = SHAPES[shape]
    rng = np.random.default_rng(0)
    return rng.normal(0, 0.02, (chosen.vocabulary, chosen.dim)).astype(np.float32)


# -- Writing the models -----------------------------------------------------------


def write_vaani(shape: str, folder: pathlib.Path, activations: str) -> None:
    """A packed folder; ``activations`` are by "token", or by groups of so many."""
    import jax.numpy as jnp
    import numpy as np

    from vaani_jax.inference.packed_writer import PackedWriter
    from vaani_jax.model.transformer import Vaani
    from vaani_jax.quant.packed import pack_rows
    from vaani_jax.runs.metadata import Metadata
    from vaani_jax.text.tokenizers import ByteTokenizer

    s = SHAPES[shape]
    module = Vaani().changed(
        vocab_size=s.vocabulary,
        dim=s.dim,
        n_layers=s.layers,
        n_heads=s.heads,
        n_kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        ffn_dim=s.ffn,
        max_seq_len=2048,
        family=s.family,
        sub_norms=s.family == "bitnet",
    )
    if s.group:
        module = module.changed(
            weight_scale="stored",
            weight_granularity="group",
            weight_group=s.group,
            scale_dtype="float16",
            ternary_embedding=True,
        )
    if activations != "token":
        module = module.changed(
            activation_tracking="group", activation_group=int(activations)
        )
    metadata = Metadata.of(module, ByteTokenizer().to_json())
    folder.mkdir()
    shared = "" if s.group else "tensor"
    rounding: Any = "float32" if s.group else "int8"
    with PackedWriter(folder, module, metadata, rounding) as writer:
        if s.group:
            codes, scales = weights(shape, s.layers, 0, s.dim, s.vocabulary)
            writer.ternary(("embedding",), codes, scales)
        else:
            writer.rows(("embedding",), pack_rows(jnp.asarray(embedding(shape))))
        for i in range(s.layers):
            layer = f"layers_{i}"
            for index, (path, _, k, n) in enumerate(s.linears):
                codes, scales = weights(shape, i, index, k, n)
                writer.ternary(
                    (layer, *path.split("/"), "kernel"), codes, scales, shared
                )
        for name, size in writer.left():
            writer.floats(name, np.ones(size, np.float32))  # norms


def write_gguf(shape: str, kind: str, path: pathlib.Path) -> None:
    """A file for llama.cpp; types with larger blocks than groups take fewer scales."""
    import gguf
    import numpy as np
    from gguf.quants import quantize

    from vaani_jax.interop.formats.gguf import add_tensor
    from vaani_jax.interop.formats.gguf_types import TYPES

    s = SHAPES[shape]
    writer = gguf.GGUFWriter(str(path), s.family)
    writer.add_context_length(2048)
    writer.add_embedding_length(s.dim)
    writer.add_block_count(s.layers)
    writer.add_feed_forward_length(s.ffn)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads or s.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    if s.head_dim:
        writer.add_key_length(s.head_dim)
        writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.head_dim or s.dim // s.heads)
    writer.add_vocab_size(s.vocabulary)
    writer.add_tokenizer_model("none")

    def add(name: str, codes: Any, scales: Any) -> None:
        known = TYPES.get(kind)
        if known is not None and known.encode is not None:
            blocks = codes.shape[1] // known.block
            at = np.arange(blocks) * scales.shape[1] // blocks
            data = known.encode(codes, scales[:, at]).reshape(len(codes), -1)
            return add_tensor(writer, name, data, known)
        target = gguf.GGMLQuantizationType[kind]
        wide = np.repeat(
            scales.astype(np.float32), codes.shape[1] // scales.shape[1], 1
        )
        writer.add_tensor(name, quantize(codes * wide, target), raw_dtype=target)

    if s.group:
        add("token_embd.weight", *weights(shape, s.layers, 0, s.dim, s.vocabulary))
    else:
        q8 = gguf.GGMLQuantizationType.Q8_0
        data = quantize(embedding(shape), q8)
        writer.add_tensor("token_embd.weight", data, raw_dtype=q8)
    norms = {"attn_norm": s.dim, "ffn_norm": s.dim}
    if s.family == "bitnet":
        norms |= {"attn_sub_norm": s.dim, "ffn_sub_norm": s.ffn}
    else:
        norms |= {"attn_q_norm": s.head_dim, "attn_k_norm": s.head_dim}
    writer.add_tensor("output_norm.weight", np.ones(s.dim, np.float32))
    for i in range(s.layers):
        for index, (_, name, k, n) in enumerate(s.linears):
            add(f"blk.{i}.{name}.weight", *weights(shape, i, index, k, n))
        for name, size in norms.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- Measuring, in a process of its own --------------------------------------------


def peak() -> float:
    """Largest resident memory so far, MB (that of getrusage outlives an exec)."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure_vaani(path: pathlib.Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    jax.jit(lambda x: x + 1)(jnp.ones(8)).block_until_ready()
    runtime = peak()
    from vaani_jax.inference.generate import decode, prefill
    from vaani_jax.inference.model import load_packed
    from vaani_jax.inference.sampling import SamplerConfig
    from vaani_jax.kernels import backend
    from vaani_jax.model.cache import KVCache

    model = load_packed(path)
    greedy, key = SamplerConfig(temperature=0.0), jax.random.key(0)

    def read() -> Any:
        return prefill(
            model.module,
            model.variables,
            jnp.ones((1, PREFILL), jnp.int32),
            jnp.int32(PREFILL),
            capacity=PREFILL,
            kv_dtype=KV_DTYPE,
        )

    def generate() -> float:
        cache = KVCache.create(model.architecture, 1, 256, KV_DTYPE)
        logits = jnp.zeros((1, model.architecture.vocab_size))
        began = time.perf_counter()
        tokens, *_ = decode(
            model.module,
            greedy,
            GENERATE,
            model.variables,
            logits,
            cache,
            key,
            jnp.int32(0),
        )
        tokens.block_until_ready()
        return GENERATE / (time.perf_counter() - began)

    generate()
    generated = [generate() for _ in range(REPEATS)]
    memory = peak()
    jax.block_until_ready(read())
    prefilled = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(read())
        prefilled.append(PREFILL / (time.perf_counter() - began))
    return {
        "prefill": statistics.median(prefilled),
        "generate": statistics.median(generated),
        "peak": memory,
        "runtime": runtime,
        "kernels": backend(),
    }


def measure_llama(path: pathlib.Path, threads: int) -> dict[str, Any]:
    import ctypes

    import llama_cpp as ll

    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda *_: None
    )
    ll.llama_log_set(silent, ctypes.c_void_p())
    ll.llama_backend_init()
    runtime = peak()
    model = ll.llama_model_load_from_file(
        str(path).encode(), ll.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"llama.cpp can't load {path}")
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = PREFILL + 64, PREFILL, PREFILL
    params.n_threads = params.n_threads_batch = threads
    context = ll.llama_init_from_model(model, params)
    tokens = (ll.llama_token * PREFILL)(*([1] * PREFILL))

    def forward(count: int, steps: int) -> float:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        began = time.perf_counter()
        for _ in range(steps):
            if ll.llama_decode(context, ll.llama_batch_get_one(tokens, count)):
                raise SystemExit("llama_decode failed")
        ll.llama_synchronize(context)
        return count * steps / (time.perf_counter() - began)

    forward(1, 16)
    generated = [forward(1, GENERATE) for _ in range(REPEATS)]
    memory = peak()
    forward(PREFILL, 1)
    return {
        "prefill": statistics.median(forward(PREFILL, 1) for _ in range(REPEATS)),
        "generate": statistics.median(generated),
        "peak": memory,
        "runtime": runtime,
    }


# -- The table ----------------------------------------------------------------------


def machine(threads: int, folder: pathlib.Path) -> dict[str, float]:
    """Best read bandwidth and vpdpbusd rate, where they can be measured."""
    program = folder / "machine"
    source = str(ROOT / "benchmarks" / "machine.cc")
    command = ["c++", "-O3", "-std=c++17", "-march=native", "-pthread", source]
    try:
        if not program.exists():
            subprocess.run([*command, "-o", str(program)], check=True)
        done = subprocess.run(
            pinned([str(program), str(threads)], threads), capture_output=True
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {}


def pinned(command: list[str], threads: int) -> list[str]:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    return ["taskset", "-c", cores, *command]


def have_llama() -> bool:
    code = "import gguf, llama_cpp"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    if done.returncode:
        print(
            "llama-cpp-python or gguf is not installed: its rows are left out",
            file=sys.stderr,
        )
    return done.returncode == 0


def use_toy_sizes() -> None:
    """One tiny shape and a few tokens, in this process."""
    global PREFILL, GENERATE, REPEATS
    PREFILL, GENERATE, REPEATS = 32, 8, 1
    SHAPES.clear()
    SHAPES.update(TOYS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = ",".join(USUAL)
    parser.add_argument("--shapes", default=usual, help=f"of {', '.join(SHAPES)}")
    parser.add_argument(
        "--activations",
        default="token",
        help="ours are rounded by token, or by groups of inputs (llama.cpp's: 32)",
    )
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    parser.add_argument("--types", default="TQ2_0,Q4_0", help="of llama.cpp")
    parser.add_argument("--folder", default="", help="keeps the models for a next time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.toy:
        use_toy_sizes()
        options.threads, options.passes, options.shapes = "1", 1, ",".join(SHAPES)
    if options.work:
        engine, path, threads = options.work
        if engine == "vaani":
            answer = measure_vaani(pathlib.Path(path))
        else:
            answer = measure_llama(pathlib.Path(path), int(threads))
        print(json.dumps(answer))
        return
    temporary = tempfile.TemporaryDirectory()
    folder = pathlib.Path(options.folder or temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = options.types.split(",") if options.types and have_llama() else []
    results: list[dict[str, Any]] = []
    for shape in options.shapes.split(","):
        paths = {"vaani": folder / f"{shape}-vaani-{options.activations}"}
        if not paths["vaani"].exists():
            write_vaani(shape, paths["vaani"], options.activations)
        for kind in kinds:
            paths[kind] = folder / f"{shape}-{kind}.gguf"
            if not paths[kind].exists():
                write_gguf(shape, kind, paths[kind])
        for threads in map(int, options.threads.split(",")):
            answers: dict[str, list[Any]] = {name: [] for name in paths}
            best = machine(threads, folder)
            for _ in range(options.passes):
                for name, path in paths.items():
                    command = [sys.executable, __file__]
                    command += ["--toy"] if options.toy else []
                    command += ["--work", name, str(path), str(threads)]
                    done = subprocess.run(
                        pinned(command, threads),
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                    answers[name].append(json.loads(done.stdout.splitlines()[-1]))
            rows = []
            for name, path in paths.items():
                files = [path] if path.is_file() else list(path.iterdir())
                middle = {
                    key: statistics.median(a[key] for a in answers[name])
                    for key in ("prefill", "generate", "peak", "runtime")
                }
                size = sum(f.stat().st_size for f in files) / 1e6
                rows.append({"engine": name, "file_MB": size, **middle})
            results.append(
                {"shape": shape, "threads": threads, **best, "engines": rows}
            )
            if not options.json:
                show(results[-1])
    if options.json:
        print(json.dumps(results, indent=1))


def show(result: dict[str, Any]) -> None:
    rows = result["engines"]
    ours = rows[0]
    shape = SHAPES[result["shape"]]
    # Of the ternary kernels of the layers, per token.
    macs = shape.layers * sum(k * n for _, _, k, n in shape.linears) / 1e9
    read = result.get("read_GB/s", float("nan"))
    multiply = result.get("vpdpbusd_GMAC/s", float("nan"))
    print(
        f"\n{result['shape']}, {result['threads']} thread(s); this machine reads"
        f" {read:.1f} GB/s, vpdpbusd {multiply:.0f} GMAC/s"
    )
    print(
        f"{'':>8} {'file MB':>8} {'peak MB':>8} {'prefill/s':>10} {'generate/s':>11}"
        f" {'GB/s':>6} {'of read':>8} {'GMAC/s':>7} {'of peak':>8}"
    )
    for row in rows:
        bandwidth = row["file_MB"] * row["generate"] / 1e3
        rate = macs * row["prefill"]
        print(
            f"{row['engine']:>8} {row['file_MB']:8.1f} {row['peak']:8.0f}"
            f" {row['prefill']:10.0f} {row['generate']:11.1f} {bandwidth:6.1f}"
            f" {bandwidth / read:8.0%} {rate:7.0f} {rate / multiply:8.0%}"
        )
    for row in rows[1:]:
        prefill, generate = (ours[k] / row[k] for k in ("prefill", "generate"))
        print(
            f"  ours / {row['engine']}: prefill {prefill:.2f} x,"
            f" generation {generate:.2f} x"
        )
    print(f"  (our runtime alone, before any model: {ours['runtime']:.0f} MB)")


if __name__ == "__main__":
    main()
