"""Builds the C++ extension; everything else is in pyproject.toml."""

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile(default=0).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "pinclip_kernels._C",
            ["csrc/bindings.cpp", "csrc/random_walk.cpp"],
            depends=["csrc/philox.h", "csrc/random_walk.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
