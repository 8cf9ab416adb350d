"""`/v1/videos`: asked for with POST, looked at with GET until it is completed, then fetched from `/content`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Path, Request, Response, UploadFile

from mm.pipelines.text_to_video import TextToVideoPipeline
from mm.serve.desk import Ticket
from mm.serve.errors import RESPONSES, Refusal
from mm.serve.files import natural_size, picture
from mm.serve.films import Film, Films, frames_of, scale_of
from mm.serve.place import Place, streamed
from mm.serve.schemas import Deleted, Seed, Size, Temperature, Text, Video, Videos

Id = Annotated[str, Path(max_length=100)]


def routes(place: Place, films: Films) -> APIRouter:
    router = APIRouter(tags=["video"], responses=RESPONSES)

    @router.post("/v1/videos", response_model=Video)
    async def film(
        request: Request,
        prompt: Annotated[Text, Form()],
        model: Annotated[str | None, Form(max_length=200)] = None,
        seconds: Annotated[float | None, Form(gt=0, le=60, allow_inf_nan=False)] = None,
        size: Annotated[Size | None, Form(description="A whole multiple of what the model films.")] = None,
        seed: Annotated[Seed | None, Form()] = None,
        temperature: Annotated[Temperature | None, Form()] = None,
        input_reference: Annotated[UploadFile | None, File(description="The first frame.")] = None,
    ) -> Any:
        """A video for a prompt. The answer says its id, and how far it is."""
        served = place.shelf.choose("video", model or None)
        first = None if input_reference is None else await input_reference.read()
        options: Any = {} if temperature is None else {"temperature": temperature}
        ticket = Ticket(place.settings.seconds, lambda: place.gate.draining)  # nobody can fetch it from then on

        def check(ticket: Ticket) -> None:
            filmer = served.open(TextToVideoPipeline, ticket)
            scale_of(size, *natural_size(filmer, filmer.video))

        if size not in (None, "auto"):
            await place.desk.run(request, check)

        def work(made: Film) -> None:
            filmer = served.open(TextToVideoPipeline, ticket)
            out = filmer(
                prompt,
                num_frames=frames_of(seconds, filmer),
                image=picture(first) if first else None,
                seed=seed,
                callback=made.see,
                **options,
            )
            made.fill(out, size)

        asked = "" if seconds is None else f"{seconds:g}"
        return films.start(Film(served.name, prompt, ticket, asked, size or "auto"), work).told()

    @router.get("/v1/videos", response_model=Videos)
    async def every() -> Any:
        """The newest first."""
        return {"data": [one.told() for one in films.all()]}

    @router.get("/v1/videos/{video_id}", response_model=Video)
    async def look(video_id: Id) -> Any:
        """How far a video is."""
        return films.find(video_id).told()

    @router.get("/v1/videos/{video_id}/content", response_class=Response, responses=streamed("video/mp4", "image/gif"))
    async def fetch(video_id: Id, variant: Literal["video"] = "video") -> Any:
        """A completed video as a file."""
        made = films.find(video_id)
        if made.status != "completed":
            raise Refusal(404, f"the video is {made.status.replace('_', ' ')}, not completed", param="video_id")
        return Response(made.data, media_type=made.kind)

    @router.delete("/v1/videos/{video_id}", response_model=Deleted)
    async def remove(video_id: Id) -> Any:
        """Forget a video; one that is being made is ended."""
        films.remove(films.find(video_id))
        return {"id": video_id}

    return router
