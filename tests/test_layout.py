"""`platform/` is a source root, never a package: the standard library's `platform` wins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = "import platform; print(platform.python_version())"
IN_RAY = """
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR",
         log_to_driver=False, object_store_memory=100_000_000,
         runtime_env={"working_dir": FOLDER})
@ray.remote
def look():
    import os, platform
    return os.path.isdir("platform"), platform.python_version()
there, version = ray.get(look.remote())
assert there, "the working directory did not travel"
print(version)
"""


def _python(*arguments: str, folder: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_platform_has_no_package_file() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_standard_library_wins_under_pytest() -> None:
    import platform

    assert Path(platform.__file__).parent == Path(subprocess.__file__).parent


@pytest.mark.parametrize("how", [["-c", CHECK], ["-m", "platform"], ["-m", "jobs.cli", "--help"]])
def test_standard_library_wins_from_the_repository_root(how: list[str]) -> None:
    assert _python(*how)
    assert _python("-c", CHECK) == sys.version.split()[0]


def test_standard_library_wins_in_a_ray_worker_with_working_dir(tmp_path: Path) -> None:
    # The sources alone: a working directory travels whole, and an environment is gigabytes.
    for name in ("platform", "pipelines", "jobs"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = IN_RAY.replace("FOLDER", repr(str(tmp_path)))
    assert _python("-c", script, folder=tmp_path) == sys.version.split()[0]
