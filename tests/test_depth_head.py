"""The depth head: sub-codes one after another."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.generation import Engine, Request
from mm.heads.depth import DepthHead
from mm.heads.lm import LMHead
from mm.interfaces import DRAWN, Draw, Encoded, Sampling, Spec
from mm.layout import Segment
from mm.orders.delay import Delay
from mm.testing import Levels, predictors, tiny, watch

SPEC = Spec(kind="codes", vocab_size=3, num_codes=4)
MOSHI = [0, 1, 1, 1]


def head(spec: Spec = SPEC, **options: float) -> DepthHead:
    torch.manual_seed(1)
    made = DepthHead(**{"width": 16, **options})  # type: ignore[arg-type]
    made.build(width=12, spec=spec)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return made.eval()


def draw(rows: slice, seed: int = 0, sampling: Sampling | None = None, **more: object) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return Draw(rows=rows, sampling=sampling or Sampling(), generator=generator, **more)  # type: ignore[arg-type]


def test_the_sub_codes_of_a_step_are_one_distribution() -> None:
    """The probabilities of all tuples sum to 1, and aren't a product of K distributions, as side by side they are."""
    made, hidden = head(), torch.randn(1, 12)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=4)))
    probability = torch.exp(-4 * made.loss(hidden.expand(81, -1), tuples)).detach().view(3, 3, 3, 3)
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-5)
    alone = [probability.sum([a for a in range(4) if a != axis]) for axis in range(4)]
    product = torch.einsum("a,b,c,d->abcd", *alone)
    assert (probability - product).abs().max() > 0.01


def test_a_sub_code_depends_on_those_before_it_alone() -> None:
    made, hidden = head(), torch.randn(2, 12)
    codes = torch.randint(0, 3, (2, 4))
    logits = made.logits(hidden, codes)
    for q in range(4):
        other = codes.clone()
        other[:, q] = (codes[:, q] + 1) % 3
        moved = (made.logits(hidden, other) - logits).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [n > q for n in range(4)]
        torch.testing.assert_close(made.logits(hidden, codes[:, : q + 1]), logits[:, : q + 1])


def test_sampling_draws_from_what_is_learned() -> None:
    """Frequencies of whole tuples against exp(−K·loss); the log-probabilities that come along are those of the loss."""
    made, count = head(Spec(kind="codes", vocab_size=3, num_codes=2)), 20_000
    hidden = torch.randn(1, 12).expand(count, -1)
    ((codes, log_prob),) = made.sample(hidden, [draw(slice(0, count))])
    assert log_prob is not None
    torch.testing.assert_close(log_prob, -2 * made.loss(hidden, codes).detach(), atol=1e-4, rtol=1e-4)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=2)))
    wanted = torch.exp(-2 * made.loss(hidden[:9], tuples)).detach()
    share = torch.bincount(codes[:, 0] * 3 + codes[:, 1], minlength=9) / count
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert bool(((share - wanted).abs() < 4.5 * spread).all())


def test_none_counts_nothing_and_is_read_as_none() -> None:
    made, hidden = head(), torch.randn(3, 12)
    target = torch.tensor([[0, 1, 2, 0], [-1, 1, -1, 2], [-1, -1, -1, -1]])
    logits = made.logits(hidden, target)
    wanted = F.cross_entropy(logits[1, [1, 3]], torch.tensor([1, 2]))
    loss = made.loss(hidden, target)
    assert loss[1].item() == pytest.approx(wanted.item(), rel=1e-5) and loss[2] == 0
    zeros = made.logits(hidden[1:2], torch.tensor([[0, 1, 0, 2]]))
    assert (zeros - logits[1:2]).abs()[:, 1:].max() > 1e-3  # not taken for sub-code 0


def test_given_sub_codes_are_not_drawn_and_are_read() -> None:
    made, hidden = head(), torch.randn(2, 12)
    asked = torch.tensor([[2, DRAWN, -1, DRAWN], [DRAWN, DRAWN, 1, DRAWN]])
    ((codes, log_prob),) = made.sample(hidden, [draw(slice(0, 2), given=asked)])
    assert torch.equal(codes[asked != DRAWN], asked[asked != DRAWN]) and bool((codes[asked == DRAWN] >= 0).all())
    each = made.logits(hidden, codes).log_softmax(-1).gather(-1, codes.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(log_prob, (each * (asked == DRAWN)).sum(-1).detach(), atol=1e-5, rtol=1e-5)


def test_twins_read_what_the_row_drew() -> None:
    """Guided greedily: at every step the likeliest of u + s·(c − u), all rows given the same sub-codes so far."""
    made, hidden = head(), torch.randn(6, 12)
    asks = [
        draw(slice(0, 2), sampling=Sampling(temperature=0), unconditional=slice(2, 4), scale=3.0),
        draw(slice(4, 5), sampling=Sampling(temperature=0)),
        draw(
            slice(0, 1), sampling=Sampling(temperature=0), unconditional=slice(5, 6), scale=2.0, context=slice(4, 5),
            context_scale=1.5,
        ),
    ]  # fmt: skip
    plain = made.sample(hidden, asks[:2])
    for (codes, _), own, free, scale in zip(
        plain, (hidden[:2], hidden[4:5]), (hidden[2:4], None), (3.0, 1.0), strict=True
    ):
        c = made.logits(own, codes)
        u = c if free is None else made.logits(free, codes)
        assert torch.equal((u + scale * (c - u)).argmax(-1), codes)
    ((codes, _),) = made.sample(hidden, asks[2:])
    c, u, i = (made.logits(hidden[n : n + 1], codes) for n in (0, 5, 4))
    assert torch.equal((u + 1.5 * (i - u) + 2.0 * (c - i)).argmax(-1), codes)


def test_a_subset_has_the_mean_of_all() -> None:
    made, hidden = head(subset=0.25), torch.randn(8, 12)
    target = torch.randint(0, 3, (8, 4))
    target[0, 2] = -1
    whole = made.loss(hidden, target)  # evaluation takes all
    torch.testing.assert_close(whole, head().loss(hidden, target))
    made.train()
    first = made._losses(hidden, target[:, :1])[:, 0] / (target >= 0).sum(-1)
    for seed in range(5):  # two of eight have more than their first sub-code learned, which then counts four times
        torch.manual_seed(seed)
        some = torch.randperm(8)[:2]
        wanted = first.clone()
        wanted[some] += 4 * (whole - first)[some]
        torch.manual_seed(seed)
        torch.testing.assert_close(made.loss(hidden, target), wanted)
    gradient = torch.autograd.grad(made.loss(hidden, target).sum(), made.out)[0]
    assert bool((gradient != 0).any())


def test_the_first_sub_code_may_count_more() -> None:
    """With a half, twice the loss is CSM's: the first, and the mean of the others that stand there."""
    hidden = torch.randn(3, 12)
    target = torch.tensor([[0, 1, 2, 0], [2, -1, 1, -1], [-1, -1, 0, 2]])
    each = -head()._losses(hidden, target).detach()
    for share in (0.5, 0.8):
        made = head(first=share).loss(hidden, target)
        assert made[0].item() == pytest.approx(float(-share * each[0, 0] - (1 - share) * each[0, 1:].mean()), rel=1e-5)
        assert made[1].item() == pytest.approx(float(-share * each[1, 0] - (1 - share) * each[1, 2]), rel=1e-5)
        assert made[2].item() == pytest.approx(float(-each[2, 2:].mean()), rel=1e-5)
    alone = head(Spec(kind="codes", vocab_size=3, num_codes=1), first=0.3)
    code = torch.tensor([[1], [-1]])
    assert torch.allclose(alone.loss(hidden[:2], code), alone._losses(hidden[:2], code)[:, 0])


def test_sizes_that_do_not_fit() -> None:
    for wrong, message in [
        (lambda: DepthHead(layers=0), "layers and heads >= 1"),
        (lambda: DepthHead(width=10, heads=4), "a width that divides"),
        (lambda: DepthHead(subset=0.0), "above 0 and up to 1; got 0"),
        (lambda: DepthHead(first=1.0), "between 0 and 1, or None; got 1.0"),
        (lambda: DepthHead().build(width=10, spec=SPEC), "width 10 doesn't divide into 4 heads"),
        (lambda: DepthHead().build(width=12, spec=Spec(kind="discrete", vocab_size=3)), "this tokenizer is discrete"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize("order", [Delay("parallel"), Delay(delays=MOSHI, along=True)], ids=["CSM", "Moshi"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_generation_is_likely_as_training_says(order: Delay, guidance: float) -> None:
    """Given the tokens that generation drew, the head's logits in one teacher-forced pass are those it drew from: the greedy
    choice is their maximum wherever something was to be drawn."""
    model = tiny(order, tokenizer=Levels(), head=DepthHead(width=16))
    seen = watch(model)
    prompt = [Segment("text", "go", loss=False)]
    request = Request(
        prompt=prompt, items=[("image", (6,))], text=False, sampling=Sampling(temperature=0, guidance=guidance)
    )
    ((item,),) = Engine(model).generate([request])
    codes: Tensor = order.pattern(4).build(item.content.codes)

    def logits(*segments: Segment) -> Tensor:
        stream = model.build_document(
            [*segments, Segment("image", Encoded(grid=(6,), codes=item.content.codes))], torch.Generator()
        )
        return model.head("image").logits(predictors(model, stream, "image"), codes)  # type: ignore[operator]

    conditional, free = logits(*prompt), logits(Segment("null"))
    held = codes >= 0
    best = (free + guidance * (conditional - free)).argmax(-1)
    assert torch.equal(best[held], codes[held]) and len(seen["image"]) == len(codes)


def test_learns_what_side_by_side_heads_cannot() -> None:
    """Sub-code 1 repeats sub-code 0, which is a coin toss: one bit a pair is left, where independent heads leave two."""
    spec, hidden = Spec(kind="codes", vocab_size=2, num_codes=2), torch.zeros(64, 12)
    target = (torch.arange(64)[:, None] % 2).repeat(1, 2)
    bits = {}
    for made in (DepthHead(layers=1, width=16), LMHead(bias=True)):
        torch.manual_seed(0)
        made.build(width=12, spec=spec)
        optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            loss = made.loss(hidden, target).mean()
            loss.backward()
            optimizer.step()
        bits[type(made)] = 2 * loss.item() / torch.log(torch.tensor(2.0)).item()
    assert bits[DepthHead] == pytest.approx(1.0, abs=0.05)
    assert bits[LMHead] == pytest.approx(2.0, abs=0.05)
