"""parts/pretrained.py: a model folder is checked before it is trusted."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import finetune
from conftest import parts, run, sentences, user_error
from parts import pretrained
from parts.data import demo_data
from parts.errors import UserError
from parts.model import predict
from parts.records import read_records

POLARITY = ("negative", "positive")
SMALL = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2}
XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}


@pytest.fixture(scope="session")
def demo_tokenizer():
    return pretrained.load_tokenizer("demo", "cls")


@pytest.fixture
def save_encoder(tmp_path, demo_tokenizer):
    """Saves a tiny encoder of an architecture, with random weights and the demo's tokenizer."""

    def save(name, tokenizer=True, **settings):
        folder = tmp_path / "model"
        settings = {"vocab_size": len(demo_tokenizer), "pad_token_id": demo_tokenizer.pad_token_id} | settings
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **SMALL | settings)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        if tokenizer:
            demo_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Copies a trained checkpoint to a folder that the test may change."""
    return lambda pooling: shutil.copytree(checkpoints[pooling], tmp_path / "model")


def edit_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rename_classes(folder, *names):
    edit_config(folder, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def load(folder, pooling="cls", names=POLARITY, tokenizer=None, **settings):
    tokenizer = tokenizer or pretrained.load_tokenizer(str(folder), pooling)
    return pretrained.load_model(str(folder), pooling, names, tokenizer, **{"dropout": 0.0} | settings)


# ------------------------------------------------------------ the configuration


def dropout_rates(model):
    return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_dropout_of_the_demo_model(demo_tokenizer, dropout):
    assert dropout_rates(load("demo", tokenizer=demo_tokenizer, dropout=dropout)) == {dropout}


@pytest.mark.parametrize("config", [
    transformers.AlbertConfig(**SMALL, hidden_dropout_prob=0, attention_probs_dropout_prob=0),  # integers
    transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2)])  # attn_pdrop and so on
def test_dropout_is_that_of_the_flag_whatever_its_name_in_the_config(tmp_path, demo_tokenizer, config):
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    assert dropout_rates(load(tmp_path, "mean", tokenizer=demo_tokenizer, dropout=0.25)) == {0.25}


def test_the_classifier_of_modernbert_reads_the_first_token(tmp_path, demo_tokenizer):
    config = transformers.ModernBertConfig(**SMALL, classifier_pooling="mean", pad_token_id=0, cls_token_id=1)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path, tokenizer=demo_tokenizer).eval()
    tokens = torch.arange(1, 9)[None]
    class_logits, _ = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    first = model.backbone.base_model(input_ids=tokens).last_hidden_state[:, 0]
    torch.testing.assert_close(class_logits, model.backbone.classifier(model.backbone.head(first)))


@pytest.mark.parametrize("name, settings", [
    ("modernbert", {"classifier_pooling": "mean", "cls_token_id": 0, "sep_token_id": 2}),
    ("eurobert", {"classifier_pooling": "mean", "bos_token_id": 0, "eos_token_id": 2})])
def test_a_classifier_that_can_read_the_first_token_does(tmp_path, save_encoder, name, settings):
    if name not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    folder = save_encoder(name, **settings)
    assert run(tmp_path / "out", "--shots", 20, "--model", folder)[0]["ce"] > 0


@pytest.mark.parametrize("name, settings", [("xlnet", XLNET), ("llama", {"num_key_value_heads": 2})])
def test_a_classifier_that_reads_another_token_than_the_first_is_rejected(capsys, tmp_path, save_encoder, name,
                                                                          settings):
    error = user_error(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", save_encoder(name, **settings))
    assert "reads other tokens than the first" in error and "--pooling mean" in error


LEAKS = [{}, {"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True},
         {"problem_type": "multi_label_classification"}, {"attn_implementation": "org/kernel"}]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_options_of_a_source_config_change_nothing(tmp_path, save_encoder, pooling):
    folder = save_encoder("roberta")
    original, seen = (folder / "config.json").read_text(), []
    for i, leak in enumerate(LEAKS):
        (folder / "config.json").write_text(original)
        edit_config(folder, **leak)
        (record,) = run(tmp_path / str(i), "--shots", 20, "--model", folder, "--pooling", pooling)
        seen.append((record["ce"], record["test_correct"]))
        if pooling == "cls":
            checkpoint = str(tmp_path / str(i) / record["run"])
            (answers,) = transformers.pipeline("text-classification", model=checkpoint, top_k=None)(["the plot"])
            assert sum(answer["score"] for answer in answers) == pytest.approx(1), leak
    assert seen == [seen[0]] * len(LEAKS)


def test_code_in_a_model_folder_is_never_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    config = {"model_type": "ours", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer to the question of transformers
    assert "argument --model" in user_error(capsys, tmp_path, "--task", "demo", "--model", tmp_path / "model")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------ the tokenizer


@pytest.mark.parametrize("name", [
    "roberta", "bert", "distilbert", "electra", "xlm-roberta", "albert", "deberta", "deberta-v2", "camembert", "mpnet",
    "longformer", "big_bird", "convbert"])
def test_a_folder_without_tokenizer_files_is_rejected(capsys, tmp_path, save_encoder, name):
    """transformers makes a tokenizer of a few tokens, which does not distinguish the texts."""
    extra = {"embedding_size": 16} if name in ("electra", "albert", "convbert") else {}
    if name == "distilbert":
        extra = {"dim": 16, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}
    folder = save_encoder(name, tokenizer=False, **extra)
    for pooling in ("cls", "mean"):
        error = user_error(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder, "--pooling", pooling)
        assert "argument --model" in error
        assert "tokenizer" in error or (pooling == "cls" and "no cls token first" in error)


def word_tokenizer(*words):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=10)


def test_texts_in_another_script_are_rejected(capsys, tmp_path, own, save_encoder):
    folder = save_encoder("bert", tokenizer=False, vocab_size=7, pad_token_id=0)
    word_tokenizer("the", "cat").save_pretrained(folder)
    task = own(train=[(f"\u732b {i} \u72ac", i % 2) for i in range(20)], test=[("\u732b", 0)])
    error = user_error(capsys, tmp_path, "--task", task, "--shots", 4, "--model", folder)
    assert "knows 0 of" in error and "for this language" in error


@pytest.mark.parametrize("texts, warnings", [
    ([("a b",)] * 20, []),
    ([("a b",)] * 18 + [("a x",)], []),  # 1 of 38 tokens
    ([("a b",)] * 9 + [("a x",)], ["5% of the tokens are unknown to this tokenizer"]),
    ([("a b a b a b a b",), ("a b a b a b a b a",)],  # with [CLS] and [SEP]: 10 and 11 tokens
     ["1 of 2 texts have more than 10 tokens; the model does not see the rest (--max-length of finetune.py)"]),
    ([("a b a b", "a b a")] * 2 + [("a b a b", "a b a b")],  # with two [SEP]
     ["1 of 3 texts have more than 10 tokens; the model does not see the rest (--max-length of finetune.py)"]),
    ([("a",)] * 300 + [("x " * 100,)] * 300, []),  # only the first 300 texts are read
])
def test_truncated_texts_and_unknown_tokens_are_warned_of(texts, warnings):
    assert pretrained.check_vocabulary(word_tokenizer("a", "b"), texts, "model") == warnings


def test_half_of_the_tokens_must_be_known():
    with pytest.raises(UserError, match="the tokenizer of folder knows 2 of 4 tokens"):
        pretrained.check_vocabulary(word_tokenizer("a", "b"), [("a x",), ("b x",)], "folder")


@pytest.mark.parametrize("normalizer, changed", [({"type": "Lowercase"}, 0), (None, 2)])
def test_tokens_that_differ_from_tokenizer_json_are_warned_of(tmp_path, normalizer, changed):
    tokenizer = word_tokenizer("the", "The", "dog")
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    warnings = pretrained.check_vocabulary(tokenizer, [("The dog",), ("the dog",), ("dog The the",)], str(tmp_path))
    expected = f"for {changed} of 3 texts, transformers does not give the tokens of {file}; "
    assert [warning.startswith(expected) for warning in warnings] == [True] * bool(changed)
    assert pretrained.check_vocabulary(tokenizer, [("dog", "the dog")], str(tmp_path)) == []


def test_the_demo_does_not_read_a_folder_with_its_name(tmp_path, monkeypatch, demo_tokenizer):
    word_tokenizer("dog").save_pretrained(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert pretrained.check_vocabulary(demo_tokenizer, [("the plot was great",)], "demo") == []


@pytest.mark.parametrize("name, settings, limit", [
    ("roberta", {"max_position_embeddings": 40}, 39), ("mpnet", {"max_position_embeddings": 40}, 38),
    ("bert", {"max_position_embeddings": 40}, 40), ("nystromformer", {"max_position_embeddings": 40}, 40),
    ("electra", {"max_position_embeddings": 40, "embedding_size": 16}, 40),
    ("gpt2", {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, 40), ("xlnet", XLNET, 256)])
def test_the_maximum_length_is_the_smaller_of_tokenizer_and_model(tmp_path, own, save_encoder, name, settings, limit):
    folder = save_encoder(name, **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**30 if name == "xlnet" else 512
    tokenizer.save_pretrained(folder)
    rows = [(f"the plot was great {i} " * 90, i % 2) for i in range(30)]
    flags = ["--shots", "8", "--max-steps", "2", "--model", str(folder), "--pooling", "mean"]
    task = own(train=rows[:20], test=rows[20:])
    assert finetune.main(["--task", str(task), *flags, "--out", str(tmp_path / "out")]) == 0
    (record,) = read_records(tmp_path / "out" / "results.jsonl")
    assert record["max_length"] == limit


def test_the_limit_of_a_checkpoint_does_not_limit_a_later_run(copy):
    folder = copy("cls")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 16  # as after --max-length 16
    tokenizer.save_pretrained(folder)
    limits = [pretrained.load_tokenizer(str(folder), "cls", length).model_max_length for length in (32, 256)]
    assert limits == [32, 65]  # the second is the limit of the encoder
    (folder / "record.json").unlink()  # any other model: its tokenizer knows its limit
    assert pretrained.load_tokenizer(str(folder), "cls", 32).model_max_length == 16


def test_a_tokenizer_with_more_words_than_embeddings_is_rejected(capsys, tmp_path, save_encoder):
    folder = save_encoder("roberta", vocab_size=100)
    error = user_error(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder)
    assert "has 100 word embeddings, but its tokenizer has" in error


def test_padding_is_on_the_right_even_if_the_tokenizer_pads_on_the_left(tmp_path, save_encoder):
    folder = save_encoder("roberta")
    (right,) = run(tmp_path / "right", "--shots", 20, "--model", folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    (left,) = run(tmp_path / "left", "--shots", 20, "--model", folder)
    assert left["ce"] == right["ce"] and left["test_correct"] == right["test_correct"]


@pytest.mark.parametrize("content, pooling, hint", [
    ('{"pooling_mode_mean_tokens": true}', "cls", True), ('{"pooling_mode_mean_tokens": true}', "mean", False),
    ('{"pooling_mode_mean_tokens": false}', "cls", False), ("[]", "cls", False), ("{", "cls", False),
    (None, "cls", False)])
def test_a_model_of_mean_pooling_gets_a_hint(tmp_path, capsys, save_encoder, content, pooling, hint):
    folder = save_encoder("roberta")
    (folder / "1_Pooling").mkdir()
    if content:
        (folder / "1_Pooling" / "config.json").write_text(content)
    run(tmp_path / "out", "--shots", 20, "--max-steps", 1, "--model", folder, "--pooling", pooling)
    expected = f"note: {folder} was trained with mean pooling; also try --pooling mean\n"
    assert capsys.readouterr().err == (expected if hint else "")


def save_decoder(folder):
    tokenizer = transformers.GPT2Tokenizer().train_new_from_iterator(sentences(9), vocab_size=300, show_progress=False)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=64)
    transformers.GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_decoder_works_with_mean_pooling_only(capsys, tmp_path):
    save_decoder(tmp_path / "decoder")
    error = user_error(capsys, tmp_path, "--task", "demo", "--model", tmp_path / "decoder")
    assert "puts no cls token first (is it a decoder?)" in error and "--pooling mean" in error
    (record,) = run(tmp_path / "out", "--shots", 20, "--model", tmp_path / "decoder", "--pooling", "mean")
    assert record["test_accuracy"] > 0


def test_a_causal_encoder_is_rejected(capsys, tmp_path, save_encoder):
    folder = save_encoder("bert", is_decoder=True)
    error = user_error(capsys, tmp_path, "--task", "demo", "--model", folder)
    assert f"{folder} has is_decoder true in config.json" in error and "choose an encoder" in error


def test_an_encoder_that_reads_padding_is_rejected(capsys, tmp_path, save_encoder):
    folder = save_encoder("fnet")
    error = user_error(capsys, tmp_path, "--task", "demo", "--model", folder, "--pooling", "mean")
    assert f"padding changes the features of {folder}" in error and "attention mask" in error


def test_the_mask_does_not_depend_on_the_tokenizer(save_encoder):
    """Some tokenizers return no attention mask unless they are asked for it."""
    folder = save_encoder("roberta")
    tokenizer = pretrained.load_tokenizer(str(folder), "cls")
    tokenizer.model_input_names = ["input_ids"]
    tokens = load(folder, tokenizer=tokenizer).tokenize([("the plot was great",), ("dull",)])
    assert tokens["attention_mask"].sum(dim=1).tolist() == [6, 4]


def test_an_encoder_with_one_token_type_accepts_pairs(tmp_path, save_encoder):
    """RoBERTa has one token type, but a BERT tokenizer numbers the tokens of the second text as type 1."""
    folder = save_encoder("roberta", tokenizer=False, vocab_size=8, pad_token_id=0, type_vocab_size=1)
    word_tokenizer("a", "b", "c").save_pretrained(folder)
    model = load(folder)
    assert "token_type_ids" in model.tokenizer("a", "b") and "token_type_ids" not in model.tokenize([("a", "b")])
    assert model(**model.tokenize([("a", "b")]))[0].isfinite().all()


# ------------------------------------------------------------ the weights


def test_weights_of_layers_that_the_config_does_not_have_are_warned_of(capsys, save_encoder):
    folder = save_encoder("bert", num_hidden_layers=2)
    load(folder)
    assert capsys.readouterr().err == ""
    edit_config(folder, num_hidden_layers=1)
    load(folder)
    warning = f"warning: {folder} has 16 weights that its config.json does not use, such as encoder.layer.1."
    assert capsys.readouterr().err.startswith(warning)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_encoder_that_would_start_from_random_weights_is_rejected(tmp_path, demo_tokenizer, pooling):
    model, *_ = parts()
    model.backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"module.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks 37 weights of its encoder"):
        load(tmp_path, pooling, tokenizer=demo_tokenizer)


def test_an_encoder_decoder_is_rejected(capsys, tmp_path):
    config = transformers.BartConfig(vocab_size=400, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_layers=1,
                                     decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1)
    config.save_pretrained(tmp_path / "model")
    error = user_error(capsys, tmp_path, "--task", "demo", "--model", tmp_path / "model")
    assert "is an encoder-decoder; choose an encoder" in error


@pytest.mark.parametrize("name, settings, unused", [
    ("xlnet", XLNET, "mask_emb"), ("longformer", {"attention_window": [8, 8]}, "query_global"), ("bert", {}, "pooler"),
    ("luke", {"entity_vocab_size": 10, "entity_emb_size": 8}, "entity_embeddings")])
def test_parameters_that_no_output_uses_are_frozen(save_encoder, name, settings, unused):
    """DistributedDataParallel would wait for their gradients."""
    folder = save_encoder(name, **settings)
    model = load(folder, "mean")
    class_logits, features = model.train()(**model.tokenize([("the plot was great",), ("dull",)]))
    (class_logits.sum() + features.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert any(unused in name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def test_weights_that_are_nan_are_reported_before_training(capsys, tmp_path, copy):
    folder = copy("mean")
    head = load_file(folder / "head.safetensors")
    save_file({name: tensor * math.nan for name, tensor in head.items()}, folder / "head.safetensors")
    error = user_error(capsys, tmp_path, "--task", "demo", "--shots", 20, "--model", folder, "--pooling", "mean")
    assert "has weights that are NaN or infinite" in error


def test_weights_that_need_unpickling_are_rejected(capsys, tmp_path, copy):
    folder = copy("cls")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "argument --model" in user_error(capsys, tmp_path, "--task", "demo", "--model", folder)


def test_truncated_weights_are_rejected(capsys, tmp_path, copy):
    file = copy("cls") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "argument --model" in user_error(capsys, tmp_path, "--task", "demo", "--model", file.parent)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "null", "{", '{"model_type": 5}', '{"vocab_size": "many"}'])
def test_a_broken_file_of_a_model_gives_one_line(capsys, tmp_path, copy, name, content):
    folder = copy("cls")
    (folder / name).write_text(content)
    flags = ["--task", "demo", "--shots", "20", "--max-steps", "2", "--model", str(folder), "--out", str(tmp_path)]
    status = finetune.main(flags)
    errors = capsys.readouterr().err.splitlines()
    assert status == 0 or (status == 2 and len(errors) == 1 and "argument --model" in errors[0]), errors
    assert status == 2 or name != "config.json"


# ------------------------------------------------------------ the classifier


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_checkpoint_is_a_model_for_the_next_task(checkpoints, own, tmp_path, capsys, pooling):
    rows = [(text, "abc"[i % 3]) for i, text in enumerate(sentences(60))]
    task = own(train=rows[:45], test=rows[45:])
    model = ["--model", str(checkpoints[pooling]), "--pooling", pooling]
    flags = ["--shots", "9", "--max-steps", "2", "--out", str(tmp_path / "out")]
    assert finetune.main(["--task", str(task), *model, *flags]) == 0
    (record,) = read_records(tmp_path / "out" / "results.jsonl")
    assert record["train_size"] == 9 and record["base_model"].endswith("demo-n20")
    assert "with a new classifier" in capsys.readouterr().out  # for three classes
    run(tmp_path / "same", "--shots", 20, *model)
    assert "with its trained classifier, " in capsys.readouterr().out
    first, second = (load(checkpoints[pooling], pooling).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("saved, wanted, rows", [
    (("a", "b", "c"), ("c", "a", "b"), [2, 0, 1]), (("POSITIVE", "Negative"), ("negative", "positive"), [1, 0]),
    (("a", "A"), ("a", "A"), [0, 1]), (("a", "A"), ("A", "a"), None),
    (("not-same", "same"), ("same", "not_same"), [1, 0]),
    (("a", "b"), ("a", "c"), None), (("a", "b"), ("a", "b", "c"), None), (("a", "b", "c"), ("a", "b"), None),
    (("contradiction", "entailment", "neutral"), ("entailment", "neutral", "contradiction"), [1, 2, 0]),
    (("contradiction", "entailment", "neutral"), ("0", "1", "2"), None),  # words have no numbers
    (("LABEL_0", "LABEL_1"), ("negative", "positive"), None), (("0", "1"), ("1", "2"), None),
    (("1", "2"), ("1", "2"), [0, 1])])
def test_classes_are_matched_by_name(saved, wanted, rows):
    assert pretrained.match_classes(saved, wanted) == rows


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("names", [("positive", "negative"), ("POSITIVE", "Negative")])
def test_classes_in_another_order_keep_their_classifier(checkpoints, copy, pooling, names):
    folder, plain = copy(pooling), load(checkpoints[pooling], pooling)
    weights = "model.safetensors" if pooling == "cls" else "head.safetensors"
    tensors = load_file(folder / weights)
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias", "weight", "bias"):
        if name in tensors:
            tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    rename_classes(folder, *names)
    assert pretrained.saved_classes(str(folder)) == names
    model = load(folder, pooling)
    assert not model.classifier_is_new and model.backbone.config.id2label == {0: "negative", 1: "positive"}
    test = demo_data().test
    assert np.allclose(predict(model, test)[0], predict(plain, test)[0], atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_other_classes_get_a_new_classifier_and_a_message(checkpoints, copy, tmp_path, capsys, pooling):
    folder, before = copy(pooling), load(checkpoints[pooling], pooling)
    rename_classes(folder, "spam", "ham")
    model = load(folder, pooling)
    assert model.classifier_is_new and not torch.equal(model.last_layer().weight, before.last_layer().weight)
    run(tmp_path / "out", "--shots", 20, "--model", folder, "--pooling", pooling)
    assert "with a new classifier" in capsys.readouterr().out


@pytest.mark.parametrize("saved, labels, description", [
    (("0", "1"), (0, 1), "with its trained classifier (matched by class number), "),
    (("-1", "1"), (-1, 1), "with its trained classifier (matched by class number), "),
    (("0", "1"), (1, 2), "with a new classifier, "), (("0", "1"), ("0 cats", "1 cat"), "with a new classifier, "),
])
def test_classes_that_are_numbers_are_matched_by_number_with_a_message(copy, own, tmp_path, capsys, saved, labels,
                                                                       description):
    """Other numbers are other classes."""
    folder = copy("cls")
    rename_classes(folder, *saved)
    rows = [(text, labels[i % 2]) for i, text in enumerate(sentences(60))]
    flags = ["--task", str(own(train=rows[:40], test=rows[40:])), "--model", str(folder), "--shots", "8"]
    assert finetune.main([*flags, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert description in capsys.readouterr().out


@pytest.mark.parametrize("pooling, ce_temperature", [("cls", 0.2), ("mean", 0.2)])
def test_a_classifier_of_other_features_is_not_kept(checkpoints, pooling, ce_temperature):
    """The checkpoint's classifier reads the plain mean. The new features have the same width."""
    assert load(checkpoints["mean"], pooling, ce_temperature=ce_temperature).classifier_is_new
    assert not load(checkpoints["mean"], "mean").classifier_is_new
