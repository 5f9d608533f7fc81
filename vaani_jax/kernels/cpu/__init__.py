"""The native CPU kernels (`kernels.cc`) as JAX functions."""

import ctypes
import functools
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.quant.packed import PackedRows, PackedTernary, relayout

Array = jax.Array


HINT = "install a C++ compiler (Debian and Ubuntu: apt install g++), then"


HINT += " pip install --no-deps -e . in Vaani's folder"


HANDLERS = (
    "vaani_ternary_matmul",
    "vaani_rows_matmul",
    "vaani_attention",
    "vaani_attention_gradient",
    "vaani_rms_norm",
    "vaani_swiglu",
    "vaani_float_matmul",
    "vaani_log_sum_exp",
)


VERSION = 3  # of kernels.cc


def missing() -> str:
    """Why the kernels can't be used; empty where they can."""
    try:
        return "" if _library() else f"the native CPU kernels are not built: {HINT}"
    except OSError as error:
        return f"the native CPU kernels do not load ({error}): {HINT}"
    except AttributeError:
        return f"the native CPU kernels were built of an older version: {HINT}"


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, its functions registered with XLA; None if not built."""
    # In a checkout that several Pythons share, that of this one.
    ours = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    found = sorted(
        pathlib.Path(__file__).parent.glob("_cpu*.so"), key=lambda p: p.name != ours
    )
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    if library.vaani_version() != VERSION:
        raise AttributeError("another version")
    handlers = {name: getattr(library, name) for name in HANDLERS}
    library.vaani_isa.restype = ctypes.c_char_p
    library.vaani_isa_name.restype = ctypes.c_char_p
    library.vaani_isa_name.argtypes = [ctypes.c_int]
    library.vaani_choose_isa.argtypes = [ctypes.c_char_p]
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None  # `missing` was asked first
    return library


def isas() -> list[str]:
    """Instruction sets in the library, in order of preference."""
    names: list[str] = []
    while (name := _loaded().vaani_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def isa() -> str:
    """The instruction set in use: the best that this processor has."""
    return _loaded().vaani_isa().decode()


def choose_isa(name: str) -> bool:
    """Takes another instruction set; False where the processor lacks it."""
    return bool(_loaded().vaani_choose_isa(name.encode()))


def ternary_matmul(
    x: Array,
    packed: tuple[PackedTernary, ...],
    activation_range: Array | None,
    norm: tuple[Array, float] | None = None,
    *,
    halves: bool = False,
    activation_group: int = 0,
) -> list[Array]:
    """See `vaani_jax.kernels.ternary_matmul`: x [M, K] float32, [M, N] float32 each.

    With ``halves``, the norm's result is rounded to bfloat16 before it is quantized.
    With an ``activation_group``, as many inputs share a scale, instead of all of a
    token: a multiple of 32 that divides K, and that divides the groups of every kernel
    or is a multiple of them; there is no ``activation_range`` then.
    """
    _loaded()
    operands: list[Array] = [x]
    for kernel in packed:
        kernel = relayout(kernel, "tiles")
        operands += [kernel.codes, kernel.scale]
    if activation_range is not None:
        operands.append(activation_range.astype(jnp.float32))
    epsilon = 0.0
    if norm is not None:
        operands.append(norm[0].astype(jnp.float32))
        epsilon = norm[1]
    shapes = [
        jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.float32)
        for kernel in packed
    ]
    call = jax.ffi.ffi_call("vaani_ternary_matmul", shapes, vmap_method="sequential")
    return list(
        call(
            *operands,
            tracked=activation_range is not None,
            normed=norm is not None,
            halves=halves,
            epsilon=np.float32(epsilon),
            activation_group=np.int64(activation_group),
        )
    )


def rows_matmul(x: Array, rows: PackedRows) -> Array:
    """[M, V] float32 of x [M, D] float32."""
    _loaded()
    shape = jax.ShapeDtypeStruct((x.shape[0], rows.codes.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call("vaani_rows_matmul", shape, vmap_method="sequential")
    return call(x, rows.codes, rows.scale)


def rms_norm(x: Array, scale: Array, epsilon: float) -> tuple[Array, Array]:
    """See `floats.rms_norm`: [M, D] of x [M, D], and the factors of its rows [M]."""
    _loaded()
    shapes = (
        jax.ShapeDtypeStruct(x.shape, jnp.float32),
        jax.ShapeDtypeStruct(x.shape[:1], jnp.float32),
    )
    call = jax.ffi.ffi_call("vaani_rms_norm", shapes, vmap_method="sequential")
    y, inverse = call(x, scale, epsilon=np.float32(epsilon))
    return y, inverse


def swiglu(gate: Array, up: Array) -> tuple[Array, Array]:
    """``gate sigmoid(gate) up`` and ``sigmoid(gate)`` of [M, F], all float32."""
    _loaded()
    shapes = [jax.ShapeDtypeStruct(gate.shape, jnp.float32)] * 2
    call = jax.ffi.ffi_call("vaani_swiglu", shapes, vmap_method="sequential")
    y, sigmoid = call(gate, up)
    return y, sigmoid


def float_matmul(x: Array, weights: Array, *, columns: bool = False) -> Array:
    """[M, V] of x [M, D] and weights [V, D], or [D, V] as columns; all float32."""
    _loaded()
    width = weights.shape[1 if columns else 0]
    shape = jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32)
    call = jax.ffi.ffi_call("vaani_float_matmul", shape, vmap_method="sequential")
    return call(x, weights, columns=columns)


def log_sum_exp(x: Array) -> Array:
    """[M] float32 of x [M, V] float32."""
    _loaded()
    shape = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    call = jax.ffi.ffi_call("vaani_log_sum_exp", shape, vmap_method="sequential")
    return call(x)


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    slot: Array,
    start: Array,
    scales: tuple[Array, ...] | None = None,
    *,
    weights: bool = False,
) -> tuple[Array, ...]:
    """Attention of queries in slots from ``slot`` [] on: see `attention.py`.

    ``scales`` stand beside codes: of keys, of values and, with 4 bits, centers.

    Reads the slots from ``start`` [B] up to a query's own alone, both int32. Returns
    [B, T, N, H] float32, and, if asked for, the weights [B, N, T, S] float32, which
    are 0 elsewhere; ``q_BTNH`` is float32.
    """
    _loaded()
    batch, length, heads, _ = q_BTNH.shape
    shapes = [jax.ShapeDtypeStruct(q_BTNH.shape, jnp.float32)]
    if weights:
        shape = (batch, heads, length, k_BSKH.shape[1])
        shapes.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    call = jax.ffi.ffi_call("vaani_attention", shapes, vmap_method="sequential")
    return tuple(call(q_BTNH, k_BSKH, v_BSKH, slot, start, *(scales or ())))


def attention_gradient(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    y_BTNH: Array,
    g_BTNH: Array,
    weights_BNTT: Array,
) -> tuple[Array, ...]:
    """What causal attention of all to those before them gets back; all float32.

    Args:
      q_BTNH, k_BTKH, v_BTKH: as `attention` had them, with ``slot`` and ``start`` 0.
      y_BTNH, weights_BNTT: what it returned.
      g_BTNH: the gradient of ``y_BTNH``.

    Returns:
      The gradients of queries, keys and values.
    """
    _loaded()
    given = (q_BTNH, k_BTKH, v_BTKH, y_BTNH, g_BTNH, weights_BNTT)
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in given[:3]]
    call = jax.ffi.ffi_call(
        "vaani_attention_gradient", shapes, vmap_method="sequential"
    )
    return tuple(call(*given))
