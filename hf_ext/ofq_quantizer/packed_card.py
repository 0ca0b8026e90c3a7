"""The card in the folder of a packed model."""

from typing import Any

from hf_ext import compat
from hf_ext.ofq_quantizer.config import OFQConfig

CARD = """{head}
# {kind}, quantised with OFQ and packed

{w_bits}-bit weights and {a_bits}-bit activations{how}, after [arXiv 2302.02210](https://arxiv.org/abs/2302.02210); the
codes of the weights are packed to their bits. Where hf_ext is installed, this gives the model in evaluation mode, with
the logits of the trained one bit for bit:

```python
from hf_ext.ofq_quantizer import load_packed

model = load_packed("{here}")
```

`model.safetensors` has {size:,} bytes. It holds no latent weights to train on; no other loader reads it.
"""


def packed_card(about: dict[str, Any], config: OFQConfig, size: int) -> str:
    """What README.md says beside a packed model.

    about: of `describe`. size: bytes of the tensors' file.
    """
    source = about.get("config", {}).get("_name_or_path")
    return CARD.format(
        head=compat.front_matter("hf_ext", ["ofq", "quantization", about["library"]], source),
        kind=about["base"].split(".")[0] if "base" in about else about["class"],  # its tag tells of other weights
        w_bits=config.w_bits,
        a_bits=config.a_bits,
        how=" with QKR" if config.qk_reparam else "",
        here=compat.HERE,
        size=size,
    )
