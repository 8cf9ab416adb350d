"""The shapes in the signatures are true. They are checked at run time here, in one process of its own, along the paths
that everything uses: laying out, packing, loss and gradients, generation, saving, every tokenizer.

Elsewhere they are not: a check would be in the way of the errors that users see, and of compilation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKER = """
from beartype import beartype

KINDS = ("jaxtyping", "Float[", "Int[", "Bool[", "UInt8[")
checked = 0

def check(function):
    # beartype on the hints that state the shape of a tensor; the type checker sees to the others.
    global checked
    hints = function.__annotations__
    shapes = {name: hint for name, hint in hints.items() if any(kind in str(hint) for kind in KINDS)}
    if not shapes:
        return function
    checked += 1
    function.__annotations__ = shapes
    try:
        return beartype(function)
    finally:
        function.__annotations__ = hints
"""

PATHS = """
import sys
from jaxtyping import install_import_hook

install_import_hook("mm", "checker.check")

import torch
from PIL import Image
import checker
from mm import hub, plugins
from mm.generation import Engine, Request
from mm.interfaces import Encoded, Sampling
from mm.layout import Segment
from mm.stream import pack, unpack
from mm.pipelines.any_to_any import AnyToAnyPipeline
from mm.pipelines.image_to_text import ImageToTextPipeline
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.testing import Levels, tiny

load = plugins.load
# It is on: a function that promises a grid of ids refuses a flat list.
vq = plugins.load("tokenizers", "image_janus").tiny()
try:
    vq.pixels(torch.zeros(4, dtype=torch.long))
except Exception as error:
    assert "TypeCheckError" in type(error).__name__, repr(error)
else:
    raise AssertionError("shapes are not checked")

picture = Image.effect_noise((4, 4), 90).convert("RGB")
def systems():
    # every order with ids and with vectors, as far as it takes them, and every head
    for order in plugins.available("orders"):
        if order not in ("blocks", "delay", "followed", "stages"):
            several = load("tokenizers", "image_msvq").tiny() if order == "scales" else None
            yield tiny(load("orders", order)(), tokenizer=several)
    patches, diffusion = load("tokenizers", "image_patches"), load("heads", "diffusion")
    cases = [("raster", {}, diffusion(width=8, blocks=1, sampler={"steps": 2})),
             ("masked", {"choice": "random", "steps": 2}, load("heads", "gaussian")()),
             ("blocks", {"block": 2, "sampler": {"steps": 2}}, load("heads", "regression")())]
    for order, settings, head in cases:
        yield tiny(load("orders", order)(**settings), tokenizer=patches(size=4, patch=2), head=head)

for model in systems():
    rng = torch.Generator().manual_seed(0)
    documents = [[Segment("text", "red"), Segment("image", picture)], [Segment("image", picture), Segment("text", "a")]]
    streams = [model.build_document(document, rng) for document in documents]
    stream = pack(streams, 256)
    assert len(unpack(stream)) == 2
    report = model.loss(stream)
    report.total.backward()
    assert report.total.isfinite()
    images = TextToImagePipeline(model)(["red", "a"], seed=0, guidance=2.0).images
    assert len(images) == 2
    assert len(ImageToTextPipeline(model)(images, seed=0, max_tokens=5).texts) == 2
    AnyToAnyPipeline(model)(["red", images[0]], seed=0)
    hub.load_pretrained(hub.save_pretrained(model, sys.argv[1]))

# sub-codes: each order that takes them, each head that predicts them
coded = [("delay", {"along": True}, "lm"), ("delay", {"delays": [0, 1, 1, 1]}, "depth"), ("stages", {}, "lm"),
         ("masked", {"steps": 2}, "lm"), ("raster", {}, "depth")]
for order, settings, head in coded:
    model = tiny(load("orders", order)(**settings), tokenizer=Levels(), head=load("heads", head)())
    item = Encoded(grid=(5,), codes=torch.randint(0, 8, (5, 4)))
    streams = [model.build_document([Segment("text", "red"), Segment("image", item)], torch.Generator()) for _ in range(2)]
    stream = pack(streams)
    assert len(unpack(stream)) == 2
    model.loss(stream).total.backward()
    known = (item.codes, torch.arange(5) < 2)
    request = Request(prompt=[Segment("image", item), Segment("text", "a")], items=[("image", (5,))], known=known, max_tokens=4,
                      sampling=Sampling(guidance=2.0))
    Engine(model).generate([request, Request(prompt=[Segment("text", "a")], free=True, max_tokens=20)])

for name in plugins.available("tokenizers"):
    tokenizer = plugins.load("tokenizers", name).tiny()
    known = [] if name.startswith(("text", "image")) else tokenizer.examples()
    encoded = tokenizer.encode([*known, "a red apple" if name.startswith("text") else picture][0])
    assert tokenizer.decode(encoded).valid == tokenizer.decodes
    tokenizer.decode(Encoded(grid=(1, 1), ids=torch.zeros(1, dtype=torch.long)))
print(checker.checked)
"""


@pytest.mark.slow
def test_shapes_along_the_main_paths(tmp_path: Path) -> None:
    (tmp_path / "checker.py").write_text(CHECKER)
    (tmp_path / "paths.py").write_text(PATHS)
    done = subprocess.run(
        [sys.executable, "paths.py", str(tmp_path / "model")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 80, "functions with shapes in their signatures"
