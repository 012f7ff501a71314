"""vLLM answers questions about a video that Video-XL has watched.

The cached K and V of a video have ordinary positions, and the plain language model reads the text
after it. So vLLM runs that language model, and a KV connector loads the cached K and V as the
beginning of a request. vLLM finds this package by the entry point `vllm.general_plugins`.

    prefix = publish(memory, "talk.vxl")
    llm = LLM(checkpoint, skip_tokenizer_init=True, kv_transfer_config=KVTransferConfig(
        kv_connector="VxlConnector", kv_role="kv_consumer"))
    llm.generate(prefix.prompt(ids), prefix.sampling(max_tokens=64, temperature=0))
"""

from .prefix import Prefix, publish

__all__ = ["Prefix", "publish", "register"]


def register() -> None:
    """Makes connector and model known to vLLM, in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.models import ModelRegistry

    import vxl_model  # noqa: F401  its configuration, for transformers' AutoConfig

    ModelRegistry.register_model("LlavaQwenForCausalLM", f"{__name__}.model:VideoXLTextModel")
    if "VxlConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "VxlConnector", f"{__name__}.connector", "VxlConnector"
        )
