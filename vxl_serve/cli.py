"""`vxl serve`: the server from the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vxl_cli.common import add_device_arguments, byte_size, count, placement, quiet

__all__ = ["add_serve"]

_KEYS = "VXL_API_KEYS"


def add_serve(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    serve = commands.add_parser("serve", help="a server for questions about videos, as OpenAI's")
    serve.add_argument(
        "--model", required=True, metavar="PATH", help="checkpoint: a folder or a name on the Hub"
    )
    add_device_arguments(serve)
    serve.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    serve.add_argument("--port", type=_port, default=8000, help="(default: %(default)s)")
    serve.add_argument("--name", help="of the model, for clients (default: the folder's)")
    serve.add_argument(
        "--store",
        type=Path,
        default=Path("vxl-store"),
        help="folder of memories (default: %(default)s)",
    )
    serve.add_argument(
        "--cache",
        type=byte_size,
        default=byte_size("2G"),
        metavar="SIZE",
        help="memory for K and V (default: 2G)",
    )
    serve.add_argument(
        "--disk",
        type=byte_size,
        default=byte_size("64G"),
        metavar="SIZE",
        help="of all memories (default: 64G)",
    )
    serve.add_argument(
        "--upload",
        type=byte_size,
        default=byte_size("2G"),
        metavar="SIZE",
        help="of a video (default: 2G)",
    )
    serve.add_argument(
        "--allow-folder",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="requests may name files in it; several times",
    )
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="requests may name URLs of it; several times",
    )
    serve.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help=f"one key a line; by default those of {_KEYS}, separated by commas",
    )
    serve.add_argument(
        "--running", type=count, default=64, help="answers decoded together (default: %(default)s)"
    )
    serve.add_argument(
        "--waiting", type=count, default=256, help="questions that may wait (default: %(default)s)"
    )
    serve.add_argument(
        "--engine",
        choices=("vxl", "vllm"),
        default="vxl",
        help="who answers (default: %(default)s)",
    )
    serve.add_argument("--vllm-url", metavar="URL", help="of a vLLM server with VxlConnector")
    serve.add_argument("--vllm-model", metavar="NAME", help="(default: the first of its models)")
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    if (options.engine == "vllm") != (options.vllm_url is not None):
        raise ValueError("--vllm-url: expected with --engine vllm, and only there")
    settings = _settings(options)
    import uvicorn

    uvicorn.run(
        application(options, settings),
        host=options.host,
        port=options.port,
        log_level="info",
        timeout_graceful_shutdown=5,
        ws_max_size=2**24,
        h11_max_incomplete_event_size=2**16,
    )


def _settings(options: argparse.Namespace) -> Any:
    """What the options allow. ValueError if they do not fit together."""
    from .settings import ServerSettings

    for folder in options.allow_folder:
        if not folder.is_dir():
            raise ValueError(f"--allow-folder: got {folder}, no such folder")
    return ServerSettings(
        store=options.store,
        name=options.name or Path(options.model).name,
        keys=_keys(options),
        folders=tuple(options.allow_folder),
        hosts=tuple(options.allow_host),
        upload_bytes=options.upload,
        disk_bytes=options.disk,
    )


def application(options: argparse.Namespace, settings: Any = None) -> Any:
    """The server that the options describe, with its model loaded."""
    from vxl_model import VideoXLForConditionalGeneration, VideoXLProcessor

    from .app import make_app
    from .engine import Engine
    from .memories import Memories

    quiet()
    settings = settings or _settings(options)
    device, dtype = placement(options)
    processor = VideoXLProcessor.from_pretrained(options.model)
    processor.prefix_ids()
    model = VideoXLForConditionalGeneration.from_pretrained(options.model, dtype=dtype).to(device)
    model.processor = processor
    config = model.config
    heads = config.num_key_value_heads or config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * config.head_dim * dtype.itemsize

    def engine(make_room: Any) -> Engine:
        return Engine(
            model.eval(),
            max(1, options.cache // row),
            most_running=options.running,
            most_waiting=options.waiting,
            make_room=make_room,
        )

    vllm = None
    if options.engine == "vllm":
        from .vllm.answers import VllmAnswers

        vllm = VllmAnswers(options.vllm_url, options.vllm_model)
    return make_app(Memories(settings, engine), vllm)


def _keys(options: argparse.Namespace) -> tuple[str, ...]:
    if options.api_keys is not None:
        where, form = f"--api-keys: got {options.api_keys}", "one a line"
        try:
            text = options.api_keys.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}, which is not UTF-8 ({error})") from None
    elif _KEYS in os.environ:
        where, form = f"{_KEYS}: got {os.environ[_KEYS]!r}", "some, separated by commas"
        text = os.environ[_KEYS].replace(",", "\n")
    else:
        return ()
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:  # a server that was to be closed is not opened to everybody
        raise ValueError(f"{where} without a key, expected {form}")
    return keys


def _port(text: str) -> int:
    """An argument's type: a port; 0 takes one that is free."""
    if not (text.isdecimal() and len(text) < 6 and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 to 65535")
    return int(text)
