"""The same MoE layers in torch and Triton, timed as `gpu_times` times ours: medians of graph replays over sets of inputs in turn.

usage: peers.py SHAPES.json [--times TIMES.json] [--json OUT.json] [--budget SECONDS]

SHAPES.json is what `gpu_times --list` prints, TIMES.json what `gpu_times --json` writes: ours stand beside theirs then.

Two layers, both bf16 with SiLU-gated experts and weights [E, 2I, H] and [E, H, I] whatever the model:
- "torch": slots sorted by expert, rows gathered, torch's grouped matmul twice;
- "triton": the design that fused MoE kernels in Triton share: each expert's slots padded to whole tiles, the first product gathers its rows, the
  second scales by the weight of the choice, and a sum over the choices of a token follows. The best of a few tilings counts.
Routing is plain torch in both and slower than a kernel made for it: so `experts` stands apart from `layer`. Compare `experts` with the sum of
gate_up, down and combine, and read `layer` with that in mind.
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch

# The bundle has the kernels beside this file.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../benches/triton"))
try:
    import triton
except ImportError:
    triton = None
else:
    from moe_triton import product_kernel, silu_kernel

DEVICE = "cuda"
BF16 = torch.bfloat16
CACHES_OF_A_ROUND = 4  # as in gpu_times
MOST_SETS = 32
# Rows, columns and depth of a tile, tiles of a group that shares columns of the weight, warps, stages.
TILINGS = {
    "few": [(16, 128, 64, 1, 4, 4), (16, 64, 128, 1, 4, 4)],
    "some": [(64, 128, 64, 8, 4, 4), (64, 256, 64, 8, 8, 3)],
    "many": [(128, 128, 64, 8, 8, 4), (128, 256, 64, 8, 8, 3)],
}


def median_us(passes):
    """Median microseconds of one pass, where a graph holds all of `passes` one behind the other: of 20 replays, fewer of long ones."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for one in passes:
            one()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in passes:
            one()
    times, spent = [], 0.0
    for replay in range(22):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / len(passes))
            spent += begin.elapsed_time(end)
        if len(times) >= 5 and spent > 150:
            break
    return statistics.median(times)


def route(x, router, k):
    """Weights [T, k], renormalised, and experts [T, k]."""
    weights, experts = torch.topk(torch.softmax((x @ router.T).float(), -1), k)
    return weights / weights.sum(-1, keepdim=True), experts


def counts_of(experts, number):
    """Slots of each expert, without asking the device for anything."""
    ones = torch.ones_like(experts)
    return torch.zeros(number, dtype=experts.dtype, device=experts.device).scatter_add_(0, experts, ones)


def grouped_matmul(a, b, ends):
    """a [S, K], b [E, N, K]: each expert's rows times its matrix; `ends` are the ends of the experts' rows."""
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(a, b.transpose(1, 2), offs=ends)


def torch_experts(x, choice, gate_up, down):
    weights, experts = choice
    (tokens, k), flat = experts.shape, experts.flatten()
    order = torch.argsort(flat, stable=True)
    ends = torch.cumsum(counts_of(flat, gate_up.shape[0]), 0, dtype=torch.int32)
    gate, up = grouped_matmul(x[order // k], gate_up, ends).chunk(2, -1)
    rows = grouped_matmul(torch.nn.functional.silu(gate) * up, down, ends)
    slots = torch.empty_like(rows)
    slots[order] = rows * weights.flatten()[order, None].to(rows.dtype)
    return slots.view(tokens, k, -1).sum(1)


def padded_slots(flat, number, tile):
    """Slots by expert, each expert's padded to whole tiles: slot of each row, expert of each tile, rows in use [1], most rows."""
    slots = flat.numel()
    order = torch.argsort(flat, stable=True)
    counts = counts_of(flat, number)
    padded = (counts + tile - 1) // tile * tile
    ends = torch.cumsum(padded, 0)
    start, before = ends - padded, torch.cumsum(counts, 0) - counts
    most = (slots + min(slots, number) * (tile - 1)) // tile * tile
    slot_of_row = torch.full((most,), slots, dtype=torch.int32, device=flat.device)
    sorted_experts = flat[order]
    place = start[sorted_experts] + torch.arange(slots, device=flat.device) - before[sorted_experts]
    slot_of_row[place] = order.int()
    tiles = torch.arange(0, most, tile, device=flat.device)
    expert_of_tile = torch.searchsorted(ends, tiles, right=True).clamp(max=number - 1).int()
    return slot_of_row, expert_of_tile, ends[-1:].int(), most


def triton_experts(x, choice, gate_up, down, tiling):
    bm, bn, bk, group, warps, stages = tiling
    weights, experts = choice
    (tokens, k), slots = experts.shape, experts.numel()
    number, hidden, width = gate_up.shape[0], x.shape[1], down.shape[2]
    rows, tile_experts, used, most = padded_slots(experts.flatten(), number, bm)
    both = torch.empty(slots, 2 * width, dtype=x.dtype, device=x.device)
    h = torch.empty(slots, width, dtype=x.dtype, device=x.device)
    y = torch.empty(slots, hidden, dtype=x.dtype, device=x.device)
    groups = triton.cdiv(most // bm, group) * group

    def product(a, b, out, n, depth, slots_a_row, weighted):
        product_kernel[(groups * triton.cdiv(n, bn),)](
            a, b, out, weights, rows, tile_experts, used, n, depth, slots,
            SLOTS_A_ROW=slots_a_row, WEIGHTED=weighted, BM=bm, BN=bn, BK=bk, GROUP=group, num_warps=warps, num_stages=stages)

    product(x, gate_up, both, 2 * width, hidden, k, False)
    silu_kernel[(slots, triton.cdiv(width, 1024))](both, h, width, BLOCK=1024)
    product(h, down, y, hidden, width, 1, True)
    return y.view(tokens, k, hidden).sum(1)


def ceilings():
    """What a copy and one large product reach on this card."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    copy = 2 * a.numel() / median_us([lambda: b.copy_(a)]) / 1e3
    del a, b
    m = torch.empty(8192, 8192, dtype=BF16, device=DEVICE).normal_()
    product = 2 * 8192**3 / median_us([lambda: m @ m]) / 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {getattr(triton, '__version__', None)}: "
          f"a copy {copy:.0f} GB/s, a product of 8192 bf16 {product:.0f} TFLOP/s", flush=True)
    return {"copy_gbs": copy, "matmul_tflops": product}


def relative(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


def one_shape(model, tokens, weights, cache):
    """Records of one batch: for each peer, of the experts alone and of the whole layer."""
    router, gate_up, down = weights
    number, k, hidden, width = (model[name] for name in ("experts", "top_k", "hidden", "intermediate"))
    slots = tokens * k
    touched = 2 * (min(number, slots) * hidden * width + slots * (hidden + width))
    sets = max(2, min(MOST_SETS, -(-CACHES_OF_A_ROUND * cache // touched)))
    inputs = [torch.empty(tokens, hidden, dtype=BF16, device=DEVICE).normal_() for _ in range(sets)]
    choices = [route(x, router, k) for x in inputs]
    records, want = [], torch_experts(inputs[0], choices[0], gate_up, down) if grouped_works() else None

    def add(peer, tiling, experts):
        got = experts(inputs[0], choices[0])
        if want is not None and relative(got, want) > 0.02:
            raise ArithmeticError(f"off by {relative(got, want):.3f} of torch's grouped product")
        parts = {
            "experts": [lambda x=x, c=c: experts(x, c) for x, c in zip(inputs, choices)],
            "layer": [lambda x=x: experts(x, route(x, router, k)) for x in inputs],
        }
        for operation, passes in parts.items():
            us = median_us(passes)
            records.append({"name": f"{model['model']}/{tokens}", "peer": peer, "tiling": tiling, "operation": operation,
                            "us": us, "tflops": 6 * slots * hidden * width / us / 1e6, "sets": sets})

    if want is not None:
        add("torch", None, lambda x, c: torch_experts(x, c, gate_up, down))
    per_expert = slots / min(number, slots)
    load = "few" if per_expert < 24 else "some" if per_expert < 96 else "many"
    for tiling in TILINGS[load] if triton else []:
        try:
            add("triton", "x".join(map(str, tiling)), lambda x, c: triton_experts(x, c, gate_up, down, tiling))
        except Exception as error:  # a tiling that this card or compiler refuses is no reason to stop
            print(f"  triton {tiling}: {str(error).splitlines()[0][:110]}", flush=True)
    best = {}
    for record in records:
        key = record["peer"], record["operation"]
        if key not in best or record["us"] < best[key]["us"]:
            best[key] = record
    return list(best.values())


def grouped_works():
    """Whether this torch has the grouped product for this card."""
    if not hasattr(grouped_works, "answer"):
        try:
            a = torch.ones(16, 16, dtype=BF16, device=DEVICE)
            grouped_matmul(a, a[None], torch.tensor([16], dtype=torch.int32, device=DEVICE))
            torch.cuda.synchronize()
            grouped_works.answer = True
        except Exception as error:
            print(f"torch's grouped matmul: {str(error).splitlines()[0][:110]}", flush=True)
            grouped_works.answer = False
    return grouped_works.answer


def ours(path):
    """Microseconds of our experts and of our layer by name."""
    if not path or not os.path.exists(path):
        return {}
    with open(path) as file:
        times = json.load(file)["times"]
    table = {}
    for record in times:
        entry = table.setdefault(record["name"], {"experts": 0.0})
        if record["operation"] in ("gate_up", "down", "combine"):
            entry["experts"] += record["us"]
        if record["operation"] == "layer":
            entry["layer"] = record["us"]
    return table


def write_whole(path, value):
    with open(path + ".part", "w") as file:
        json.dump(value, file, indent=1)
    os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes")
    parser.add_argument("--times")
    parser.add_argument("--json")
    parser.add_argument("--budget", type=float, default=600)
    options = parser.parse_args()
    start = time.monotonic()
    with open(options.shapes) as file:
        models = json.load(file)
    mine = ours(options.times)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
              "triton": getattr(triton, "__version__", None), "ceilings": ceilings(), "times": [], "skipped": []}
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
    print(f"{'shape/tokens':<26} {'operation':<8} {'ours us':>10} {'torch us':>10} {'triton us':>10} {'TFLOP/s of each':>24}", flush=True)
    torch.manual_seed(1)
    for model in models:
        weights = None
        for tokens in model["tokens"]:
            name = f"{model['model']}/{tokens}"
            if time.monotonic() - start > options.budget:
                print(f"{name:<26} skipped: no time left", flush=True)
                result["skipped"].append(name)
                continue
            try:
                if weights is None:
                    number, hidden, width = model["experts"], model["hidden"], model["intermediate"]
                    make = lambda *shape: torch.empty(*shape, dtype=BF16, device=DEVICE).normal_(std=shape[-1] ** -0.5)
                    weights = make(number, hidden), make(number, 2 * width, hidden), make(number, hidden, width)
                records = one_shape(model, tokens, weights, cache)
            except torch.cuda.OutOfMemoryError:
                print(f"{name:<26} skipped: out of memory", flush=True)
                result["skipped"].append(name)
                records = []
            result["times"] += records
            for operation in ("experts", "layer"):
                us = {record["peer"]: record["us"] for record in records if record["operation"] == operation}
                us["ours"] = mine.get(name, {}).get(operation)
                flops = 6 * tokens * model["top_k"] * model["hidden"] * model["intermediate"]
                columns = [us.get(peer) for peer in ("ours", "torch", "triton")]
                rates = "/".join(f"{flops / value / 1e6:.1f}" if value else "-" for value in columns)
                if any(columns[1:]):
                    cells = " ".join(f"{value:>10.1f}" if value else f"{'-':>10}" for value in columns)
                    print(f"{name:<26} {operation:<8} {cells} {rates:>24}", flush=True)
            if options.json:
                write_whole(options.json, result)
        del weights
        torch.cuda.empty_cache()
    return 3 if result["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
