"""Checkpoints: what is saved comes back exactly; what doesn't fit, or is hostile, is refused with one sentence."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch

from mm import hub
from mm.generation import Engine, Request
from mm.heads.regression import RegressionHead
from mm.interfaces import Modality, Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.orders.masked import Masked
from mm.orders.raster import Raster
from mm.testing import Frames, tiny


def generate(model: MultimodalModel) -> list[int]:
    request = Request(prompt=[Segment("text", "red", loss=False)], items=[("image", (4, 4))], text=False, seed=3)
    return Engine(model).generate([request])[0][-1].content.ids.tolist()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return hub.save_pretrained(tiny(Masked(steps=3)), tmp_path / "model", "# A card\n")


def edit(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    config = json.loads((folder / "model.json").read_text())
    change(config)
    (folder / "model.json").write_text(json.dumps(config))


def test_a_checkpoint_gives_the_same_model(saved: Path) -> None:
    model, again = tiny(Masked(steps=3)), hub.load_pretrained(saved)
    assert generate(again) == generate(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    order = again.modalities[1].order
    assert isinstance(order, Masked) and order.default_steps == 3
    assert again.context == model.context and not again.training
    assert (saved / "README.md").read_text() == "# A card\n"
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "model.json", "model.safetensors"]


def test_a_whole_number_may_stand_for_another(tmp_path: Path) -> None:
    folder = hub.save_pretrained(tiny(rope_theta=10_000_000), tmp_path / "m")
    assert hub.load_pretrained(folder).backbone.config.rope_theta == 10_000_000


def test_conditions_come_back(tmp_path: Path) -> None:
    folder = hub.save_pretrained(tiny(Masked(rate_condition=True, micro=(1.0, 2.0))), tmp_path / "m")
    assert generate(hub.load_pretrained(folder)) == generate(tiny(Masked(rate_condition=True, micro=(1.0, 2.0))))


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    hub.load_pretrained(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_half_storage(tmp_path: Path) -> None:
    model = tiny()
    full = hub.save_pretrained(model, tmp_path / "full")
    half = hub.save_pretrained(model, tmp_path / "half", storage="float16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    again = hub.load_pretrained(half)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.float32
        expected = model.state_dict()[name]
        assert torch.equal(tensor, expected.half().float() if expected.ndim > 1 else expected)
    with torch.no_grad():
        model.embedding.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="embedding.weight holds values that are not finite in torch.float16"):
        hub.save_pretrained(model, tmp_path / "other", storage="float16")
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_with_weights_has_its_own_folder(tmp_path: Path) -> None:
    from mm.tokenizers.image_vq import ImageVQ

    torch.manual_seed(0)
    tokenizer = ImageVQ(size=8, channels=8, codebook_size=16, code_dim=4)
    tokenizer.reconstruct(torch.rand(16, 3, 8, 8))  # the first batch makes the codebook
    tokenizer.eval()
    base = tiny()
    modality = Modality(name="image", tokenizer=tokenizer, head=type(base.modalities[1].head)(), order=Raster())
    text = Modality(
        name="text", tokenizer=base.modalities[0].tokenizer, head=type(base.modalities[0].head)(), order=Raster()
    )
    model = MultimodalModel(base.backbone.config, [text, modality], 64).eval()
    folder = hub.save_pretrained(model, tmp_path / "m")
    assert (folder / "tokenizers" / "image" / "model.safetensors").is_file()
    described = json.loads((folder / "model.json").read_text())["modalities"][1]["tokenizer"]
    assert described == {"class_path": "image_vq", "folder": "tokenizers/image"}
    again = hub.load_pretrained(folder)
    assert again.modalities[1].tokenizer.spec == tokenizer.spec
    noise = torch.rand(3, 8, 8) * 2 - 1
    assert torch.equal(again.modalities[1].tokenizer.encode(noise).content, tokenizer.encode(noise).content)

    settings = folder / "tokenizers" / "image" / "config.json"
    whole = settings.read_text()
    for name, value, message in (
        ("code_dim", 1 << 20, "the tokenizer of 'image' can't be made: .* asks for a codebook of"),
        ("channels", 512, "the tokenizer of 'image' can't be made: it asks for far more memory than"),
    ):
        settings.write_text(re.sub(rf'"{name}": \d+', f'"{name}": {value}', whole))
        with pytest.raises(ValueError, match=message):
            hub.load_pretrained(folder)
    settings.write_text(whole)
    edit(folder, lambda c: c["modalities"][1]["tokenizer"].update(folder="../elsewhere"))
    with pytest.raises(ValueError, match="does not stay inside its folder"):
        hub.load_pretrained(folder)
    edit(folder, lambda c: c["modalities"][1].update(tokenizer={"class_path": "image_vq", "init_args": {}}))
    with pytest.raises(ValueError, match="is kept in a folder, but the checkpoint names none"):
        hub.load_pretrained(folder)


def test_sampling_defaults_travel_along(tmp_path: Path) -> None:
    wanted = {"image": Sampling(guidance=3.0, steps=5, guidance_interval=(0.1, 0.9))}
    folder = hub.save_pretrained(tiny(), tmp_path / "m", sampling=wanted)
    assert hub.load_sampling(hub.read_config(folder)) == wanted
    edit(folder, lambda c: c["sampling"]["image"].update(temperature="hot"))
    with pytest.raises(ValueError, match="the sampling of 'image' can't be made"):
        hub.load_sampling(hub.read_config(folder))
    with pytest.raises(ValueError, match="no modality 'sound'"):
        hub.save_pretrained(tiny(), tmp_path / "other", sampling={"sound": Sampling()})


def test_load_weights_refuses_before_it_changes_anything(saved: Path, tmp_path: Path) -> None:
    target = tiny(Raster(), seed=1)
    hub.load_weights(target, saved)  # another order, same weights
    assert torch.equal(target.embedding.weight, tiny(Masked(steps=3)).embedding.weight)
    for other, message in (
        (tiny(seed=1, side=3), "fingerprint|max_grid"),
        (tiny(seed=1, layers=3), "the checkpoint's backbone has layers 2, this one 3"),
        (tiny(seed=1, kv_heads=4), "kv_heads"),
        (tiny(seed=1, rope_theta=500.0), "rope_theta 10000.0, this one 500.0"),
        (tiny(Masked(rate_condition=True), seed=1), "lacks inject"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            hub.load_weights(other, saved)
        assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def set_tokenizer(**values: object):  # type: ignore[no-untyped-def]
    return lambda c: c["modalities"][1].update(tokenizer=values)


def set_order(**values: object):  # type: ignore[no-untyped-def]
    return lambda c: c["modalities"][1]["order"]["init_args"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="pickle"), "this version reads 'mm.model' version 1"),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.pop("vocabulary"), "vocabulary of it is 'None', expected dict"),
        (lambda c: c.update(context=10**12), "has a context of 1000000000000"),
        (lambda c: c.update(context=True), "context of it is 'True', expected int"),
        (lambda c: c.update(modalities=[]), "has 0 modalities"),
        (lambda c: c.update(modalities=c["modalities"] * 20), "has 40 modalities"),
        (lambda c: c.update(modalities=c["modalities"][:1] * 2), "two modalities share the name 'text'"),
        (lambda c: c["backbone"].update(width=10**9), "impossible size"),
        (lambda c: c["backbone"].update(layers=10**6), "impossible size"),
        (lambda c: c["backbone"].update(heads=0), "impossible size: heads is 0, expected 1 to 1,048,576"),
        (lambda c: c["backbone"].update(hidden=-1), "impossible size: hidden is -1, expected 0 to"),
        (lambda c: c["backbone"].update(width=1 << 20), "far more memory than its weights file holds"),
        (lambda c: c["backbone"].update(layers=4096, hidden=1 << 12), "far more memory than its weights file holds"),
        (lambda c: c["backbone"].update(layers=3), "lacks backbone.blocks.2"),
        (lambda c: c["backbone"].update(width="32"), "width of the backbone is '32', expected int"),
        (lambda c: c["backbone"].update(exec="x"), "the backbone has unknown settings: exec"),
        (lambda c: c["modalities"][1].update(name="../x"), "a modality '../x'"),
        (lambda c: c["vocabulary"].update(modalities=[1]), "a modality of the vocabulary is a int, expected an"),
        (
            lambda c: c["vocabulary"].update(modalities={"name": "text", "fingerprint": "x"}),
            "modalities of the vocabulary is .*, expected list",
        ),
        (lambda c: c["vocabulary"].update(size=7), "the checkpoint's vocabulary has size 7, this one has"),
        (lambda c: c["vocabulary"]["modalities"][1].update(size=9), "has size 9"),
        (lambda c: c["vocabulary"]["modalities"][1].update(fingerprint="z"), "was trained with 'z'"),
        (lambda c: c["modalities"][1]["order"].update(class_path="mask"), "did you mean 'masked'"),
        (lambda c: c["modalities"][1]["order"].update(class_path="lm"), "no plug-in 'lm' in orders"),
        (lambda c: c["modalities"][1]["order"]["init_args"].update(power=1), "unexpected keyword argument 'power'"),
        (set_order(steps="many"), "the order of 'image' has steps 'many', expected a whole number"),
        (set_order(steps=1.5), "steps '1.5', expected a whole number"),
        (set_order(steps=True), "steps 'True', expected a whole number"),
        (set_order(schedule="nope"), "schedule 'nope', expected one of cosine, uniform, normal"),
        (set_order(choice_temperature="x"), "choice_temperature 'x', expected a finite number"),
        (set_order(choice_temperature=float("1e999")), "JSON|finite"),
        (set_order(rate_condition=1), "rate_condition '1', expected true or false"),
        (set_order(micro=["x"]), "micro .*, expected a list of a finite number"),
        (set_order(micro=None), "micro 'None', expected a list"),
        (lambda c: c["modalities"][1]["head"]["init_args"].update(z_loss="x"), "z_loss 'x', expected a finite"),
        (lambda c: c["modalities"][1].update(weight=10**400), "weight of a modality is .*, expected float"),
        (lambda c: c["modalities"][1]["order"]["init_args"].update(steps=10**4000), "numbers|digits"),
        (lambda c: c["modalities"][1]["head"].update(folder="x"), "unknown settings: init_args"),
        (set_tokenizer(class_path="os.system", init_args={}), "is not loaded"),
        (set_tokenizer(class_path="mm.cli.main", init_args={}), "is not loaded"),
        (set_tokenizer(class_path="mm.testing.torch", init_args={}), "is not loaded"),
        (set_tokenizer(class_path="mm.testing.MultimodalModel", init_args={}), "is not loaded"),
        (set_tokenizer(class_path="mm.tokenizers..x.Y", init_args={}), "is not loaded"),
        (set_tokenizer(class_path="mm.tokenizers.nothing.Y", init_args={}), "is not loaded"),
        (set_tokenizer(class_path="mm.testing.Palette", init_args={"side": "/etc/passwd"}), "looks like a path"),
        (set_tokenizer(class_path="mm.testing.Palette", init_args={"side": "x"}), "side 'x', expected a whole"),
        (set_tokenizer(class_path="mm.testing.Palette", init_args=[1]), "init_args is a list"),
    ],
)
def test_hostile_descriptions_are_refused(saved: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    def guarded(config: dict) -> None:  # type: ignore[type-arg]
        change(config)

    sys.set_int_max_str_digits(5000)
    try:
        edit(saved, guarded)
    finally:
        sys.set_int_max_str_digits(4300)
    with pytest.raises(ValueError, match=message) as caught:
        hub.load_pretrained(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "place"), [("norm_eps", "the backbone"), ("weight", "a modality")])
def test_infinity_in_a_file_is_refused(saved: Path, field: str, place: str) -> None:
    """JSON has no word for it, but readers make it of numbers that are too large."""
    file = saved / "model.json"
    file.write_text(re.sub(rf'"{field}": [^,]*', f'"{field}": 1e999', file.read_text(), count=1))
    with pytest.raises(ValueError, match=f"{field} of {place} is 'inf', expected float"):
        hub.load_pretrained(saved)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([1], "sampling of it is .*, expected dict"),
        ("hot", "sampling of it is 'hot', expected dict"),
        ({"image": [1]}, "image of the sampling is .*, expected dict"),
        ({"image": {"heat": 1}}, "the sampling of 'image' can't be made: .*heat"),
        ({"image": {"top_k": 1.5}}, "the sampling of 'image' can't be made: top_k must be a whole number"),
        ({"image": {"guidance": None}}, "the sampling of 'image' can't be made: guidance must be a finite number"),
        ({"image": {"guidance_interval": 1}}, "can't be made: guidance_interval must be two numbers"),
        ({"image": {"guidance_schedule": "wrong"}}, "can't be made: guidance_schedule must be constant or ramp"),
    ],
)
def test_sampling_of_wrong_types_is_refused(saved: Path, sampling: object, message: str) -> None:
    edit(saved, lambda c: c.update(sampling=sampling))
    with pytest.raises(ValueError, match=message) as caught:
        hub.load_sampling(hub.read_config(saved))
    assert "\n" not in str(caught.value)


def test_arguments_are_held_to_annotations() -> None:
    from mm.description import check_arguments
    from mm.heads.diffusion import DiffusionHead

    for good in ({"process": {"train_steps": 10}}, {"process": None}, {"sampler": {"eta": 0}}, {"width": 3}):
        check_arguments(DiffusionHead, good, "the head")
    for wrong in ({"process": {"schedule": "x"}}, {"process": 1}, {"blocks": 1.5}, {"learned_variance": "no"}):
        with pytest.raises(ValueError, match="the head has .*expected"):
            check_arguments(DiffusionHead, wrong, "the head")


def test_a_foreign_module_is_not_even_imported(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(saved, set_tokenizer(class_path="evil.Tokenizer", init_args={}))
    with pytest.raises(ValueError, match="'evil.Tokenizer', which is no ModalityTokenizer"):
        hub.load_pretrained(saved)
    assert "evil" not in sys.modules


def test_damaged_files_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        hub.load_pretrained(saved)
    weights.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="pickle under another name"):
        hub.load_pretrained(saved)
    weights.unlink()
    with pytest.raises(ValueError, match="is missing"):
        hub.load_pretrained(saved)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(whole)
    weights.symlink_to(outside)
    with pytest.raises(ValueError, match="a link that leads out of its folder"):
        hub.load_pretrained(saved)
    (saved / "model.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        hub.load_pretrained(saved)


def test_weights_of_another_shape_or_not_finite(tmp_path: Path) -> None:
    small, large = tiny(), tiny(width=48)
    first = hub.save_pretrained(small, tmp_path / "a")
    second = hub.save_pretrained(large, tmp_path / "b")
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"has shape \(6,\), expected \(4,\)"):
        hub.load_pretrained(first)
    from safetensors.torch import load_file, save_file

    state = load_file(second / "model.safetensors")
    state["embedding.weight"][3, 3] = float("nan")
    save_file(state, second / "model.safetensors")
    with pytest.raises(ValueError, match="embedding.weight holds values that are not finite"):
        hub.load_pretrained(second)
    with torch.no_grad():
        small.embedding.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="the model is not saved"):
        hub.save_pretrained(small, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_no_checkpoint_can_name_is_not_saved(tmp_path: Path) -> None:
    class Mine(Raster):
        pass

    sound = Frames(rate=100.0)  # type: ignore[arg-type]
    for model, message in (
        (tiny(Mine()), "install it as a plug-in"),
        (tiny(tokenizer=sound, head=RegressionHead()), "has rate '100.0', expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            hub.save_pretrained(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_an_entry_point_is_named_by_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in of another distribution, found by the real entry-point machinery in a real dist-info folder."""
    from mm import plugins

    code = "from mm.orders.raster import Raster\nclass Backwards(Raster):\n    pass\n"
    (tmp_path / "other_orders.py").write_text(code)
    info = tmp_path / "other_orders-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-orders\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mm.orders]\nbackwards = other_orders:Backwards\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins._entry_points.cache_clear()
    try:
        order = plugins.load("orders", "backwards")()
        folder = hub.save_pretrained(tiny(order), tmp_path / "m")
        assert json.loads((folder / "model.json").read_text())["modalities"][1]["order"]["class_path"] == "backwards"
        assert type(hub.load_pretrained(folder).modalities[1].order) is type(order)
    finally:
        plugins._entry_points.cache_clear()


def test_names(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SHIPPED", tmp_path)
    assert hub.shipped() == ("model",)
    assert hub.resolve("model") == saved and hub.resolve(saved) == saved
    for name, message in (
        ("nothing", r"there is no checkpoint 'nothing'; .*shipped \(model\)"),
        ("", "there is no checkpoint ''"),
        ("../model", "there is no checkpoint"),
        (str(tmp_path), "holds no model.json"),
        (str(saved / "model.json"), "is a file; give the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            hub.resolve(name)


def test_a_hub_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'somebody/no-such-model' is no local folder and can't be fetched") as caught:
        hub.load_pretrained("somebody/no-such-model")
    assert "\n" not in str(caught.value)


def test_saving_again_replaces(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    hub.save_pretrained(tiny(seed=7), saved)
    assert torch.equal(hub.load_pretrained(saved).embedding.weight, tiny(seed=7).embedding.weight)
    assert (saved / "notes.txt").read_text() == "mine"
