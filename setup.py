"""Builds the extension `pinclip_kernels._C`; everything else is in pyproject.toml.

C++ always; the CUDA sources too where nvcc is on the PATH. A CUDA that cannot be used costs a warning and the
GPU walker, never the build.
"""

import re
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile(default=0).install()

CUDA_SOURCES = ["csrc/random_walk.cu"]
# Machine code for Ampere and Hopper, and PTX for what comes after.
CUDA_TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]


class BuildExtension(build_ext):
    def build_extensions(self):
        nvcc = shutil.which("nvcc")
        if nvcc:
            try:
                self._add_cuda(nvcc)
            except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
                print(f"warning: building without CUDA: {error}")
        super().build_extensions()

    def _add_cuda(self, nvcc):
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC"]
        for target in CUDA_TARGETS:
            flags += ["-gencode", target]
        objects = []
        for source in CUDA_SOURCES:
            out = folder / (Path(source).stem + ".cu.o")
            subprocess.run([nvcc, *flags, "-c", source, "-o", str(out)], check=True)
            objects.append(str(out))
        (extension,) = self.extensions
        extension.extra_objects += [*objects, _static_runtime(nvcc)]
        extension.define_macros.append(("PINCLIP_CUDA", "1"))
        extension.libraries += ["dl", "rt"]


def _static_runtime(nvcc):
    """libcudart_static.a of nvcc's own toolkit, so that nothing of CUDA has to be found at import."""
    dry = subprocess.run([nvcc, "--dryrun", CUDA_SOURCES[0]], check=True, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    for place in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        library = Path(top[1].strip(), place, "libcudart_static.a") if top else Path()
        if library.is_file():
            return str(library)
    raise RuntimeError(f"{nvcc} has no libcudart_static.a")


setup(
    ext_modules=[
        Pybind11Extension(
            "pinclip_kernels._C",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.[hc]*")),
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
