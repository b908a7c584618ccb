"""Drives CMake for pip: CMakeLists.txt describes the build, pyproject.toml the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "tts_kernels._ops"  # no Python in it, so no interpreter tag in its file name


class CMakeBuild(build_ext):
    """Configure, build and install the `python` component to where setuptools expects the extensions."""

    def run(self) -> None:
        # Wheels for several Pythons may share a build tree: only the forest's module is compiled for each of them.
        build = Path(os.environ.get("TTS_KERNELS_BUILD_DIR") or Path(self.build_temp) / "cmake").resolve()
        destination = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DTTS_BUILD_TESTS=OFF", *self._generator()]
        options += os.environ.get("CMAKE_ARGS", "").split()
        self._cmake("-S", str(ROOT), "-B", str(build), *options)
        self._cmake("--build", str(build), "--parallel", jobs)
        self._cmake("--install", str(build), "--component", "python", "--prefix", str(destination))

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so" if fullname == LIBRARY else super().get_ext_filename(fullname)

    @staticmethod
    def _generator() -> list[str]:
        try:
            import ninja
        except ImportError:
            return []
        return ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]

    @staticmethod
    def _cmake(*arguments: str) -> None:
        subprocess.run(["cmake", *arguments], check=True)


setup(
    ext_modules=[Extension(name, sources=[]) for name in (LIBRARY, "tts_kernels._host")],
    cmdclass={"build_ext": CMakeBuild},
)
