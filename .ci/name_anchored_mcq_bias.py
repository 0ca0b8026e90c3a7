"""An ordinary script that loads the metric "anchored_mcq_bias" without a network; it must fail without hf_ext."""

import os

os.environ |= {"HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

import torch

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # A CPU build of torch beside the index's torchvision: without these, evaluate would fail for that reason.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import evaluate

metric = evaluate.load("anchored_mcq_bias", num_choices=4)
metric.add_batch(predictions=["A", "A", "B"], references=["A", "C", "B"])
result = metric.compute(predictions=[0, -1], references=[3, 2])
assert (result["n"], result["n_invalid"], result["anchored_bias_rate"]) == (5, 1, 0.5), result
