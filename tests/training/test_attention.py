"""Rows packed into one sequence are what they are alone, on every kind of decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from tests.tiny import ARCHITECTURES, HYBRIDS
from tests.training.runs import dataset, recipe_for, sample, samples, tiny_base

from onebase_engine.base.view import view
from onebase_training.attention import UnsupportedTrainingError
from onebase_training.batches import pack
from onebase_training.events import OpenGate
from onebase_training.trainable import Trainable


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES | HYBRIDS))
def test_packed_logits_are_eager_attentions_of_each_row_alone(architecture: str, tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    rows = dataset([sample(rng, line, longest=70) for line in (1, 2, 3)])
    base = tiny_base(tmp_path, architecture, dtype=torch.float32, compute_dtype=torch.float32)
    trainable = Trainable(base, recipe_for(rows), OpenGate())
    batch = pack(rows.rows, range(3), 1000, packing=True)[0]
    with trainable.evaluating():
        packed = batch.tensors(torch.device("cpu"))
        logits = trainable.logits(packed)
        alone = view(base)
        alone.set_attn_implementation("eager")  # type: ignore[operator]
        for number, one in enumerate(batch.samples):
            ids = torch.from_numpy(one.ids.astype(np.int64))[None]
            places = torch.from_numpy(np.flatnonzero(one.supervised) - 1)
            expected = alone(input_ids=ids, use_cache=False).logits[0, places]
            torch.testing.assert_close(logits[packed.owner == number], expected, atol=2e-4, rtol=1e-4)


SIZES = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
UNKNOWN = {
    "a mask of its own": lambda: tf.DogeConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0
    ),
    "in its own way": lambda: tf.XLMRobertaConfig(
        **SIZES, num_attention_heads=4, pad_token_id=0, is_decoder=True, max_position_embeddings=128
    ),
}
"""Configs of decoders that training would compute wrongly, by what is said of them."""


@pytest.mark.parametrize("reason", UNKNOWN)
def test_a_decoder_that_training_would_compute_wrongly_is_refused(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "unknown", UNKNOWN[reason])
    rows = samples(2)
    base = tiny_base(tmp_path, "unknown")
    with pytest.raises(UnsupportedTrainingError, match=reason):
        Trainable(base, recipe_for(rows), OpenGate())
