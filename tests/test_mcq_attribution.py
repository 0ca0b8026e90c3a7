"""The split of a difference of two logits: it adds up, and each part is what its module added."""

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from mcq_models import (
    FAMILIES,
    LETTERS,
    WORDS,
    alone,
    examples,
    tiny_model,
    with_float64_norms,
    word_tokenizer,
)
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_ext.mcq_bias import BiasAttribution, attribute, score_choices
from hf_ext.mcq_bias.families import FAMILIES as SUPPORTED
from hf_ext.mcq_bias.families import family_of

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "mcq_bias"
TOKENIZER = word_tokenizer()
EXAMPLES = examples()
COUNTS = [example["num_choices"] for example in EXAMPLES]
LABELS = [example["label"] for example in EXAMPLES]
IDS = [WORDS.index(letter) for letter in LETTERS]
PER_ROW = ("embedding", "neurons", "heads", "mlp_bias", "attention_bias", "final_norm_bias", "logit_difference")


def exact(family, **changes):
    return with_float64_norms(tiny_model(family, **changes))


def attributed(model, rows=EXAMPLES, tokenizer=TOKENIZER, **options):
    return attribute(model, tokenizer, rows, **{"progress": False, **options})


def letter_logits(model):
    """(n, 5) by plain forwards, -inf beyond k."""
    rows = np.full((len(EXAMPLES), 5), -np.inf)
    for row, example in enumerate(EXAMPLES):
        rows[row, : COUNTS[row]] = alone(model, TOKENIZER, example["prompt"])[IDS[: COUNTS[row]]]
    return rows


# --- the sum


@pytest.mark.smoke
@pytest.mark.parametrize("target", ["gold", "runner_up"])
@pytest.mark.parametrize("family", FAMILIES)
def test_terms_add_up_to_the_logits(family, target):
    model = exact(family)
    result = attributed(model, target=target, batch_size=3)
    logits = letter_logits(model)
    others = np.where(np.arange(5) == 0, -np.inf, logits)
    expected_target = np.array(LABELS) if target == "gold" else others.argmax(1)
    assert result.target_index.tolist() == expected_target.tolist()
    difference = logits[:, 0] - logits[np.arange(len(logits)), expected_target]
    np.testing.assert_allclose(result.logit_difference, difference, rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.total(), difference, rtol=0, atol=1e-10)
    assert result.residual() <= 1e-10
    selected = (logits[:, 0] > others.max(1)) & (expected_target != 0)
    assert result.selected.tolist() == selected.tolist()


def test_an_output_bias_is_a_term():
    model = exact("gpt2")
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(WORDS), dtype=torch.float64))
    result = attributed(model, target="runner_up")
    bias = model.lm_head.bias.detach().numpy()
    np.testing.assert_allclose(result.output_bias, bias[IDS[0]] - bias[np.array(IDS)[result.target_index]])
    assert result.residual() <= 1e-10


@pytest.mark.parametrize("anchor", ["B", 1, "(b)"])
def test_another_anchor(anchor):
    model = exact("llama")
    logits = letter_logits(model)
    result = attributed(model, anchor=anchor, target="runner_up")
    others = np.where(np.arange(5) == 1, -np.inf, logits)
    np.testing.assert_allclose(result.logit_difference, logits[:, 1] - others.max(1), atol=1e-10)
    assert result.selected.tolist() == (logits[:, 1] > others.max(1)).tolist()
    assert (result.anchor, result.residual() <= 1e-10) == (1, True)


def test_a_tie_is_not_selected():
    model = exact("llama")
    with torch.no_grad():
        model.lm_head.weight[IDS] = 10 * model.lm_head.weight[IDS[0]]
    assert not attributed(model, target="runner_up").selected.any()


# --- each part


def by_hand(model, prompt, token_a, token_b):
    """The terms of one unpadded prompt from the inputs and outputs of whole modules, by finite sums in float64."""
    gpt2 = hasattr(model, "transformer")
    norm_name, block_name = ("transformer.ln_f", "transformer.h") if gpt2 else ("model.norm", "model.layers")
    mlp, attention = ("mlp.c_proj", "attn.c_proj") if gpt2 else ("mlp.down_proj", "self_attn.o_proj")
    projections = [f"{block_name}.{layer}.{path}" for layer in range(2) for path in (mlp, attention)]
    seen = inputs_and_outputs(model, prompt, [norm_name, f"{block_name}.0", *projections])
    norm = model.get_submodule(norm_name)
    x = seen[norm_name][0]
    dw = (model.lm_head.weight[token_a] - model.lm_head.weight[token_b]).detach()
    centred = x - x.mean() if gpt2 else x
    scale = (centred.square().mean() + (norm.eps if gpt2 else norm.variance_epsilon)).sqrt()
    u = norm.weight.detach() * dw
    u = (u - u.mean() if gpt2 else u) / scale

    terms = {"embedding": seen[f"{block_name}.0"][0] @ u, "neurons": [], "heads": [], "attention": [], "mlp": []}
    for layer, block in enumerate(model.get_submodule(block_name)):
        (m, mlp_out), (z, attention_out) = (seen[f"{block_name}.{layer}.{path}"] for path in (mlp, attention))
        head_dim = (block.attn if gpt2 else block.self_attn).head_dim
        terms["mlp"].append(mlp_out @ u)
        terms["attention"].append(attention_out @ u)
        terms["neurons"].append(pushed(block.get_submodule(mlp), m, u, 1))
        terms["heads"].append(pushed(block.get_submodule(attention), z, u, head_dim))
    return terms


def inputs_and_outputs(model, prompt, names):
    """name -> (input, output) of a module at the last position."""
    seen, handles = {}, []
    for name in names:

        def see(module, args, output, name=name):
            output = output[0] if isinstance(output, tuple) else output
            seen[name] = args[0][0, -1].detach(), output[0, -1].detach()

        handles.append(model.get_submodule(name).register_forward_hook(see))
    alone(model, TOKENIZER, prompt)
    for handle in handles:
        handle.remove()
    return seen


def pushed(module, inputs, u, width):
    """What each `width` inputs of a projection add along u: everything else set to zero, minus the bias."""
    parts = torch.zeros(len(inputs) // width, len(inputs), dtype=inputs.dtype)
    for part in range(len(parts)):
        parts[part, part * width : (part + 1) * width] = inputs[part * width : (part + 1) * width]
    with torch.no_grad():
        return (module(parts) - module(torch.zeros_like(parts))) @ u


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_is_what_its_module_adds(family):
    model = exact(family)
    result = attributed(model, batch_size=4, target="runner_up")
    for row in (0, 3):
        token = IDS[result.target_index[row]]
        expected = by_hand(model, EXAMPLES[row]["prompt"], IDS[0], token)
        np.testing.assert_allclose(result.embedding[row], expected["embedding"], atol=1e-10)
        for layer in range(2):
            np.testing.assert_allclose(result.neurons[row, layer], expected["neurons"][layer], atol=1e-10)
            np.testing.assert_allclose(result.heads[row, layer], expected["heads"][layer], atol=1e-10)
            mlp = result.neurons[row, layer].sum() + result.mlp_bias[row, layer]
            attention = result.heads[row, layer].sum() + result.attention_bias[row, layer]
            np.testing.assert_allclose(mlp, expected["mlp"][layer], atol=1e-10)
            np.testing.assert_allclose(attention, expected["attention"][layer], atol=1e-10)


def test_shapes_and_precision():
    result = attributed(tiny_model("gpt2"))
    assert isinstance(result, BiasAttribution)
    assert {name: getattr(result, name).shape for name in PER_ROW} == {
        "embedding": (7,),
        "neurons": (7, 2, 96),
        "heads": (7, 2, 3),
        "mlp_bias": (7, 2),
        "attention_bias": (7, 2),
        "final_norm_bias": (7,),
        "logit_difference": (7,),
    }
    assert {getattr(result, name).dtype for name in PER_ROW} == {np.dtype("float64")}
    assert result.selected.dtype == bool
    assert result.target_index.dtype == np.int64
    assert result.head_positions is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lower_precision(family, dtype):
    exactly = attributed(tiny_model(family), target="runner_up")
    result = attributed(tiny_model(family, dtype), target="runner_up", per_position=True)
    assert {getattr(result, name).dtype for name in (*PER_ROW, "head_positions")} == {np.dtype("float32")}
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert result.residual() <= tolerance
    same = result.target_index == exactly.target_index  # a runner-up may change with rounding
    assert same.sum() >= 5
    np.testing.assert_allclose(result.neurons[same], exactly.neurons[same], atol=tolerance)
    np.testing.assert_allclose(result.heads[same], exactly.heads[same], atol=tolerance)


def test_under_autocast():
    exactly = attributed(tiny_model("gpt2"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attributed(tiny_model("gpt2", torch.float32))
    np.testing.assert_allclose(result.neurons, exactly.neurons, atol=0.1)


# --- batches


@pytest.mark.parametrize("batch_size", [7, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family, batch_size):
    model = exact(family)
    together = attributed(model, batch_size=batch_size, per_position=True)
    length = max(len(TOKENIZER(example["prompt"])["input_ids"]) for example in EXAMPLES)
    assert together.head_positions.shape[-1] == length
    for row, example in enumerate(EXAMPLES):
        one = attributed(model, [example], per_position=True)
        for name in PER_ROW:
            np.testing.assert_allclose(getattr(together, name)[row], getattr(one, name)[0], atol=1e-10, err_msg=name)
        own = one.head_positions.shape[-1]
        np.testing.assert_allclose(together.head_positions[row, ..., -own:], one.head_positions[0], atol=1e-10)
        assert not together.head_positions[row, ..., :-own].any()


def test_a_dataset_and_bos():
    model = exact("gpt2")
    plain = attributed(model, prepend_bos=True)
    loaded = attributed(model, datasets.Dataset.from_list(EXAMPLES), prepend_bos=True)
    np.testing.assert_array_equal(plain.neurons, loaded.neurons)
    spelt = attributed(model, EXAMPLES, word_tokenizer(bos=True))
    np.testing.assert_allclose(plain.neurons, spelt.neurons, atol=1e-10)
    assert np.abs(plain.neurons - attributed(model).neurons).max() > 1e-3


def test_labels_are_not_read_for_the_runner_up():
    model = exact("gpt2")
    wrong = [{**example, "label": "nonsense"} for example in EXAMPLES]
    result = attributed(model, wrong, target="runner_up")
    np.testing.assert_array_equal(result.neurons, attributed(model, target="runner_up").neurons)


# --- positions


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_add_up_to_heads(family):
    model = exact(family)
    result = attributed(model, batch_size=3, per_position=True)
    np.testing.assert_allclose(result.head_positions.sum(-1), result.heads, atol=1e-10)
    np.testing.assert_allclose(result.heads, attributed(model).heads, atol=1e-10)
    assert result.residual() <= 1e-10


def test_positions_by_hand():
    """Llama with grouped heads: attention weights of the host's eager engine times values, one head at a time."""
    model = exact("llama")
    result = attributed(model, target="runner_up", per_position=True)
    prompt, row = EXAMPLES[2]["prompt"], 2
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    values, finals = {}, []
    for layer, block in enumerate(model.model.layers):
        block.self_attn.v_proj.register_forward_hook(lambda m, a, out, layer=layer: values.update({layer: out[0]}))
    model.model.norm.register_forward_pre_hook(lambda m, args: finals.append(args[0][0, -1]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
        x = finals[-1]
        dw = model.lm_head.weight[IDS[0]] - model.lm_head.weight[IDS[result.target_index[row]]]
        u = model.model.norm.weight * dw / (x.square().mean() + model.model.norm.variance_epsilon).sqrt()
        for layer, block in enumerate(model.model.layers):
            for head in range(4):
                out = block.self_attn.o_proj.weight[:, 8 * head : 8 * (head + 1)].T @ u
                group = head // 2
                expected = weights[layer][0, head, -1] * (values[layer][:, 8 * group : 8 * (group + 1)] @ out)
                own = result.head_positions[row, layer, head, -ids.shape[1] :]
                # The host's eager softmax is in float32.
                np.testing.assert_allclose(own, expected, atol=1e-6)


def test_the_engine_is_given_back():
    model = exact("llama")
    config, before = model.config, {name: vars(module).copy() for name, module in model.named_modules()}
    attributed(model, per_position=True)
    assert model.config is config
    assert config._attn_implementation == "sdpa"
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: attributes.keys() for name, attributes in before.items()
    }


# --- everything is left as found


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("per_position", [False, True], ids=["plain", "positions"])
def test_hooks_are_gone(per_position):
    model = exact("gpt2").train()
    attributed(model, per_position=per_position)
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    logits = letter_logits(model.eval())
    np.testing.assert_allclose(score_choices(model, TOKENIZER, [e["prompt"] for e in EXAMPLES], COUNTS).scores, logits)


@pytest.mark.parametrize("per_position", [False, True], ids=["plain", "positions"])
def test_hooks_are_gone_after_an_exception(per_position, monkeypatch):
    model = exact("gpt2").train()
    monkeypatch.setattr(model.transformer.h[1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attributed(model, per_position=per_position)
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == model.transformer.h[0].attn.config._attn_implementation == "sdpa"


def test_only_the_last_position_is_kept(monkeypatch):
    """A view of it would keep the activations of all positions."""
    from hf_ext.mcq_bias import attribution

    sizes = []

    def looked_at(family, model, seen, *rest):
        kept = [seen.embedding, seen.final, *seen.neurons.values(), *seen.mixtures.values()]
        sizes.extend(tensor.untyped_storage().nbytes() / (tensor.numel() * tensor.element_size()) for tensor in kept)
        return terms_of(family, model, seen, *rest)

    terms_of = attribution.terms_of
    monkeypatch.setattr(attribution, "terms_of", looked_at)
    attributed(exact("llama"))
    assert set(sizes) == {1.0}


# --- golden


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference data")
@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-10), ("llama", 1e-5)])
def test_golden(kind, tolerance):
    with safe_open(GOLDEN / f"decomposition_{kind}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    left_out = ("dtype", "model_type", "transformers_version")
    config = {key: value for key, value in json.loads(metadata["config"]).items() if key not in left_out}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).double().eval()
    weights = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    tokenizer = word_tokenizer(json.loads((GOLDEN / "word_level_vocab.json").read_text())["vocab"])
    prompts, counts = json.loads(metadata["prompts"]), tensors["num_choices"].tolist()
    labels = tensors["target_index"].tolist()
    rows = [
        {"prompt": prompt, "num_choices": k, "label": label}
        for prompt, k, label in zip(prompts, counts, labels, strict=True)
    ]
    result = attributed(model, rows, tokenizer, batch_size=5)
    expected = {name[9:]: tensor for name, tensor in tensors.items() if name.startswith("expected.")}
    assert set(expected) == set(PER_ROW)
    for name, tensor in expected.items():
        np.testing.assert_allclose(getattr(result, name), tensor, rtol=0, atol=tolerance, err_msg=name)


# --- what is read off


@pytest.fixture(scope="module")
def biased():
    """A model whose best letter is often A, and its attribution."""
    model = exact("gpt2")
    model.lm_head.bias = torch.nn.Parameter(9 * torch.eye(len(WORDS), dtype=torch.float64)[IDS[0]])
    return model, attributed(model)


def test_means_are_over_the_selected_rows(biased):
    result = biased[1]
    assert 2 <= result.selected.sum() < len(EXAMPLES)
    frame = result.to_pandas("neuron")
    assert list(frame) == ["component", "layer", "index", "mean"]
    assert len(frame) == 2 * 96
    mean = sum(result.neurons[row] for row in range(7) if result.selected[row]) / result.selected.sum()
    for layer, index in ((0, 0), (0, 95), (1, 17)):
        [value] = frame[(frame["layer"] == layer) & (frame["index"] == index)]["mean"]
        assert value == pytest.approx(mean[layer, index], abs=1e-14)
    assert set(frame["component"]) == {"neuron"}
    heads = result.to_pandas("head")
    np.testing.assert_allclose(heads["mean"], result.heads[result.selected].mean(0).ravel())
    assert heads[["layer", "index"]].to_numpy().tolist() == [[layer, head] for layer in range(2) for head in range(3)]


def test_the_component_table_adds_up(biased):
    result = biased[1]
    frame = result.to_pandas()
    assert frame["mean"].sum() == pytest.approx(result.logit_difference[result.selected].mean(), abs=1e-10)
    kinds = {"embedding": 1, "heads": 2, "attention_bias": 2, "neurons": 2, "mlp_bias": 2}
    assert Counter(frame["component"]) == kinds | {"final_norm_bias": 1, "output_bias": 1}
    assert frame["layer"].isna().sum() == 3
    assert frame["index"].isna().all()


def test_top(biased):
    result = biased[1]
    means = result.neurons[result.selected].mean(0)
    top = result.top(5)
    assert [term.mean for term in top] == pytest.approx(np.sort(means.ravel())[::-1][:5])
    assert all(term.component == "neuron" and means[term.layer, term.index] == pytest.approx(term.mean) for term in top)
    assert {type(top[0].layer), type(top[0].index), type(top[0].mean)} == {int, int, float}
    assert len(result.top(1000, "head")) == 6
    assert result.top(1, "component")[0].index is None
    assert sum(term.mean for term in result.top(99, "component")) == pytest.approx(
        result.logit_difference[result.selected].mean()
    )


def test_plot(biased):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    figure = biased[1].plot()
    heads, sums = (axis.images[0].get_array() for axis in figure.axes[:2])
    np.testing.assert_allclose(heads, biased[1].mean(biased[1].heads))
    assert sums.shape == (2, 4)
    pyplot.close(figure)


def test_no_row_selected():
    model = exact("gpt2")
    with torch.no_grad():
        model.lm_head.weight[IDS] = model.lm_head.weight[IDS[0]].clone()
    result = attributed(model)
    for read in (result.to_pandas, result.top, result.plot):
        with pytest.raises(ValueError, match=r"in none of the 7 rows .* the anchor A alone and wrong"):
            read()
    assert result.paper_ranking() == Counter()


def test_misspelt_component(biased):
    with pytest.raises(ValueError, match=r"component='heads' is none of .*; did you mean 'head'"):
        biased[1].to_pandas("heads")
    for n in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"n=.* is no integer of at least 1"):
            biased[1].top(n)


# --- the paper's ranking


def lens_oracle(model, result):
    """A list for each selected row and layer, in plain loops: (layer, neuron, lens gap), the largest neuron first."""
    family = family_of(model)
    gpt2 = hasattr(model, "transformer")
    gain = family.final_norm(model).weight.detach()
    unembedding = gain * model.lm_head.weight.detach()
    unembedding = unembedding - unembedding.mean(1, keepdim=True)
    unembedding = unembedding - unembedding.mean(0, keepdim=True)
    eps = family.final_norm(model).eps if gpt2 else family.final_norm(model).variance_epsilon
    lists = []
    for row in np.flatnonzero(result.selected):
        direction = unembedding[IDS[0]] - unembedding[IDS[LABELS[row]]]
        for layer in range(2):
            name = f"transformer.h.{layer}.mlp.c_proj" if gpt2 else f"model.layers.{layer}.mlp.down_proj"
            projection = model.get_submodule(name)
            activations = inputs_and_outputs(model, EXAMPLES[row]["prompt"], [name])[name][0]
            values = projection.weight.detach() if gpt2 else projection.weight.detach().T
            bias = torch.zeros(24, dtype=torch.float64) if projection.bias is None else projection.bias.detach()
            neurons = []
            for neuron, (m, value) in enumerate(zip(activations, values, strict=True)):
                written = m * value + bias
                written = written - written.mean()
                gap = written / (written.square().mean() + eps).sqrt() @ direction
                neurons.append((abs(float(m)) * float((value - value.mean()).norm()), layer, neuron, float(gap)))
            lists.append([neuron[1:] for neuron in sorted(neurons, key=lambda neuron: -neuron[0])])
    return lists


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_paper_ranking(family):
    model = exact(family)
    model.lm_head.bias = torch.nn.Parameter(9 * torch.eye(len(WORDS), dtype=torch.float64)[IDS[0]])
    result = attributed(model)
    assert result.selected.sum() >= 2
    lists = lens_oracle(model, result)
    found = 0
    for top_k in (1, 3, 10, 1000):
        for threshold in np.linspace(-3, 6, 91):
            expected = Counter()
            for neurons in lists:
                for layer, neuron, gap in neurons[:top_k]:
                    if gap > threshold:
                        expected[layer, neuron] += 1
                        break
            assert result.paper_ranking(top_k, threshold) == expected
            found += len(expected)
    assert found > 100, "else nothing is tested"


def test_paper_ranking_refuses(biased):
    with pytest.raises(ValueError, match=r"top_k=0 is no integer of at least 1"):
        biased[1].paper_ranking(top_k=0)
    with pytest.raises(ValueError, match=r"gap_threshold='4' is no number"):
        biased[1].paper_ranking(gap_threshold="4")


def test_the_lens_is_blind_to_size():
    """A thousand times as large, a neuron's lens gap is the same (without an MLP bias), and its term is not."""
    model = exact("mistral")
    model.lm_head.bias = torch.nn.Parameter(9 * torch.eye(len(WORDS), dtype=torch.float64)[IDS[0]])
    with torch.no_grad():
        model.model.norm.variance_epsilon = 0.0
    before = attributed(model)
    small = before.paper_ranking(top_k=1, gap_threshold=0.0)
    scaled = BiasAttribution(
        **{**vars(before), "neurons": before.neurons / 1000, "activations": before.activations / 1000}
    )
    assert scaled.paper_ranking(top_k=1, gap_threshold=0.0) == small
    assert scaled.top(1)[0].mean == pytest.approx(before.top(1)[0].mean / 1000)


# --- bad input: nothing is computed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "glod"}, r"target='glod' is none of 'gold', 'runner_up'; did you mean 'gold'"),
        ({"target": "gold", "rows": [{"prompt": "p", "num_choices": 2}]}, r"examples\[0\]: it has no 'label'"),
        ({"rows": []}, r"there are no examples"),
        ({"anchor": "C"}, r"examples\[0\]: the anchor C is beyond its 2 choices"),
        ({"anchor": "AA"}, r"anchor='AA' is neither an index 0 to 25 nor a letter A to Z"),
        ({"anchor": 26}, r"anchor=26 is neither"),
        ({"batch_size": 0}, r"batch_size=0 is no integer of at least 1"),
        ({"rows": [{"prompt": "w1 " * 65, "num_choices": 2, "label": 0}]}, r"examples\[0\] has 65 tokens"),
        ({"letter_prefix": " w1 "}, r"'A' is not one token"),
    ],
)
def test_refused_before_any_forward(options, message, monkeypatch):
    model = exact("gpt2")
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("a forward"))
    with pytest.raises(ValueError, match=message):
        attributed(model, **options)
    assert hooks(model) == 0


def test_another_family():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_neox", vocab_size=33, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(
        ValueError, match=r"model_type 'gpt_neox' is not supported; .* gpt2, llama, mistral, qwen2, qwen3"
    ):
        attributed(model)
    assert set(SUPPORTED) == set(FAMILIES)


def test_a_model_without_head():
    model = AutoModel.from_config(AutoConfig.for_model("gpt2", vocab_size=33, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"GPT2Model is no causal language model"):
        attributed(model)


@pytest.mark.parametrize("target", ["down_proj", "q_proj"])
def test_a_model_with_adapters(target):
    model = exact("llama").float()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    for refused in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=r"has adapters.*merge_and_unload\(\) or unload\(\)"):
            attributed(refused)
    assert attributed(adapted.merge_and_unload()).residual() < 1e-3


def test_a_projection_that_is_no_plain_matrix():
    model = exact("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(model.model.layers[1].mlp.down_proj)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj is a .*Sequential, and a plain matrix"):
        attributed(model)


def test_terms_that_miss_the_logits():
    """A hook that adds to the residual stream is no part of the weights."""
    model = exact("gpt2")
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: output + 0.5)
    model.transformer.h[1].attn.c_proj.register_forward_hook(lambda module, args, output: 1.5 * output)
    with pytest.raises(ValueError, match=r"the terms of the first batch miss the logits of this GPT2LMHeadModel by"):
        attributed(model)
    assert hooks(model) == 2


def test_numbers_that_are_not_finite():
    model = exact("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"or numbers that are not finite"):
        attributed(model)


def test_a_wrapper_is_named():
    with pytest.raises(ValueError, match=r"DataParallel wraps a GPT2LMHeadModel.*unwrap_model"):
        attributed(torch.nn.DataParallel(exact("gpt2")))


def test_a_model_on_several_devices_is_refused():
    model = exact("gpt2")
    model.transformer.h[1].to("meta")
    with pytest.raises(ValueError, match=r"on cpu, meta: load it onto one device"):
        attributed(model)


def test_result_says_what_it_is_and_is_not_compared_by_its_arrays():
    result = attributed(exact("gpt2"), target="runner_up")
    assert repr(result) == (
        f"BiasAttribution(anchor='A', target='runner_up', 7 rows of which {result.selected.sum()} selected, "
        "2 layers of 96 neurons and 3 heads)"
    )
    assert result == result
    assert result != attributed(exact("gpt2"), target="runner_up")


@pytest.mark.parametrize("part", ["model", "block"])
def test_what_torch_compile_returned_is_refused(part):
    """PEFT would save an adapter under names that the model itself does not have."""
    model = exact("gpt2")
    if part == "model":
        model = torch.compile(model, backend="eager")
    else:
        model.transformer.h[0] = torch.compile(model.transformer.h[0], backend="eager")
    with pytest.raises(ValueError, match=r"what torch.compile returned.*in place, model.compile\(\)"):
        attributed(model)


@pytest.mark.parametrize("part", ["model", "blocks"])
def test_a_model_compiled_in_place_is_run_as_it_is(part):
    model, expected = exact("gpt2"), attributed(exact("gpt2"))
    for module in [model] if part == "model" else model.transformer.h:
        module.compile(backend="eager")
    np.testing.assert_allclose(attributed(model).neurons, expected.neurons, atol=1e-12)
