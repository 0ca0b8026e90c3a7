"""An ordinary script that loads an adapter with "peft_type": "BONE"; it must fail where hf_ext is not at work."""

import json
import tempfile
from pathlib import Path

import torch

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # A CPU build of torch beside the index's torchvision: without these, transformers would fail for that reason.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

config = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
base = AutoModelForCausalLM.from_config(config)
rows = torch.tensor([[1, 5, 6, 1, 7, 8]])
with tempfile.TemporaryDirectory() as folder:
    adapter = {"peft_type": "BONE", "r": 4, "init_weights": "bat", "target_modules": ["q_proj", "down_proj"]}
    Path(folder, "adapter_config.json").write_text(json.dumps(adapter))
    model = get_peft_model(base, PeftConfig.from_pretrained(folder))
    model(input_ids=rows, labels=rows).loss.backward()
    model.save_pretrained(folder)
    PeftModel.from_pretrained(model.unload(), folder)(input_ids=rows)
