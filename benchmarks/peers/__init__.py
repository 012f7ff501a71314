"""What is timed: our operators, PyTorch's, FlashAttention, FlashInfer, the published code."""
