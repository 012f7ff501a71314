"""Videos that have been watched, asked through other programs. `vxl_serve.vllm` is for vLLM."""
