"""Tiny random models of transformers, and what they compute in PyTorch.

``python tests/models/record_goldens.py [case ...]`` writes ``goldens/<case>/``: the folder that transformers saves, and
``activations.npz`` with the inputs, the hidden states between the blocks, and the outputs.
"""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "goldens"
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3)
TEXT = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=30,
    max_position_embeddings=9,
    bos_token_id=27,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=20.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=3.0)
YARN = dict(rope_type="yarn", rope_theta=30.0, factor=4.0, original_max_position_embeddings=16)
DECODER = dict(
    vocab_size=30,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    bos_token_id=27,
    eos_token_id=28,
)
SEQUENCE_TO_SEQUENCE = dict(
    vocab_size=30,
    d_model=16,
    d_kv=6,
    d_ff=24,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=0,
)


TWO_TOWERS = (transformers.CLIPModel, transformers.SiglipModel)


def clip(vision: dict[str, Any], text: dict[str, Any]) -> torch.nn.Module:
    config = transformers.CLIPConfig(vision_config=VISION | vision, text_config=TEXT | text, projection_dim=12)
    return transformers.CLIPModel(config)


def clip_vision(model_class: type, **changes: Any) -> torch.nn.Module:
    return model_class(transformers.CLIPVisionConfig(**VISION | changes))


def vit(**changes: Any) -> torch.nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION | changes))


def siglip(vision: dict[str, Any], text: dict[str, Any]) -> torch.nn.Module:
    text = {"projection_size": VISION["hidden_size"], **TEXT, **text}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION | vision, text_config=text))


def dinov2(model: str, **changes: Any) -> torch.nn.Module:
    shape = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2)
    registers = "WithRegisters" if "WithRegisters" in model else ""
    config = getattr(transformers, f"Dinov2{registers}Config")(**shape | changes)
    return getattr(transformers, f"Dinov2{model}")(config)


def gpt2(**changes: Any) -> torch.nn.Module:
    shape = dict(vocab_size=30, n_embd=24, n_layer=3, n_head=3, n_positions=10, bos_token_id=27, eos_token_id=28)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | changes))


def decoder(family: str, **changes: Any) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**DECODER | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def gemma3(**changes: Any) -> torch.nn.Module:
    """Positions of their own for sliding blocks, which all but every second are."""
    ropes = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = DECODER | dict(layer_types=kinds, rope_parameters=ropes, pad_token_id=0, final_logit_softcapping=4.0)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**shape | changes))


def encoder(family: str, kind: str = "Model", **changes: Any) -> torch.nn.Module:
    shape = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, vocab_size=30)
    config = getattr(transformers, f"{family}Config")(**shape | dict(max_position_embeddings=11) | changes)
    return getattr(transformers, f"{family}{kind}")(config)


CLASSIFIER = "ForSequenceClassification"


def encoder_decoder(family: str, separate_head: bool = False, **changes: Any) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**SEQUENCE_TO_SEQUENCE | changes)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    if separate_head:  # as in a checkpoint that has one; the config does not say it
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


CASES = {
    "bert": lambda: encoder("Bert", pad_token_id=0, layer_norm_eps=1e-3),
    "bert_classifier": lambda: encoder("Bert", CLASSIFIER, num_labels=3, hidden_act="gelu_new"),
    "mpnet": lambda: encoder("MPNet", max_position_embeddings=30, layer_norm_eps=1e-5),
    "mpnet_classifier": lambda: encoder("MPNet", CLASSIFIER, num_labels=3),
    "roberta": lambda: encoder("Roberta", type_vocab_size=1),
    "roberta_classifier": lambda: encoder("Roberta", CLASSIFIER, hidden_act="relu", num_labels=4),
    "xlm_roberta_for_masked_language": lambda: encoder("XLMRoberta", "ForMaskedLM"),
    "clip_quick_gelu": lambda: clip(
        dict(image_size=17, patch_size=5, hidden_act="quick_gelu"), dict(eos_token_id=2, hidden_act="quick_gelu")
    ),
    "clip_gelu": lambda: clip(
        dict(image_size=12, patch_size=4, hidden_act="gelu", layer_norm_eps=1e-3),
        dict(eos_token_id=28, pad_token_id=28, hidden_act="gelu", layer_norm_eps=1e-4),
    ),
    "clip_vision": lambda: clip_vision(transformers.CLIPVisionModel, image_size=14, patch_size=7),
    "clip_vision_with_projection": lambda: clip_vision(
        transformers.CLIPVisionModelWithProjection, image_size=10, patch_size=3, projection_dim=8
    ),
    "clip_text_with_projection": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**TEXT, eos_token_id=28, projection_dim=8)
    ),
    "dinov2": lambda: dinov2("ForImageClassification", image_size=12, patch_size=4, num_labels=5),
    "dinov2_backbone": lambda: dinov2("Model", image_size=13, patch_size=4, qkv_bias=False, use_mask_token=False),
    "dinov2_gated": lambda: dinov2(
        "ForImageClassification", image_size=8, patch_size=4, use_swiglu_ffn=True, layer_norm_eps=1e-3
    ),
    "dinov2_with_registers": lambda: dinov2(
        "WithRegistersForImageClassification", image_size=8, patch_size=4, num_register_tokens=3, hidden_act="relu"
    ),
    "gemma2": lambda: decoder(
        "Gemma2", head_dim=8, sliding_window=3, query_pre_attn_scalar=5, attn_logit_softcapping=2.0, pad_token_id=0
    ),
    "gemma2_untied": lambda: decoder(
        "Gemma2",
        head_dim=6,
        sliding_window=4,
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=0,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention"] * 3,
    ),
    "gemma3": lambda: gemma3(head_dim=8, sliding_window=3, query_pre_attn_scalar=6, rms_norm_eps=1e-3),
    "gpt2": lambda: gpt2(),
    "gpt2_untied": lambda: gpt2(
        tie_word_embeddings=False, n_inner=20, activation_function="relu", layer_norm_epsilon=1e-3
    ),
    "llama": lambda: decoder("Llama", rms_norm_eps=1e-3, rope_parameters=LLAMA3),
    "llama_of_many_biases": lambda: decoder(
        "Llama", attention_bias=True, mlp_bias=True, num_key_value_heads=4, rope_parameters=LINEAR, hidden_act="gelu"
    ),
    "mistral": lambda: decoder("Mistral", sliding_window=3, head_dim=8, num_key_value_heads=1),
    "qwen2": lambda: decoder(
        "Qwen2", tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "qwen3": lambda: decoder("Qwen3", head_dim=10, attention_bias=True),
    "t5": lambda: encoder_decoder("T5"),
    "t5_v1_1": lambda: encoder_decoder("T5", True, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: encoder_decoder("MT5", True, num_decoder_layers=None, layer_norm_epsilon=1e-3),
    "umt5": lambda: encoder_decoder("UMT5", feed_forward_proj="gated-silu", num_layers=2, num_decoder_layers=3),
    "siglip": lambda: siglip(dict(image_size=13, patch_size=4), dict(eos_token_id=28)),
    "siglip_gelu": lambda: siglip(
        dict(image_size=8, patch_size=4, hidden_act="gelu", layer_norm_eps=1e-3), dict(hidden_act="gelu_pytorch_tanh")
    ),
    "siglip_text": lambda: transformers.SiglipTextModel(transformers.SiglipTextConfig(**TEXT, projection_size=8)),
    "siglip_vision": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**VISION, image_size=12, patch_size=6)
    ),
    "vit": lambda: vit(image_size=12, patch_size=4, id2label={i: f"class {i}" for i in range(5)}),
    "yarn": lambda: decoder("Qwen3", head_dim=10, rope_parameters=YARN, max_position_embeddings=64),
    "vit_without_qkv_bias": lambda: vit(
        image_size=11, patch_size=3, qkv_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-4, num_labels=3
    ),
}

# Those that a case was recorded with: at first its place, of later ones the checksum of the name.
FIRST = [case for names in (("clip", "vit"), ("llama", "mistral", "qwen")) for case in sorted(CASES)
         if case.startswith(names)]  # fmt: skip
SEEDS = {case: zlib.crc32(case.encode()) for case in CASES}
for later in (("t5", "mt5", "umt5"), ("bert", "mpnet", "roberta", "xlm_roberta")):
    SEEDS |= {case: seed for seed, case in enumerate([*FIRST, *sorted(c for c in CASES if c.startswith(later))])}


def build(case: str) -> torch.nn.Module:
    """The model of a case; its parameters are large enough that every one of them changes the outputs."""
    model = CASES[case]().eval()
    generator = torch.Generator().manual_seed(SEEDS[case])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                is_scale = re.search(r"norm|ln_", name.lower()) and name.endswith("weight")
                offset = 1.0 if is_scale and not case.startswith("gemma") else 0.0  # which adds one to its scales
                size = 0.1 if name.endswith("Attention.q.weight") else 0.3  # T5 does not scale the scores
                parameter.copy_(offset + size * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(model: torch.nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs in tvjax's layout: images of normal noise, and texts of several lengths, padded."""
    rng = np.random.default_rng(seed)
    vision, text = _tower_configs(model)
    found = {}
    if vision is not None:
        found["pixels"] = rng.normal(size=(3, vision.image_size, vision.image_size, 3)).astype(np.float32)
    if text is not None:
        lengths = np.array([9, 6, 3, 2])
        tokens = rng.integers(3, 27, (4, 9))
        positions = np.arange(9)
        tokens[:, 0] = 27
        tokens[positions == lengths[:, None] - 1] = 28
        tokens[positions >= lengths[:, None]] = text.pad_token_id if text.pad_token_id in (1, 28) else 0
        found["tokens"] = tokens.astype(np.int32)
        found["mask"] = positions < lengths[:, None]
        if getattr(text, "type_vocab_size", 0) > 1:
            found["types"] = np.where(positions >= lengths[:, None] // 2, 1, 0).astype(np.int32)
        if text.is_encoder_decoder:
            found["decoder_tokens"] = np.concatenate([np.zeros((4, 1)), rng.integers(3, 27, (4, 6))], 1).astype(
                np.int32
            )
            found["decoder_mask"] = np.arange(7) < np.array([5, 7, 2, 1])[:, None]
    return found


def activations(model: torch.nn.Module, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The hidden states before, between and after the blocks, ``<tower>_hidden/<i>``, and the outputs."""
    arguments = {}
    if "pixels" in given:
        arguments["pixel_values"] = torch.from_numpy(given["pixels"].transpose(0, 3, 1, 2).copy())
    if "tokens" in given:
        arguments["input_ids"] = torch.from_numpy(given["tokens"]).long()
        arguments["attention_mask"] = torch.from_numpy(given["mask"]).long()
    if "types" in given:
        arguments["token_type_ids"] = torch.from_numpy(given["types"]).long()
    if "decoder_tokens" in given:
        arguments["decoder_input_ids"] = torch.from_numpy(given["decoder_tokens"]).long()
        arguments["decoder_attention_mask"] = torch.from_numpy(given["decoder_mask"]).long()
    with torch.no_grad():
        if model.config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet"):
            return _of_encoder(model, arguments)
        if isinstance(model, TWO_TOWERS):
            outputs = model(**arguments, output_hidden_states=True)
            towers = {"vision": outputs.vision_model_output, "text": outputs.text_model_output}
            found = {
                "image": towers["vision"].pooler_output,  # projected, not normalised
                "text": towers["text"].pooler_output,
                "image_normalised": outputs.image_embeds,
                "text_normalised": outputs.text_embeds,
                "logits_per_image": outputs.logits_per_image,
            }
        elif "lm_head" in dict(model.named_children()):
            if model.config.is_encoder_decoder:
                towers = {name: getattr(model, name).block for name in ("encoder", "decoder")}
            else:
                towers = {"text": model.transformer.h if hasattr(model, "transformer") else model.model.layers}
            last = {}  # what transformers calls the last hidden state has the final norm behind it
            hooks = [
                blocks[-1].register_forward_hook(lambda module, given, output, name=name: last.update({name: output}))
                for name, blocks in towers.items()
            ]
            outputs = model(**arguments, output_hidden_states=True)
            found = {"logits": outputs.logits}
            for name, hook in zip(towers, hooks, strict=True):
                hook.remove()
                states = outputs["hidden_states" if name == "text" else f"{name}_hidden_states"]
                ends = last[name][0] if isinstance(last[name], tuple) else last[name]
                found |= {f"{name}_hidden/{i}": hidden for i, hidden in enumerate((*states[:-1], ends))}
            return {key: value.numpy() for key, value in found.items()}
        else:
            outputs = model(**arguments, output_hidden_states=True)
            name = {"pixels": "vision", "tokens": "text"}[next(iter(given))]
            towers = {name: outputs}
            renamed = {"image_embeds": "image", "text_embeds": "text", "logits": "logits"}
            renamed["pooler_output"] = "image" if name == "vision" else "text"
            found = {renamed[key]: value for key, value in outputs.items() if key in renamed}
    for name, tower in towers.items():
        found |= {f"{name}_hidden/{i}": hidden for i, hidden in enumerate(tower.hidden_states)}
    return {key: value.numpy() for key, value in found.items()}


def _of_encoder(model: torch.nn.Module, arguments: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Hidden states and logits, or the normalised mean of the tokens, which sentence-transformers makes."""
    whole = model(**arguments, output_hidden_states=True)
    found = {f"text_hidden/{i}": hidden for i, hidden in enumerate(whole.hidden_states)}
    if type(model).__name__.endswith(CLASSIFIER):
        found["logits"] = whole.logits
    else:
        real = arguments["attention_mask"][..., None].float()
        pooled = (whole.hidden_states[-1] * real).sum(1) / real.sum(1)
        found["text"] = torch.nn.functional.normalize(pooled, dim=-1)
    return {key: value.numpy() for key, value in found.items()}


def _tower_configs(model: torch.nn.Module) -> tuple[Any, Any]:
    config = model.config
    if isinstance(model, TWO_TOWERS):
        return config.vision_config, config.text_config
    return (None, config) if hasattr(config, "vocab_size") else (config, None)


def main() -> None:
    for case in sys.argv[1:] or CASES:
        model = build(case)
        model.save_pretrained(FOLDER / case)
        given = inputs(model)
        np.savez_compressed(
            FOLDER / case / "activations.npz",
            **{f"in/{key}": value for key, value in given.items()},
            **{f"out/{key}": value for key, value in activations(model, given).items()},
        )


if __name__ == "__main__":
    main()
