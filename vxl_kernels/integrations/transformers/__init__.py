"""`attn_implementation="vxl"` and a paged cache, for the decoders of transformers 5.

>>> from vxl_kernels.integrations.transformers import register  # doctest: +SKIP
>>> register()  # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="vxl")  # doctest: +SKIP
"""

from .attention import register
from .cache import PagedCache
from .prefilled import skip_cached

__all__ = ["PagedCache", "register", "skip_cached"]
