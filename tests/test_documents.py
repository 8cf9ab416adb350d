"""From documents to streams: controls, orders, coordinates, targets, and which head learns what."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from mm.attention import dense
from mm.backbone import BackboneConfig
from mm.heads.lm import LMHead
from mm.interfaces import Encoded, Modality, Order, Spec
from mm.layout import NULL, Segment
from mm.model import MultimodalModel
from mm.orders.masked import RATE, Masked
from mm.orders.raster import Raster
from mm.stream import TokenStream, pack
from mm.testing import Palette, tiny
from mm.tokenizers.text_bytes import TextBytes

PICTURE = Encoded(grid=(2, 3), ids=torch.tensor([7, 0, 3, 3, 5, 1]))


def build(model: MultimodalModel, *segments: Segment, seed: int = 0, close: bool = True) -> TokenStream:
    made = model.build_document(segments, torch.Generator().manual_seed(seed), close=close)
    return made.validate()


def names(model: MultimodalModel, tokens: TokenStream) -> list[str]:
    return [model.vocabulary.describe(token) for token in tokens.ids.tolist()]


def links(tokens: TokenStream) -> dict[int, int]:
    """Who predicts whom."""
    return {place: target for place, target in enumerate(tokens.target.tolist()) if target >= 0}


def test_text_and_raster_picture_position_by_position() -> None:
    model = tiny()
    model.modalities[1].weight = 0.5
    tokens = build(model, Segment("text", "hi"), Segment("image", PICTURE), Segment("text", "!"))
    assert names(model, tokens) == [
        "<bos>", "text:104", "text:105", "<begin image>", "<size 2>", "<size 3>",
        "image:7", "image:0", "image:3", "image:3", "image:5", "image:1", "<end image>", "text:33", "<eos>",
    ]  # fmt: skip
    assert tokens.modality.tolist() == [0] * 6 + [1] * 6 + [0] * 3
    assert tokens.order.tolist() == list(range(15))
    assert not tokens.copy.any() and not tokens.time.any()
    assert links(tokens) == {place: place + 1 for place in range(14)}
    assert tokens.weight.tolist() == [1.0] * 5 + [0.5] * 6 + [1.0] * 3 + [0.0]  # the weight of what is predicted
    assert tokens.position[:, 0].tolist() == [*range(6), *[6] * 6, 9, 10, 11]  # a picture is one moment
    assert tokens.position[6:12, 1:].tolist() == [[6, 6], [6, 7], [6, 8], [7, 6], [7, 7], [7, 8]]
    assert torch.equal(tokens.position[12], torch.full((3,), 9.0))  # what follows stands behind its largest coordinate
    assert torch.equal(dense(tokens), torch.ones(15, 15, dtype=torch.bool).tril())


def test_masked_picture_position_by_position() -> None:
    model = tiny(Masked())
    tokens = build(model, Segment("text", "a"), Segment("image", PICTURE), Segment("text", "b"))
    assert tokens.order.tolist() == [0, 1, 2, 3, 4, *[5] * 6, 6, 7, 8]
    hidden = (tokens.time > 0).nonzero()[:, 0].tolist()
    assert 1 <= len(hidden) <= 6 and set(hidden) <= set(range(5, 11))
    assert tokens.ids[5:11].tolist() == [token + model.vocabulary["image"].start for token in PICTURE.ids.tolist()]
    # hidden elements predict themselves; after the picture nobody predicts its end, which is certain
    wanted = {0: 1, 1: 2, 2: 3, 3: 4, **{place: place for place in hidden}, 11: 12, 12: 13}
    assert links(tokens) == wanted
    seen = dense(tokens)
    assert bool(seen[5:11, :11].all()) and not bool(seen[5:11, 11:].any())


def test_a_prompt_is_given_and_not_learned() -> None:
    for order in (Raster(), Masked()):
        model = tiny(order)
        prompt, answer = Segment("image", PICTURE, loss=False), Segment("text", "ok")
        tokens = build(model, Segment("text", "x", loss=False), prompt, answer)
        last = len(tokens) - 1
        assert not tokens.time.any()
        assert links(tokens) == {last - 3: last - 2, last - 2: last - 1, last - 1: last}  # end → o → k → eos
        given = build(model, Segment("text", "x"), prompt)
        assert links(given) == {0: 1} and given.weight.sum() == 1  # not even that the document ends


def test_prefix_lm_prompts_see_both_ways() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(width=16, layers=1, heads=2)
    text = Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster(prefix=True))
    image = Modality(name="image", tokenizer=Palette(), head=LMHead(), order=Raster())
    model = MultimodalModel(config, [text, image])
    tokens = build(model, Segment("text", "abc", loss=False), Segment("image", PICTURE))
    assert tokens.order.tolist() == [0, 1, 1, 1, *range(2, 13)]
    assert bool(dense(tokens)[1:4, :4].all()) and not bool(dense(tokens)[1:4, 4:].any())
    assert links(tokens) == {place: place + 1 for place in range(3, 14)}  # the last of the prompt predicts what follows
    learned = build(model, Segment("text", "abc"))  # text to be learned stays causal
    assert learned.order.tolist() == list(range(5)) and links(learned) == {place: place + 1 for place in range(4)}


def test_the_absent_condition_and_open_documents() -> None:
    model = tiny()
    tokens = build(model, Segment(NULL), Segment("image", PICTURE))
    assert names(model, tokens)[:3] == ["<bos>", "<null>", "<begin image>"]
    assert links(tokens) == {place: place + 1 for place in range(1, 12)}  # bos does not learn to say null
    assert names(model, build(model, Segment("text", "a"), close=False)) == ["<bos>", "text:97"]
    assert names(model, build(model, close=False)) == ["<bos>"]
    assert names(model, build(model, Segment("text", ""))) == ["<bos>", "<eos>"]
    assert links(build(model, Segment("text", ""))) == {0: 1}


def test_documents_pack_into_one_valid_stream() -> None:
    model = tiny(Masked(rate_condition=True, micro=(1.0,)))
    a = build(model, Segment("text", "one"), Segment("image", PICTURE))
    b = build(model, Segment("image", PICTURE, loss=False), Segment("text", "two"))
    packed = pack([a, b]).validate()
    assert packed.lengths == [len(a), len(b)]
    rates = packed.inject[RATE]
    assert rates.values.shape == (12, 2) and bool((rates.values[:, 1] == 1.0).all())
    share = float((a.time > 0).sum()) / 6
    assert rates.values[:6, 0].tolist() == pytest.approx([share] * 6) and not rates.values[6:, 0].any()
    assert torch.equal(packed.modality[rates.index], torch.ones(12, dtype=torch.int64))


def test_micro_conditions_come_from_the_item() -> None:
    order = Masked(rate_condition=True, micro=(0.0, 0.0))
    item = Encoded(grid=(1, 2), ids=torch.tensor([1, 2]), micro=(0.25, 0.75))
    facts = order.layout(item, context=True, rng=torch.Generator()).inject[RATE]
    assert facts.tolist() == [[0.0, 0.25, 0.75]] * 2
    wrong = Encoded(grid=(1, 1), ids=torch.tensor([1]), micro=(0.25,))
    with pytest.raises(ValueError, match="conditions on 2 micro-conditions, the item has 1"):
        order.layout(wrong, context=True, rng=torch.Generator())
    with pytest.raises(ValueError, match="micro-conditions need rate_condition=True"):
        Masked(micro=(1.0,))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment("image", Encoded(grid=(1, 2), ids=torch.tensor([3, 8]))), r"image: ids span 3..8, but .* has 0..7"),
        (Segment("text", Encoded(grid=(1,), ids=torch.tensor([256]))), "text: ids span 256..256"),
        (Segment("image", Encoded(grid=(1, 2), ids=torch.tensor([-1, 2]))), "image: ids span -1..2"),
        (Segment("image", Encoded(grid=(5, 1), ids=torch.arange(5))), r"grid of \(5, 1\) does not fit the largest"),
        (Segment("smell", "?"), "no modality 'smell'"),
    ],
)
def test_content_that_does_not_fit_is_refused(segment: Segment, message: str) -> None:
    """An id too large would otherwise become a control token, or another modality's."""
    with pytest.raises(ValueError, match=message):
        build(tiny(), segment)


def test_modalities_must_agree_on_shared_conditions() -> None:
    def modality(name: str, order: Order) -> Modality:
        return Modality(name=name, tokenizer=Palette(), head=LMHead(), order=order)

    text = Modality(name="text", tokenizer=TextBytes(), head=LMHead(), order=Raster())
    config = BackboneConfig(width=16, layers=1, heads=2)
    plain, sized = Masked(rate_condition=True), Masked(rate_condition=True, micro=(1.0, 2.0))
    with pytest.raises(ValueError, match="second: its order conditions on 3 facts as 'mask_rate', the other on 1"):
        MultimodalModel(config, [text, modality("first", plain), modality("second", sized)])
    assert len(MultimodalModel(config, [text, modality("first", plain), modality("second", plain)]).inject) == 1


# --- which head learns what -----------------------------------------------------------------------------------------


def reference(model: MultimodalModel, tokens: TokenStream) -> dict[str, list[tuple[Tensor, float]]]:
    """Losses by modality, position by position: the head of modality[target[p]] reads hidden state p."""
    hidden, out = model(tokens), {m.name: [] for m in model.modalities}
    for place, target in links(tokens).items():
        owner = model.modalities[int(tokens.modality[target])]
        logits = hidden[place] @ model.heads[owner.name].weight.T
        local = int(tokens.ids[target]) - model.vocabulary[owner.name].start
        out[owner.name].append((-logits.log_softmax(-1)[local], float(tokens.weight[place])))
    return out


@pytest.mark.parametrize("order", [Raster(), Masked()])
def test_loss_is_routed_by_what_is_predicted(order: Order) -> None:
    model = tiny(order)
    model.modalities[1].weight = 0.25
    documents = [
        build(model, Segment("text", "hello"), Segment("image", PICTURE), seed=1),
        build(model, Segment("image", PICTURE, loss=False), Segment("text", "yes")),
    ]
    tokens = pack(documents)
    report, wanted, total = model.loss(tokens), reference(model, tokens), 0.0
    for name, terms in wanted.items():
        assert report.count[name] == len(terms) > 0
        raw = torch.stack([loss for loss, _ in terms]).mean()
        weighted = torch.stack([loss * weight for loss, weight in terms]).mean()
        torch.testing.assert_close(report.raw[name], raw)
        torch.testing.assert_close(report.weighted[name], weighted)
        total = total + weighted
    torch.testing.assert_close(report.total, total)
    torch.testing.assert_close(report.weighted["image"], 0.25 * report.raw["image"])


def test_each_loss_trains_its_own_head_and_the_mask_vector() -> None:
    model = tiny(Masked())
    words = build(model, Segment("text", "hello"))
    model.loss(words).total.backward()
    assert model.heads["text"].weight.grad.any() and model.heads["image"].weight.grad is None
    assert model.mask.weight.grad is None
    picture = build(model, Segment(NULL), Segment("image", PICTURE))
    model.zero_grad()
    model.loss(picture).total.backward()
    assert model.heads["image"].weight.grad.any()
    assert model.mask.weight.grad[1].any() and not model.mask.weight.grad[0].any()


def test_hidden_content_never_reaches_the_model() -> None:
    model = tiny(Masked())
    tokens = build(model, Segment("text", "a"), Segment("image", PICTURE))
    hidden = tokens.time > 0
    other = build(model, Segment("text", "a"), Segment("image", Encoded(grid=(2, 3), ids=(PICTURE.ids + 1) % 8)))
    assert torch.equal(other.time, tokens.time)
    assert torch.equal(model.embed(tokens)[hidden], model.embed(other)[hidden])
    assert not torch.equal(model.embed(tokens)[~hidden], model.embed(other)[~hidden])


def test_a_batch_without_targets_has_loss_zero_and_counts_can_come_from_elsewhere() -> None:
    model = tiny()
    nothing = model.loss(build(model, Segment("text", "a", loss=False), close=False))
    assert float(nothing.total.detach()) == 0 and not nothing.count
    nothing.total.backward()
    tokens = build(model, Segment("text", "abc"))
    own, shared = model.loss(tokens), model.loss(tokens, {"text": torch.tensor(8.0)})
    torch.testing.assert_close(shared.total * 8, own.total * 4)


def test_prediction_gives_the_loss_of_each_document() -> None:
    """A row a document, whatever it is packed with: the same as the loss of the document alone."""
    from mm.training import ModelTraining

    made = tiny()
    module = ModelTraining(made.backbone.config, made.modalities, context=made.context).eval()
    documents = [
        made.build_document([Segment("text", "only words")], torch.Generator()),
        made.build_document(
            [Segment("text", "red", loss=False), Segment("image", Image.new("RGB", (4, 4)))], torch.Generator()
        ),
    ]
    with torch.no_grad():
        rows = module.predict_step(pack(documents), 0)
        for document, row in zip(documents, rows, strict=True):
            report = module.model.loss(pack([document]))
            assert {n: value["positions"] for n, value in row.items()} == report.count
            for name, value in row.items():
                assert value["loss"] == pytest.approx(float(report.raw[name]), rel=1e-5)


def test_what_a_tokenizer_says_of_itself_hashes_and_empty_items_are_refused() -> None:
    spec = Spec(kind="discrete", vocab_size=4, alongside={"listening": 3})
    assert hash(spec) == hash(Spec(kind="discrete", vocab_size=4)) and spec != Spec(kind="discrete", vocab_size=4)
    for ended in (False, True):
        with pytest.raises(ValueError, match="exactly one of ids, codes, latents"):
            Encoded(grid=(3,), ended=ended)
