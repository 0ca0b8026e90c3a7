"""An ordinary script that loads a model with "quant_method": "ofq"; it must fail where hf_ext is not at work."""

import tempfile

import torch

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # A CPU build of torch beside the index's torchvision: without these, transformers would fail for that reason.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import ViTConfig, ViTForImageClassification

size = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
with tempfile.TemporaryDirectory() as folder:
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **size)).save_pretrained(folder)
    config = {"quant_method": "ofq", "w_bits": 2, "a_bits": 2}
    model = ViTForImageClassification.from_pretrained(folder, quantization_config=config)
    model(pixel_values=torch.randn(2, 3, 16, 16)).logits.sum().backward()
    model.save_pretrained(f"{folder}/trained")
    ViTForImageClassification.from_pretrained(f"{folder}/trained")
