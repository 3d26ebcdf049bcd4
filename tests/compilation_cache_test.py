"""Where compiled programs are kept, and that a run goes on where they cannot be."""

import jax
import jax.numpy as jnp
import pytest

from modjax import compilation_cache

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def as_before():
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    "flag, environment, expected",
    [
        (None, {"HOME": "/h"}, "/h/.cache/modjax/compiled"),
        (None, {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/modjax/compiled"),
        (None, {"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": "/j"}, "/j"),
        ("/f", {"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": "/j"}, "/f"),
        (None, {"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": ""}, None),
        ("off", {"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": "/j"}, None),
    ],
)
def test_the_flag_goes_before_jaxs_variable_and_that_before_the_users_cache(
    flag, environment, expected
):
    assert compilation_cache.folder(flag, environment) == expected


def test_small_programs_are_kept_too(tmp_path):
    assert compilation_cache.enable(str(tmp_path / "a" / "b")) == str(tmp_path / "a" / "b")
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))
    assert list((tmp_path / "a" / "b").iterdir())


def test_a_folder_that_cannot_be_written_costs_a_message_only(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compilation_cache.enable(str(tmp_path / "file" / "below")) is None
    assert jax.config.jax_compilation_cache_dir is None
    told = capsys.readouterr().err
    assert "not kept" in told and "Not a directory" in told and "--compilation_cache" in told
    assert jax.jit(lambda x: x + 2)(1) == 3


def test_a_read_only_folder_costs_a_message_only(tmp_path, capsys, monkeypatch):
    # By a stand-in, for root may write anywhere.
    def refuse(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr(compilation_cache.tempfile, "TemporaryFile", refuse)
    assert compilation_cache.enable(str(tmp_path)) is None
    assert "Permission denied" in capsys.readouterr().err


def test_jaxs_own_threshold_is_kept_where_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update(NAMES[1], 7.0)
    compilation_cache.enable(str(tmp_path))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0
