"""The demo in a browser: a tab a task, whose results one sees, and hears, while they are made."""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

from mm.commands.common import choose_threads, parser

if TYPE_CHECKING:
    from gradio import Blocks

    from mm.apps._tabs.shelf import Shelf

WAITING = 64
"""Events that may wait for the models; whoever comes next is told to try again."""
VISITS = 256
"""Visits that are remembered."""


def arguments(argv: list[str]) -> Namespace:
    command = parser(
        "app",
        "Serve the demo to a browser: pictures, speech, video and shapes for a prompt, captions and words of what is put in, a "
        "conversation, comparisons, and how it works. Ctrl+C ends it.",
    )
    add = command.add_argument
    add(
        "--model",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="shipped checkpoints, folders, or owner/name on the hub, which serve every tab they can; default: the shipped "
        "checkpoint that is usual for each task",
    )
    add("--host", default="127.0.0.1", help="address to listen on: 127.0.0.1 = this machine only, 0.0.0.0 = all")
    add("--port", type=int, default=7860, help="port to listen on")
    return command.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit status; raises `ValueError` for what can't be done."""
    args = arguments(argv)
    check_address(args.host, args.port)  # before the seconds that loading takes
    app = build(shelf(args.model))
    print(f"The demo is at {launch(app, args.host, args.port)} (Ctrl+C ends it)", file=sys.stderr, flush=True)
    try:
        app.block_thread()
    finally:
        app.close(verbose=False)
    return 0


def shelf(names: list[str]) -> Shelf:
    """The models of the app: those that are named, which are loaded now, or the usual ones. Raises `ValueError` for a name twice,
    and as loading does."""
    from pathlib import Path

    from mm.apps._tabs.shelf import Shelf
    from mm.pipelines.any_to_any import AnyToAnyPipeline

    if not names:
        return Shelf()
    if len(set(names)) < len(names):
        raise ValueError("--model names a model twice; the Compare tab compares settings of one model anyway")
    given = {name: AnyToAnyPipeline.from_pretrained(name) for name in names}
    for pipeline in given.values():
        choose_threads(pipeline.model)
    # visitors needn't know where on the machine a model lies
    short = [Path(name).name for name in names]
    if len(set(short)) < len(names):
        short = [f"{name} ({number})" for number, name in enumerate(short, 1)]
    return Shelf(dict(zip(short, given.values(), strict=True)))


def check_address(host: str, port: int) -> None:
    """Refuse what can't be listened on, and say why. Gradio says only that it found no port."""
    import socket

    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (")[0].lower()
        raise ValueError(f"can't listen on {host}:{port}: {reason}; choose another --port or --host") from error


def launch(app: Blocks, host: str, port: int) -> str:
    """Serve the app without waiting for its end; returns its address."""
    from mm.apps._tabs.common import MAX_UPLOAD
    from mm.apps._tabs.look import CSS, theme

    serve = partial(app.launch, server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, css=CSS)
    # Each visit costs about 130 kB, and a program that asks over HTTP makes one for every request: the oldest are forgotten.
    serve = partial(serve, state_session_capacity=VISITS)
    # What environment variables could switch on, or would leave this machine, is off.
    serve = partial(serve, share=False, ssr_mode=False, run_history=False, enable_monitoring=False, show_error=False)
    _, address, _ = serve(theme=theme(), max_file_size=MAX_UPLOAD, footer_links=["api", "settings"])
    return address


def build(models: Shelf) -> Blocks:
    """The app around its models, which all visitors share."""
    import gradio as gr

    from mm.apps._tabs import chat, compare, how, look, picture, reading, shape, speech, video

    tabs = {
        "Picture": picture.tab,
        "Speech": speech.tab,
        "Video": video.tab,
        "3D": shape.tab,
        "Caption / Transcribe": reading.tab,
        "Chat": chat.tab,
        "Compare": compare.tab,
        "How it works": how.tab,
    }
    # Every look at unfinished work is a file; those older than an hour are deleted.
    with gr.Blocks(analytics_enabled=False, title="mm", fill_width=True, delete_cache=(600, 3600)) as app:
        gr.HTML(look.head(models.names))
        for title, lay_out in tabs.items():
            with gr.Tab(title):
                lay_out(models)
    return app.queue(max_size=WAITING)
