"""Records which operators of this project a call reaches."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Names and backends of the vxl operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vxl":
            backend = args[-1] if isinstance(args[-1], str) else ""
            self.seen.append((func.overloadpacket.__name__, backend))
        return func(*args, **(kwargs or {}))
