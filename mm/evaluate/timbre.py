"""Whether a model that takes speech apart (Mega-TTS) speaks in the voice it is shown, whoever gave the prosody.

Held-out clips are spoken again, three times: with their own prosody in their own voice (shown by another clip of the speaker),
with their own prosody in the voice of someone else, and with prosody that the model makes, in that other voice. A judge that was
trained on real clips says who speaks, pocketsphinx what is said.

Of the tokenizers by themselves: how well the voice can be told from the timbre's vector, which should hold it, and from the
prosody's codes, which should not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mm import safe_io
from mm.audio import Audio
from mm.data.speech_grammar import KINDS
from mm.evaluate.networks import Say
from mm.evaluate.recordings import Recordings, load_recordings
from mm.evaluate.results import Figure, share
from mm.evaluate.speech import recognise, word_error
from mm.evaluate.speech_figures import error_figures, right
from mm.evaluate.speech_judges import SoundJudge, voice_judge
from mm.generation import Engine, Request
from mm.interfaces import Sampling
from mm.layout import Segment
from mm.model import MultimodalModel
from mm.speech_reader import ProsodyReader, TimbreReader

TIMBRE = "timbre"
"""Family of figures."""
GOAL, WORSE = 0.9, 0.05
"""Share of swapped sounds that have to be in the voice that was shown, and by how much more words may be wrong."""
Way = Literal["own", "swapped", "written"]
"""Own voice, another voice, another voice and the model's own prosody."""
CENTROID = 40
"""Training clips of each speaker that the tokenizers' figures are computed from."""


@dataclass(frozen=True)
class Case:
    """A clip to be spoken again; numbers are of clips."""

    clip: int
    own: int
    """Another clip of the speaker, which shows the voice."""
    other: int
    """A clip of someone else."""


@dataclass(frozen=True)
class Parts:
    """Names of a model's modalities."""

    text: str
    timbre: str
    prosody: str
    speech: str


def parts_of(model: MultimodalModel) -> Parts:
    """Raises `ValueError` for a model that doesn't take speech apart."""
    found: dict[str, str] = {}
    for modality in model.modalities[1:]:
        tokenizer = modality.tokenizer
        if isinstance(tokenizer, TimbreReader):
            found.setdefault("timbre", modality.name)
        elif isinstance(tokenizer, ProsodyReader):
            found.setdefault("prosody", modality.name)
        elif tokenizer.spec.sample_rate:
            found.setdefault("speech", modality.name)
    if len(found) < 3:
        names = ", ".join(model.vocabulary.index)
        raise ValueError(f"this model has no timbre, prosody and speech to swap; it has {names}")
    return Parts(model.vocabulary.host.name, found["timbre"], found["prosody"], found["speech"])


def cases(clips: Recordings, count: int, most: float) -> list[Case]:
    """So many cases, the clips in turn; what shows a voice says another text. The voices of others come in turn too.

    Raises `ValueError` where there are no two speakers with two texts each.
    """
    usable = [i for i, audio in enumerate(clips.audios) if audio.seconds <= most and clips.kinds[i] in KINDS]
    names = sorted({clips.speakers[i] for i in usable})
    of = {name: [i for i in usable if clips.speakers[i] == name] for name in names}
    out: list[Case] = []
    for number in range(count):
        clip = usable[number % len(usable)] if usable else -1
        mine = clips.speakers[clip] if usable else ""
        others = [name for name in names if name != mine]
        shown = []
        for name in (mine, others[number % len(others)] if others else ""):
            some = [i for i in of.get(name, []) if clips.texts[i] != clips.texts[clip]]
            if not some:
                raise ValueError(
                    f"a swap needs two speakers or more, with two texts or more each that are at most {most:.1f} s long; got "
                    f"{len(usable)} clips of {len(names)} speakers"
                )
            shown.append(some[(number // len(usable) * 7 + clip) % len(some)])
        out.append(Case(clip, *shown))
    return out


def speak(
    model: MultimodalModel,
    clips: Recordings,
    asked: Sequence[Case],
    way: Way,
    *,
    sampling: Sampling | None = None,
    batch: int = 16,
    seed: int = 0,
    say: Say = lambda line: None,
) -> list[Audio]:
    """The sound of each case. With the clip's prosody it is as long as the clip; else the model says how long."""
    names = parts_of(model)
    codec = model.modalities[model.vocabulary.index[names.speech]].tokenizer
    chosen = {names.text: Sampling(temperature=0.0), names.speech: sampling or Sampling()}
    requests = []
    for number, case in enumerate(asked):
        shown = clips.audios[case.own if way == "own" else case.other]
        given = [(names.timbre, shown), (names.text, clips.texts[case.clip])]
        items: list[Any] = [(names.prosody, None), (names.speech, None)]
        if way != "written":
            audio = clips.audios[case.clip]
            given.append((names.prosody, audio))
            items = [(names.speech, (math.ceil(audio.seconds * codec.spec.frame_rate - 1e-6),))]
        prompt = [Segment(name, content, loss=False) for name, content in given]
        requests.append(Request(prompt=prompt, items=items, text=False, by_modality=chosen, seed=seed + number))
    out: list[Audio] = []
    engine = Engine(model)
    for first in range(0, len(requests), batch):
        made = engine.generate(requests[first : first + batch])
        out += [decoded.value for decoded in codec.decode_batch([segments[-1].content for segments in made])]
        say(f"{way}: {len(out)} of {len(requests)} spoken")
    return out


def swap_figures(
    model: MultimodalModel,
    clips: Recordings,
    judge: SoundJudge,
    *,
    count: int = 200,
    sampling: Sampling | None = None,
    batch: int = 16,
    seed: int = 0,
    say: Say = lambda line: None,
) -> list[Figure]:
    """Whose voice is heard, and words that are wrong, each way; and whether both goals are met with swapped voices."""
    codec = model.modalities[model.vocabulary.index[parts_of(model).speech]].tokenizer
    asked = cases(clips, count, codec.spec.max_grid[0] / codec.spec.frame_rate)
    originals = [clips.audios[case.clip] for case in asked]
    figures = _heard("originals", clips, asked, originals, "own", judge, control=True)
    rates: dict[str, float] = {}
    ways: tuple[Way, ...] = ("own", "swapped", "written")
    for way in ways:
        made = speak(model, clips, asked, way, sampling=sampling, batch=batch, seed=seed, say=say)
        found = _heard(way, clips, asked, made, way, judge)
        errors = [figure.detail for figure in found if "edits" in figure.detail]
        rates[way] = sum(error["edits"] for error in errors) / sum(error["words"] for error in errors)
        figures += found
    figures.append(
        Figure(
            family=TIMBRE,
            name="words wrong, swapped − own",
            value=rates["swapped"] - rates["own"],
            unit="error",
            n=len(asked),
            goal=WORSE,
        )
    )
    return figures


def _heard(
    what: str,
    clips: Recordings,
    asked: Sequence[Case],
    audios: Sequence[Audio],
    way: str,
    judge: SoundJudge,
    control: bool = False,
) -> list[Figure]:
    wanted = [clips.speakers[case.clip if way == "own" else case.other] for case in asked]
    hits = right(judge, audios, "speaker", wanted)
    goal = None if way == "own" else GOAL
    figures = [share(TIMBRE, f"voice that was shown, {what}", hits, control=control, goal=goal)]
    if way != "own":
        given = right(judge, audios, "speaker", [clips.speakers[case.clip] for case in asked])
        figures.append(share(TIMBRE, f"voice of the clip that was spoken again, {what}", given))
    for kind in sorted({clips.kinds[case.clip] for case in asked}):
        rows = [n for n, case in enumerate(asked) if clips.kinds[case.clip] == kind]
        references = [clips.texts[asked[n].clip] for n in rows]
        errors = word_error(references, recognise([audios[n] for n in rows], kind))
        figures += error_figures(TIMBRE, f"{kind}, {what}", errors, control=control)
    return figures


# --- the tokenizers by themselves -------------------------------------------------------------------------------------


def tokenizer_figures(timbre: TimbreReader, prosody: ProsodyReader, clips: Recordings) -> list[Figure]:
    """Shares of held-out clips whose speaker is told right: by the nearest mean vector, and by how often each code occurs (naive
    Bayes). Both know `CENTROID` training clips a speaker. Raises `ValueError` for clips of which none or all are held out."""
    held, train = clips.where(held=True), clips.where(held=False)
    names = sorted({clips.speakers[i] for i in train})
    known = {name: [i for i in train if clips.speakers[i] == name] for name in names}
    rows = [i for i in held if clips.speakers[i] in known]
    if not rows:
        raise ValueError("the clips need some that are held out, of speakers that others show; give both sets")
    some = {name: own[:: max(1, len(own) // CENTROID)][:CENTROID] for name, own in known.items()}

    means = torch.stack([torch.cat([_vector(timbre, clips, i) for i in some[name]]).mean(0) for name in names])
    by_vector = [
        names[int(torch.cosine_similarity(_vector(timbre, clips, i), means).argmax())] == clips.speakers[i]
        for i in rows
    ]
    size = prosody.spec.vocab_size
    counts = torch.stack([sum((_counts(prosody, clips, i) for i in some[name]), torch.ones(size)) for name in names])
    odds = (counts / counts.sum(1, keepdim=True)).log()
    by_codes = [names[int((odds @ _counts(prosody, clips, i)).argmax())] == clips.speakers[i] for i in rows]
    note = f"chance {1 / len(names):.0%}"
    return [
        share(TIMBRE, "speaker told from the timbre's vector", by_vector, note=note),
        share(TIMBRE, "speaker told from how often each prosody code occurs", by_codes, note=f"{note}; less is better"),
    ]


def _vector(timbre: TimbreReader, clips: Recordings, number: int) -> Tensor:
    return timbre.encode(clips.audios[number]).content


def _counts(prosody: ProsodyReader, clips: Recordings, number: int) -> Tensor:
    return torch.bincount(prosody.encode(clips.audios[number]).content, minlength=prosody.spec.vocab_size).float()


# --- command ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measures a checkpoint or two tokenizers, prints JSON. Raises `ValueError` for what the user can mend."""
    from mm.commands.tokenize import find
    from mm.data.shards import ShardSource
    from mm.hub import load_pretrained, load_sampling, read_config, resolve

    parser = argparse.ArgumentParser(prog="python -m mm.evaluate.timbre", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder of a Mega-TTS")
    parser.add_argument("--tokenizers", nargs=2, metavar="NAME:DIR", help="timbre and prosody by themselves")
    parser.add_argument("--data", nargs="+", required=True, metavar="TAR", help="training and held-out clips")
    parser.add_argument("--samples", type=int, default=200, help="clips that are spoken again (%(default)s)")
    parser.add_argument("--judges", default="runs/judges", help="folder where the judge is kept (%(default)s)")
    parser.add_argument("--temperature", type=float, help="of the sound")
    parser.add_argument("--top-k", type=int, help="of the sound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="file for the JSON")
    options = parser.parse_args(argv)
    if bool(options.model) == bool(options.tokenizers) or options.samples < 1:
        raise ValueError("give either --model or --tokenizers, and --samples of at least 1")
    torch.set_num_threads(1)
    clips = load_recordings(ShardSource(options.data, caption=None))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if options.tokenizers:
        timbre, prosody = (find(name, "sound") for name in options.tokenizers)
        if not isinstance(timbre, TimbreReader) or not isinstance(prosody, ProsodyReader):
            raise ValueError(f"--tokenizers takes a timbre and a prosody, got {' and '.join(options.tokenizers)}")
        figures = tokenizer_figures(timbre, prosody, clips)
    else:
        model = load_pretrained(options.model).eval()
        names = parts_of(model)
        recommended = load_sampling(read_config(resolve(options.model))).get(names.speech, Sampling())
        given = {"temperature": options.temperature, "top_k": options.top_k}
        sampling = Sampling(**{**vars(recommended), **{k: v for k, v in given.items() if v is not None}})
        both = [model.modalities[model.vocabulary.index[name]].tokenizer for name in (names.timbre, names.prosody)]
        assert isinstance(both[0], TimbreReader) and isinstance(both[1], ProsodyReader)
        figures = tokenizer_figures(both[0], both[1], clips)
        judge = voice_judge(clips, Path(options.judges), say, options.seed)
        held = clips.subset(clips.where(held=True))
        figures += swap_figures(
            model, held, judge, count=options.samples, sampling=sampling, seed=options.seed, say=say
        )
    result = {"samples": options.samples, "seed": options.seed, "figures": [asdict(figure) for figure in figures]}
    if options.out:
        safe_io.write_json(Path(options.out), result)
    for figure in figures:
        low, high = figure.low or 0.0, figure.high or 0.0
        say(f"{figure.name:64} {figure.value:7.3f}  {low:6.3f} … {high:6.3f}  n={figure.n}  {figure.note}")
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
