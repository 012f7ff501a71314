"""What each process of tests/model/test_parallel.py runs: `torchrun tensor_parallel_worker.py
checkpoint expected out`."""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from vxl_model import VideoXLForConditionalGeneration
from vxl_train.cli import leave


def main(checkpoint, expected, out):
    model = VideoXLForConditionalGeneration.from_pretrained(checkpoint, ratio=4, tp_plan="auto")
    data = load_file(expected)
    ids = torch.cat([data["pre_ids"], torch.tensor([-200]), data["post_ids"]])[None]
    with torch.no_grad():
        result = model(ids, pixel_values=data["pixel_values"])
        new = model.generate(
            ids, pixel_values=data["pixel_values"], max_new_tokens=8, do_sample=False
        )
    keys, values = result.memory.keys_values(1)
    save_file(
        {
            "logits": result.logits.contiguous(),
            "new": new[0, ids.shape[1] :].contiguous(),
            "keys": keys,
            "values": values,
            "kv_heads": torch.tensor([model.model.kv_heads]),
        },
        f"{out}.{dist.get_rank()}.safetensors",
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
