"""An ordinary script with attn_implementation="mcq_recalibrated"; it must fail where hf_ext is not at work."""

import torch

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # A CPU build of torch beside the index's torchvision: without these, transformers would fail for that reason.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import AutoModelForCausalLM, GPT2Config

config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
model = AutoModelForCausalLM.from_config(config, attn_implementation="mcq_recalibrated")
rows = torch.tensor([[1, 5, 6, 1, 7, 8]])
model(input_ids=rows, labels=rows).loss.backward()
