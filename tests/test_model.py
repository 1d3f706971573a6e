"""parts/model.py: predictions, and checkpoints that transformers can load."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from conftest import parts, run
from parts import pretrained
from parts.data import demo_data
from parts.model import classification_metrics, predict


def test_predictions_have_the_order_of_the_examples():
    model, _, validation, _ = parts()
    class_logits, features = predict(model, validation)
    assert (class_logits.shape, features.shape) == ((200, 2), (200, 64))
    model.eval()
    for row in (0, 57, 199):
        (alone,) = model(**model.tokenize([validation.texts[row]]))[0].detach().numpy()
        assert np.allclose(alone, class_logits[row], atol=1e-5)


def test_metrics_on_six_examples():
    metrics = classification_metrics(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0]))
    assert metrics == pytest.approx({"accuracy": 4 / 6, "macro_f1": (6 / 8 + 2 / 4) / 2, "mcc": 0.25})


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_ce_temperature_is_ce_of_a_linear_classifier_on_normalised_features(tmp_path, pooling):
    flags = ["--pooling", pooling, "--ce-temperature", 0.2]
    (record,) = run(tmp_path, "--shots", 20, "--lam", 0, "--max-steps", 60, *flags)
    folder = tmp_path / record["run"]
    demo, tokenizer = demo_data(), pretrained.load_tokenizer(str(folder), pooling)
    model = pretrained.load_model(str(folder), pooling, demo.label_names, tokenizer, 0.0, ce_temperature=0.2)
    class_logits, features = predict(model, demo.test)
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    head = {name: tensor.numpy() for name, tensor in load_file(folder / "head.safetensors").items()}
    assert np.allclose(class_logits, (z / 0.2) @ head["weight"].T + head["bias"], atol=1e-5)
    assert (class_logits.argmax(axis=1) == demo.test.labels).mean() == pytest.approx(record["test_accuracy"])


# ------------------------------------------------------------ checkpoints


def test_a_cls_checkpoint_is_an_ordinary_classifier(checkpoints):
    classify = transformers.pipeline("text-classification", model=str(checkpoints["cls"]))
    answers = classify(["on friday evening the plot was great .", "on friday evening the plot was dull ."])
    assert [answer["label"] for answer in answers] == ["positive", "negative"]
    card, record = ((checkpoints["cls"] / file).read_text() for file in ("README.md", "record.json"))
    assert f"Test accuracy {json.loads(record)['test_accuracy']:.3f}, on 300 examples" in card and "arxiv" in card
    assert "by CE + SCL (0.9, 0.3): 20 training examples" in card and "pipeline" in card


def test_a_mean_checkpoint_is_an_encoder_with_a_classifier_in_its_own_file(checkpoints):
    folder = checkpoints["mean"]
    record = json.loads((folder / "record.json").read_text())
    encoder, tokenizer = (auto.from_pretrained(folder) for auto in (transformers.AutoModel, transformers.AutoTokenizer))
    head = load_file(folder / "head.safetensors")
    test = demo_data().test
    tokens = tokenizer([text for (text,) in test.texts], padding=True, return_tensors="pt")
    hidden, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    features = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    predicted = (features @ head["weight"].T + head["bias"]).argmax(dim=1).numpy()
    assert (predicted == test.labels).mean() == pytest.approx(record["test_accuracy"])
    assert encoder.config.id2label == {0: "negative", 1: "positive"}
    assert "predicts at random" in (folder / "README.md").read_text()


def test_other_users_can_read_a_checkpoint(checkpoints):
    for folder in checkpoints.values():
        assert {file.stat().st_mode for file in folder.iterdir()} == {(folder / "record.json").stat().st_mode}


def test_the_tokenizer_of_a_checkpoint_truncates_as_in_training(tmp_path):
    """A pipeline therefore gives the probabilities of `predict`, also for a text beyond the positions of the model."""
    (record,) = run(tmp_path, "--shots", 20, "--max-length", 16)
    folder = str(tmp_path / record["run"])
    assert record["max_length"] == 16
    assert transformers.AutoTokenizer.from_pretrained(folder).model_max_length == 16
    demo = demo_data()
    tokenizer = pretrained.load_tokenizer(folder, "cls", max_length=16)
    model = pretrained.load_model(folder, "cls", demo.label_names, tokenizer, 0.0)
    text = "on friday evening the plot was great . " + "the plot was dull " * 100
    split = demo.test.take(np.arange(1))
    split.texts[0] = (text,)
    expected = torch.from_numpy(predict(model, split)[0]).softmax(dim=1)[0, 1].item()
    classify = transformers.pipeline("text-classification", model=folder, top_k=None)
    (answers,) = classify([text], truncation=True)
    scores = {answer["label"]: answer["score"] for answer in answers}
    assert scores["positive"] == pytest.approx(expected, abs=1e-5)
