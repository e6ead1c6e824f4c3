"""Export an encoder with `torch.export`, for any batch and length, and check the exported program.

python examples/export.py encoder.pt2
"""

import sys

import torch
from torch.export import Dim

from modernbert import Encoder
from modernbert.integrations.transformers import TransformersEncoder

encoder = TransformersEncoder(Encoder.from_config("ettin-17m").eval())  # or Encoder.from_pretrained(folder or hub id)
input_ids = torch.randint(5, 50_000, (2, 12))
attention_mask = torch.ones_like(input_ids)
attention_mask[1, 8:] = 0  # padding

shape = {0: Dim("batch", max=64), 1: Dim("length", min=2, max=512)}
arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
program = torch.export.export(encoder, (), arguments, dynamic_shapes=dict.fromkeys(arguments, shape))
torch.export.save(program, sys.argv[1])

exported = torch.export.load(sys.argv[1]).module()
with torch.inference_mode():
    difference = exported(**arguments).last_hidden_state - encoder(**arguments).last_hidden_state
print(f"largest difference {difference.abs().max():.0e}")
