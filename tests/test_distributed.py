"""Two ranks that see different modalities train as one process that sees both batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm.layout import Segment
from mm.orders.masked import Masked
from mm.stream import TokenStream, pack
from mm.testing import tiny
from mm.training import ModelTraining


def batches() -> list[TokenStream]:
    """A batch of text alone, and one with a masked picture: the first has no use for head, mask vector and conditions."""
    build = tiny(Masked(steps=3, rate_condition=True)).build_document
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    draws = torch.Generator().manual_seed(0)
    return [
        pack([build([Segment("text", "only words")], draws), build([Segment("text", "more")], draws)]),
        pack([build([Segment("text", "red", loss=False), Segment("image", picture)], draws)]),
    ]


def module() -> ModelTraining:
    torch.manual_seed(0)
    made = tiny(Masked(steps=3, rate_condition=True))
    return ModelTraining(made.backbone.config, made.modalities, context=made.context, lr=0.01, warmup_steps=0)


def rank(folder: Path) -> None:
    """What each of the two processes runs: two steps of Lightning's own data-parallel training."""
    import lightning.pytorch as pl

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 0:
                gradients = {n: p.grad.clone() for n, p in pl_module.model.named_parameters() if p.grad is not None}
                torch.save(gradients, folder / f"{trainer.global_rank}.pt")

    number = int(os.environ.get("LOCAL_RANK", "0"))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=2, callbacks=[Keep()], logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False,
    )  # fmt: skip
    loader: Any = torch.utils.data.DataLoader([batches()[number]] * 2, batch_size=None)
    trainer.fit(module(), loader)


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:  # a rank that waits for a gradient would wait for ever
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors.decode()[-3000:]
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in range(2))
    model = module().model
    model.loss(pack(batches())).total.backward()
    alone: dict[str, Tensor] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(first) == set(second) >= set(alone)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])
        torch.testing.assert_close(gradient, alone.get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
