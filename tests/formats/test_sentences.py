"""What sentence-transformers says of a model is read at import, kept, and done."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cramjax
from cramjax.embeddings import EmbeddingConfig
from cramjax.errors import ModelError
from cramjax.formats.sentences import read_embedding
from cramjax.language_model import load_model
from cramjax.serve import embed


def written(path: Path, *kinds: str, pooling: dict[str, Any] | None = None, most: int | None = None) -> Path:
    """The files of sentence-transformers in a directory."""
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    if pooling is not None:
        (path / "1_Pooling").mkdir(exist_ok=True)
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    if most is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": most}), encoding="utf-8")
    return path


MEAN = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
ALL = ("Transformer", "Pooling", "Normalize")


def test_what_the_files_say(tmp_path: Path) -> None:
    assert read_embedding(tmp_path, 512) is None
    assert read_embedding(written(tmp_path, *ALL, pooling=MEAN, most=256), 512) == EmbeddingConfig("mean", True, 256)
    last = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}
    assert read_embedding(written(tmp_path, *ALL[:2], pooling=last), 256) == EmbeddingConfig("last", False, None)
    assert read_embedding(written(tmp_path, *ALL[:2], pooling={"pooling_mode": "cls"}), 128) == EmbeddingConfig(
        "cls", False, None
    )


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (("Transformer", "Pooling", "Dense"), MEAN, "type 'Dense', which is not here"),
        (("Transformer",), None, "no module of type Pooling"),
        (ALL, {"pooling_mode_max_tokens": True}, r"pools by \['pooling_mode_max_tokens'\]"),
        (ALL, {**MEAN, "pooling_mode_cls_token": True}, "pools by"),
        (ALL, {"pooling_mode": "weightedmean"}, "pools by .*weightedmean"),
        (ALL, None, "config.json does not exist"),
    ],
)
def test_what_is_not_here_is_refused(tmp_path: Path, kinds: Any, pooling: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_embedding(written(tmp_path, *kinds, pooling=pooling), 512)


def test_damaged_modules_are_named(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('[{"type": 1}]', encoding="utf-8")
    with pytest.raises(ModelError, match=r"modules.json is damaged"):
        read_embedding(tmp_path, 512)


def test_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the `parity` extra: pip install -e '.[parity]'")
    tokenizers = pytest.importorskip("tokenizers")
    from .models import seeded
    from .test_import import tokenizer_files

    their = seeded("bert").bert
    their.save_pretrained(tmp_path / "theirs")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(130)}, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="w1:0 $A:0 w2:0", special_tokens=[("w1", 1), ("w2", 2)]
    )
    tokenizer_files(tmp_path / "theirs", words, sep_token="w2", mask_token="w4")
    written(tmp_path / "theirs", *ALL, pooling=MEAN, most=12)
    cramjax.import_model(tmp_path / "theirs", tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    assert model.embedding == EmbeddingConfig("mean", True, 12)
    texts = ["w5 w6 w7", "w100", " ".join(f"w{i}" for i in range(20, 40))]
    found = embed(model, texts, cut=True)
    for vector, text in zip(found, texts, strict=True):
        ids = [1, *words.encode(text, add_special_tokens=False).ids[:10], 2]
        with torch.no_grad():
            pooled = their(torch.tensor([ids])).last_hidden_state[0].double().mean(dim=0).numpy()
        # Float32 sums in another order, in a stream of three layers.
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), atol=1e-5)
