"""Collectives are found in texts of XLA, with their bytes and turns."""

import json
import os
import subprocess
import sys

import pytest

from vaani_jax.plan.hlo import Collective, collectives

TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], u8[4,8])) -> (s32[], u8[4,8]) {
  %p = (s32[], u8[4,8]{1,0}) parameter(0)
  %part = u8[1,8]{1,0} get-tuple-element(%p), index=1
  %whole = u8[4,8]{1,0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], u8[4,8]{1,0}) tuple(%i, %whole)
}

%condition (p.1: (s32[], u8[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %loop = (s32[], u8[4,8]{1,0}) while(%init), condition=%condition, body=%body, BACKEND
  %both = (f32[16]{0}, bf16[2]{0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, \
to_apply=%add
  %alone = f32[16]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
  ROOT %next = f32[16]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"12"}}'


def test_a_text_written_by_hand():
    found = collectives(TEXT.replace("BACKEND", KNOWN))
    assert found == [
        Collective("all-gather", "u8", 32, 4, 12),
        Collective("all-reduce", "f32", 64, 2, 1),
        Collective("all-reduce", "bf16", 4, 2, 1),
        Collective("collective-permute", "f32", 64, 2, 1),
    ]
    received = [exchange.received for exchange in found]
    assert received == [12 * 24, 64, 4, 64]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("BACKEND", ""), "number of turns is unknown"),
        (
            TEXT.replace("BACKEND", KNOWN).replace("[2,4]<=[8]", "what?"),
            "unknown groups",
        ),
        ("HloModule empty", "no entry"),
    ],
)
def test_what_cannot_be_read_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        collectives(text)


COMPILED = """
import dataclasses, json, jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from vaani_jax.plan.hlo import collectives

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def turn(total, x):
    whole = jax.lax.all_gather(x, "b", tiled=True)  # [32] of int8
    return total + whole.astype(jnp.float32), None

def step(xs):
    total, _ = jax.lax.scan(turn, jnp.zeros(32), xs)
    return jax.lax.psum(total, "a")

cut = jax.shard_map(
    step, mesh=mesh, in_specs=P(None, "b"), out_specs=P(), check_vma=False
)
text = jax.jit(cut).lower(jnp.ones((5, 32), jnp.int8)).compile().as_text()
print(json.dumps(sorted(map(dataclasses.astuple, collectives(text)))))
"""


def test_a_program_of_this_compiler():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [
        ["all-gather", "s8", 32, 4, 5],
        ["all-reduce", "f32", 128, 2, 1],
    ]
