"""One evaluation a block: a trained model of the blocks order (the teacher) distilled into a student of one step.

Three networks of one shape, all begun as the teacher (Liu et al. 2024, ARDiT, section 3.5; Luo et al. 2023, Diff-Instruct;
Yin et al. 2024, distribution matching distillation):

- the *student* g(w) = w − v_ξ(w, t = 1) makes every block of a training batch from noise w, each with the true clean blocks
  before it as its context;
- the *fake* network v_η learns the velocity of what the student makes, by flow matching;
- the *teacher* v_θ stays. What the student made is corrupted again to x_t, and the student goes down the difference of the two
  velocities there, the direction in which its distribution comes nearer to the teacher's (the integral of their Kullback–
  Leibler divergence over t): the loss |x̂ + sg(v_θ − v_η − x̂)|² has twice that difference as its gradient.

Beside it the student is held to β·|g(w) − ODE(w)|² on pairs of noise and what the teacher's sampler makes of it. In the packed
training layout each pass of the teacher moves all blocks of a batch by a step, so that a batch of pairs costs as many passes
as the sampler has steps. Pairs are made once, kept with their batches, and drawn again.

The networks meet in detached tensors only, so that one optimizer steps all that learns, in one backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm.adopt import fingerprint
from mm.attention import Packed
from mm.diffusion import TIME, Plan, Process
from mm.hub import load_pretrained
from mm.model import MultimodalModel
from mm.optimization import optimizer_and_schedule
from mm.stream import POSITIONAL, RECORDS, Placed, TokenStream
from mm.training import ModelTraining


class NoisyBlocks:
    """The noisy copies of one modality in a packed training batch: R vectors in B blocks, at a time and with contents of one's
    own."""

    def __init__(self, stream: TokenStream, name: str) -> None:
        self.stream, self.name = stream, name
        record = stream.latents.get(name)
        self.rows = torch.zeros(0, dtype=torch.int64, device=stream.device)
        self.places = self.rows
        if record is not None:
            self.rows = (stream.copy[record.index] > 0).nonzero()[:, 0]
            self.places = record.index[self.rows]
        key = torch.stack((stream.document[self.places], stream.order[self.places], stream.copy[self.places]))
        self.count, self.block = 0, self.places
        if len(self.places):
            unique, self.block = key.unique(dim=1, return_inverse=True)
            self.count = unique.shape[1]
        self.plan = Packed(stream)

    def __len__(self) -> int:
        return len(self.rows)

    def draw_time(self, process: Process) -> Float[Tensor, " R"]:
        """A time for training, one a block."""
        return process.draw_time(self.count).to(self.stream.device)[self.block]

    def filled(self, x: Float[Tensor, "R D"], time: Float[Tensor, " R"]) -> TokenStream:
        """The batch with other contents in its noisy blocks, corrupted to the given times already."""
        stream = self.stream
        record = stream.latents[self.name]
        values = record.values.float().index_copy(0, self.rows, x.float())
        times = stream.time.index_copy(0, self.places, time)
        changed: dict[str, Any] = {"latents": {**stream.latents, self.name: replace(record, values=values)}}
        if TIME in stream.inject:
            told = stream.inject[TIME]
            noisy = (stream.copy[told.index] > 0)[:, None]
            facts = torch.where(noisy, times[told.index][:, None], told.values)
            changed["inject"] = {**stream.inject, TIME: replace(told, values=facts)}
        return replace(stream, time=times, **changed)

    def velocity(
        self,
        model: MultimodalModel,
        x: Float[Tensor, "R D"],
        time: Float[Tensor, " R"],
        others: Mapping[str, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "R D"], Float[Tensor, "T W"]]:
        """What the model predicts for x at the given times, and all hidden states. `others`: noise of other modalities, whose
        noisy copies no position beside them sees; only their own loss asks for it."""
        hidden = model(self.filled(x, time), self.plan, others)
        head: Any = model.head(self.name)  # those that regress have a transition
        return head.transition(hidden[self.places], x)[0], hidden

    def solve(self, model: MultimodalModel, plan: Plan, noise: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """What a sampler makes of noise, all blocks at once, each with the true clean blocks before it."""

        def predict(x: Tensor, step: int) -> Tensor:
            return self.velocity(model, x, plan.time[step].to(x.device).expand(len(self)))[0]

        return plan.run(predict, [noise])


@dataclass(frozen=True)
class Pairs:
    """A batch, noise for its noisy blocks, and what the teacher's sampler makes of it."""

    stream: TokenStream
    noise: Float[Tensor, "R D"]
    answer: Float[Tensor, "R D"]

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(self.stream.to(device), self.noise.to(device), self.answer.to(device))

    def to_dict(self) -> dict[str, Any]:
        """Tensors in dictionaries, which a checkpoint can hold."""
        records = {
            kind: {name: _present(record) for name, record in getattr(self.stream, kind).items()} for kind in RECORDS
        }
        positional = {name: getattr(self.stream, name) for name in POSITIONAL}
        return {"stream": positional, "records": records, "noise": self.noise, "answer": self.answer}

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> Pairs:
        records: dict[str, Any] = {
            kind: {name: Placed(**record) for name, record in named.items()} for kind, named in saved["records"].items()
        }
        return Pairs(TokenStream(**saved["stream"], **records), saved["noise"], saved["answer"])


def _present(record: Placed) -> dict[str, Tensor]:
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in found.items() if value is not None}


class Distillation(ModelTraining):
    """Trains a one-step student of a checkpoint whose backbone denoises blocks (`mm.orders.blocks`) with the flow process.

    Takes what `ModelTraining` takes, and backbone and modalities are those of the teacher; `initial` is the teacher. The model
    that comes out is an ordinary one whose blocks order has one step. Text, controls and other modalities go on learning with it,
    each by its own loss.

    `val/ode` is the mean squared distance of what the student makes of noise from what the teacher's sampler makes of it.

    Args:
        teacher: folder of the checkpoint.
        modality: which modality is distilled, if several are denoised by the backbone.
        betas_ode: β until and after the share `late` of the training. ARDiT: 1.0, then 0.2 for blocks of four; 2.0, then 0.1
            for single vectors.
        late: that share.
        fake_steps: steps of the fake network for each of the student. `max_steps` counts the former.
        teacher_steps: steps of the teacher's sampler; 0 = as in the checkpoint.
        pairs: batches of pairs that are kept (on the CPU, and in checkpoints).
        distribution: weight of the difference of velocities; 0 leaves the pairs alone to teach.
    """

    def __init__(
        self,
        teacher: str,
        modality: str | None = None,
        betas_ode: tuple[float, float] = (1.0, 0.2),
        late: float = 0.67,
        fake_steps: int = 1,
        teacher_steps: int = 0,
        pairs: int = 64,
        distribution: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(initial=teacher, **kwargs)
        if min(betas_ode) < 0 or distribution < 0 or betas_ode[0] + distribution <= 0:
            raise ValueError(
                f"the weights of the losses must be at least 0, and one of them above; got betas_ode {betas_ode} and "
                f"distribution {distribution}"
            )
        if not 0 <= late <= 1:
            raise ValueError(f"late is a share of the training between 0 and 1, got {late}")
        if fake_steps < 1 or pairs < 1 or teacher_steps < 0:
            raise ValueError(
                f"fake_steps and pairs must be at least 1 and teacher_steps at least 0, got {fake_steps}, {pairs} and "
                f"{teacher_steps}"
            )
        self.modality, self.process = self._denoised(modality)
        self.betas_ode, self.late, self.fake_steps = betas_ode, late, fake_steps
        self.most_pairs, self.distribution = pairs, distribution
        frozen = load_pretrained(teacher).requires_grad_(False)
        own: Any = frozen.modalities[frozen.vocabulary.index[self.modality]].order
        chosen = next(m for m in self.model.modalities if m.name == self.modality)
        for name in ("process", "block", "frames", "along"):
            theirs, mine = getattr(own, name, None), getattr(chosen.order, name, None)
            if theirs != mine:
                raise ValueError(f"the teacher was trained with {name} {theirs}, here it is {mine}; use the teacher's")
        if getattr(chosen.order, "augment", 0.0):
            raise ValueError(
                f"{self.modality} has augment {chosen.order.augment}, but a student learns from blocks that follow what is "  # type: ignore[attr-defined]
                "without noise; set augment and augment_sampling to 0"
            )
        self.plan: Plan = own.sampler.plan(own.process, teacher_steps)
        if self.plan.draws > 1:
            raise ValueError(
                f"the teacher's sampler is {own.sampler.solver}, which adds noise on the way; one without noise (euler) has "
                "an answer to each noise, which the student can learn"
            )
        self._teacher = [frozen]  # in a list: neither trained nor saved with what is
        self._of_teacher = fingerprint(frozen)
        self.fake = load_pretrained(teacher)
        for name, head in self.fake.heads.items():
            head.requires_grad_(name == self.modality)
        settings = chosen.order.arguments() | {"sampler": {"solver": "euler", "steps": 1}}
        chosen.order = type(chosen.order)(**settings)
        self.one_step: Plan = chosen.order.sampler.plan(self.process)  # type: ignore[attr-defined]
        self.pool: list[Pairs] = []

    def _denoised(self, wanted: str | None) -> tuple[str, Process]:
        """Name and process of the modality that is distilled."""
        found = {m.name: self.model.process(n) for n, m in enumerate(self.model.modalities)}
        processes = {name: process for name, process in found.items() if process is not None}
        if wanted is None and len(processes) == 1:
            wanted = next(iter(processes))
        if wanted is None or wanted not in processes:
            raise ValueError(
                f"the backbone denoises {', '.join(processes) or 'nothing'} here, and modality is {wanted!r}; name one of these"
            )
        process = processes[wanted]
        if process.schedule != "flow" or process.prediction != "flow":
            raise ValueError(
                f"distillation takes differences of the flow's velocities, but {wanted} has the schedule {process.schedule} "
                f"and predicts {process.prediction}; train a teacher with flow and flow"
            )
        return wanted, process

    @property
    def teacher(self) -> MultimodalModel:
        return self._teacher[0]

    def train(self, mode: bool = True) -> Distillation:
        """The fake network always says the same of the same."""
        super().train(mode)
        self.fake.eval()
        return self

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.fake_steps > 1 and self.trainer.world_size > 1:  # ranks wait for gradients of all that learns
            raise ValueError(
                f"fake_steps is {self.fake_steps}, and several ranks can train with 1 only; train on one device"
            )
        self.teacher.to(self.device)

    def on_validation_start(self) -> None:
        self.teacher.to(self.device)

    def on_test_start(self) -> None:
        self.teacher.to(self.device)

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(
            self.parameters(),
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup=self.warmup_steps,
            total=int(self.trainer.estimated_stepping_batches),
            floor=self.lr_floor,
            matrices=itertools.chain(*self._matrices()) if self.optimizer == "muon" else (),
        )

    def _matrices(self) -> Iterator[Any]:
        return (network.backbone.matrices() for network in (self.model, self.fake))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Each network by its own norm."""
        if gradient_clip_val:
            for network in (self.model, self.fake):
                torch.nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_val)

    # ---- one step ----------------------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """Weight of the pairs now."""
        return self.betas_ode[self.global_step >= self.late * float(self.trainer.estimated_stepping_batches)]

    def made(
        self, blocks: NoisyBlocks, noise: Float[Tensor, "R D"], others: Mapping[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, "R D"], Tensor]:
        """What the student makes of noise, and all its hidden states. `others` as `NoisyBlocks.velocity`."""
        if not len(blocks):
            return noise, self.model(blocks.stream, blocks.plan, others)
        velocity, hidden = blocks.velocity(self.model, noise, torch.ones(len(blocks), device=noise.device), others)
        return self.one_step.advance(0, noise, velocity, None, iter(()))[0], hidden

    def fake_loss(self, blocks: NoisyBlocks, x: Float[Tensor, "R D"]) -> Tensor:
        """Flow matching on what the student made."""
        noise, time = torch.randn_like(x), blocks.draw_time(self.process)
        velocity, _ = blocks.velocity(self.fake, self.process.corrupt(x, noise, time), time)
        return (velocity - self.process.target(x, noise, time)).square().mean()

    def distribution_loss(self, blocks: NoisyBlocks, x: Float[Tensor, "R D"]) -> Tensor:
        """|x + sg(v_θ − v_η − x)|²."""
        with torch.no_grad():
            noise, time = torch.randn_like(x), blocks.draw_time(self.process)
            mixed = self.process.corrupt(x, noise, time)
            difference = blocks.velocity(self.teacher, mixed, time)[0] - blocks.velocity(self.fake, mixed, time)[0]
        return (x + (difference - x).detach()).square().mean()

    def answers(self, blocks: NoisyBlocks, noise: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """What the teacher's sampler makes of noise."""
        with torch.no_grad():
            return blocks.solve(self.teacher, self.plan, noise)

    def pairs_loss(self, blocks: NoisyBlocks, noise: Tensor, x: Float[Tensor, "R D"]) -> Tensor:
        """|g(w) − ODE(w)|² of pairs that are made now, or were before. `noise`, `x`: what the student has made of this batch."""
        if len(self.pool) < self.most_pairs:
            answer = self.answers(blocks, noise)
            kept = Pairs(blocks.stream, noise, answer).to("cpu")
            kept.stream.__dict__.pop("runs", None)  # masks, which are large and made again in no time
            self.pool.append(kept)
            return (x - answer).square().mean()
        kept = self.pool[int(torch.randint(len(self.pool), ()))].to(self.device)
        return (self.made(NoisyBlocks(kept.stream, self.modality), kept.noise)[0] - kept.answer).square().mean()

    def _step(self, batch: TokenStream, stage: str) -> Tensor:
        blocks = NoisyBlocks(batch, self.modality)
        if stage != "train":
            return self._validate(blocks, stage)
        terms: dict[str, Tensor] = {}
        others = self._noise_of_others(batch)
        turn = self.global_step % self.fake_steps == 0
        with torch.set_grad_enabled(turn):
            noise = torch.randn(len(blocks), self._dim, device=self.device)
            x, hidden = self.made(blocks, noise, others)
        if len(blocks):
            terms["fake"] = self.fake_loss(blocks, x.detach())
        if turn:
            terms |= dict(self._others(batch, hidden, others))
            if len(blocks) and self.distribution:
                terms["distribution"] = self.distribution * self.distribution_loss(blocks, x)
            if len(blocks) and self.beta:
                terms["ode"] = self.beta * self.pairs_loss(blocks, noise, x)
        for name, term in terms.items():
            self.log(f"{stage}/{name}", term.detach(), prog_bar=True, batch_size=batch.num_documents)
        self.log(f"{stage}/positions", float(len(batch)), batch_size=batch.num_documents)
        total = torch.stack([hidden.sum() * 0.0, *terms.values()]).sum()
        several = self.trainer.world_size > 1
        return total + self.model.untouched() + self.fake.untouched() if several else total

    def _validate(self, blocks: NoisyBlocks, stage: str) -> Tensor:
        noise, others = torch.randn(len(blocks), self._dim, device=self.device), self._noise_of_others(blocks.stream)
        x, hidden = self.made(blocks, noise, others)
        terms = dict(self._others(blocks.stream, hidden, others))
        if len(blocks):
            terms["ode"] = (x - self.answers(blocks, noise)).square().mean()
        for name, term in terms.items():
            self.log(f"{stage}/{name}", term, prog_bar=True, batch_size=blocks.stream.num_documents, sync_dist=True)
        return torch.stack([hidden.sum() * 0.0, *terms.values()]).sum()

    def _noise_of_others(self, batch: TokenStream) -> dict[str, Tensor]:
        """Noise for what else the backbone denoises; the distilled modality's noisy blocks are filled by hand."""
        return {name: noise for name, noise in self.model.draw_noise(batch).items() if name != self.modality}

    def _others(self, batch: TokenStream, hidden: Tensor, noise: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The ordinary loss of what isn't distilled: texts, other modalities, and how many elements an item has."""
        for name, source, losses in self.model.losses(batch, hidden, noise):
            if name != self.modality:
                yield name, (batch.weight[source] * losses).mean()

    @property
    def _dim(self) -> int:
        return self.model.modalities[self.model.vocabulary.index[self.modality]].tokenizer.spec.dim

    # ---- exact resumption --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["distillation"] = {"teacher": self._of_teacher, "pairs": [pairs.to_dict() for pairs in self.pool]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("distillation", {})
        if saved.get("teacher", self._of_teacher) != self._of_teacher:
            raise ValueError(
                "this run was begun with another teacher than the one given; give that one to go on with it"
            )
        self.pool = [Pairs.from_dict(pairs) for pairs in saved.get("pairs", [])]
