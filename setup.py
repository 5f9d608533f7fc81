"""Builds the native CPU kernels, and takes the configs along.

Everything else is in pyproject.toml.

Where no compiler is found the package installs without them, and says so when a model
is run (`vaani_jax.kernels`).
"""

import jax
from setuptools import Extension, find_packages, setup

setup(
    # The configs lie beside the package in a checkout, in it where it is installed.
    packages=[*find_packages(include=["vaani_jax*"]), "vaani_jax.configs"],
    package_dir={"vaani_jax.configs": "configs"},
    ext_modules=[
        Extension(
            "vaani_jax.kernels.cpu._cpu",
            sources=["vaani_jax/kernels/cpu/kernels.cc"],
            depends=[
                "vaani_jax/kernels/cpu/floats.inc",
                "vaani_jax/kernels/cpu/groups.inc",
                "vaani_jax/kernels/cpu/attention.inc",
            ],
            include_dirs=[jax.ffi.include_dir()],
            language="c++",
            optional=True,
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                # Products and sums round one by one where the source says so.
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wno-maybe-uninitialized",
                "-Wno-psabi",
            ],
        )
    ],
)
