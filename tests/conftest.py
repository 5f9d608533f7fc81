"""Settings for every test: strict numerics, no network, one cache of compiled code.

The cache lies beside the temporary folders of a session, or where
``JAX_COMPILATION_CACHE_DIR`` says: all workers and all the commands that
tests start as processes share it, so that no large program is compiled twice.
"""

import os
import tempfile

# Before JAX is imported, which reads them once. The first process of a session makes
# the folder: workers and the processes that they start inherit its name.
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vaani-compiled-")
    os.environ["VAANI_TESTS_OWN_CACHE"] = str(os.getpid())
# Smaller programs cost more to write than to compile again.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import shutil

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure() -> None:
    """Removes the cache that this session made."""
    if os.environ.get("VAANI_TESTS_OWN_CACHE") == str(os.getpid()):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VAANI_DATA_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
