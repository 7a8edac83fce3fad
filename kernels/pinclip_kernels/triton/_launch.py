"""What the launch code of every Triton kernel shares: the device asked, and the compilations it can cause."""

import functools
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class CompileCase:
    """One compilation that the launch code can ask for.

    signature: the type of every argument in Triton's spelling ("constexpr" for those in `constexprs`).
    Every pointer is divisible by 16, as it is at run time: kernels are given torch allocations, never
    views into them. Integers are not specialised. needs_dot: tensor core products are expected in the
    machine code. archs: the compute capabilities (90: sm_90) whose launch table leads here.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    num_ctas: int = 1
    maxnreg: int | None = None
    needs_dot: bool = True
    archs: tuple[int, ...] = (80, 90)

    def compile(self, arch: int):
        """The compiled kernel for sm_`arch`; needs no GPU."""
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(self.kernel.arg_names)
            if self.signature[name].startswith("*")
        }
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "num_ctas": self.num_ctas}
        if self.maxnreg:
            options["maxnreg"] = self.maxnreg
        source = ASTSource(self.kernel, self.signature, self.constexprs, aligned)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number, 90 for sm_90; 0 for the CPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of SMs; the interpreter stands in for three, so that a program of it walks several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
