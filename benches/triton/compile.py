"""Compiles the kernels of moe_triton.py for GPUs that need not be there.

usage: compile.py FOLDER < REQUESTS.json

REQUESTS.json is a list of {"name", "kernel": "product" | "silu" | "sum", "arch": 80 | 90, "constants": {...}, "warps", "stages"}. Into FOLDER go
NAME.ptx, whose entry is NAME, and NAME.json: shared memory in bytes, threads, how many parameters follow the function's own (scratch that is null here),
registers and spills by Triton's own ptxas, and the stages that it was compiled with: fewer than were asked for
where those need more shared memory than a block of that GPU may have.
"""

import hashlib
import json
import os
import re
import subprocess
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import moe_triton

# The most shared memory of a block, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED = {80: 163 << 10, 90: 227 << 10}
KERNELS = {
    "product": (moe_triton.product_kernel, {
        "a": "*bf16", "b": "*bf16", "out": "*bf16", "weights": "*fp32", "slot_of_row": "*i32", "expert_of_tile": "*i32", "rows_used": "*i32",
        "n": "i32", "depth": "i32", "slots": "i32"}),
    "silu": (moe_triton.silu_kernel, {"both": "*bf16", "out": "*bf16", "width": "i32"}),
    "sum": (moe_triton.sum_kernel, {"rows": "*bf16", "out": "*bf16", "width": "i32"}),
}


def compiled(request):
    """The kernel, in as many stages as fit."""
    function, types = KERNELS[request["kernel"]]
    names = list(function.arg_names)
    # What Triton's launcher finds out by itself: buffers begin at multiples of 16 bytes, widths are multiples of 16. The number of slots need not be.
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "slots"}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(function, signature, request["constants"], divisible)
    target = GPUTarget("cuda", request["arch"], 32)
    for stages in range(request["stages"], 0, -1):
        kernel = triton.compile(source, target=target, options={"num_warps": request["warps"], "num_stages": stages})
        if kernel.metadata.shared <= SHARED[request["arch"]]:
            return kernel, stages
    raise ValueError(f"{request['name']}: {kernel.metadata.shared} bytes of shared memory in one stage")


def source():
    """What a kernel that was compiled before must have been made by."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in (__file__, moe_triton.__file__):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def is_there(folder, request):
    try:
        with open(os.path.join(folder, request["name"] + ".json")) as file:
            about = json.load(file)
        return about["source"] == source() and about["request"] == request
    except (OSError, ValueError, KeyError):
        return False


def write(folder, request):
    kernel, stages = compiled(request)
    name, types = request["name"], KERNELS[request["kernel"]][1]
    ptx = re.sub(rf"\b{kernel.metadata.name}\b", name, kernel.asm["ptx"])
    ptx = re.sub(rf"\b{kernel.metadata.name}_param_", f"{name}_param_", ptx)
    path = os.path.join(folder, name + ".ptx")
    with open(path, "w") as file:
        file.write(ptx)
    arch = re.search(r"^\.target\s+(\w+)", ptx, re.M).group(1)
    told = subprocess.run([get_ptxas(request["arch"]).path, "-v", f"--gpu-name={arch}", path, "-o", os.devnull], check=True, capture_output=True,
                          text=True).stderr
    params = len(re.findall(r"^\s*\.param\s", ptx, re.M))
    about = {
        "shared_bytes": kernel.metadata.shared,
        "threads": 32 * request["warps"],
        "stages": stages,
        "scratch_params": params - len(types),
        "registers": int(re.search(r"Used (\d+) registers", told).group(1)),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", told))),
        "triton": triton.__version__,
        "source": source(),
        "request": request,
    }
    with open(os.path.join(folder, name + ".json"), "w") as file:
        json.dump(about, file)


def main():
    os.makedirs(sys.argv[1], exist_ok=True)
    requests = [request for request in json.load(sys.stdin) if not is_there(sys.argv[1], request)]
    for done, request in enumerate(requests):
        print(f"\r{done + 1} of {len(requests)}: {request['name']:<60}", end="", file=sys.stderr, flush=True)
        write(sys.argv[1], request)
    if requests:
        print(file=sys.stderr)


if __name__ == "__main__":
    main()
