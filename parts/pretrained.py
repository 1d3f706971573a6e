"""Loads pre-trained models with transformers, loads checkpoints of this project, and checks models before training."""

import json
import os
import re
import sys
from pathlib import Path

import huggingface_hub
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from parts.data import demo_data
from parts.errors import UserError, connect_hub, explain_errors, one_line
from parts.model import Model


def fetch_model(model: str) -> str:
    """Returns the local folder of a model. Downloads only safetensors weights, because a pickle file could run code."""
    if model == "demo" or os.path.isdir(model):
        return model
    connect_hub()
    files = ["*.json", "*.txt", "*.model", "model*.safetensors", "head.safetensors"]
    with explain_errors("--model", model, "a hub id or a folder", without_hub="give --model a local folder"):
        return huggingface_hub.snapshot_download(model, allow_patterns=files)


def load_config(source: str):
    """Loads the config of a model. Resets options that would change the output format or load kernels from the hub."""
    ours = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "attn_implementation": None}
    with explain_errors("--model", source, "a folder that save_pretrained wrote"):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **ours)
    if config.is_encoder_decoder:
        raise UserError(f"argument --model: {source} is an encoder-decoder; choose an encoder")
    if getattr(config, "is_decoder", False):
        raise UserError(f"argument --model: {source} has is_decoder true in config.json, so each token reads only the "
                        "tokens before it; choose an encoder")
    return config


def load_tokenizer(source: str, pooling: str, max_length: int = 256):
    """Loads the tokenizer of a model and checks that the encoder has an embedding for every token.

    Sets `model_max_length` to the smallest of `max_length`, the limit of the tokenizer and the limit of the encoder.
    """
    if source == "demo":  # a tokenizer of RoBERTa's type, trained on the demo sentences
        sentences = (text for (text,) in demo_data().train.texts)
        untrained = transformers.RobertaTokenizer(model_max_length=min(max_length, 64))
        return untrained.train_new_from_iterator(sentences, vocab_size=400, show_progress=False)
    config = load_config(source)
    with explain_errors("--model", source, "a folder that save_pretrained wrote, with its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # decoders have no pad token
        tokenizer.padding_side = "right"  # so that the first token is never padding
        first_token = tokenizer("a")["input_ids"][:1]
        with torch.device("meta"):  # creates no weights
            encoder = transformers.AutoModel.from_config(config)
        embeddings = getattr(encoder.get_input_embeddings(), "num_embeddings", sys.maxsize)
    if pooling == "cls" and first_token != [tokenizer.cls_token_id]:
        raise UserError(f"argument --model: the tokenizer of {source} puts no cls token first (is it a decoder?); "
                        "choose an encoder or --pooling mean")
    if len(tokenizer) > embeddings:
        raise UserError(f"argument --model: {source} has {embeddings} word embeddings, but its tokenizer has "
                        f"{len(tokenizer)} words; expected the tokenizer that the model was trained with")
    # The tokenizer of a checkpoint stores the --max-length of its run. The encoder may accept longer texts.
    is_checkpoint = Path(source, "record.json").is_file()
    own_limit = max_length if is_checkpoint else tokenizer.model_max_length
    tokenizer.model_max_length = min(max_length, own_limit, longest_input(encoder))
    return tokenizer


def longest_input(encoder: transformers.PreTrainedModel) -> int:
    """Returns the maximum number of tokens of an input, from the config and the number of position embeddings.

    In RoBERTa-like models, the first position has the number padding_idx + 1.
    """
    limit = getattr(encoder.config, "max_position_embeddings", None)
    limit = limit if limit and limit > 0 else sys.maxsize  # for models without a maximum, such as XLNet
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first_position = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(limit, module.num_embeddings - first_position)
    return limit


def long_texts(tokenizer, texts: list[tuple[str, ...]]) -> list[str]:
    """Returns a list with a warning if some texts have more tokens than the model reads, or else an empty list."""
    inputs = tokenizer(*map(list, zip(*texts, strict=True)), truncation=False)["input_ids"]
    limit = tokenizer.model_max_length
    if truncated := sum(len(row) > limit for row in inputs):
        return [f"{truncated} of {len(texts)} texts have more than {limit} tokens; the model does not see the rest "
                "(--max-length of finetune.py)"]
    return []


def check_vocabulary(tokenizer, texts: list[tuple[str, ...]], source: str, first: int | None = 300) -> list[str]:
    """Tokenises the first texts, or all texts if `first` is None. Returns warnings about long texts and unknown tokens.

    Also returns a warning if transformers does not give the tokens of the model's own tokenizer.json. Rejects a
    tokenizer that turns at least half of the tokens of the texts into the unknown token. Probably, tokenizer files are
    missing.
    """
    texts = texts[:first]
    inputs = tokenizer(*map(list, zip(*texts, strict=True)), truncation=False)["input_ids"]
    words = tokenizer([" ".join(row) for row in texts], add_special_tokens=False)["input_ids"]
    tokens = [token for row in words for token in row]
    known = sum(token != tokenizer.unk_token_id for token in tokens)
    if known <= len(tokens) / 2:
        raise UserError(f"argument --model: the tokenizer of {source} knows {known} of {len(tokens)} tokens of the "
                        "texts; expected tokenizer files in the folder, for this language")
    warnings = long_texts(tokenizer, texts)
    if (unknown_share := 1 - known / len(tokens)) > 0.03:
        warnings.append(f"{unknown_share:.0%} of the tokens are unknown to this tokenizer")
    file = Path(source, "tokenizer.json")
    if source != "demo" and file.is_file():
        original = tokenizers.Tokenizer.from_file(str(file))  # transformers may replace the normaliser of this file
        original.no_truncation()
        original.no_padding()
        encodings = original.encode_batch([row if len(row) == 2 else row[0] for row in texts])
        if changed := sum(row != encoding.ids for row, encoding in zip(inputs, encodings, strict=True)):
            warnings.append(f"for {changed} of {len(texts)} texts, transformers does not give the tokens of "
                            f"{file}; perhaps tokenizer_config.json lacks do_lower_case")
    return warnings


def load_model(source: str, pooling: str, label_names: tuple[str, ...], tokenizer, dropout: float,
               ce_temperature: float | None = None) -> Model:
    """Loads a pre-trained model or a checkpoint of this project, with a classifier for the given classes.

    If the model has a trained classifier with the given class names, in any order, uses this classifier. Otherwise
    initialises the last layer of the classifier from torch's random seed. Other layers of the classifier keep their
    weights if the model has weights for these layers.
    """
    has_own_classifier = pooling == "cls" and not ce_temperature
    config = demo_config(tokenizer) if source == "demo" else load_config(source)
    saved_names = class_names(config)
    adapt_config(config, label_names, dropout)
    backbone, new_weights = load_backbone(source, config, has_own_classifier)
    head = None if has_own_classifier else nn.Linear(config.hidden_size, len(label_names))
    model = Model(backbone, tokenizer, head, pooling, ce_temperature)

    encoder = {name for name, _ in model.named_parameters()} - model.classifier_names()
    if missing := sorted(encoder & new_weights):
        raise UserError(f"argument --model: {source} lacks {len(missing)} weights of its encoder or has them in other "
                        f"shapes, such as {missing[0].removeprefix('backbone.')}; save it again with save_pretrained")

    if head:
        is_trained = load_head(source, head, pooling, ce_temperature)
    else:
        is_trained = source != "demo" and not new_weights
    if is_trained:
        layer, order = model.last_layer(), match_classes(saved_names, label_names)
        if order:
            layer.load_state_dict({name: weight[order] for name, weight in layer.state_dict().items()})
            model.classifier_is_new = False
        else:
            layer.reset_parameters()

    check_and_freeze(model, source)
    return model


def demo_config(tokenizer) -> transformers.RobertaConfig:
    return transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=66, type_vocab_size=1, initializer_range=0.05, pad_token_id=tokenizer.pad_token_id)


def load_backbone(source: str, config, has_own_classifier: bool) -> tuple[transformers.PreTrainedModel, set[str]]:
    """Loads the network. Returns two values: the network, and the names of parameters that the model files lack.

    Prints a warning if the files have weights of layers that the network lacks.
    """
    auto = transformers.AutoModelForSequenceClassification if has_own_classifier else transformers.AutoModel
    if source == "demo":
        return auto.from_config(config), set()
    with explain_errors("--model", source, "a folder that save_pretrained wrote, with model.safetensors"):
        backbone, info = auto.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True, trust_remote_code=False)
    if unused := sorted(name for name in info["unexpected_keys"] if re.search(r"\.\d+\.", name)):  # in a numbered layer
        print(f"warning: {source} has {len(unused)} weights that its config.json does not use, such as {unused[0]}",
              file=sys.stderr)
    missing = (*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"]))
    return backbone, {f"backbone.{name}" for name in missing}


def adapt_config(config, label_names: tuple[str, ...], dropout: float) -> None:
    """Changes the config of a model: sets class names, all dropout rates, and pooling at the first token."""
    config.id2label = dict(enumerate(label_names))  # also sets num_labels
    config.label2id = {name: number for number, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and type(value) in (int, float):
            setattr(config, name, dropout)
    if hasattr(config, "classifier_pooling"):  # ModernBERT's classifier may read the mean of the tokens
        config.classifier_pooling = "bos" if config.model_type == "eurobert" else "cls"


def load_head(source: str, head: nn.Linear, pooling: str, ce_temperature: float | None) -> bool:
    """Loads the linear classifier of a checkpoint into `head`. Returns whether a classifier was loaded."""
    file = Path(source, "head.safetensors")
    if not file.is_file():
        return False
    with explain_errors("--model", source, "a folder that finetune.py wrote"):
        record, weights = json.loads(Path(source, "record.json").read_text(encoding="utf-8")), load_file(file)
        same_features = (record["pooling"], record["ce_temperature"]) == (pooling, ce_temperature)
        if not same_features or weights["weight"].shape != head.weight.shape:
            return False
        head.load_state_dict(weights)
    return True


def class_names(config) -> tuple[str, ...]:
    return tuple(str(name) for _, name in sorted(config.id2label.items()))


def saved_classes(source: str) -> tuple[str, ...]:
    """Returns the class names of a saved model, in the order of its class logits."""
    return class_names(load_config(source))


def match_classes(saved: tuple[str, ...], wanted: tuple[str, ...]) -> list[int] | None:
    """Returns a list with the index of each wanted class in `saved`, or None if the class names differ.

    The comparison of class names ignores case and treats "-" as "_".
    """
    if saved == wanted:
        return list(range(len(wanted)))
    saved, wanted = ([name.casefold().replace("-", "_") for name in names] for names in (saved, wanted))
    if len(set(saved)) < len(saved) or set(saved) != set(wanted):
        return None
    return [saved.index(name) for name in wanted]


def assign_classes(folder: str, task: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the checkpoint's class names in the order of the task's classes.

    Matches the classes by name. If the class names are numbers in the task and words in the checkpoint, matches the
    classes by number. If the class names of the task are numbers, prints the class name for each number.
    """
    own = saved_classes(folder)
    by_name = match_classes(own, wanted)
    by_number = [int(name) for name in wanted if name.isdecimal()]
    own_are_words = not any(name.isdecimal() for name in own)
    if by_name is None and not (own_are_words and sorted(wanted) == sorted(map(str, range(len(own))))):
        raise UserError(f"argument --task: the classes of {task} are {', '.join(wanted)}, but those of {folder} are "
                        f"{', '.join(own)}; use the same names")
    names = tuple(own[i] for i in (by_number if by_name is None else by_name))
    if by_number:
        pairs = ", ".join(f"{one_line(number)} = {one_line(name)}" for number, name in zip(wanted, names, strict=True))
        print(f"{one_line(folder)}: the class numbers of {one_line(task)} stand for these class names: {pairs}",
              file=sys.stderr)
    return names


def check_and_freeze(model: Model, source: str) -> None:
    """Checks a model before training, and freezes parameters that no output uses.

    Checks that all weights are finite, that the model accepts a text, and that padding does not change the features of
    a text. If the model has its own classifier, also checks that the class logits depend only on the first token.
    Unused parameters are frozen, because DistributedDataParallel would wait for their gradients.
    """
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"argument --model: {source} has weights that are NaN or infinite; expected a trained model")
    model.eval()
    with explain_errors("--model", source, "an encoder for text"):
        _, padded_features = model(**model.tokenize([("a b c",), ("a b c " * 9,)]))
        class_logits, features = model(**model.tokenize([("a b c",)]))
        (class_logits.sum() + features.sum()).backward(retain_graph=True)
    if (features - padded_features[:1]).norm() > 0.01 * features.norm():
        raise UserError(f"argument --model: padding changes the features of {source}, so the features of a text depend "
                        "on the other texts of its batch; choose an encoder that uses an attention mask")
    if model.head is None:
        (by_token,) = torch.autograd.grad(class_logits.sum(), model.hidden, allow_unused=True)  # (1, T, D)
        if by_token is None or by_token[:, 1:].any():
            raise UserError(f"argument --model: the classifier of {source} reads other tokens than the first, but SCL "
                            "contrasts the first; choose --pooling mean")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()
    model.hidden = None


def was_trained_with_mean(source: str) -> bool:
    """Returns whether the folder of a sentence encoder declares mean pooling."""
    try:
        return bool(json.loads(Path(source, "1_Pooling", "config.json").read_text())["pooling_mode_mean_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
