"""The estimate of memory counts the weights that a model and its adapter have."""

import memory_estimate
import pytest
from helpers import tiny_model
from peft import LoraConfig, get_peft_model


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_a_model(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    c = model.config
    sizes = memory_estimate.Sizes(
        c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads,
        c.num_key_value_heads, c.vocab_size, tied,
    )  # fmt: skip
    assert sizes.linear_weights + sizes.other_weights == model.num_parameters()
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    assert sizes.adapter_weights(8) == adapted.num_parameters(only_trainable=True)
