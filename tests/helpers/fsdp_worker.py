"""What each process of tests/train/test_fsdp.py runs: the command line, under FSDP on a CPU.

accelerate shards only if the processes have accelerators. Here its state is told that they do. All
else is as on GPUs, except that gloo communicates.
"""

import sys

import accelerate.state
import torch
from accelerate.utils import DistributedType

_init = accelerate.state.AcceleratorState.__init__


def _shard_on_a_cpu(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


accelerate.state.AcceleratorState.__init__ = _shard_on_a_cpu

if __name__ == "__main__":
    from torch.distributed.tensor import DTensor

    from vxl_train import sharded
    from vxl_train.cli import leave, main

    seen = sharded.gather_weights

    def watched(model, keep, names=None):
        layer = model.model.layers[0].self_attn.q_proj.weight
        assert isinstance(layer, DTensor)
        assert layer.to_local().shape[0] * 2 == layer.shape[0]
        return seen(model, keep, names)

    sharded.gather_weights = watched
    status = main(sys.argv[1:])
    assert not torch.distributed.is_initialized(), "the processes' group is still open"
    leave(status)
