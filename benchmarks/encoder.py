"""Time, memory and error of SAM-Med3D's encoder: the published formula, this package, and each precision.

    python -m benchmarks encoder [--batch 4] [--repeats 3] [--device cuda] [--compiled] [--weights FILE]

Each row runs in its own process, so its peak memory is its own. Without --weights, weights are random; the cost is the
same. Errors are relative to the published formula, on features of unit variance.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from semisam_o1.encoders.base import Encoder
from semisam_o1.encoders.sam_med3d_encoder import SAMMed3DEncoder, load_sam_med3d

SEED = 0


def options(parser) -> None:
    parser.add_argument("--batch", type=int, default=4, help="volumes per batch in the batch row")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="also measure torch.compile")
    parser.add_argument("--weights", default="", metavar="FILE")
    parser.add_argument("--row", help="run one row only (internal)")


def published_attention(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Attention between all tokens of the padded window, by matrix products and a softmax: (B, g, g, g, width)."""
    batch, side, window, heads = x.shape[0], x.shape[1], attn.window, attn.heads
    x = F.pad(x, (0, 0) + (0, window - side) * 3)
    query, key, value = attn.qkv(x).reshape(batch, window**3, 3, heads, -1).permute(2, 0, 3, 1, 4)
    grid = query.unflatten(2, (window, window, window))
    place = torch.arange(window, device=x.device)
    rows = [t[place[:, None] - place + window - 1] for t in (attn.rel_pos_d, attn.rel_pos_h, attn.rel_pos_w)]
    first = torch.einsum("bndhwc,dzc->bndhwz", grid, rows[0])
    second = torch.einsum("bndhxc,hzc->bndhxz", grid, rows[1])
    third = torch.einsum("bndhyc,yzc->bndhyz", grid, rows[2])
    scores = (query / query.shape[-1] ** 0.5) @ key.transpose(-1, -2)
    cube = scores.unflatten(-1, (window,) * 3).unflatten(2, (window,) * 3)
    cube = cube + first[..., None, None, :] + second[:, :, :, :, None, :, None, :] + third[:, :, :, :, None, None]
    out = cube.flatten(2, 4).flatten(3).softmax(-1) @ value
    out = out.transpose(1, 2).reshape(batch, window, window, window, -1)
    return attn.proj(out[:, :side, :side, :side])


def network(weights: str) -> SAMMed3DEncoder:
    if weights:
        return load_sam_med3d(weights)
    torch.manual_seed(SEED)
    made = SAMMed3DEncoder().eval()
    for name, parameter in made.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            nn.init.normal_(parameter, std=0.02)
    return made


def one_row(options) -> None:
    """Print seconds per volume and peak MiB of one variant as JSON, and save its features."""
    row = json.loads(options.row)
    made = network(options.weights)
    if row["way"] == "published":
        for block in made.blocks:
            block.attn.forward = partial(published_attention, block.attn)
    compiled = row["way"] == "compiled"
    encoder = Encoder(made, "sam_med3d", 16, 128, trained=True, precision=row["precision"], compiled=compiled)
    encoder.error = 0.0  # measured here
    encoder = encoder.to(options.device)
    volumes = torch.randn(row["batch"], 1, 128, 128, 128, generator=torch.Generator().manual_seed(SEED))
    volumes, cuda = volumes.to(options.device), options.device.startswith("cuda")
    first, seconds = None, []
    for _ in range(options.repeats + (row["way"] == "compiled" or cuda)):
        began = time.perf_counter()
        tokens = encoder(volumes)
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / row["batch"])
        first = tokens[0].float().cpu().numpy()
    np.save(row["features"], first)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": float(np.median(seconds[-options.repeats :])), "mib": peak / 2**20}))


def run(options) -> None:
    if options.row:
        one_row(options)
        return
    rows = [("published", 1, "float32"), ("ours", 1, "float32"), ("ours", options.batch, "float32")]
    rows += [("compiled", 1, "float32")] if options.compiled else []
    rows += [("ours", 1, "bfloat16")] + ([("ours", 1, "float16")] if options.device != "cpu" else [])
    print(f"\nSAM-Med3D's encoder, {torch.get_num_threads()} threads, {options.device}", end="")
    print("" if options.weights else ", RANDOM WEIGHTS")
    head = f"{'way':12}{'batch':>6} {'precision':10}{'s/volume':>9}{'times':>7}{'peak MiB':>10}{'largest error':>15}"
    print(head, flush=True)
    plain = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for way, batch, precision in rows:
            file = Path(folder) / f"{way}{batch}{precision}.npy"
            row = json.dumps({"way": way, "batch": batch, "precision": precision, "features": str(file)})
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "encoder", "--row", row]
            command += ["--device", options.device, "--repeats", str(options.repeats), "--weights", options.weights]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                reason = (ended.stderr.strip().splitlines() or ["killed"])[-1]
                print(f"{way:12}{batch:6} {precision:10} did not run: {reason}", flush=True)
                continue
            found = json.loads(ended.stdout.splitlines()[-1])
            if way == "published":
                plain = found["seconds"]
            reference = np.load(Path(folder) / "published1float32.npy")
            error = np.abs(np.load(file) - reference).max()
            times = plain / found["seconds"]
            figures = f"{found['seconds']:9.2f}{times:7.1f}{found['mib']:10.0f}{error:15.1e}"
            print(f"{way:12}{batch:6} {precision:10}{figures}", flush=True)
