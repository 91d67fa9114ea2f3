"""Torch on the shapes of `cargo bench --bench kernels`, whose JSON lines come on standard input: a line each with torch's
seconds and how many times as fast as torch azr is. Random data, and buffers in turn so that none stays in the L2 cache."""
import json, statistics, sys, time

import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = {"qwen2.5-0.5b": (14, 2, 64), "qwen2.5-1.5b": (12, 2, 128), "qwen2.5-3b": (16, 2, 128), "qwen2.5-7b": (28, 4, 128), "tiny": (2, 1, 64)}
ROTATION = 192e6 if DEVICE == "cuda" else 1


def random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def seconds(make, run, nbytes):
    sets = [make() for _ in range(max(1, min(16, int(ROTATION / nbytes) + 1)))]
    for s in sets:
        run(*s)

    def timed(count):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(count):
            run(*sets[i % len(sets)])
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    # Launches return at once: how many make 10 ms of the device's time?
    count = max(len(sets), min(2000, int(0.01 / timed(len(sets)))))
    return statistics.median(timed(count) for _ in range(5))


def attention(rows, length, heads, backward):
    h, g, c = heads
    def make():
        q, k, v = (random(rows // length, n, length, c).requires_grad_(backward) for n in (h, g, g))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) if backward else None
        return q, k, v, out, random(rows // length, h, length, c)
    if backward:
        return make, lambda q, k, v, out, d: torch.autograd.grad(out, (q, k, v), d, retain_graph=True)
    return make, lambda q, k, v, out, d: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def peer(line):
    """What torch runs for a line: buffers and call, or nothing."""
    kernel, shape = line["kernel"], line["shape"]
    if kernel in ("gemm_forward", "gemm_input", "gemm_weight", "gemm_swiglu"):
        t, n, k = shape
        if kernel == "gemm_input":
            return (lambda: (random(t, n), random(n, k))), torch.mm
        if kernel == "gemm_weight":
            return (lambda: (random(t, n).T, random(t, k))), torch.mm
        make = lambda: (random(t, k), random(n, k))
        if kernel == "gemm_swiglu":
            def gated(x, w):
                gate, up = torch.mm(x, w.T).chunk(2, 1)
                return F.silu(gate) * up
            return make, gated
        return make, lambda x, w: torch.mm(x, w.T)
    if kernel.startswith("attention_forward"):
        return attention(*shape[:2], HEADS[line["model"]], False)
    if kernel.startswith("attention_delta") or kernel.startswith("attention_backward"):
        return attention(*shape[:2], HEADS[line["model"]], True)
    return None


for text in sys.stdin:
    try:
        line = json.loads(text)
    except ValueError:
        continue
    found = peer(line) if "kernel" in line else None
    if found is None:
        continue
    make, run = found
    try:
        time_s = seconds(make, run, 1e9 * line["gb_per_s"] * line["seconds"] + 1)
    except (RuntimeError, TypeError) as e:
        print(json.dumps({"kernel": line["kernel"], "model": line["model"], "shape": line["shape"], "torch": f"SKIPPED: {e}"[:200]}))
        continue
    print(json.dumps({"kernel": line["kernel"], "model": line["model"], "shape": line["shape"], "device": DEVICE,
                      "seconds": line["seconds"], "torch_seconds": time_s, "times_as_fast_as_torch": time_s / line["seconds"]}), flush=True)
