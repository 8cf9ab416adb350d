"""Stages of training: a model of vectors that begins as a model of ids, parts that stay as they are, data that is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.adopt import adopt, blend, fingerprint, train_only
from mm.backbone import BackboneConfig
from mm.generation import Engine, Request
from mm.heads.depth import DepthHead
from mm.heads.diffusion import DiffusionHead
from mm.heads.lm import LMHead
from mm.hub import load_pretrained, save_pretrained
from mm.interfaces import Encoded, Head, Modality, ModalityTokenizer, Sampling
from mm.layout import Segment
from mm.listening import Dialogue
from mm.model import MultimodalModel
from mm.optimization import optimizer_and_schedule
from mm.orders.delay import Delay
from mm.orders.raster import Raster
from mm.stream import TokenStream, pack
from mm.testing import tiny
from mm.tokenizers.image_patches import ImagePatches
from mm.tokenizers.image_softvq import ImageSoftVQ
from mm.tokenizers.image_vq import ImageVQ
from mm.tokenizers.speech_codec import SpeechCodec
from mm.tokenizers.speech_duplex import SpeechDuplex
from mm.tokenizers.text_bytes import TextBytes
from mm.training import ModelTraining

BACKBONE: dict[str, Any] = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2}
HEAD: dict[str, Any] = {
    "process": {"schedule": "scaled_linear", "prediction": "v", "zero_terminal_snr": True},
    "sampler": {"solver": "ddim", "steps": 3, "spacing": "trailing"},
    "width": 32,
    "blocks": 1,
}


def text() -> Modality:
    return Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster())


def picture(tokenizer: ModalityTokenizer, head: Head | None = None) -> Modality:
    return Modality(name="image", tokenizer=tokenizer, head=head or DiffusionHead(**HEAD), order=Raster())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random model of text and ids of pictures."""
    torch.manual_seed(0)
    model = tiny(tokenizer=ImageVQ.tiny())
    return save_pretrained(model, tmp_path_factory.mktemp("base") / "model")


def vq(base: Path) -> ImageVQ:
    return load_pretrained(base).modalities[1].tokenizer  # type: ignore[return-value]


def soft(base: Path, **settings: Any) -> ModelTraining:
    torch.manual_seed(1)
    modalities = [text(), picture(ImageSoftVQ(vq(base), temperature=0.0))]
    return ModelTraining(BackboneConfig(**BACKBONE), modalities, context=64, **settings)


def batch(model: MultimodalModel) -> TokenStream:
    rng = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1
    documents = [[Segment("text", "a cat", loss=False), Segment("image", picture)] for picture in pictures]
    return pack([model.build_document(document, rng) for document in documents])


# --- adoption -------------------------------------------------------------------------------------------------------


def test_with_a_hard_lookup_the_backbone_reads_what_it_always_read(base: Path) -> None:
    """τ = 0: hidden states of a document are those of the model of ids, the picture's too."""
    old, new = load_pretrained(base), soft(base, adopt=str(base)).model.eval()
    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hidden = [
        model(model.build_document([Segment("text", "a cat"), Segment("image", x)], torch.Generator().manual_seed(0)))
        for model in (old, new)
    ]
    assert hidden[0].shape == hidden[1].shape
    assert torch.allclose(hidden[0], hidden[1], atol=1e-5)
    stranger = soft(base).model.eval()
    assert not torch.allclose(
        hidden[0], stranger(stranger.build_document([Segment("text", "a cat"), Segment("image", x)], torch.Generator())), atol=0.1
    )  # fmt: skip


def test_what_is_taken_is_said(base: Path) -> None:
    model = soft(base).model
    assert adopt(model, base) == ["backbone", "embedding", "heads.text", "rows of image"]
    torch.manual_seed(0)
    same = MultimodalModel(BackboneConfig(**BACKBONE), [text(), picture(vq(base), LMHead())], context=64)
    assert adopt(same, base) == ["backbone", "embedding", "heads.text", "heads.image"]
    assert fingerprint(same) == fingerprint(load_pretrained(base))


@pytest.mark.parametrize("layers", [3, 5])
def test_a_deeper_backbone_begins_as_the_one_it_adopts(base: Path, layers: int) -> None:
    old = load_pretrained(base)
    config = BackboneConfig(**{**BACKBONE, "layers": layers})
    new = MultimodalModel(config, [text(), picture(vq(base), LMHead())], context=64)
    adopt(new, base)
    stream = batch(old)
    assert torch.allclose(old.eval()(stream), new.eval()(stream), atol=1e-6)
    new.train().loss(stream).total.backward()
    for block in new.backbone.blocks:
        for projection in (block.attention.out, block.mlp.down):  # type: ignore[union-attr]
            assert projection.weight.grad.abs().sum() > 0, "what adds nothing yet can learn to"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("backbone", "the checkpoint's backbone has layers 2, this one 1; use the checkpoint's"),
        ("host", "use the checkpoint's text tokenizer"),
        ("order", "the modalities here are text, other, the checkpoint's text, image; begin with the same ones"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(base: Path, change: str, message: str) -> None:
    from mm.testing import Palette

    config = BackboneConfig(**{**BACKBONE, "layers": 1 if change == "backbone" else 2})
    host = text()
    if change == "host":
        host = replace(host, tokenizer=Palette(3))
    second = picture(ImagePatches(size=8, patch=2))
    if change == "order":
        second = replace(second, name="other")
    model = MultimodalModel(config, [host, second], context=64)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        adopt(model, base)
    assert fingerprint(model) == before


# --- frozen parts ---------------------------------------------------------------------------------------------------


def test_weights_are_averaged_with_those_they_came_from(base: Path) -> None:
    source = load_pretrained(base)
    tuned, other = load_pretrained(base), source.state_dict()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    own = {name: value.clone() for name, value in tuned.state_dict().items()}
    with pytest.raises(ValueError, match="share is of the model's own weights, from 0 to 1, got 1.5"):
        blend(tuned, base, 1.5)
    blend(tuned, base, 1.0)
    assert all(torch.equal(value, own[name]) for name, value in tuned.state_dict().items())
    assert "backbone" in blend(tuned, base, 0.75)
    for name, value in tuned.state_dict().items():
        assert torch.allclose(value, 0.75 * own[name] + 0.25 * other[name], atol=1e-6), name


def steps(module: ModelTraining, count: int) -> list[float]:
    optimizer = optimizer_and_schedule(
        module.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, warmup=1, total=count, floor=1.0,
        matrices=module.model.backbone.matrices(),
    )["optimizer"]  # fmt: skip
    stream, losses = batch(module.model), []
    torch.manual_seed(0)
    for _ in range(count):
        loss = module.model.loss(stream).raw["image"]
        total = module.model.loss(stream).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_the_base_stage_learns_and_leaves_the_backbone_bit_for_bit(base: Path) -> None:
    module = soft(base, adopt=str(base), train_only=["latent_embeddings.image", "heads.image"])
    model = module.model
    frozen = ("backbone", "embedding", "mask", "heads.text")
    before = {name: fingerprint(model.get_submodule(name)) for name in frozen}
    trained = {name: fingerprint(model.get_submodule(name)) for name in ("latent_embeddings.image", "heads.image")}
    losses = steps(module, 60)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert {name: fingerprint(model.get_submodule(name)) for name in frozen} == before
    assert all(fingerprint(model.get_submodule(name)) != old for name, old in trained.items())


def test_parts_that_are_not_there(base: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train_only names 'heads.picture', .* there are backbone, embedding.weight, heads.image"
    ):
        soft(base, train_only=["heads.picture"])
    model = soft(base).model
    train_only(model, ["heads.image"])
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"heads"}


def test_a_model_of_vectors_is_saved_with_its_codebook(base: Path, tmp_path: Path) -> None:
    module = soft(base, adopt=str(base))
    request = Request(prompt=[Segment("text", "a cat")], items=[("image", (2, 2))], text=False)
    made = Engine(module.model).generate([request])
    again = load_pretrained(save_pretrained(module.model, tmp_path / "model"))
    assert torch.equal(Engine(again).generate([request])[0][0].content.content, made[0][0].content.content)


def test_only_one_beginning(base: Path) -> None:
    with pytest.raises(ValueError, match=r"give initial \(the same tokenizers\) or adopt \(others\), not both"):
        soft(base, adopt=str(base), initial=str(base))


# --- data that is refused -------------------------------------------------------------------------------------------


def patches(head: Head, **settings: Any) -> tuple[ModelTraining, TokenStream]:
    torch.manual_seed(0)
    module = ModelTraining(
        BackboneConfig(**BACKBONE),
        [text(), picture(ImagePatches(size=8, patch=2, scale=40.0), head)],
        context=64,
        **settings,
    )
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    vars(module)["_trainer"] = type("Trainer", (), {"world_size": 1})()
    from PIL import Image

    shown = Image.effect_noise((8, 8), 120).convert("RGB")
    return module, module.model.build_document([Segment("image", shown)], torch.Generator().manual_seed(0))


def test_vectors_far_from_unit_spread_are_refused_unless_asked_for() -> None:
    from mm.heads.regression import RegressionHead

    module, stream = patches(DiffusionHead(**HEAD))
    with pytest.raises(
        ValueError, match=r"the vectors of 'image' have a standard deviation of .*; normalise them \(mm.latents\)"
    ):
        for _ in range(4):  # 16 vectors a picture; one picture may be flat
            module.training_step(stream, 0)
    for allowed, stream in (patches(DiffusionHead(**HEAD), unnormalized=True), patches(RegressionHead())):
        assert all(bool(allowed.training_step(stream, n).isfinite()) for n in range(5))


def test_guidance_without_a_null_condition_is_warned_of(tmp_path: Path) -> None:
    """Of a model that trained without dropping conditions; not of one whose training isn't known."""
    module, _ = patches(DiffusionHead(**HEAD), unnormalized=True)
    model = module.model
    rng = torch.Generator().manual_seed(0)
    plain = model.build_document([Segment("text", "a", loss=False), Segment("text", "b")], rng)
    dropped = model.build_document([Segment("null", None, loss=False), Segment("text", "b")], rng)
    request = Request(
        prompt=[Segment("text", "a")], items=[("image", (1, 1))], text=False, sampling=Sampling(guidance=2.0)
    )

    def generate() -> Tensor:
        return (
            Engine(load_pretrained(save_pretrained(model, tmp_path / "model")))
            .generate([request])[0][0]
            .content.content
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate()
    module.training_step(plain, 0)
    with pytest.warns(UserWarning, match="trained without dropping its condition"):
        generate()
    module.training_step(dropped, 0)
    module.training_step(plain, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate()


@pytest.mark.parametrize("depth", [False, True], ids=["linear", "depth"])
def test_a_model_that_listens_begins_as_one_that_speaks(tmp_path: Path, depth: bool) -> None:
    """The codec is the one inside: hidden states are the same, and so are the logits of its ids."""
    codec = SpeechCodec.tiny()

    def speaking(tokenizer: ModalityTokenizer, seed: int, **settings: Any) -> MultimodalModel:
        torch.manual_seed(seed)
        head = DepthHead(width=16, layers=1, heads=2) if depth else LMHead()
        speech = Modality(name="speech", tokenizer=tokenizer, head=head, order=Delay(pattern="parallel"))
        return ModelTraining(BackboneConfig(**BACKBONE), [text(), speech], context=128, **settings).model.eval()

    def document(model: MultimodalModel) -> TokenStream:
        codes = torch.randint(
            codec.spec.vocab_size, (6, codec.spec.num_codes), generator=torch.Generator().manual_seed(3)
        )
        speech = Encoded(grid=(6,), codes=codes)
        said = Dialogue(speech, None, None) if isinstance(model.modalities[1].tokenizer, SpeechDuplex) else speech
        segments = [Segment("text", "ab", loss=False), Segment("speech", said)]
        return pack([model.build_document(segments, torch.Generator().manual_seed(0))])

    old = speaking(codec, 0)
    save_pretrained(old, tmp_path / "model")
    new = speaking(SpeechDuplex(codec), 1, adopt=str(tmp_path / "model"))
    with torch.no_grad():
        hidden = [model(document(model)) for model in (old, new)]
    assert torch.equal(*hidden)
    if depth:  # its inner ids are others
        return
    mine, theirs = (model.heads["speech"].logits(x) for model, x in zip((new, old), hidden, strict=True))
    assert mine.shape[-1] == theirs.shape[-1] + 1
    torch.testing.assert_close(mine[..., :-1], theirs, rtol=1e-6, atol=1e-6)
