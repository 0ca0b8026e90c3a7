"""An ordinary script that types attn_implementation="anchor_continuous"; it must fail where hf_ext is not at work."""

import torch

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # A CPU build of torch beside the index's torchvision: without these, transformers would fail for that reason.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import AutoModelForCausalLM, LlamaConfig

config = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="anchor_continuous")
rows = torch.tensor([[1, 5, 6, 1, 7, 8]])
positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
model(input_ids=rows, position_ids=positions, labels=rows).loss.backward()
