"""The examples of the documentation page, pasted; only the import and the checkpoint differ."""

from __future__ import annotations

import numpy as np
import pytest

FOLDER = "fairytales"


def test_initializing_a_model_from_a_configuration() -> None:
    from llama_np import LlamaConfig, LlamaModel

    configuration = LlamaConfig()
    model = LlamaModel(configuration)
    configuration = model.config
    assert configuration.hidden_size == 4096


def test_loading_converted_weights_and_generating() -> None:
    from llama_np import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = "Hey, are you conscious? Can you talk to me?"
    inputs = tokenizer(prompt, return_tensors="np")
    generate_ids = model.generate(inputs.input_ids, max_length=30)
    text = tokenizer.batch_decode(
        generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )[0]
    assert text.startswith(prompt)
    assert generate_ids.shape[1] <= 30


def test_the_classes_named_after_the_model() -> None:
    from llama_np import LlamaForCausalLM, LlamaTokenizer, LlamaTokenizerFast

    tokenizer = LlamaTokenizer.from_pretrained(FOLDER)
    model = LlamaForCausalLM.from_pretrained(FOLDER)
    assert model.config.vocab_size >= tokenizer.vocab_size
    fast = LlamaTokenizerFast.from_pretrained(FOLDER)
    assert fast.encode("Hello this is a test") == tokenizer.encode("Hello this is a test")


def test_a_padding_token_is_added_and_the_embedding_resized() -> None:
    from llama_np import LlamaForCausalLM, LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(FOLDER)
    model = LlamaForCausalLM.from_pretrained(FOLDER)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left"
    inputs = tokenizer(["Once", "There was a king"], padding=True, return_tensors="np")
    found = model.generate(**inputs, max_new_tokens=6, pad_token_id=tokenizer.pad_token_id)
    for row, text in zip(found, ("Once", "There was a king"), strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="np"), max_new_tokens=6)[0]
        without_pads = row[row != tokenizer.pad_token_id]
        np.testing.assert_array_equal(without_pads, alone[: len(without_pads)])


def test_flax_models_take_numpy_arrays() -> None:
    from llama_np import AutoTokenizer, FlaxLlamaForCausalLM, FlaxLlamaModel

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
    T = inputs["input_ids"].shape[1]
    model = FlaxLlamaModel.from_pretrained(FOLDER)
    last_hidden_states = model(**inputs).last_hidden_state
    assert last_hidden_states.shape == (1, T, model.config.hidden_size)
    head = FlaxLlamaForCausalLM.from_pretrained(FOLDER)
    next_token_logits = head(**inputs, params=head.params).logits[:, -1]
    assert next_token_logits.shape == (1, head.config.vocab_size)


def test_classifying_a_sequence() -> None:
    from llama_np import AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = LlamaForSequenceClassification.from_pretrained(FOLDER)
    inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
    logits = model(**inputs).logits
    predicted_class_id = logits.argmax().item()
    assert predicted_class_id in model.config.id2label
    num_labels = len(model.config.id2label)
    assert logits.shape == (1, num_labels)
    with pytest.warns(UserWarning, match="newly initialized"):
        other = LlamaForSequenceClassification.from_pretrained(
            FOLDER, num_labels=num_labels + 1, ignore_mismatched_sizes=True
        )
    assert other(**inputs, labels=np.array([num_labels])).loss > 0
