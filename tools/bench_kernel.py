"""Peak memory and time of the log-prob kernel against naive full-logits autograd, side by side in one run.

    python -m tools.bench_kernel --tokens 1024 --vocabulary 151665 --hidden 256

Each measurement is a process of its own: its peak resident memory above what inputs, weights and gradients take anyway,
and the time of one forward and backward. Pairs alternate; medians and the range are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def measure(kind: str, tokens: int, vocabulary: int, hidden: int, threads: int) -> dict[str, float]:
    """One forward and backward in this process; bytes are of resident memory."""
    import torch

    from lightning_vlm.losses.kernel import token_scores

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden, requires_grad=True)
    w = torch.randn(vocabulary, hidden).mul_(0.02).requires_grad_()
    y = torch.randint(vocabulary, (tokens,))
    # Gradients exist anyway; their memory is not the kernel's.
    h.grad, w.grad = torch.zeros_like(h), torch.zeros_like(w)
    token_scores(h[:2].detach(), w.detach()[:100], y[:2] % 100)  # libraries loaded before the base is read
    base = peak_bytes()
    start = time.perf_counter()
    if kind == "naive":
        logp = (h @ w.T).float().log_softmax(-1)
        picked, entropy = logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    else:
        scores = token_scores(h, w, y)
        picked, entropy = scores.logprobs, scores.entropies
    (-picked.mean() - 0.01 * entropy.mean()).backward()
    return {"seconds": time.perf_counter() - start, "bytes": peak_bytes() - base, "loss": float(-picked.mean())}


def peak_bytes() -> int:
    """Highest resident memory of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Alternate both kinds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="scored tokens of a micro-batch (default 1024)")
    parser.add_argument("--vocabulary", type=int, default=151_665, help="vocabulary size (default 151665)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--repeats", type=int, default=3, help="alternating pairs (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", help="write the figures to this file as well")
    parser.add_argument("--one", choices=["naive", "kernel"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = [args.tokens, args.vocabulary, args.hidden, args.threads]
    if args.one:
        print(json.dumps(measure(args.one, *shape)))
        return
    runs: dict[str, list[dict[str, float]]] = {"naive": [], "kernel": []}
    flags = [f"--{k}={v}" for k, v in zip(("tokens", "vocabulary", "hidden", "threads"), shape, strict=True)]
    for _ in range(args.repeats):
        for kind, measured in runs.items():
            command = [sys.executable, "-m", "tools.bench_kernel", "--one", kind, *flags]
            measured.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    gap = abs(runs["naive"][0]["loss"] - runs["kernel"][0]["loss"])
    shape_text = f"{args.tokens} tokens, V={args.vocabulary}, D={args.hidden}, float32, {args.threads} thread(s)"
    print(f"{shape_text}; |Δloss| {gap:.1e}")
    result = {"tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden}
    for kind, measured in runs.items():
        for what, unit in (("bytes", 2**20), ("seconds", 1)):
            values = [m[what] / unit for m in measured]
            result[f"{kind}_{what}"] = statistics.median(values)
            name = "peak MiB above inputs and gradients" if what == "bytes" else "seconds, forward and backward"
            print(f"  {kind:7} {statistics.median(values):10.2f} [{min(values):.2f}, {max(values):.2f}]  {name}")
    print(f"  memory ratio {result['kernel_bytes'] / result['naive_bytes']:.3f}", end=", ")
    print(f"time ratio {result['kernel_seconds'] / result['naive_seconds']:.2f} (kernel / naive)")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
