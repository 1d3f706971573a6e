"""Defines the model, which computes class logits and features from texts. Evaluates and saves models."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from tqdm import tqdm

from parts.data import Split
from parts.ranks import autocast, rank, world_size
from parts.records import atomic_write, method_name

EVAL_BATCH = 64


class Model(nn.Module):
    """Combines an encoder, a tokenizer and a classifier. SCL contrasts the features that the classifier reads.

    With cls pooling, the features are the last hidden layer at the first token. The classifier is part of `backbone`.
    With mean pooling, the features are the mean of the last hidden layer over all tokens that are not padding, and the
    classifier is the linear layer `head`. With `ce_temperature` T, the classifier is always `head`, which reads
    l2-normalised features divided by T.
    """

    def __init__(self, backbone: transformers.PreTrainedModel, tokenizer, head: nn.Linear | None = None,
                 pooling: str = "cls", ce_temperature: float | None = None):
        super().__init__()
        self.backbone, self.tokenizer, self.head = backbone, tokenizer, head
        self.pooling, self.ce_temperature = pooling, ce_temperature
        self.classifier_is_new = True
        self.hidden: Tensor | None = None  # (N, T, D), the last hidden layer of the latest batch
        backbone.base_model.register_forward_hook(self.keep_hidden)

    def keep_hidden(self, module, inputs, output) -> None:
        """Stores the last hidden layer's output. Without this hook, the encoder would have to return all layers."""
        self.hidden = output[0]

    def forward(self, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        output = self.backbone(**tokens)
        if self.pooling == "cls":
            features = self.hidden[:, 0]  # (N, D)
        else:
            mask = tokens["attention_mask"][..., None]  # (N, T, 1)
            features = (self.hidden * mask).sum(dim=1) / mask.sum(dim=1)  # (N, D)
        if self.head is None:
            return output.logits, features  # (N, C), (N, D)
        scaled = F.normalize(features, dim=1) / self.ce_temperature if self.ce_temperature else features
        return self.head(scaled), features

    def tokenize(self, texts: list[tuple[str, ...]]) -> dict[str, Tensor]:
        """Returns the token tensors (N, T) of a batch, padded on the right to the length T of the longest text.

        Removes the token types if the encoder has only one type. A BERT tokenizer gives type 1 to the second text.
        """
        columns = map(list, zip(*texts, strict=True))
        tokens = self.tokenizer(*columns, truncation=True, max_length=self.tokenizer.model_max_length, padding=True,
                                return_tensors="pt", return_attention_mask=True)
        if getattr(self.backbone.config, "type_vocab_size", None) == 1:
            tokens.pop("token_type_ids", None)
        return tokens.to(self.backbone.device)

    def summary(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        names = self.backbone.config.id2label.values()
        matched = " (matched by class number)" if all(name.removeprefix("-").isdecimal() for name in names) else ""
        classifier = "a new classifier" if self.classifier_is_new else f"its trained classifier{matched}"
        return f"{classifier}, {parameters / 1e6:.1f} M parameters, on {self.backbone.device}"

    def classifier_names(self) -> set[str]:
        """Returns the names of the parameters that SCL does not train: the classifier and, in BERT, the pooler."""
        encoder = "backbone." if self.head else f"backbone.{self.backbone.base_model_prefix}."
        return {name for name, _ in self.named_parameters() if not name.startswith(encoder) or ".pooler." in name}

    def last_layer(self) -> nn.Linear:
        """Returns the linear layer that computes the class logits."""
        classes = self.backbone.config.num_labels
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes]
        return layers[-1]


@torch.inference_mode()
def predict(model: Model, split: Split, precision: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    """Returns class logits (N, C) and features (N, D), in the order of the examples.

    Sorts the examples by text length to reduce padding. Each rank evaluates a share of the batches and receives the
    results of all ranks.
    """
    model.eval()
    device, classes, width = model.backbone.device, model.backbone.config.num_labels, model.backbone.config.hidden_size
    order = np.argsort([sum(map(len, row)) for row in split.texts], kind="stable")
    outputs = torch.zeros(len(split), classes + width, device=device)
    starts = range(rank() * EVAL_BATCH, len(order), world_size() * EVAL_BATCH)
    for start in tqdm(starts, "evaluating", disable=True if rank() else None, leave=False, delay=5):
        rows = order[start : start + EVAL_BATCH]
        tokens = model.tokenize([split.texts[row] for row in rows])
        with autocast(device, precision):
            outputs[rows] = torch.cat(model(**tokens), dim=1).float()
    if world_size() > 1:
        dist.all_reduce(outputs)  # the sum is exact: each row is non-zero on only one rank
    results = outputs.cpu().numpy()
    return results[:, :classes], results[:, classes:]


def classification_metrics(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Returns accuracy, macro-F1 and the Matthews correlation coefficient, as fractions."""
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "mcc": float(matthews_corrcoef(labels, predicted)),
    }


MODEL_CARD = """# {run}

{model}, fine-tuned on {task} by {method}: {train_size} training examples, seed {seed}, {pooling} pooling. Best
validation accuracy {validation}, at step {best_step} of {steps}. Test accuracy {test}, on {test_size} examples.
`record.json` has all settings. {loading}
SCL, the supervised contrastive loss: Gunel, Du, Conneau, Stoyanov, ICLR 2021, https://arxiv.org/abs/2011.01403
"""
LOADING = {
    True: '`transformers.pipeline("text-classification", model=FOLDER)` loads this model.',
    False: "The linear classifier is in `head.safetensors`. A `pipeline` ignores this file and predicts at random.",
}  # True means that the classifier is part of the transformers model


def save_checkpoint(folder: Path, model: Model, record: dict) -> None:
    """Writes the weights, tokenizer, record and model card of a model to a folder that transformers can load."""
    accuracy = {split: "none" if (value := record.get(f"{split}_accuracy")) is None else f"{value:.3f}"
                for split in ("validation", "test")}
    facts = record | accuracy | {"method": method_name(record), "loading": LOADING[model.head is None]}
    with atomic_write(folder) as part:
        part.mkdir()
        model.backbone.save_pretrained(part)
        if model.head:
            save_file(model.head.state_dict(), part / "head.safetensors")
        model.tokenizer.save_pretrained(part)
        (part / "record.json").write_text(json.dumps(record) + "\n")
        (part / "README.md").write_text(MODEL_CARD.format(**facts), encoding="utf-8")
        for file in part.iterdir():
            shutil.copymode(part / "record.json", file)  # otherwise, only the owner can read safetensors files
