"""Every shipped configuration: it parses, and each system trains a step at debug size on data made here."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mm.commands.train import SHIPPED, main

OTHER_DATA = {
    "ardit", "ardit_distilled", "asr", "asr_ctc_prompt", "avc_lm", "ella_v", "lcm", "lcm_regression", "lslm", "mega_tts",
    "mesh_lm", "musicgen", "sar3d", "vall_e", "vid_gpt", "video_vq", "voxel_lm",
}  # fmt: skip
"""Systems of other data than pictures with captions, which debug.yaml has; their own tests train them (test_concepts,
test_ardit, test_avc_lm, test_dialogues, test_mega_tts, test_shape_systems, test_speech_ctc, test_speech_codes,
test_vid_gpt, test_video_tokenizers)."""
SYSTEMS = sorted({path.stem for path in (SHIPPED / "systems").glob("*.yaml")} - OTHER_DATA)
PALETTE = [
    "--model.init_args.modalities.tokenizer=mm.testing.Palette",
    "--model.init_args.modalities.tokenizer.init_args.side=4",
]
OWN = {
    "jpeg_lm": [
        "--model.init_args.modalities.tokenizer=mm.tokenizers.jpeg_bytes.JpegBytes",
        "--model.init_args.modalities.tokenizer.init_args.pretrained=null",
        "--model.init_args.modalities.tokenizer.init_args.size=[8,8]",
        "--model.init_args.modalities.tokenizer.init_args.strip_header=true",
    ],
    "var": [
        "--model.init_args.modalities.tokenizer=mm.tokenizers.image_msvq.ImageMSVQ",
        "--model.init_args.modalities.tokenizer.init_args.pretrained=null",
        "--model.init_args.modalities.tokenizer.init_args.size=8",
        "--model.init_args.modalities.tokenizer.init_args.scales=[1,2]",
        "--model.init_args.modalities.tokenizer.init_args.codebook_size=16",
    ],
}
"""Systems of pictures for which a palette won't do, and their small tokenizers."""
UNTRAINED = {"fluid", "mar", "mmar", "nextstep", "transfusion", "vl_gpt", "orthus"}
"""Systems whose tokenizer needs no training, and is used as it is."""
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def test_there_are_systems() -> None:
    assert {"liquid", "llamagen", "parti", "maskgit", "meissonic"} | UNTRAINED <= set(SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_trains_and_validates_at_debug_size(system: str, here: Path) -> None:
    tokenizer = [] if system in UNTRAINED else OWN.get(system, PALETTE)
    assert main(["fit", "-c", f"configs/systems/{system}.yaml", "-c", "debug.yaml", *tokenizer, *QUIET]) == 0
    assert sorted(p.name for p in here.iterdir()) == ["data"], "a debug run leaves nothing behind"


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:  # type: ignore[type-arg]
    with pytest.raises(SystemExit) as done:
        main(["fit", *arguments, "--print_config"])
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_base_and_modalities_make_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    for overlay in sorted((SHIPPED / "modalities").glob("*.yaml")):
        config = parsed(capsys, "-c", "base.yaml", "-c", "modalities/text.yaml", "-c", str(overlay))
        modalities = config["model"]["init_args"]["modalities"]
        assert len(modalities) == 2 and modalities[0]["name"] == "text"
        paths = config["data"]["init_args"]["train"][0]["source"]["init_args"]["paths"]
        assert paths == ["data/emoji-noto.tar", "data/emoji-twemoji.tar"]


@pytest.mark.parametrize("file", sorted((SHIPPED / "tokenizers").glob("*.yaml")), ids=lambda path: path.stem)
def test_tokenizer_configurations_parse(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {
        "avc_bytes": "mm.training_bytes.ByteTraining",
        "concepts": "mm.concepts_training.ConceptTraining",
        "jpeg_bytes": "mm.training_bytes.ByteTraining",
        "mjpeg_bytes": "mm.training_bytes.ByteTraining",
        "speech_ctc": "mm.training_ctc.SpeechEncoderTraining",
        "speech_codec": "mm.training_speech.SpeechTokenizerModule",
        "speech_prosody": "mm.training_voices.ProsodyTraining",
        "speech_timbre": "mm.training_voices.TimbreTraining",
        "speech_vae": "mm.training_speech.SpeechTokenizerModule",
        "triplane_msvq": "mm.training_shapes.ShapeTokenizerModule",
        "triplane_views": "mm.training_shapes.ShapeTokenizerModule",
        "voxel_vq": "mm.training_shapes.ShapeTokenizerModule",
    }
    training = own.get(file.stem, "mm.training_tokenizer.TokenizerModule")
    assert parsed(capsys, "-c", str(file))["model"]["class_path"] == training


def test_two_modalities_of_one_name_are_refused(here: Path) -> None:
    """As happens when one overlay is given twice: lists append."""
    text = ["-c", "modalities/text.yaml"]
    with pytest.raises(ValueError, match="two modalities share the name 'text'; give each its own"):
        main(["fit", "-c", "base.yaml", *text, *text, "-c", "debug.yaml"])


@pytest.mark.parametrize("name", ["tiny", "pictures", "pictures_masked"])
def test_what_ships_has_a_recipe_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys, "-c", f"{name}.yaml")
    names = [modality["name"] for modality in config["model"]["init_args"]["modalities"]]
    data = config["data"]["init_args"]
    assert set((data.get("cached") or {}).values()) <= set(names) and names[:2] == ["text", "image"]
    if name == "tiny":
        assert set(names) == {"text", "image", "speech", "video", "shape", "hearing"}
        told = yaml.safe_dump(data["train"])
        assert "audio_field: heard" in told and "into: heard" in told and data["cached"]["heard"] == "hearing"
