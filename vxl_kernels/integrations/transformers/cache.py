"""A cache of transformers whose keys and values are pages of a `VstCache`.

`update` writes nothing. It gives the new rows to the attention of `attn_implementation="vxl"`. That
knows which of them are padding, appends the others to their pages, and reads what is cached there.
Nothing is concatenated, padding takes no memory, and beams and copies share pages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..._arguments import at_least, fail
from ...api import vst_attention
from ...cache.pool import CacheBatch, VstCache
from .rows import RowPlan

__all__ = ["PagedCache", "PagedRows"]

_ATTRIBUTES = {getattr(Tensor, x).__get__ for x in ("shape", "dtype", "device", "requires_grad")}


class PagedRows(Tensor):
    """New keys or values of a layer, which only the attention "vxl" can use.

    Attributes:
        sequences: where they belong.
        layer: the number of the layer.
        rows: the tensor itself.
    """

    sequences: PagedSequences
    layer: int
    rows: Tensor

    @classmethod
    def of(cls, rows: Tensor, sequences: PagedSequences, layer: int) -> PagedRows:
        new = rows.as_subclass(cls)
        new.sequences, new.layer, new.rows = sequences, layer, rows
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ATTRIBUTES:
            expected = 'attn_implementation="vxl", whose pages it has'
            fail("PagedCache", "a model of another attention", expected)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@dataclass
class _Step:
    """A forward on its way through the layers.

    Attributes:
        rows: of the forward, padding included.
        counts: rows of each sequence without padding.
        which: where those are in the rows, counted through the batch; None for all.
        slots: where they go, counted through the pages.
        next_layer: which has not appended yet.
    """

    rows: int
    counts: list[int]
    which: Tensor | None
    slots: Tensor
    next_layer: int = 0


class PagedSequences:
    """The sequences of a `PagedCache`, one for each row of the batch.

    Attributes:
        pages: the cache that they are in.
        ids: of the sequences in it.
        length: tokens of each, padding included.
        kept: bool `(batch, length)` on the host, False for padding; None without any.
    """

    def __init__(self, pages: VstCache, ids: Iterable[int] = ()) -> None:
        self.pages, self.ids = pages, list(ids)
        lengths = [pages.length(seq) for seq in self.ids]
        self.length, self.kept = max(lengths, default=0), None
        if len(set(lengths)) > 1:
            missing = self.length - torch.tensor(lengths)[:, None]
            self.kept = torch.arange(self.length) >= missing
        self._batch: CacheBatch | None = None
        self._step: _Step | None = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process parts may be gone
            self.clear()

    def fork(self) -> PagedSequences:
        """Copies that share all pages."""
        other = PagedSequences(self.pages)
        other.ids = [self.pages.fork(seq) for seq in self.ids]
        other.length, other.kept = self.length, self.kept
        return other

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the sequences of these rows, in this order. A row may come several times."""
        ids, left = [], set(self.ids)
        for row in rows:
            seq = self.ids[row]
            ids.append(seq if seq in left else self.pages.fork(seq))
            left.discard(seq)
        for seq in left:
            self.pages.free(seq)
        self.ids, self._batch = ids, None
        if self.kept is not None:
            self.kept = self.kept[list(rows)]

    def truncate(self, length: int) -> None:
        """Keeps the first tokens, and forgets a forward that did not reach the last layer."""
        self._step = None
        if self.kept is not None:
            self.kept = self.kept[:, :length]
        for i, seq in enumerate(self.ids):
            kept = length if self.kept is None else int(self.kept[i].sum())
            self.pages.truncate(seq, kept)
        self.length = length

    def clear(self) -> None:
        """Gives all pages back."""
        while self.ids:
            self.pages.free(self.ids.pop())
        self.length, self.kept, self._batch, self._step = 0, None, None, None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RowPlan | None,
        scale: float | None,
        backend: str | None,
    ) -> Tensor:
        """Appends the rows of a layer to their pages, and attends.

        Args:
            q, k, v: `(batch, rows, heads, head_dim)`, rotated.

        Returns:
            `(batch, rows, heads, head_dim)`.
        """
        if layer == 0:
            self._begin(len(q), q.shape[1], plan)
        step = self._step
        if step is None or step.next_layer != layer:
            fail("PagedCache", f"rows of layer {layer}", "a forward through all layers in order")
        assert self._batch is not None
        cache = self._batch.layer(layer)
        q, k, v = (x.to(self.pages.dtype) for x in (q, k, v))  # autocast made them of another
        for pages, rows in zip(cache[:2], (k, v), strict=True):
            rows = rows.flatten(0, 1)
            rows = rows if step.which is None else rows[step.which]
            pages.view(-1, *pages.shape[2:]).index_copy_(0, step.slots, rows)
        parts = [q], [k], [v]
        if plan is not None:
            parts = plan.sequences(q), plan.sequences(k), plan.sequences(v)
        (q_rows,), (k_rows,), (v_rows,) = parts
        out = vst_attention(q_rows, k_rows, v_rows, *cache, scale=scale, backend=backend)
        step.next_layer += 1
        if step.next_layer == self.pages.num_layers:
            self._commit(step, plan)
        return out if plan is None else plan.rows([out], q.shape)

    # -- private -----------------------------------------------------------------------

    def _begin(self, batch: int, rows: int, plan: RowPlan | None) -> None:
        """Makes room for a forward. The cache is as before if it raises."""
        if self._step is not None:
            got = f"a forward after one that stopped at layer {self._step.next_layer}"
            fail("PagedCache", got, "crop(0) or reset() first")
        self._refuse_mismatch(batch, plan)
        if not self.ids:
            self.ids = [self.pages.new() for _ in range(batch)]
        if self._batch is None:
            self._batch = self.pages.batch(self.ids)
        valid = None if plan is None else plan.valid
        counts = [rows] * batch if valid is None else valid.sum(1).tolist()
        if valid is None:
            self._batch.reserve(rows)
        else:
            for seq, count in zip(self.ids, counts, strict=True):
                self.pages.reserve(seq, count)
            self._batch.reserve(0)
        table, lengths = self._batch.block_table, self._batch.cache_seqlens
        at = lengths[:, None] + torch.arange(rows, device=table.device)
        which = None
        if valid is not None:
            valid = valid.to(table.device)
            at = lengths[:, None] + valid.cumsum(1) - 1
            at, which = at.clamp(min=0), valid.flatten().nonzero()[:, 0]
        size = self.pages.page_size
        slots = (table.gather(1, at // size) * size + at % size).flatten().long()
        self._step = _Step(rows, counts, which, slots if which is None else slots[which])

    def _refuse_mismatch(self, batch: int, plan: RowPlan | None) -> None:
        if self.ids and len(self.ids) != batch:
            fail("PagedCache", f"{len(self.ids)} sequences", f"{batch}, the batch")
        if plan is not None and plan.start != self.length:
            fail("PagedCache", f"{self.length} tokens", f"{plan.start} as the attention mask")
        if plan is not None and len(plan.takes) > 1:
            fail("attention mask", "packed sequences with a cache", "one of the two")
        kept = None if plan is None else plan.kept
        same = (kept is None) == (self.kept is None)
        if not same or (kept is not None and not torch.equal(kept, self.kept)):  # type: ignore[arg-type]
            got = f"other padding among the {self.length} cached tokens"
            fail("attention_mask", got, "that of the forwards that cached them")

    def _commit(self, step: _Step, plan: RowPlan | None) -> None:
        assert self._batch is not None
        if step.which is None:
            self._batch.commit(step.rows)
        else:
            for seq, count in zip(self.ids, step.counts, strict=True):
                self.pages.commit(seq, count)
        valid = None if plan is None else plan.valid
        if self.kept is not None or valid is not None:
            parts = [(self.kept, self.length), (valid, step.rows)]
            full = (len(self.ids),)
            self.kept = torch.cat(
                [torch.ones(*full, n, dtype=torch.bool) if x is None else x for x, n in parts], 1
            )
        self.length += step.rows
        self._step = None


class _PagedLayer(CacheLayerMixin):
    """One layer, as transformers asks for it."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, sequences: PagedSequences, index: int) -> None:
        super().__init__()
        self.sequences, self.index = sequences, index

    @property
    def batch_size(self) -> int:
        if not self.sequences.ids:
            raise AttributeError("batch_size: no sequence yet")
        return len(self.sequences.ids)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: pages are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new rows, for the attention to append."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            fail("PagedCache", "rows that require a gradient", "torch.no_grad()")
        rows = (PagedRows.of(x, self.sequences, self.index) for x in (key_states, value_states))
        return next(rows), next(rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.sequences.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.sequences.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # its name up to 5.16
        return -1


class PagedCache(Cache):
    """A cache for `generate` of a model with `attn_implementation="vxl"`.

    It appends to pages without copying what is there. Beam search, `copy.copy` and `copy.deepcopy`
    share pages. Padding is not kept. A sequence that is dropped gives its pages back.

    Args:
        pages: the pool. It may be shared with others.
        sequences: ids of sequences in it, one for each row of the batch. The cache takes them over.
            Shorter ones count as padded on the left. Without any, the first forward makes them.

    Raises:
        PoolExhausted: in a forward, too few free pages; the cache is as before then.
    """

    def __init__(self, pages: VstCache, sequences: Iterable[int] = ()) -> None:
        self._hold(PagedSequences(pages, sequences))

    def _hold(self, sequences: PagedSequences) -> None:
        self._sequences = sequences
        layers = [_PagedLayer(sequences, i) for i in range(sequences.pages.num_layers)]
        super().__init__(layers=layers)

    @classmethod
    def for_model(
        cls, model: Any, tokens: int, sequences: int = 1, page_size: int = 128
    ) -> PagedCache:
        """An empty cache of a new pool with the model's geometry, dtype and device.

        Args:
            model: a decoder of transformers.
            tokens: of each sequence, at most.
            sequences: rows of the batch, with beams.

        Raises:
            ValueError: a layer of the model is not attention, or an argument is not positive.
        """
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {
            "full_attention",
            "sliding_attention",
        }
        if kinds:
            fail("model", f"layers of kind {', '.join(sorted(kinds))}", "attention in every layer")
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        pages = -(-at_least("tokens", tokens, 1) // page_size)
        pool = VstCache(
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or heads,
            head_dim,
            num_pages=pages * at_least("sequences", sequences, 1),
            page_size=page_size,
            dtype=model.dtype,
            device=model.device,
        )
        return cls(pool)

    @property
    def pages(self) -> VstCache:
        """The pool."""
        return self._sequences.pages

    @property
    def sequences(self) -> list[int]:
        """Ids of the sequences in the pool, one for each row of the batch."""
        return list(self._sequences.ids)

    def __repr__(self) -> str:
        return f"PagedCache({len(self.sequences)} sequences of {self.get_seq_length()} tokens)"

    def __copy__(self) -> PagedCache:
        other = PagedCache.__new__(PagedCache)
        other._hold(self._sequences.fork())
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        return self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PagedCache cannot be pickled: VstCache.save writes a sequence to a file")

    # -- what transformers asks for ------------------------------------------------------

    def reset(self) -> None:
        """Forgets all tokens."""
        self._sequences.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens. 0 forgets a forward that was interrupted."""
        if tokens_to_remove > 0:
            fail("crop", tokens_to_remove, "minus the number of tokens to remove")
        self._sequences.truncate(max(0, self.get_seq_length() + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues row `beam_idx[i]`. Copies nothing."""
        self._sequences.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times. Copies nothing."""
        rows = range(len(self._sequences.ids))
        self._sequences.select([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""
        self._sequences.select(torch.as_tensor(indices).tolist())
