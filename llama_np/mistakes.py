"""Known mistakes of LLaMA implementations, each a small variation of the forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from llama_np.experiment import Run
from llama_np.layers import rms_norm
from llama_np.ports import from_interleaved, to_interleaved
from llama_np.precision import round_bf16, round_f16
from llama_np.variations import (
    NORMS,
    ROTATED,
    Variation,
    activated,
    activation_in,
    added_to,
    all_weights,
    angles,
    backwards,
    cached_keys_unrotated,
    capped,
    context_reordered,
    decode_positions,
    decoded_keys_unrotated,
    divided_by_n_minus_one,
    eps_outside,
    exchanged,
    exponent_over,
    first_token_missing,
    fused_qkv_split_in_thirds,
    gate_of,
    half_as_wide,
    half_kept,
    half_of_the_run,
    head_in,
    head_is_embedding,
    head_is_zero,
    head_last,
    heads_split,
    hidden_scores,
    hole_in_cache,
    interleaved,
    key_heads_taken_in_turn,
    keys_and_values_reread,
    keys_permuted_for_query_heads,
    last_slot_overwritten,
    layer_norm,
    mask_after_softmax,
    masked,
    merged_untransposed,
    misread_as_transposed,
    missing_layer,
    mlp_beside_attention,
    model_width,
    no_norm,
    no_root,
    norm_in_bf16,
    norms,
    one_more_in_sum,
    ops,
    other_activation,
    padding_attended,
    padding_counted,
    plain_angles,
    reads,
    root_of_width,
    rotated_twice,
    rotated_values,
    rotations,
    rounded_angles,
    rounded_frequencies,
    rounded_op,
    rounded_positions,
    rounded_products,
    rows_by_head,
    rows_shifted,
    scaled_linearly,
    scores_times,
    sees,
    softmax_in,
    sum_not_mean,
    token_in_front,
    transposed,
    truncate_bf16,
    unrotated,
    untransposed,
    unweighted,
    up_of,
    upper_layers_one_further,
    values_reread,
    values_rotated,
    weighed,
    weight_plus_one,
    weights_of_neighbour,
    width_per_head,
    window,
    with_each,
    without_bias,
    without_cache,
    without_minus,
    without_scaling,
)


@dataclass(frozen=True)
class Mistake:
    """A mistake that real projects made.

    id: its name; cause: how it usually comes about; advice: how to mend it; threads: where it
    was reported (repository#number); variations: the forms in which it shows.
    """

    id: str
    cause: str
    advice: str
    threads: tuple[str, ...]
    variations: tuple[Variation, ...]


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BF16 = round_bf16
F16 = round_f16

CATALOGUE: tuple[Mistake, ...] = (
    # tokens
    Mistake(
        "bos_missing",
        "The tokenizer was asked for no special tokens, or the harness strips them.",
        "Put the beginning-of-sequence token in front of the prompt.",
        ("ggml-org/llama.cpp#1303", "ollama/ollama#9373"),
        (first_token_missing,),
    ),
    Mistake(
        "bos_doubled",
        "Both the chat template and the tokenizer add the beginning-of-sequence token.",
        "Encode text that already contains it without adding special tokens.",
        ("ggml-org/llama.cpp#7107", "abetlen/llama-cpp-python#1501"),
        (token_in_front, partial(token_in_front, shown=False)),
    ),
    Mistake(
        "logits_row_shift",
        "Logits are read one row too early or too late.",
        "Row t predicts token t + 1; read the last real row for the next token.",
        ("tenstorrent/tt-forge-onnx#384", "unslothai/unsloth#772"),
        tuple(rows_shifted(by, wrap) for by in (1, -1) for wrap in (True, False)),
    ),
    # weights
    Mistake(
        "rope_interleaved",
        "Adjacent channels are rotated on weights for halves, or Meta's q/k were not permuted.",
        "Pair channel j with j + head_dim/2, or permute q_proj and k_proj rows when converting.",
        ("huggingface/transformers#25199", "tenstorrent/tt-metal#26844", "rasbt#747"),
        (
            rotations(interleaved),
            rows_by_head(lambda rows, c: to_interleaved(rows, c.head_dim), "q_proj", "k_proj"),
            rows_by_head(lambda rows, c: from_interleaved(rows, c.head_dim), "q_proj", "k_proj"),
            rotations(interleaved, "self_attn.k_rot"),
            rotations(interleaved, "self_attn.q_rot"),
        ),
    ),
    Mistake(
        "k_permuted_for_query_heads",
        "The rotary permutation of k_proj was done with the number of query heads.",
        "Permute k_proj with num_key_value_heads.",
        ("ggml-org/llama.cpp#3364", "huggingface/transformers#31788"),
        (keys_permuted_for_query_heads,),
    ),
    Mistake(
        "o_proj_head_order",
        "Heads are merged in another order than the output projection was trained with.",
        "Merge as (tokens, heads, head_dim) with query heads in their own order.",
        ("nntile/nntile#347",),
        (
            partial(context_reordered, by_channel=True),
            partial(context_reordered, by_channel=False),
        ),
    ),
    Mistake(
        "heads_untransposed",
        "(tokens, heads * head_dim) is reshaped to (heads, tokens, head_dim): tokens are mixed.",
        "Reshape to (tokens, heads, head_dim), then transpose to (heads, tokens, head_dim).",
        (),
        (heads_split(untransposed), without_cache(heads_split(untransposed))),
    ),
    Mistake(
        "heads_head_dim_first",
        "Channels are split as (head_dim, heads) instead of (heads, head_dim).",
        "Head n owns the channels n * head_dim up to (n + 1) * head_dim.",
        (),
        (heads_split(head_last),),
    ),
    Mistake(
        "heads_merged_untransposed",
        "(heads, tokens, head_dim) is reshaped to (tokens, heads * head_dim): tokens are mixed.",
        "Transpose to (tokens, heads, head_dim) first; view() refuses what reshape() does.",
        (),
        (merged_untransposed, without_cache(merged_untransposed)),
    ),
    Mistake(
        "fused_qkv_split",
        "A fused q/k/v matrix interleaved by group was split as [all q, all k, all v].",
        "Split each group into its query heads, one key head and one value head.",
        ("epfLLM/Megatron-LLM#45", "vllm-project/vllm#53114"),
        (fused_qkv_split_in_thirds,),
    ),
    Mistake(
        "gate_up_swapped",
        "gate_proj and up_proj are exchanged (Meta: w1 is gate, w3 is up).",
        "Apply the activation to gate_proj, multiply by up_proj.",
        ("ml-explore/mlx-lm#767", "flashinfer-ai/flashinfer#4130"),
        (
            exchanged("mlp.gate_proj", "mlp.up_proj"),
            ops(
                mlp__act_fn=lambda array, place: activated(up_of(place), place),
                mlp__hidden=lambda array, place: place.seen["mlp.act_fn"] * gate_of(place),
            ),
            ops(mlp__hidden=lambda array, place: activated(up_of(place), place) * gate_of(place)),
        ),
    ),
    Mistake(
        "kv_swapped",
        "k_proj and v_proj are exchanged.",
        "Check the order in which the loader unpacks q, k and v.",
        (),
        (exchanged("self_attn.k_proj", "self_attn.v_proj"),),
    ),
    Mistake(
        "qk_swapped",
        "q_proj and k_proj are exchanged.",
        "Check the order in which the loader unpacks q, k and v.",
        (),
        (exchanged("self_attn.q_proj", "self_attn.k_proj"),),
    ),
    Mistake(
        "head_untied",
        "The embedding serves as head although the checkpoint has its own, or none was loaded.",
        "Follow tie_word_embeddings: true shares the embedding, false loads lm_head.weight.",
        ("tinygrad/tinygrad#13796", "huggingface/transformers#43429", "DeepSpeed#4088"),
        (head_is_embedding, head_is_zero),
    ),
    *(
        Mistake(
            f"{module.split('.')[1]}_transposed",
            f"The weight of {module} is used as (in, out) although it is stored as (out, in).",
            "Compute x @ weight.T; square matrices hide the mistake.",
            ("EnzymeAD/Enzyme-JAX#104", "huggingface/candle#321"),
            (transposed(module), misread_as_transposed(module)),
        )
        for module in (*ATTENTION, "self_attn.o_proj", *MLP)
    ),
    Mistake(
        "weights_truncated_bf16",
        "float32 weights were cut to bfloat16 by dropping bits instead of rounding.",
        "Round to nearest even when converting.",
        ("aprender#2144",),
        (all_weights(truncate_bf16),),
    ),
    Mistake(
        "weights_rounded_bf16",
        "The weights went through bfloat16, the arithmetic is float32.",
        "Load the weights in the checkpoint's own precision.",
        (),
        (all_weights(round_bf16),),
    ),
    Mistake(
        "weights_rounded_f16",
        "The weights went through float16, the arithmetic is float32.",
        "Load the weights in the checkpoint's own precision.",
        (),
        (all_weights(round_f16),),
    ),
    Mistake(
        "qkv_bias_dropped",
        "The biases of q, k and v are not loaded.",
        "Load every *.bias tensor of the checkpoint; attention_bias says that they exist.",
        ("ANEForge#253", "mlc-ai/mlc-llm#3494", "vllm-project/vllm#3767"),
        (without_bias(*ATTENTION), *map(without_bias, ATTENTION)),
    ),
    Mistake(
        "o_bias_dropped",
        "The bias of o_proj is not loaded.",
        "Load every *.bias tensor of the checkpoint.",
        ("mlc-ai/mlc-llm#3494",),
        (without_bias("self_attn.o_proj"),),
    ),
    Mistake(
        "attention_bias_dropped",
        "All four biases of the attention are not loaded.",
        "Load every *.bias tensor of the checkpoint; attention_bias says that they exist.",
        ("mlc-ai/mlc-llm#3494",),
        (without_bias(*ATTENTION, "self_attn.o_proj"),),
    ),
    Mistake(
        "mlp_bias_dropped",
        "The biases of the MLP are not loaded.",
        "Load every *.bias tensor of the checkpoint; mlp_bias says that they exist.",
        ("mlc-ai/mlc-llm#3494",),
        (without_bias(*MLP), *map(without_bias, MLP)),
    ),
    Mistake(
        "layer_missing",
        "One layer is skipped: the loop ends early, starts late or leaves one out.",
        "Run num_hidden_layers layers.",
        (),
        tuple(missing_layer(index) for index in range(-1, 32)),
    ),
    Mistake(
        "layer_weights_shifted",
        "Layers have the weights of the layer before or after them.",
        "Layer i reads the weights of model.layers.i, counted from 0.",
        (),
        (weights_of_neighbour(-1), weights_of_neighbour(1)),
    ),
    # norms and residual
    Mistake(
        "rms_eps",
        "The norm's eps is a constant of the code instead of rms_norm_eps, or has no effect "
        "(missing, or max(mean(x*x), eps)).",
        "Read rms_norm_eps from config.json and add it to the mean before the square root.",
        ("ggml-org/llama.cpp#2373", "huggingface/candle#271", "Lightning-AI/lit-llama#339"),
        with_each("rms_norm_eps", 1e-6, 1e-5, 1e-8, 1e-12, 1e-3),
    ),
    Mistake(
        "rms_eps_outside",
        "eps is added after the square root.",
        "x / sqrt(mean(x*x) + eps) * weight",
        (),
        (norms(eps_outside),),
    ),
    Mistake(
        "rms_layernorm",
        "LayerNorm: the mean is subtracted.",
        "RMSNorm subtracts nothing: x / sqrt(mean(x*x) + eps) * weight",
        (),
        (norms(layer_norm), *(norms(layer_norm, name) for name in NORMS)),
    ),
    Mistake(
        "rms_weight_missing",
        "The norm's weight is not applied.",
        "Multiply the normalized vector by the weight.",
        (),
        (norms(unweighted), *(norms(unweighted, name) for name in NORMS)),
    ),
    Mistake(
        "rms_weight_plus_one",
        "1 + weight, as in Gemma.",
        "LLaMA multiplies by the weight itself.",
        ("vllm-project/vllm#29810", "google/gemma_pytorch#67"),
        (norms(weight_plus_one),),
    ),
    Mistake(
        "rms_sum",
        "The sum of squares instead of their mean.",
        "Divide the sum of squares by hidden_size.",
        (),
        (norms(sum_not_mean),),
    ),
    Mistake(
        "rms_n_minus_one",
        "The sum of squares is divided by hidden_size - 1, as an unbiased variance is.",
        "Divide the sum of squares by hidden_size (torch.var divides by n - 1 by default).",
        (),
        (norms(divided_by_n_minus_one),),
    ),
    Mistake(
        "rms_no_root",
        "x / (mean(x*x) + eps): the square root is left out.",
        "x / sqrt(mean(x*x) + eps) * weight",
        (),
        (norms(no_root),),
    ),
    Mistake(
        "norm_bypassed",
        "Projections read the stream from before the norm.",
        "q, k, v read input_layernorm's output; gate and up read post_attention_layernorm's.",
        (),
        (
            ops(self_attn__q_proj=reads("self_attn.q_proj", "x")),
            ops(self_attn__k_proj=reads("self_attn.k_proj", "x")),
            ops(self_attn__v_proj=reads("self_attn.v_proj", "x")),
            ops(mlp__gate_proj=reads("mlp.gate_proj", "middle")),
            ops(mlp__up_proj=reads("mlp.up_proj", "middle")),
            norms(no_norm, "input_layernorm"),
            norms(no_norm, "post_attention_layernorm"),
        ),
    ),
    Mistake(
        "norm_low_precision",
        "The norm is computed in bfloat16.",
        "Compute the mean of squares in float32, cast afterwards.",
        ("tinygrad/tinygrad#5095", "huggingface/transformers#29402"),
        (norms(norm_in_bf16),),
    ),
    Mistake(
        "norms_swapped",
        "input_layernorm and post_attention_layernorm are exchanged.",
        "Check which norm the loader gives to which half of the layer.",
        (),
        (exchanged("input_layernorm", "post_attention_layernorm"),),
    ),
    Mistake(
        "final_norm_twice",
        "The final norm is applied again to states that are normalized already.",
        "hidden_states[-1] of transformers has been through model.norm.",
        (),
        (
            ops(
                model__norm=lambda array, place: rms_norm(
                    "model.norm", array, place.w, place.config.rms_norm_eps
                )
            ),
        ),
    ),
    Mistake(
        "final_norm_missing",
        "The norm before the head is left out.",
        "Apply model.norm to the last layer's output.",
        ("PaddlePaddle/PaddleNLP#7615",),
        (norms(no_norm, "model.norm"),),
    ),
    Mistake(
        "residual_from_norm",
        "The sublayer's output is added to its normalized input (or the norm works in place).",
        "Add to what went into the norm.",
        ("nano-vllm#170", "naklecha/llama3-from-scratch#28"),
        (
            added_to("input_layernorm", "post_attention_layernorm"),
            added_to("input_layernorm", "middle"),
            added_to("x", "post_attention_layernorm"),
        ),
    ),
    Mistake(
        "residual_missing",
        "The sublayer's output is not added to the stream.",
        "x = x + attention(norm(x)); x = x + mlp(norm(x))",
        (),
        (added_to(None, None), added_to(None, "middle"), added_to("x", None)),
    ),
    Mistake(
        "residual_from_layer_input",
        "The MLP's output is added to the layer's input: the attention's contribution is lost.",
        "Keep the sum after the attention and add the MLP's output to it.",
        ("RiNALMo#9",),
        (added_to("x", "x"),),
    ),
    Mistake(
        "mlp_beside_attention",
        "The MLP reads the layer's input instead of the sum after the attention.",
        "post_attention_layernorm reads x + attention.",
        (),
        (ops(post_attention_layernorm=mlp_beside_attention),),
    ),
    # rotation and positions
    Mistake(
        "rope_not_applied",
        "Queries or keys are not rotated.",
        "Rotate both before the scores.",
        (),
        (rotations(unrotated), *(rotations(unrotated, name) for name in ROTATED)),
    ),
    Mistake(
        "rope_reversed",
        "The sign of the sine is wrong: rotation by minus the angle.",
        "x * cos + concat(-second half, first half) * sin",
        (),
        (
            rotations(backwards),
            ops(model__rotary_emb__sin=lambda array, place: -array),
            *(rotations(backwards, name) for name in ROTATED),
        ),
    ),
    Mistake(
        "rope_no_minus",
        "The halves are exchanged without the minus: x * cos + concat(second, first) * sin.",
        "x * cos + concat(-second half, first half) * sin",
        (),
        (rotations(without_minus), *(rotations(without_minus, name) for name in ROTATED)),
    ),
    Mistake(
        "rope_partial",
        "Only a part of every head is rotated, as with partial_rotary_factor.",
        "LLaMA rotates all of head_dim: pairs (j, j + head_dim/2), angles of all frequencies.",
        (),
        (
            rotations(half_kept(first=False)),
            rotations(half_kept(first=True)),
            rotations(half_as_wide(step=2)),
            rotations(half_as_wide(step=1)),
        ),
    ),
    Mistake(
        "rope_twice",
        "Queries and keys are rotated twice, for example again when they leave the cache.",
        "Rotate once; cached keys are already rotated.",
        ("ggml-org/llama.cpp#4889",),
        (rotations(rotated_twice), *(rotations(rotated_twice, name) for name in ROTATED)),
    ),
    Mistake(
        "rope_on_values",
        "Values are rotated too.",
        "Rotate queries and keys only.",
        (),
        (values_rotated, values_reread(rotated_values)),
    ),
    Mistake(
        "rope_theta",
        "rope_theta is a constant of the code (10000 for Llama 2, 500000 for Llama 3).",
        "Read rope_theta from config.json.",
        ("karpathy/llama2.c#356", "ggml-org/llama.cpp#2773"),
        with_each("rope_theta", 10000.0, 500000.0, 1000000.0, 100000.0, 1000.0),
    ),
    Mistake(
        "rope_scaling_ignored",
        "rope_scaling is not implemented, read under another key, or computed and dropped.",
        "Apply the scaling that rope_scaling (type or rope_type) names.",
        ("huggingface/transformers#32330", "Blaizzy/mlx-vlm#1710", "unslothai/unsloth#6197"),
        (without_scaling, scaled_linearly),
    ),
    Mistake(
        "rope_low_precision",
        "Rotary frequencies, angles or tables are kept in 16 bits.",
        "Compute angles in float32 and round only the cosines and sines.",
        ("EleutherAI/gpt-neox#1003", "huggingface/transformers#29496"),
        (
            angles(plain_angles, BF16),
            angles(partial(rounded_angles, BF16), BF16),
            angles(partial(rounded_angles, BF16)),
            angles(partial(rounded_frequencies, BF16)),
            angles(partial(rounded_frequencies, BF16), BF16),
            angles(plain_angles, F16),
            angles(partial(rounded_angles, F16), F16),
            angles(partial(rounded_frequencies, F16)),
            angles(partial(rounded_products, BF16)),
            angles(partial(rounded_products, BF16), BF16),
            angles(partial(rounded_products, F16)),
            angles(partial(rounded_products, F16), F16),
        ),
    ),
    Mistake(
        "position_low_precision",
        "Positions are counted in bfloat16, which knows no odd number above 256.",
        "Keep positions as integers.",
        ("keras-team/keras-hub#1544",),
        (angles(rounded_positions),),
    ),
    Mistake(
        "rope_full_dim_exponent",
        "theta^(-2i/hidden_size): the exponent is divided by the model's width.",
        "theta^(-2i/head_dim)",
        ("rasbt#410", "nntile/nntile#347"),
        (angles(partial(exponent_over, model_width)),),
    ),
    Mistake(
        "rope_head_dim",
        "The exponent uses hidden_size / num_attention_heads although head_dim is another.",
        "Use head_dim from config.json.",
        ("huggingface/transformers#32857", "pytorch/torchtitan#3570"),
        (angles(partial(exponent_over, width_per_head)),),
    ),
    Mistake(
        "rope_exponent_halved",
        "theta^(-i/head_dim) instead of theta^(-2i/head_dim).",
        "The exponents are 0, 2, 4, ... divided by head_dim.",
        ("rasbt#411",),
        (angles(partial(exponent_over, lambda config: 2 * config.head_dim)),),
    ),
    Mistake(
        "position_plus_one_decode",
        "Decode steps are rotated one position too far.",
        "The first decoded token's position is the prompt's length.",
        ("microsoft/onnxruntime-genai#2354", "tiny-llm#46"),
        (decode_positions(lambda p, prompt: p + 1),),
    ),
    Mistake(
        "position_minus_one_decode",
        "Decode steps are rotated one position too early.",
        "The first decoded token's position is the prompt's length.",
        (),
        (decode_positions(lambda p, prompt: p - 1),),
    ),
    Mistake(
        "position_zero_decode",
        "Every decode step is rotated at position 0: the start position is ignored.",
        "Pass the number of cached tokens as the start position.",
        ("keras-team/keras-hub#1544", "Blaizzy/mlx-vlm#1983"),
        (decode_positions(lambda p, prompt: 0),),
    ),
    Mistake(
        "position_stuck_decode",
        "All decode steps are rotated at the prompt's length: the position does not advance.",
        "Every decoded token's position is one further than the one before.",
        (),
        (decode_positions(lambda p, prompt: prompt),),
    ),
    Mistake(
        "position_restart",
        "Positions start again at 0 with the first decode step.",
        "Positions continue from the prompt's length.",
        ("keras-team/keras-hub#1544",),
        (decode_positions(lambda p, prompt: np.arange(p.shape[1])),),
    ),
    Mistake(
        "position_layer_offset",
        "The cache's length is counted up while the layers run: upper layers are one further.",
        "Count the cache's length up once, after the last layer.",
        ("fla-org/flash-linear-attention#766",),
        (upper_layers_one_further,),
    ),
    Mistake(
        "left_pad_positions",
        "In a left-padded batch, padding counts as positions in one phase and not in the other.",
        "position = cumsum(attention_mask) - 1, continued per row while decoding.",
        ("huggingface/transformers#33095", "unslothai/unsloth#3699"),
        (
            partial(padding_counted, prompt_too=False, decode_too=True),
            partial(padding_counted, prompt_too=True, decode_too=False),
            partial(padding_counted, prompt_too=True, decode_too=True),
        ),
    ),
    Mistake(
        "padding_attended",
        "Padding tokens are attended to.",
        "Mask the padding columns in every layer and every step.",
        ("huggingface/transformers#26072", "tloen/alpaca-lora#315"),
        (padding_attended,),
    ),
    # attention
    *(
        Mistake(
            name,
            "Query head n reads key/value head n mod K: keys are tiled, not repeated.",
            "Query head n reads key/value head n // (N/K).",
            ("onnx/onnx#7274", "ONNXim#34", "prime-rl#2681"),
            (key_heads_taken_in_turn,),
        )
        for name in ("gqa_tile", "kv_head_modulo")
    ),
    Mistake(
        "attn_scale_missing",
        "Scores are not divided by sqrt(head_dim).",
        "scores = q @ k.T / sqrt(head_dim)",
        ("mlc-ai/mlc-llm#3426",),
        (scores_times(lambda config: math.sqrt(config.head_dim)),),
    ),
    Mistake(
        "attn_scale_d_model",
        "Scores are divided by sqrt(hidden_size).",
        "scores = q @ k.T / sqrt(head_dim)",
        ("DL4Proteins#12", "AI-Hypercomputer/maxtext#1370"),
        (
            scores_times(lambda config: math.sqrt(config.head_dim / config.hidden_size)),
            scores_times(lambda config: math.sqrt(config.head_dim / width_per_head(config))),
        ),
    ),
    Mistake(
        "attn_scale_twice",
        "The scale is applied twice: scores are divided by head_dim.",
        "scores = q @ k.T / sqrt(head_dim), once",
        ("TransformerLensOrg/TransformerLens#27",),
        (scores_times(lambda config: 1 / math.sqrt(config.head_dim)),),
    ),
    Mistake(
        "attn_scale_inverse",
        "Scores are multiplied by sqrt(head_dim).",
        "scores = q @ k.T / sqrt(head_dim)",
        ("ViT-CIFAR#12",),
        (scores_times(lambda config: float(config.head_dim)),),
    ),
    Mistake(
        "attn_scale_other",
        "Scores are scaled by a number of their own.",
        "scores = q @ k.T / sqrt(head_dim)",
        ("AI-Hypercomputer/maxtext#1370",),
        (scores_times(lambda config: 2.0), scores_times(lambda config: 0.5)),
    ),
    Mistake(
        "scores_softcapped",
        "Scores pass through a soft cap, as in Gemma 2.",
        "LLaMA has no soft cap.",
        ("sgl-project/sglang#33915", "ggml-org/llama.cpp#8197"),
        (ops(self_attn__scores=capped(50.0)), ops(self_attn__scores=capped(30.0))),
    ),
    Mistake(
        "logits_softcapped",
        "Logits pass through a soft cap, as in Gemma 2.",
        "LLaMA has no soft cap.",
        ("ggml-org/llama.cpp#8197",),
        (ops(lm_head=capped(30.0)), ops(lm_head=capped(50.0))),
    ),
    Mistake(
        "causal_mask_missing",
        "Tokens of the prompt see later tokens.",
        "Mask keys after the query in every call with more than one token.",
        ("mlxcel#998", "TinyLLM#17"),
        (
            sees(lambda query, key, first, prompt: key >= 0 * query),
            without_cache(sees(lambda query, key, first, prompt: key >= 0 * query)),
        ),
    ),
    Mistake(
        "causal_mask_one_ahead",
        "A token sees the next one too: key <= query + 1.",
        "The mask is key <= query: with triu(..., diagonal=1) the ones are hidden, not seen.",
        (),
        (
            sees(lambda query, key, first, prompt: key <= query + 1),
            without_cache(sees(lambda query, key, first, prompt: key <= query + 1)),
        ),
    ),
    Mistake(
        "causal_mask_zero",
        "Scores of later tokens are set to 0, or multiplied by the mask: they still get a weight.",
        "Set hidden scores to -inf (or the dtype's smallest number) before the softmax.",
        (),
        (
            masked(hidden_scores(np.zeros_like)),
            without_cache(masked(hidden_scores(np.zeros_like))),
        ),
    ),
    Mistake(
        "causal_mask_soft",
        "Hidden scores get a penalty that is too small: later tokens still get some weight.",
        "Set hidden scores to -inf (or the dtype's smallest number) before the softmax.",
        (),
        (
            masked(hidden_scores(lambda scores: scores - 10)),
            without_cache(masked(hidden_scores(lambda scores: scores - 10))),
            masked(hidden_scores(lambda scores: np.full_like(scores, -10))),
            without_cache(masked(hidden_scores(lambda scores: np.full_like(scores, -10)))),
        ),
    ),
    Mistake(
        "causal_mask_after_softmax",
        "Weights of later tokens are set to 0 after the softmax: the others no longer sum to 1.",
        "Mask the scores, then apply the softmax.",
        (),
        (masked(mask_after_softmax), without_cache(masked(mask_after_softmax))),
    ),
    Mistake(
        "sliding_window",
        "A token sees only the latest ones, as in Mistral.",
        "LLaMA sees all earlier tokens; use a window only where config.json says sliding_window.",
        (),
        (window(half_of_the_run),),
    ),
    Mistake(
        "causal_mask_strict",
        "A token does not see itself: key < query. The first token sees nothing (NaN with -inf).",
        "The mask is key <= query.",
        (),
        (
            *(
                sees(lambda query, key, first, prompt: key < query, blind)
                for blind in (None, 0.0, math.nan)
            ),
            sees(lambda query, key, first, prompt: (key < query) | (key + query == 0)),
            sees(
                lambda query, key, first, prompt: (
                    (key < query) | ((key == query) & (query >= prompt))
                )
            ),
        ),
    ),
    Mistake(
        "causal_mask_reversed",
        "The mask is upside down: tokens see themselves and later ones.",
        "The mask is key <= query.",
        (),
        (sees(lambda query, key, first, prompt: key >= query),),
    ),
    Mistake(
        "causal_mask_not_offset",
        "The mask ignores the cached length: a decode step sees key 0 only.",
        "Compare key positions with query positions, not with the row number of the call.",
        ("hyprstream#1521",),
        (sees(lambda query, key, first, prompt: key <= query - first),),
    ),
    Mistake(
        "cache_hole",
        "The cache's write position is one too far: a slot of zeros is attended to.",
        "Write the first decoded token directly behind the prompt.",
        ("microsoft/onnxruntime-genai#2354", "tiny-llm#46"),
        (partial(hole_in_cache, further=0), partial(hole_in_cache, further=1)),
    ),
    Mistake(
        "cache_prompt_lost",
        "Decode steps do not see the prompt: its keys never reached the cache.",
        "Store the keys and values of the prefill.",
        ("ml-explore/mlx-examples#977",),
        (sees(lambda q, key, first, prompt: (key <= q) & ((q < prompt) | (key >= prompt))),),
    ),
    Mistake(
        "cache_oldest_lost",
        "Decode steps do not see the oldest key: a cache of the prompt's length, or a slice [1:].",
        "Keep every key and value; make room for the prompt and all decoded tokens.",
        (),
        (
            sees(lambda q, key, first, prompt: (key <= q) & ((q < prompt) | (key > 0))),
            sees(lambda q, key, first, prompt: (key <= q) & ((q < prompt) | (key > q - prompt))),
        ),
    ),
    Mistake(
        "cache_slot_too_early",
        "Decode steps write one slot too early: the prompt's last key and value are lost.",
        "Write the first decoded token's key and value to slot len(prompt).",
        (),
        (
            partial(last_slot_overwritten, by_slot=True),
            partial(last_slot_overwritten, by_slot=False),
        ),
    ),
    Mistake(
        "cache_slot_reused",
        "Every decode step writes to the same slot: earlier decoded tokens are forgotten.",
        "Advance the write position after every step.",
        ("koboldcpp#2158",),
        (
            sees(
                lambda q, key, first, prompt: (
                    (key <= q) & ((q < prompt) | (key < prompt) | (key == q))
                )
            ),
        ),
    ),
    Mistake(
        "cache_newest_missing",
        "A decode step does not see its own token: it attends before it stores.",
        "Store the new key and value first, then attend.",
        (),
        (sees(lambda q, key, first, prompt: (key <= q) & ((q < prompt) | (key < q))),),
    ),
    Mistake(
        "cache_unrotated",
        "The cache holds keys from before the rotation, and nobody rotates them.",
        "Store rotated keys, or rotate all of them at their own positions whenever they are read.",
        (),
        (
            decoded_keys_unrotated,
            partial(cached_keys_unrotated, own_too=False),
            partial(cached_keys_unrotated, own_too=True),
        ),
    ),
    Mistake(
        "cache_low_precision",
        "Keys and values are kept in 16 bits.",
        "Expected where the cache is meant to be half as large; compare with a float32 cache.",
        (),
        (
            ops(self_attn__k_rot=rounded_op(F16), self_attn__v_proj=rounded_op(F16)),
            ops(self_attn__k_rot=rounded_op(BF16), self_attn__v_proj=rounded_op(BF16)),
            partial(keys_and_values_reread, F16),
            partial(keys_and_values_reread, BF16),
        ),
    ),
    Mistake(
        "softmax_off_by_one",
        "exp(x) / (1 + sum(exp(x))): the weights sum to less than 1.",
        "exp(x) / sum(exp(x)); LLaMA has no attention sink.",
        (),
        (weighed(one_more_in_sum(shifted=True)), weighed(one_more_in_sum(shifted=False))),
    ),
    Mistake(
        "softmax_low_precision",
        "Scores or attention weights are kept in 16 bits.",
        "Compute scores and softmax in float32.",
        ("tinygrad/tinygrad#12280", "huggingface/transformers#24519"),
        (
            ops(self_attn__scores=rounded_op(BF16), self_attn__weights=rounded_op(BF16)),
            ops(self_attn__weights=rounded_op(BF16)),
            ops(self_attn__scores=rounded_op(BF16)),
            ops(self_attn__scores=rounded_op(F16), self_attn__weights=rounded_op(F16)),
            *(
                weighed(softmax_in(rounded, *steps))
                for rounded in (BF16, F16)
                for steps in (["input"], ["input", "output"], ["input", "within", "output"])
            ),
        ),
    ),
    # MLP
    *(
        Mistake(
            f"act_{name}",
            f"The activation is {name} instead of hidden_act.",
            "Use the activation that hidden_act names (SiLU in LLaMA).",
            ("huggingface/candle#3745", "vllm-project/vllm#41574"),
            (other_activation(act),),
        )
        for name, act in (
            ("gelu", "gelu"),
            ("gelu_tanh", "gelu_pytorch_tanh"),
            ("relu", "relu"),
            ("quick_gelu", "quick_gelu"),
            ("sigmoid", "sigmoid"),
            ("silu", "silu"),
        )
    ),
    Mistake(
        "act_missing",
        "down(gate * up): the activation is left out.",
        "down(silu(gate) * up)",
        (),
        (other_activation("linear"),),
    ),
    Mistake(
        "gate_missing",
        "down(silu(gate)): the product with up is left out.",
        "down(silu(gate) * up)",
        (),
        (ops(mlp__hidden=lambda array, place: place.seen["mlp.act_fn"]),),
    ),
    Mistake(
        "act_low_precision",
        "The activation is computed or kept in 16 bits.",
        "Compute the MLP in float32, or expect the difference; compare with a float32 run.",
        (),
        (
            ops(mlp__act_fn=rounded_op(F16)),
            ops(mlp__act_fn=rounded_op(BF16)),
            activation_in(F16),
            activation_in(BF16),
        ),
    ),
    Mistake(
        "gate_added",
        "down(silu(gate) + up): a sum instead of the product.",
        "down(silu(gate) * up)",
        (),
        (ops(mlp__hidden=lambda array, place: place.seen["mlp.act_fn"] + up_of(place)),),
    ),
    Mistake(
        "act_on_product",
        "down(silu(gate * up)): the activation comes after the product.",
        "down(silu(gate) * up)",
        (),
        (
            ops(
                mlp__act_fn=lambda array, place: activated(gate_of(place) * up_of(place), place),
                mlp__hidden=lambda array, place: place.seen["mlp.act_fn"],
            ),
        ),
    ),
    # embedding and head
    Mistake(
        "embedding_scaled",
        "The embedding is multiplied by sqrt(hidden_size), as in Gemma and T5.",
        "LLaMA uses the embedding as it is.",
        (),
        (ops(model__embed_tokens=lambda a, place: a * root_of_width(place.config)),),
    ),
    Mistake(
        "head_low_precision",
        "The head's product or the logits are kept in 16 bits.",
        "Compute the logits in float32.",
        ("huggingface/transformers#29285", "keras-team/keras-hub#1544"),
        (head_in(round_bf16), ops(lm_head=rounded_op(BF16)), head_in(round_f16)),
    ),
)
BY_ID = {mistake.id: mistake for mistake in CATALOGUE}


def variants(mistake: Mistake, run: Run) -> list[Run]:
    """All forms of a mistake that apply to this run."""
    changed = (variation(run) for variation in mistake.variations)
    return [other for other in changed if other is not None]
