"""A KV connector of vLLM that loads memories of videos.

vLLM makes one connector in its scheduler and one in each worker. The scheduler's tells how many
tokens of a request a file holds. The worker's reads them in a thread while other requests go on.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorTransferResults,
)
from vllm.logger import init_logger

from vxl_kernels import VstCache
from vxl_model.streaming.fingerprint import checkpoint_text_fingerprint

from .prefix import Prefix, identity

__all__ = ["VxlConnector"]

logger = init_logger("vllm.vxl")  # below vLLM's own, whose handlers print it


@dataclass
class Load:
    """Tokens `first` to `first + tokens` of a memory, for the blocks of a request.

    Attributes:
        refused: why the memory cannot be loaded, or None.
    """

    request: str
    prefix: Prefix | None
    first: int = 0
    tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    refused: str | None = None


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler asks of the workers in a step."""

    loads: list[Load]


class VxlConnector(KVConnectorBase_V1):
    """Loads K and V of memories that `VideoMemory.save(path, final=True)` wrote.

    A request names its memory by `Prefix.kv_transfer_params`, and its `cache_salt` has to be the
    memory's identity. A request whose memory is missing, damaged or of another model ends with
    the finish reason "error", and the log tells why. Other requests go on.

    `kv_connector_extra_config` may hold:
        folder: requests can name files in this folder only, by relative paths.
        model: the checkpoint whose memories are right, if vLLM serves a converted copy of it.

    Raises:
        ValueError: `kv_load_failure_policy` is "recompute", since placeholders have no K and V.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "fail":
            raise ValueError(
                f"kv_load_failure_policy: got {transfer.kv_load_failure_policy!r}, expected 'fail'"
            )
        extra = transfer.kv_connector_extra_config or {}
        self._folder = Path(extra["folder"]).resolve() if extra.get("folder") else None
        self._model = extra.get("model") or vllm_config.model_config.model
        self._block_size = vllm_config.cache_config.block_size
        self._requested: list[Load] = []
        self._asked: dict[str, Load] = {}
        self._loading: dict[str, Future[None]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="vxl-memory")
        self._fingerprints: dict[torch.dtype, str] = {}

    # -- scheduler ------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens that the memory has beyond those of the prefix cache."""
        load = self._wanted(request)
        if load is None:
            return 0, False
        if load.refused:  # a load of one token, which fails
            self._asked[request.request_id] = load
            return 1, True
        assert load.prefix is not None
        tokens = max(0, load.prefix.tokens - num_computed_tokens)
        if tokens:
            load.first, load.tokens = num_computed_tokens, tokens
            self._asked[request.request_id] = load
        return tokens, tokens > 0

    def _wanted(self, request: Any) -> Load | None:
        try:
            prefix = Prefix.from_request(request.kv_transfer_params)
        except ValueError as error:
            return Load(request.request_id, None, refused=str(error))
        if prefix is None:
            return None
        load = Load(request.request_id, prefix)
        if request.cache_salt != prefix.identity:
            load.refused = f"cache_salt: got {request.cache_salt!r}, expected the memory's identity"
        elif prefix.tokens >= request.num_prompt_tokens:
            load.refused = (
                f"prompt: got {request.num_prompt_tokens} tokens, expected more than the "
                f"{prefix.tokens} of the memory"
            )
        return load

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remembers where the tokens go."""
        load = self._asked.pop(request.request_id, None)
        if load is not None and num_external_tokens > 0:
            load.blocks = list(blocks.get_block_ids()[0])
            self._requested.append(load)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """The loads of this step."""
        loads, self._requested = self._requested, []
        return Loads(loads)

    # -- worker ---------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Hands the loads of this step to the reading thread."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        layers = {
            _layer_index(name): layer
            for name, layer in forward_context.no_compile_layers.items()
            if isinstance(getattr(layer, "kv_cache", None), torch.Tensor)
        }
        for load in metadata.loads:
            device = next(iter(layers.values())).kv_cache.device
            stream = _SideStream(device) if device.type == "cuda" else nullcontext()
            self._loading[load.request] = self._reader.submit(self._load, load, layers, stream)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The requests whose memory is loaded, or failed to load, since the last step."""
        done = {name for name, future in self._loading.items() if future.done()}
        failed = set()
        for name in done:
            error = self._loading.pop(name).exception()
            if error is not None:
                logger.error("request %s: %s", name, error)
                failed.add(name)
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def _load(self, load: Load, layers: dict[int, Any], stream: Any) -> None:
        if load.refused:
            raise ValueError(load.refused)
        assert load.prefix is not None
        with VstCache.reader(self._path(load.prefix.path)) as file:
            if identity(file) != load.prefix.identity:
                raise ValueError(f"{load.prefix.path}: the file holds another memory now")
            if file.user["text_model"] != self._fingerprint(file.header.dtype):
                raise ValueError(f"{load.prefix.path}: the memory of another model")
            with stream:
                self._copy(load, file, layers)

    def _copy(self, load: Load, file: Any, layers: dict[int, Any]) -> None:
        positions = torch.arange(load.first, load.first + load.tokens)
        blocks = torch.tensor(load.blocks)
        slots = blocks[positions // self._block_size] * self._block_size
        slots += positions % self._block_size
        header = file.header
        shape = header.length, header.kv_heads, header.head_dim
        k, v = (torch.empty(shape, dtype=header.dtype) for _ in range(2))
        for tensor, first, rows in file.pieces():
            index, is_value = divmod(tensor, 2)
            (v if is_value else k)[first : first + len(rows)] = rows
            layer = layers.get(index)
            if layer is None or not is_value or first + len(rows) < header.length:
                continue
            cache, heads = layer.kv_cache, _rank_heads(layer, header.kv_heads)
            part = slice(load.first, load.first + load.tokens)
            dtype = self._vllm_config.model_config.dtype
            layer.impl.do_kv_cache_update(
                layer,
                k[part, heads].to(cache.device, dtype).contiguous(),
                v[part, heads].to(cache.device, dtype).contiguous(),
                cache,
                slots.to(cache.device),
            )

    def _path(self, path: str) -> str | Path:
        if self._folder is None:
            return path
        resolved = (self._folder / path).resolve()
        if not resolved.is_relative_to(self._folder):
            raise ValueError(f"path: got {path!r}, expected a file in the folder of memories")
        return resolved

    def _fingerprint(self, dtype: torch.dtype) -> str:
        if dtype not in self._fingerprints:
            self._fingerprints[dtype] = checkpoint_text_fingerprint(self._model, dtype)
        return self._fingerprints[dtype]

    def shutdown(self) -> None:
        """Waits for the load in progress and starts no other."""
        self._reader.shutdown(cancel_futures=True)

    # -- what this connector does not do: it saves nothing and loads no layer alone ------------

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request starts when all of its layers are loaded."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait_for_save(self) -> None:
        """Nothing."""


def _layer_index(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def _rank_heads(layer: Any, total: int) -> slice:
    """The KV heads of this process under tensor parallelism. More processes than heads share."""
    start = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
    return slice(start, start + layer.impl.num_kv_heads)


class _SideStream:
    """On a GPU a stream of its own, complete at the end of the block. It starts after what the
    device has been given so far."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._context = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._stream.synchronize()
        self._context.__exit__(*error)
