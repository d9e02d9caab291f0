import os
import subprocess
import sys

import jax
import pytest

from grokkit import compilation_cache

DIRECTORY = "jax_compilation_cache_dir"
MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"

SCRIPT = """
import sys
import jax
import grokkit

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
for n in (1, 8):
    lm = grokkit.load(sys.argv[1], mesh=grokkit.make_mesh(1, n), progress=False)
    print(float(abs(lm([[5, 6, 7, 8]]).logits).sum()))
print(len(hits), file=sys.stderr)
"""


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """The cache switched on, in an empty home; JAX's settings are put back."""
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, MIN_SECONDS)}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(compilation_cache.SWITCH, raising=False)
    jax.config.update(DIRECTORY, None)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def test_second_process_finds_what_the_first_compiled(golden_dir, tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), compilation_cache.SWITCH: "on"}

    def run():
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT, str(golden_dir)],
            check=True, capture_output=True, text=True, env=environment,
        )  # fmt: skip

    def programs():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*-cache")}

    first, kept = run(), programs()
    second = run()
    assert first.stderr == "0\n"
    assert sum(name.startswith("jit__forward") for name in kept) == 2  # for 1 and 8 devices
    assert int(second.stderr) >= 2  # and nothing else was said
    assert programs() == kept
    assert second.stdout == first.stdout


def test_a_chosen_threshold_stays(settings):
    jax.config.update(MIN_SECONDS, 3.0)
    assert compilation_cache.enable() is not None
    assert getattr(jax.config, MIN_SECONDS) == 3


def test_folder_is_the_users_own(settings, tmp_path):
    folder = compilation_cache.enable()
    assert folder is not None and folder.parent == tmp_path / ".cache" / "grokkit"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert getattr(jax.config, DIRECTORY) == str(folder)
    assert getattr(jax.config, MIN_SECONDS) == 0
    assert compilation_cache.enable() == folder


def test_named_folders(settings, tmp_path):
    settings.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compilation_cache.enable().parent == tmp_path / "xdg" / "grokkit"
    jax.config.update(DIRECTORY, None)
    settings.setenv("XDG_CACHE_HOME", "relative")
    assert compilation_cache.enable().parent == tmp_path / ".cache" / "grokkit"
    jax.config.update(DIRECTORY, None)
    settings.setenv(compilation_cache.SWITCH, str(tmp_path / "mine"))
    assert compilation_cache.enable().parent == tmp_path / "mine"


@pytest.mark.parametrize("word", ["0", "off", "OFF", "false", "no"])
def test_off(settings, tmp_path, word):
    settings.setenv(compilation_cache.SWITCH, word)
    assert compilation_cache.enable() is None
    assert getattr(jax.config, DIRECTORY) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_jax_was_given_stays(settings, tmp_path):
    jax.config.update(DIRECTORY, str(tmp_path / "theirs"))
    assert compilation_cache.enable() is None
    assert getattr(jax.config, DIRECTORY) == str(tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(settings, tmp_path):
    (tmp_path / ".cache").write_text("a file in its place")
    assert compilation_cache.enable() is None
    assert getattr(jax.config, DIRECTORY) is None


def test_oldest_programs_go_first(settings, tmp_path):
    folder = compilation_cache.enable()
    for age, name in enumerate("abcd"):
        path = folder / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    (folder / "interrupted-cache").touch()
    (folder / "note").write_bytes(bytes(1000))
    settings.setattr(compilation_cache, "_MAX_BYTES", 250)
    compilation_cache.enable()
    assert sorted(path.name for path in folder.iterdir()) == ["a-cache", "b-cache", "note"]
