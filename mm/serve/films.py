"""Videos that are made while clients ask how far they are: held in memory, for some minutes."""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mm.generation import Event
from mm.pipelines.outputs import VideoOutput
from mm.pipelines.text_to_video import TextToVideoPipeline
from mm.serve.desk import Desk, Ticket
from mm.serve.errors import Refusal, refusal, sentence
from mm.serve.files import MAX_SIDE
from mm.serve.schemas import Video, VideoError
from mm.video import has_av, save_video

UNFINISHED = 8
"""Videos that wait or are made at a time."""
KEPT = 64
"""Videos that are kept; the oldest goes first."""
MINUTES = 10
"""How long one is kept."""
MAX_BYTES = 1 << 28
"""All of them together (256 MiB)."""


@dataclass(eq=False)
class Film:
    model: str
    prompt: str
    ticket: Ticket
    seconds: str = ""
    size: str = "auto"
    id: str = field(default_factory=lambda: f"video_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    completed: int | None = None
    error: VideoError | None = None
    data: bytes = b""
    kind: str = "video/mp4"

    def told(self) -> Video:
        return Video(
            id=self.id, model=self.model, status=self.status, progress=self.progress, created_at=self.created,
            completed_at=self.completed, expires_at=self.created + 60 * MINUTES, prompt=self.prompt,
            seconds=self.seconds, size=self.size, error=self.error,
        )  # fmt: skip

    def see(self, event: Event) -> None:
        self.ticket.check()
        self.status, self.progress = "in_progress", min(99, int(100 * event.done))

    def fill(self, out: VideoOutput, size: str | None) -> None:
        frames = out.videos[0]
        count, height, width = frames.shape[:3]
        scale = scale_of(size, width, height)
        ending = "mp4" if has_av() else "gif"
        with tempfile.TemporaryDirectory(prefix="mm-serve-") as folder:
            place = Path(folder) / f"video.{ending}"
            save_video(place, frames, out.fps, scale=scale)
            self.data = place.read_bytes()
        self.kind = "video/mp4" if ending == "mp4" else "image/gif"
        self.seconds, self.size = f"{count / out.fps:g}", f"{width * scale}x{height * scale}"
        self.status, self.progress, self.completed = "completed", 100, int(time.time())

    def fail(self, error: BaseException) -> None:
        said = refusal(error)
        self.error = VideoError(code=said.code or "failed", message=sentence(said.detail))
        self.status = "failed"


class Films:
    """All videos of a server, by id."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._films: dict[str, Film] = {}
        self._lock = threading.Lock()

    def start(self, film: Film, work: Callable[[Film], None]) -> Film:
        """Raises `Refusal` when too many are on their way."""

        def run() -> None:
            try:
                film.ticket.check()
                work(film)
            except Exception as error:
                late = film.ticket.expired and not isinstance(error, ValueError)
                film.fail(Refusal(504, f"it took longer than {self.desk.seconds:g} s") if late else error)

        with self._lock:
            self._tidy()
            if sum(one.status in ("queued", "in_progress") for one in self._films.values()) >= UNFINISHED:
                raise Refusal(
                    429, f"{UNFINISHED} videos are being made; try again when one is done", code="queue_full", retry=5
                )
            self._films[film.id] = film
        self.desk.pool.submit(run)
        return film

    def find(self, name: str) -> Film:
        """Raises `Refusal` where there is none."""
        with self._lock:
            self._tidy()
            if name not in self._films:
                raise Refusal(404, f"there is no video {name[:60]!r}, or it was too long ago", param="video_id")
            return self._films[name]

    def all(self) -> list[Film]:
        with self._lock:
            self._tidy()
            return list(self._films.values())[::-1]

    def remove(self, film: Film) -> None:
        film.ticket.leave()
        with self._lock:
            self._films.pop(film.id, None)

    def _tidy(self) -> None:
        old = time.time() - 60 * MINUTES
        for film in [one for one in self._films.values() if one.created < old]:
            self._drop(film)
        while len(self._films) > KEPT or sum(len(one.data) for one in self._films.values()) > MAX_BYTES:
            self._drop(next(iter(self._films.values())))

    def _drop(self, film: Film) -> None:
        film.ticket.leave()
        del self._films[film.id]


def frames_of(seconds: float | None, filmer: TextToVideoPipeline) -> int | None:
    """Frames of a clip of so many seconds; None: as the model was trained."""
    return None if seconds is None else max(1, round(seconds * filmer.tokenizer(filmer.video).spec.fps))


def scale_of(size: str | None, width: int, height: int) -> int:
    """By which whole factor a clip is enlarged. Raises `Refusal` for a size that is none."""
    if size is None or size == "auto":
        return 1
    wanted = tuple(map(int, size.split("x")))
    scale = wanted[0] // width
    if wanted != (scale * width, scale * height) or not 1 <= scale or max(wanted) > MAX_SIDE:
        raise Refusal(
            400,
            f"the model films {width}x{height}; ask for a whole multiple up to {MAX_SIDE}, got {size}",
            param="size",
        )
    return scale
