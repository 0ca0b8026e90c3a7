"""An ordinary script that trains a model of timm by the name ofq_w2a2.<architecture>; it must fail without hf_ext."""

import torch

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # A CPU build of torch beside the index's torchvision: without these, timm would fail for that reason.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm

size = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_classes": 3}
model = timm.create_model("ofq_w2a2.vit_tiny_patch16_224", **size)
model(torch.randn(2, 3, 16, 16)).sum().backward()
