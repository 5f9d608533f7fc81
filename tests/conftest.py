"""Settings for every test: strict numerics, no network, a cache of their own."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VAANI_DATA_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
