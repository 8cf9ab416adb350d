"""`mm fit` and its siblings: what a run leaves behind, going on after it, and configurations that can't be used."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mm.commands import train
from mm.commands.train import SHIPPED, check_readable, contents, differing, expand, find, main, replaced, sentence

PALETTE = [
    "--model.init_args.modalities.tokenizer=mm.testing.Palette",
    "--model.init_args.modalities.tokenizer.init_args.side=4",
]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def test_a_run_leaves_logs_checkpoints_and_a_model_and_goes_on(here: Path, tmp_path: Path) -> None:
    """The base configuration's callbacks at work: what lies where, what the exported weights are, and resuming."""
    import mm
    from mm.hub import load_pretrained

    overlay = tmp_path / "run.yaml"
    overlay.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "fast_dev_run": False,
                    "default_root_dir": str(tmp_path / "run"),
                    "max_steps": 4,
                    "val_check_interval": 2,
                    "log_every_n_steps": 1,
                    "callbacks": [
                        {"class_path": "mm.ema.EMA", "init_args": {"decay": 0.5}},
                        {"class_path": "mm.export.SavePretrained", "init_args": {"storage": "float16"}},
                        {
                            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                            "init_args": {"every_n_train_steps": 2, "save_last": True},
                        },
                    ],
                },
                "data": {"init_args": {"cache": str(tmp_path / "cache")}},
            }
        )
    )
    arguments = ["-c", "systems/llamagen.yaml", "-c", "debug.yaml", "-c", str(overlay), *PALETTE, *QUIET]
    assert main(["fit", *arguments]) == 0
    run = tmp_path / "run"
    logs = run / "logs" / "version_0"
    assert (run / "checkpoints" / "last.ckpt").is_file() and (logs / "config.yaml").is_file()
    assert list(logs.glob("events.out.tfevents*")) and list(logs.glob("samples/step-*.png"))
    noted = load_pretrained(run / "model").directions
    assert noted is not None and {("text", "image")} <= noted <= {("text", "image"), ("image", "image")}
    with (logs / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [0, 1, 2, 3]
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    shadow = state["callbacks"]["EMA"]["shadow"]["model.embedding.weight"]
    exported = load_pretrained(run / "model")
    assert torch.equal(exported.embedding.weight.detach(), shadow.half().float())
    assert not torch.equal(shadow.half().float(), state["state_dict"]["model.embedding.weight"].half().float())
    assert len(mm.TextToImagePipeline.from_pretrained(run / "model")("digit two", seed=0).images) == 1

    # what the run saved of its configuration is a configuration, and the run goes on from its last checkpoint
    again = ["-c", str(logs / "config.yaml"), "--trainer.max_steps=6", "--ckpt_path=last"]
    assert main(["fit", *again]) == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    with (run / "logs" / "version_1" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == [4, 5]
    assert main(["validate", "-c", str(logs / "config.yaml")]) == 0

    # one row a document of the validation data; their mean is the loss that validation logs
    assert main(["predict", "-c", str(logs / "config.yaml"), "--ckpt_path=last"]) == 0
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert rows and all(row["image"]["positions"] >= 16 and row["image"]["loss"] > 0 for row in rows)
    assert not list(run.glob("*.tmp"))


def test_lists_of_objects_are_replaced_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The parser alone would merge entries of lists of one length: base.yaml's format for captions of emoji, and the weight of
    its digits, into data that lack them."""
    own = {"source": {"class_path": "mm.data.sources.FolderSource", "init_args": {"path": "a"}}}
    own["template"] = {"class_path": "mm.data.documents.TextToImage"}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"data": {"init_args": {"train": [own, own], "validation": [own]}}}))
    with pytest.raises(SystemExit):
        main(["fit", "-c", "base.yaml", "-c", "modalities/text.yaml", "-c", str(file), "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert [part["source"]["init_args"]["path"] for part in data["train"]] == ["a", "a"]
    for part in [*data["train"], *data["validation"]]:
        assert part["source"]["init_args"].get("caption") is None and part["weight"] == 1.0


def test_what_is_emptied_before_a_file() -> None:
    known: dict[tuple[str, ...], int] = {}
    first = {"a": {"parts": [{"x": 1}, {"x": 2}], "names": ["p", "q"]}, "more": [{"x": 1}]}
    assert replaced(first, known) == {}
    assert replaced({"a": {"parts": [{"x": 3}, {"y": 4}], "names": ["r", "s"]}}, known) == {"a": {"parts": []}}
    assert replaced({"a": {"parts": [{"x": 3}]}}, known) == {}, "of another length nothing is merged"
    assert replaced({"more+": [{"y": 2}]}, known) == {}, "what is appended replaces nothing"
    assert replaced({"more": [{"x": 1}, {"x": 2}]}, known) == {"more": []}


def test_a_list_is_emptied_of_the_class_that_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between two data modules that have lists of one length stood one whose `train` is none, and it was told to empty it."""
    shapes = {"class_path": "mm.data.shapes.ShapesSource"}
    own = {"source": {"class_path": "mm.data.sources.FolderSource", "init_args": {"path": "a"}}}
    own["template"] = {"class_path": "mm.data.documents.TextToImage"}
    given: list[str] = []
    for name, args in (
        ("mm.data.shape_batches.ShapeDataModule", {"train": shapes, "validation": shapes}),
        ("mm.data.module.MultimodalDataModule", {"train": [own, own]}),
    ):
        file = tmp_path / f"{len(given)}.yaml"
        file.write_text(yaml.safe_dump({"data": {"class_path": name, "init_args": args}}))
        given += ["-c", str(file)]
    with pytest.raises(SystemExit):
        main(["fit", "-c", "base.yaml", "-c", "modalities/text.yaml", *given, "--print_config"])
    train = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["train"]
    assert [part["source"]["init_args"]["path"] for part in train] == ["a", "a"]


def test_two_ranks_validate_draw_samples_and_go_on(here: Path, tmp_path: Path) -> None:
    """What only the first rank does (samples, the exported model) must not leave it waiting for the other."""
    program = "import sys; from mm.cli import main; sys.exit(main(sys.argv[1:]))"
    script = tmp_path / "program.py"  # Lightning starts the second rank by the name of the first one's file
    script.write_text(program)
    callbacks = json.dumps([{"class_path": "mm.export.SavePretrained"}])
    arguments = ["fit", "-c", "systems/liquid.yaml", "-c", "debug.yaml", *PALETTE, *QUIET, "--trainer.devices=2"]
    arguments += ["--trainer.strategy=ddp", "--trainer.fast_dev_run=false", "--trainer.max_steps=4"]
    arguments += ["--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1", f"--trainer.callbacks={callbacks}"]
    arguments += [f"--trainer.default_root_dir={tmp_path}/run"]
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors.decode()[-3000:]
    logs = tmp_path / "run" / "logs" / "version_0"
    assert sorted(path.name for path in (logs / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert (tmp_path / "run" / "model" / "model.json").is_file()


def test_a_resumed_run_repeats_the_interrupted_one(here: Path, tmp_path: Path) -> None:
    """Batches, optimizer, schedule, and what dropout draws: the losses after step 2 are those of the run that went on."""
    arguments = ["-c", "systems/llamagen.yaml", "-c", "debug.yaml", *PALETTE, *QUIET]
    arguments += ["--trainer.fast_dev_run=false", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"]
    arguments += ["--trainer.val_check_interval=3", "--model.init_args.backbone.dropout=0.3"]
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    saving["init_args"] = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}  # type: ignore[assignment]
    arguments.append(f"--trainer.callbacks={json.dumps([saving])}")
    losses = []
    for name, more in (("whole", []), ("rest", [f"--ckpt_path={tmp_path}/whole/checkpoints/step=2.ckpt"])):
        assert main(["fit", *arguments, f"--trainer.default_root_dir={tmp_path}/{name}", *more]) == 0
        with (tmp_path / name / "logs" / "version_0" / "metrics.csv").open() as file:
            losses.append({int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]})
    whole, rest = losses
    assert sorted(whole) == [0, 1, 2, 3] and sorted(rest) == [2, 3]
    assert all(rest[step] == whole[step] for step in rest)


def test_checkpoints_that_cannot_be_used(here: Path, tmp_path: Path) -> None:
    """Of another configuration, cut short, empty, or no checkpoint: one sentence with the file's name, by both ways in."""
    arguments = ["-c", "systems/llamagen.yaml", "-c", "debug.yaml", *PALETTE, *QUIET, "--trainer.fast_dev_run=false"]
    arguments += ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    arguments += [f"--trainer.callbacks={json.dumps([saving])}", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *arguments]) == 0
    last = tmp_path / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    narrow = [*arguments, "--model.init_args.backbone.heads=1", "--model.init_args.backbone.width=16"]
    with pytest.raises(
        ValueError, match=r"last\.ckpt' was made with another configuration: model\..* has shape .*; give"
    ):
        main(["validate", *narrow, f"--ckpt_path={last}"])
    last.write_bytes(whole[: len(whole) // 2])
    for value in ("last", last):
        with pytest.raises(ValueError, match=r"last\.ckpt' is cut short or no checkpoint at all") as caught:
            main(["fit", *arguments, f"--ckpt_path={value}"])
        assert "weights_only" not in str(caught.value)


def test_what_a_checkpoint_file_must_hold(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    file.touch()
    with pytest.raises(ValueError, match=r"a\.ckpt' is empty"):
        check_readable(file, resume=False)
    file.write_text("hello")
    with pytest.raises(ValueError, match="no checkpoint at all"):
        check_readable(file, resume=False)
    torch.save({"state_dict": {}, "object": Path("x")}, file)
    with pytest.raises(ValueError, match="objects that could run code") as caught:
        check_readable(file, resume=False)
    assert "weights_only" not in str(caught.value)
    for state, key in (([], "state_dict"), ({"state_dict": {}}, "pytorch-lightning_version")):
        torch.save(state, file)
        with pytest.raises(ValueError, match=f"holds no {key}"):
            check_readable(file, resume=False)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, file)
    check_readable(file, resume=False)
    with pytest.raises(ValueError, match="holds no loops, expected what training goes on from"):
        check_readable(file, resume=True)


def test_the_first_differing_weight_is_named() -> None:
    one = {"a": torch.zeros(2), "b": torch.zeros(3)}
    assert differing(one, one) == ""
    assert differing(one, {"a": torch.zeros(2), "b": torch.zeros(4)}) == "b has shape (3,), expected (4,)"
    assert differing({"a": one["a"]}, one) == "it has no b"
    assert differing(one, {"a": one["a"]}) == "it has b, which the model lacks"


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"model": {"init_args": {"backbone": {"widht": 3}}}}, "mm.training.ModelTraining: .*backbone.*'widht'"),
        ({"model": {"init_args": {"larning_rate": 3}}}, "'larning_rate' is not accepted"),
        ({"trainer": {"max_stepps": 3}}, "max_stepps"),
        ({"data": {"init_args": {"tokns": 3}}}, "MultimodalDataModule: Option 'tokns' is not accepted"),
        ({"modle": {"x": 1}}, "does not accept option 'modle.x'"),
        (
            {"model": {"init_args": {"modalities+": [{"name": "x", "tokenizer": {}, "hed": {}}]}}},
            "model: mm.training.ModelTraining: modalities",
        ),
    ],
)
def test_misspelt_keys_are_refused_by_name(overlay: dict, message: str, here: Path, tmp_path: Path) -> None:  # type: ignore[type-arg]
    file = tmp_path / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay))
    with pytest.raises(ValueError, match=message) as caught:
        main(["fit", "-c", "systems/llamagen.yaml", "-c", "debug.yaml", "-c", str(file), *PALETTE])
    assert "\n" not in str(caught.value)


def test_extends_is_relative_and_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "root.yaml").write_text("x: 1\n")
    (tmp_path / "a" / "middle.yaml").write_text("extends: [../root.yaml]\ny: 2\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: [a/middle.yaml, root.yaml]\nz: 3\n")
    assert [yaml.safe_load(text) for text in contents(top, [])] == [{"x": 1}, {"y": 2}, {"x": 1}, {"z": 3}]
    assert expand(["--a", "1", "-c", str(tmp_path / "root.yaml"), f"--config={tmp_path / 'root.yaml'}"]) == [
        *["--a", "1"],
        *["--config", "x: 1\n"] * 2,
    ]


def test_configurations_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    for text, message in (
        ("extends: [a.yaml]", "extends itself"),
        ("extends: [b.yaml]", "extends 'b.yaml', which is missing"),
        ("extends: b.yaml", "extends of .* must be a list of files"),
        ("- 1", "is a list, expected keys"),
        ("a: [", "is not YAML"),
        ("x: 1\na: {b: 1, c: 2}\nx: 2", "has the key 'x' twice, again in line 3"),
        ("a: {b: 1, c: 2, b: 3}", "has the key 'b' twice"),
        ("a: " + "[" * 65 + "]" * 65, "nested too deeply, at most 64 levels"),
        ("a: " + "[" * 9_000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("", "is a NoneType, expected keys"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            expand(["-c", str(file)])
        assert "\n" not in str(caught.value)
    file.write_text("a: &a {b: 1}\nc: {<<: *a, b: 2}\nd: *a")  # a key that replaces a merged one is no mistake
    assert yaml.safe_load(contents(file, [])[0]) == {"a": {"b": 1}, "c": {"b": 2}, "d": {"b": 1}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "MAX_BYTES", 3)
    with pytest.raises(ValueError, match="too large"):
        expand(["-c", str(file)])
    for name in ("nothing.yaml", "../configs/base.yaml", "configs/nothing.yaml", "systems"):
        with pytest.raises(ValueError, match="there is no configuration"):
            find(name)
    with pytest.raises(ValueError, match="-c needs the path"):
        expand(["-c"])
    assert find("configs/base.yaml") == find("base.yaml") == find("base") == SHIPPED / "base.yaml"
    for name in ("liquid", "liquid.yaml", "systems/liquid", "configs/systems/liquid", "systems/liquid.yaml"):
        assert find(name) == SHIPPED / "systems" / "liquid.yaml"


def test_a_missing_configuration_is_refused_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from mm.cli import main; status = main(['fit', '-c', 'none.yaml']); "
        "print(status, [m for m in ('torch', 'lightning', 'jsonargparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n" and "there is no configuration 'none.yaml'" in done.stderr


def test_the_parsers_tree_becomes_a_sentence() -> None:
    tree = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'a'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'mm.X':
        Parser key "lr":
          Expected a <class 'float'>. Got value: x
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'lr': 'x'}"""
    assert sentence(tree) == "model: mm.X: lr: Expected a <class 'float'>. Got value: x"
    assert sentence("one line") == "one line"
    rivals = """Does not validate against any of the Union subtypes
Subtypes: [<class 'Module'>, <class 'NoneType'>]
Errors:
  - Does not validate against any of the Union subtypes
    Subtypes: [<class 'Source'>, <class 'Streaming'>]
    Errors:
      - shard 'a.tar' is missing; give paths of local .tar files
      - Import path mm.X does not correspond to a subclass of Streaming
    Given value type: <class 'dict'>
    Given value: {'paths': ['a.tar']}
  - Expected a <class 'NoneType'>
Given value type: <class 'dict'>
Given value: {'paths': ['a.tar']}"""
    assert sentence(rivals) == "shard 'a.tar' is missing; give paths of local .tar files"
    wrong = "Import path mm.X does not correspond to a subclass of Streaming"
    assert sentence(f'Parser key "data":\n  {wrong}') == f"data: {wrong}", "alone it is what is wrong"


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenizer.init_args.pretrained", "null"],
        ["tokenizer", '{"class_path": "mm.tokenizers.speech_codec.SpeechCodec", "init_args": {"pretrained": null}}'],
        ["tokenizer.init_args", '{"pretrained": null}'],
    ],
)
def test_null_inside_a_list_stays_null(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """jsonargparse hands such values on as their Python text, and a path named None would be looked for."""
    option = [f"--model.init_args.modalities.{arguments[0]}", arguments[1]]
    with pytest.raises(SystemExit):
        main(["fit", "-c", "systems/asr.yaml", *option, "--print_config"])
    speech = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["modalities"][-1]
    assert speech["name"] == "speech" and speech["tokenizer"]["init_args"]["pretrained"] is None
