"""The running batch of many callers: what each gets is what it gets alone, whoever comes and goes meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mm.batching import Batcher, Dropped
from mm.generation import Engine, Event, Request
from mm.heads.regression import RegressionHead
from mm.interfaces import Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.blocks import Blocks
from mm.orders.masked import Masked
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.testing import Frames, tiny


def requests(count: int, masked: bool = False, guidance: float = 2.0) -> list[Request]:
    """Texts, pictures and both, of many lengths."""
    drawn = Sampling(guidance=guidance, steps=3 if masked else 0)
    made = []
    for number in range(count):
        prompt = [Segment("text", "red" * (1 + number % 4), loss=False)]
        items: list[Any] = [[], [("image", (4, 4))], [("image", (2, 3)), ("image", (4, 4))]][number % 3]
        text = number % 2 == 0 or not items
        made.append(
            Request(
                prompt=prompt, items=items, text=text, free=False, max_tokens=3 + number, seed=number,
                by_modality={"image": drawn, "text": Sampling()},
            )
        )  # fmt: skip
    return made


def contents(rows: list[list[Segment]]) -> list[list[Any]]:
    return [[(s.modality, s.content.grid, s.content.content.tolist()) for s in row] for row in rows]


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    made = Batcher(tiny(), rows=4)
    yield made
    made.close()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_each_gets_what_it_gets_alone(masked: bool, rows: int) -> None:
    model = tiny(Masked(steps=3) if masked else None)
    wanted = requests(24, masked)
    alone = [contents(Engine(model).generate([request])) for request in wanted]
    batcher = Batcher(model, rows)
    with ThreadPoolExecutor(24) as pool:
        made = list(pool.map(lambda request: contents(batcher.generate([request])), wanted))
    assert made == alone
    assert batcher.running == batcher.waiting == 0
    if rows == 30:
        assert batcher.fed > 2 * batcher.passes, "rows shared their passes"
    assert contents(batcher.generate(wanted)) == [row for (row,) in alone], "more requests of one caller than rows"
    batcher.close()


def test_vectors_of_a_flow() -> None:
    model = tiny(Blocks(3, sampler={"steps": 2}), tokenizer=Frames(), head=RegressionHead())
    prompt = [Segment("text", "seven", loss=False)]
    wanted = [Request(prompt=prompt, items=[("image", (6,))], text=False, seed=n) for n in range(5)]
    alone = [Engine(model).generate([request])[0][0].content.latents for request in wanted]
    batcher = Batcher(model, 3)
    made = [row[0].content.latents for row in batcher.generate(wanted)]
    batcher.close()
    assert not any(latents.is_inference() for latents in made)
    torch.testing.assert_close(made, alone)


def test_rows_come_while_others_run(batcher: Batcher) -> None:
    """A long text is on its way when a short one comes and ends before it."""
    long, short = (Request(prompt=[Segment("text", "a")], free=False, max_tokens=n, seed=3) for n in (200, 2))
    ended: list[str] = []
    started = threading.Event()

    def slow() -> None:
        batcher.generate([long], lambda event: started.set())
        ended.append("long")

    thread = threading.Thread(target=slow)
    thread.start()
    assert started.wait(10)
    batcher.generate([short])
    ended.append("short")
    thread.join()
    assert ended == ["short", "long"]


def test_steps_are_told_as_the_engine_tells_them(batcher: Batcher) -> None:
    wanted = requests(6)

    def told(engine: Any) -> dict[int, list[Any]]:
        seen: list[Event] = []
        engine.generate(wanted, seen.append)
        return {
            row: [(e.modality, e.content.tolist(), e.done, e.final) for e in seen if e.row == row] for row in range(6)
        }

    assert told(batcher) == told(Engine(batcher.batch.model))


def test_what_the_caller_raises_ends_its_rows_alone(batcher: Batcher) -> None:
    def stop(event: Event) -> None:
        raise KeyError("enough")

    endless = Request(prompt=[Segment("text", "a")], free=False, max_tokens=200)
    other = ThreadPoolExecutor(1).submit(batcher.generate, requests(3))
    with pytest.raises(KeyError, match="enough"):
        batcher.generate([endless] * 3, stop)
    assert contents(other.result()) == contents(Engine(batcher.batch.model).generate(requests(3)))
    assert contents(batcher.generate(requests(2))) == contents(Engine(batcher.batch.model).generate(requests(2)))


def test_who_has_gone_is_dropped(batcher: Batcher) -> None:
    left = threading.Event()
    seen: list[Event] = []
    endless = Request(prompt=[Segment("text", "a")], free=False, max_tokens=200, seed=3)

    def see(event: Event) -> None:
        seen.append(event)
        left.set()

    with pytest.raises(Dropped):
        batcher.caller(left.is_set).generate([endless] * 9, see)
    assert 0 < len(seen) < 1000
    with pytest.raises(Dropped):
        batcher.generate([endless], None, lambda: True)
    deadline = time.monotonic() + 10
    while (batcher.running or batcher.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batcher.running == batcher.waiting == 0


def test_who_waits_too_long_for_a_place_is_told() -> None:
    batcher = Batcher(tiny(), rows=1)
    started = threading.Event()
    endless = Request(prompt=[Segment("text", "a")], free=False, max_tokens=240, seed=3)
    running = ThreadPoolExecutor(1).submit(batcher.generate, [endless], lambda event: started.set())
    assert started.wait(10)
    gone = threading.Event()
    waiting = ThreadPoolExecutor(1).submit(batcher.generate, [endless], None, gone.is_set)
    gone.set()
    with pytest.raises(Dropped):
        waiting.result(10)
    assert running.result(30)
    batcher.close()


def test_refusals(batcher: Batcher) -> None:
    with pytest.raises(ValueError, match="shorten the prompt"):
        batcher.generate([Request(prompt=[Segment("text", "a" * 300)])])
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        Batcher(tiny(), rows=0)
    assert batcher.generate([]) == []
    nothing = Request(prompt=[Segment("text", "a")], text=False)
    assert batcher.generate([nothing]) == [[]]


def test_a_failure_is_told_and_the_batch_goes_on(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(batcher.batch, "_forward", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            batcher.generate(requests(6))
    assert contents(batcher.generate(requests(3))) == contents(Engine(batcher.batch.model).generate(requests(3)))


def test_closing_finishes_what_runs() -> None:
    batcher = Batcher(tiny(), rows=2)
    started = threading.Event()
    pool = ThreadPoolExecutor(1)
    running = pool.submit(batcher.generate, requests(6), lambda event: started.set())
    assert started.wait(10)
    batcher.close()
    assert len(running.result(1)) == 6
    with pytest.raises(Dropped, match="closed"):
        batcher.generate(requests(1))


def test_a_pipeline_with_a_batcher(batcher: Batcher) -> None:
    model: MultimodalModel = batcher.batch.model
    alone, together = TextToImagePipeline(model), TextToImagePipeline(model)
    together.engine = batcher
    made = [p(["red", "blue"], num_images=3, seed=1).images for p in (alone, together)]
    assert [image.tobytes() for image in made[0]] == [image.tobytes() for image in made[1]]
