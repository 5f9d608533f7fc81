"""What a run takes where it stops between steps: to evaluate, and to sample."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vaani_jax.devices.mesh import batch_parts
from vaani_jax.evaluate.loss import batch_rows
from vaani_jax.inference.generate import (
    PIECE,
    SEGMENT,
    bucket,
    capacity_for,
    decode,
    prefill,
)
from vaani_jax.kernels.floats import compiled_floats
from vaani_jax.train.config import Config
from vaani_jax.train.program import Program

Tree = Any


def bytes_of(tree: Tree) -> int:
    """Bytes on one device of arrays, given as shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_within(compiled: Any) -> int:
    """Bytes on one device of what a call makes: temporaries, and results that don't
    take the place of an argument."""
    analysis = compiled.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.temp_size_in_bytes + results)


def evaluation_bytes(program: Program, config: Config, mesh: Mesh) -> int:
    """Bytes of a device, beside the state, while a batch of windows is evaluated."""
    parts = batch_parts(mesh)
    rows = -(-batch_rows(config.model, parts) // parts) * parts
    length = config.model.max_seq_len + 1
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=program.batch)
    weights = jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=program.batch)
    with jax.set_mesh(mesh), compiled_floats():
        lowered = program.eval_step.lower(program.shapes.variables, tokens, weights)
        return bytes_of((tokens, weights)) + bytes_within(lowered.compile())


def sampling_bytes(program: Program, config: Config, mesh: Mesh) -> int:
    """Bytes of a device, beside the state, while a sample is drawn.

    Of the longest prompt, a token being a byte at least. Stacked layers are copied one
    by one; 0 for a context too short to continue anything.
    """
    model, sample = config.model, config.sample
    context = model.max_seq_len
    if context < 2:
        return 0
    longest = max([1, *(len(prompt.encode()) for prompt in sample.prompts)])
    # Where a prompt is read in pieces, each takes what one does that is as long.
    length = min(PIECE, bucket(min(longest, context), context))
    capacity = capacity_for(longest, sample.max_new_tokens, SEGMENT, context)
    module, variables, copied = config.vaani, program.shapes.variables, 0
    if config.execution.scan_layers:
        copied = bytes_of([tree.get("layers", {}) for tree in variables.values()])
        module = module.changed(scan_layers=False)
        variables = {
            name: _unrolled(tree, model.n_layers, mesh)
            for name, tree in variables.items()
        }

    def here(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=program.everywhere)

    prompt = (variables, here((1, length)), here(()), here((1,)))
    with jax.set_mesh(mesh), compiled_floats():
        read: Any = prefill.lower(module, *prompt, capacity=capacity)
        logits, cache = jax.eval_shape(
            functools.partial(prefill, module, capacity=capacity), *prompt
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        drawn: Any = decode.lower(
            *(module, sample.sampler, SEGMENT, variables, logits, cache, key),
            here(()),
            num_samples=1,
        )
        return copied + max(bytes_within(part.compile()) for part in (read, drawn))


def _unrolled(tree: Tree, n_layers: int, mesh: Mesh) -> Tree:
    """Shapes of `model.transformer.unrolled`, each layer cut as the stack of all is."""
    if "layers" not in tree:
        return tree

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = leaf.sharding
        spec = PartitionSpec(*sharding.spec[1:])
        cut = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=cut)

    rest = {key: value for key, value in tree.items() if key != "layers"}
    layer = jax.tree.map(one, tree["layers"])
    return rest | {f"layers_{i}": layer for i in range(n_layers)}
