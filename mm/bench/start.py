"""How soon the program is there, and how much memory its main jobs take. Each is measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec

from mm.bench import Row, Settings, seconds

GIB = float(1 << 30)

GENERATE = """
import sys
from mm.cli import main
status = main(["generate", "red apple, noto", "--to", "image", "--seed", "0", "--out", sys.argv[1] + "/apple.png"])
assert status == 0
"""

# The model and the batch of configs/pictures.yaml: 2,048 positions of captions and pictures. No data are needed.
TRAIN = """
import lightning, torch
from mm.hub import load_pretrained
from mm.interfaces import Encoded
from mm.layout import Segment
from mm.optimization import optimizer_and_schedule
from mm.runtime import tune_cpu
from mm.stream import pack
tune_cpu()
model = load_pretrained("mm-pictures").train()
rng = torch.Generator().manual_seed(0)
documents, count = [], 0
while True:
    picture = Encoded(grid=(8, 8), ids=torch.randint(1024, (64,), generator=rng))
    made = model.build_document([Segment("text", "red apple, noto"), Segment("image", picture)], rng)
    if count + len(made) > 2048:
        break
    documents.append(made)
    count += len(made)
batch = pack(documents)
parameters = [p for n, p in model.named_parameters() if "tokenizer" not in n]
plan = optimizer_and_schedule(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=1, total=9, floor=0.1,
                              matrices=model.backbone.matrices())
for _ in range(3):
    plan["optimizer"].zero_grad()
    model.loss(batch).total.backward()
    plan["optimizer"].step()
"""

# Linux counts in `ru_maxrss` what the parent had when it made the process; `VmHWM` begins with the program.
PEAK = """
import resource
if sys.platform == "linux":
    kib = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
else:
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
print("peak", int(kib) * 1024)
"""


def rows(settings: Settings) -> Iterator[Row]:
    for name, command in (
        ("import mm", [sys.executable, "-c", "import mm"]),
        ("mm --help", [sys.executable, "-m", "mm.cli", "--help"]),
    ):
        yield Row(name, median(command, settings.rounds), "s")
    if find_spec("resource") is None:  # Windows
        return
    yield Row("memory of generating a picture, at most", peak(GENERATE) / GIB, "GiB")
    yield Row("memory of training configs/pictures.yaml, at most", peak(TRAIN) / GIB, "GiB")


def median(command: list[str], rounds: int) -> float:
    """Seconds of a command, after one run that fills the file cache."""
    import statistics

    def run() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    run()
    return statistics.median(seconds(run) for _ in range(rounds))


def peak(code: str) -> float:
    """Bytes that a Python process running `code` had resident at most."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{code}\n{PEAK}", folder], capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise ValueError(f"the measured program failed: {done.stderr.strip().splitlines()[-1][:200]}")
    return float(done.stdout.split("peak")[-1])
