"""Fine-tune an encoder with cross-entropy + supervised contrastive loss (Gunel et al., ICLR 2021).

    python finetune.py --task demo --shots 20 --lam 0.9 --tau 0.3       # made-up sentences: no network, ten seconds
    python finetune.py --task sst2 --shots 20 --lam 0.9 --tau 0.3       # RoBERTa-Large and SST-2 from the hub
    python finetune.py --task sst2 --shots 20 --lam 0 0.9 --seed 0 1 2  # a sweep: six runs, paired by seed
    torchrun --nproc-per-node 8 finetune.py --task mnli --batch-size 256 --micro-batch-size 16 --save-every 500

A finished run is one JSON line in OUT/results.jsonl and, unless it is one of a sweep, a checkpoint in OUT/<run>/.
The order of this file: flags; the model; the training loop (`fit`); one run; the sweep.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import data
from data import TASKS, Mistake, Split, blame, printable, reason

DEFAULT_MODEL = "FacebookAI/roberta-large"
TRANSLATORS = ["Helsinki-NLP/opus-mt-en-de", "Helsinki-NLP/opus-mt-de-en"]
EVAL_BATCH = 64
READ_EVERY = 20  # steps between two looks at the loss, since a look waits for the device
MACHINE_FLAGS = ("data_dir", "device", "out", "save", "save_every")  # they do not change what a run finds


# ------------------------------------------------------------ flags: before the slow imports, so that --help is instant


def number(kind: type, interval: str):
    """An argparse type: a number in an interval such as "[0, 1]" or "(0, inf)"; NaN is in none."""
    low, high = map(float, interval[1:-1].split(","))
    excluded = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "()"]

    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value not in excluded:
                return value + 0  # -0.0 is 0.0
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} in {interval}, got {text}")

    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # argparse would print the usage first


COUNT, FRACTION = number(int, "[1, inf)"), number(float, "[0, 1]")
POSITIVE, NOT_NEGATIVE = number(float, "(0, inf)"), number(float, "[0, inf)")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--task", required=True, help=f"{', '.join(TASKS)}; demo; or a folder with train.*, test.*, perhaps "
        "validation.* (tsv, csv, jsonl, parquet; columns text, label, perhaps text_pair)")
    add("--data-dir", help="read a named task from DIR/SST-2/train.tsv and so on, GLUE's layout, not from the hub")
    add = group.add_mutually_exclusive_group().add_argument
    add("--shots", type=COUNT, help="training examples in total, stratified (default: all)")
    add("--shots-per-class", type=COUNT, help="training examples of each class")
    add = group.add_argument
    add("--noise", choices=("label", "word", "backtranslation"), help="of the training sample: flip labels; drop and "
        "swap words; or add three back-translations of each example")
    add("--noise-level", type=NOT_NEGATIVE, help="which fraction of labels or words; which temperature of translation")
    add("--translators", nargs=2, metavar=("EN_DE", "DE_EN"), help="hub ids or folders of two sequence-to-sequence "
        f"models (default: {' '.join(TRANSLATORS)})")
    add("--max-length", type=number(int, "[8, inf)"), default=256, help="tokens, or the model's limit (default: 256)")


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method (of several values every combination runs)").add_argument
    add("--lam", type=FRACTION, nargs="+", default=[0.9], help="weight of SCL against CE in Eq. 1; 0 is CE alone; 1 "
        "fits the classifier afterwards, on frozen features (default: 0.9)")
    add("--tau", type=number(float, "[1e-6, 1e6]"), nargs="+", default=[0.3], help="temperature of SCL (default: 0.3)")
    add("--seed", type=number(int, "[0, 4294967295]"), nargs="+", default=[0], help="of sample, weights, batches, "
        "dropout (default: 0)")
    add("--ce-temperature", type=POSITIVE, metavar="T", help="with --lam 0: CE of a linear classifier on l2-normalised "
        "features over T, to tell what normalising alone does")

    add = parser.add_argument_group("model").add_argument
    add("--model", help=f"hub id or folder of an encoder (default: {DEFAULT_MODEL}; for demo: a tiny random one)")
    add("--pooling", choices=("cls", "mean"), default="cls", help="features: the last layer at the first token, with "
        "the model's own classifier (the paper's, the default); or its mean over tokens, with a linear one")
    add("--dropout", type=number(float, "[0, 1)"), default=0.1, help="default: %(default)s")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training (defaults: the paper's, else fairseq's for GLUE)")
    add = group.add_argument
    add("--lr", type=POSITIVE, help="peak learning rate (default: 1e-5; demo model: 1e-3)")
    add("--head-lr", type=POSITIVE, help="of the classifier (default: --lr; with --lam 1: 1e-3)")
    add("--batch-size", type=COUNT, default=16, help="what SCL contrasts, over all processes (default: %(default)s)")
    add("--micro-batch-size", type=COUNT, help="of each process at once: less memory, a second forward pass")
    add = group.add_mutually_exclusive_group().add_argument
    add("--epochs", type=POSITIVE, help="default: 10, but at least 200 steps")
    add("--max-steps", type=COUNT, help="length in steps instead")
    add = group.add_argument
    add("--eval-every", type=COUNT, help="steps from one validation to the next (default: a tenth of all)")
    add("--weight-decay", type=NOT_NEGATIVE, default=0.1, help="default: %(default)s")
    add("--warmup-ratio", type=FRACTION, default=0.06, help="of the steps, then linear decay (default: %(default)s)")
    add("--sampler", choices=("shuffled", "balanced"), default="shuffled", help="balanced: at least two examples "
        "of a class in every batch, of as many classes as fit (default: %(default)s)")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine and output").add_argument
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoder; SCL is always in "
        "float32 (default: %(default)s)")
    add("--compile", action="store_true", help="the encoder by torch.compile: for long runs")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--out", default="runs", help="folder of records and checkpoints (default: %(default)s)")
    add("--save", action="store_true", help="keep the checkpoints of a sweep, too")
    add("--save-every", type=COUNT, metavar="S", help="write all state every S steps: the same command goes on there")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for add_flags in (add_data_flags, add_method_flags, add_training_flags, add_machine_flags):
        add_flags(parser)
    args = parser.parse_args(argv)
    if args.noise == "backtranslation" and not args.translators:
        args.translators = TRANSLATORS
    args.model = args.model or ("demo" if args.task == "demo" else DEFAULT_MODEL)
    try:
        check_flags(args)
        data.find_files(args.task, args.data_dir)
        check_model_folder(args.model, args.pooling == "cls" and not args.ce_temperature)
        check_out(Path(args.out))
    except (Mistake, OSError) as mistake:  # a path that cannot even be looked at
        parser.error(str(mistake))
    return args


def check_flags(args: argparse.Namespace) -> None:
    """What argparse cannot know: which flags go together."""
    if (args.noise is None) != (args.noise_level is None):
        raise Mistake("argument --noise: goes with --noise-level, such as --noise label --noise-level 0.1 (a fraction) "
                      "or --noise backtranslation --noise-level 0.7 (a temperature)")
    if args.noise == "backtranslation" and args.noise_level == 0:
        raise Mistake("argument --noise-level: expected a temperature above 0 with --noise backtranslation, got 0")
    if args.noise in ("label", "word") and args.noise_level > 1:
        raise Mistake(f"argument --noise-level: expected a fraction with --noise {args.noise}, "
                      f"got {args.noise_level:g}")
    if args.translators and args.noise != "backtranslation":
        raise Mistake("argument --translators: goes with --noise backtranslation")
    if args.ce_temperature and any(args.lam):
        raise Mistake(f"argument --ce-temperature: goes with --lam 0, got --lam {' '.join(map(str, args.lam))}")
    classes = len(TASKS[args.task].labels) if args.task in TASKS else 2
    if args.shots and args.shots < classes:
        raise Mistake(f"argument --shots: expected at least {classes}, one a class, got {args.shots}")


def check_model_folder(model: str, own_classifier: bool) -> None:
    folder = Path(model)
    is_local = folder.is_dir() or model.count("/") > 1 or model[:1] in "./~"  # not a hub id
    if model == "demo" or not is_local:
        return
    if not (folder / "config.json").is_file():
        raise Mistake(f"argument --model: {model} has no config.json; expected a hub id or a save_pretrained folder")
    if own_classifier and (folder / "head.safetensors").is_file():
        raise Mistake(f"argument --model: {model} was trained with --pooling mean or --ce-temperature; say so")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with blame("--model", index, "the index that save_pretrained writes"):
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if strange := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
            raise Mistake(f"argument --model: {index} names {printable(strange[0])}; expected .safetensors beside it")


def check_out(out: Path) -> None:
    """What would keep a run from being written is told before it is run."""
    results = out / "results.jsonl"
    for path in (results, *out.absolute().parents, out):
        if path.is_symlink() and not path.exists():
            raise Mistake(f"argument --out: {path} is a link to nothing; choose another")
    written = results
    try:
        if results.exists():
            open(results, "ab").close()
        written = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
        tempfile.TemporaryFile(dir=written).close()
    except OSError as error:
        raise Mistake(f"argument --out: {written} cannot be written ({error.strerror}); choose another") from None


if __name__ == "__main__":
    parse_args()  # a mistake in the flags ends here, before torch is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"interrupted\n") and 130))  # during the imports

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from tqdm import tqdm

from scl import gather_batch, scl_bounds, scl_loss

# ------------------------------------------------------------ the model: texts -> tokens -> class logits and features


class Model(nn.Module):
    """An encoder with its tokenizer and its classifier. What the classifier reads are the features; SCL sees the same.

    Features are the last hidden layer at the first token (cls pooling) or its mean over real tokens. The classifier is
    a sequence classifier's own (cls) or a linear `head`, with `ce_temperature` T on the normalised features over T.
    """

    def __init__(self, backbone: transformers.PreTrainedModel, tokenizer, head: nn.Linear | None = None,
                 pooling: str = "cls", ce_temperature: float | None = None, max_length: int = 256):  # fmt: skip
        super().__init__()
        self.backbone, self.tokenizer, self.head = backbone, tokenizer, head
        self.pooling, self.ce_temperature, self.max_length = pooling, ce_temperature, max_length
        self.classifier_is_new = True
        self.hidden: Tensor | None = None  # (N, T, D), the last layer of the latest batch
        backbone.base_model.register_forward_hook(self.keep_hidden)

    def keep_hidden(self, module, inputs, output) -> None:
        """A sequence classifier returns its hidden layers all or none; this is the one that its classifier reads."""
        self.hidden = output[0]

    def forward(self, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        output = self.backbone(**tokens)
        if self.head is None:
            return output.logits, self.hidden[:, 0]  # (N, C), (N, D)
        if self.pooling == "cls":
            features = self.hidden[:, 0]
        else:
            mask = tokens["attention_mask"][..., None]  # (N, T, 1)
            features = (self.hidden * mask).sum(dim=1) / mask.sum(dim=1)
        scaled = F.normalize(features, dim=1) / self.ce_temperature if self.ce_temperature else features
        return self.head(scaled), features

    def tokenize(self, texts: list[tuple[str, ...]]) -> dict[str, Tensor]:
        """Of one batch, padded on the right to its longest text: (N, T) each."""
        columns = map(list, zip(*texts, strict=True))
        tokens = self.tokenizer(*columns, truncation=True, max_length=self.max_length, padding=True,
                                return_tensors="pt")
        return tokens.to(self.backbone.device)

    def classifier_names(self) -> set[str]:
        """The parameters after the features, which SCL gives no gradient; BERT's pooler is one of them."""
        encoder = "backbone." if self.head else f"backbone.{self.backbone.base_model_prefix}."
        return {name for name, _ in self.named_parameters() if not name.startswith(encoder) or ".pooler." in name}

    def last_layer(self) -> nn.Linear:
        """The linear layer that gives the class logits."""
        classes = self.backbone.config.num_labels
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes]
        return layers[-1]


def fetch_model(model: str) -> str:
    """The local folder of a model. From the hub only safetensors come: nothing is ever unpickled."""
    if model == "demo" or os.path.isdir(model):
        return model
    data.connect_hub()
    files = ["*.json", "*.txt", "*.model", "model*.safetensors", "head.safetensors"]
    with blame("--model", model, "a hub id or a folder"):
        return huggingface_hub.snapshot_download(model, allow_patterns=files)


def load_config(source: str):
    """Of a model's own config, what would change how it is called does not count, nor does a kernel from the hub."""
    ours = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "attn_implementation": None}
    with blame("--model", source, "a folder that save_pretrained wrote"):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **ours)
    if config.is_encoder_decoder:
        raise Mistake(f"argument --model: {source} is an encoder-decoder; choose an encoder")
    return config


def load_tokenizer(source: str, pooling: str):
    """Its length is the smaller of what tokenizer and model say."""
    if source == "demo":  # RoBERTa's own kind, trained on the made-up sentences
        sentences = (text for (text,) in data.demo_data().train.texts)
        return transformers.RobertaTokenizer(model_max_length=64).train_new_from_iterator(
            sentences, vocab_size=400, show_progress=False)
    config = load_config(source)
    with blame("--model", source, "a folder that save_pretrained wrote, with its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # decoders have none; the mask hides it
        tokenizer.padding_side = "right"  # the first token is never a pad
        first = tokenizer("a")["input_ids"][:1]
        with torch.device("meta"):  # its shapes alone
            encoder = transformers.AutoModel.from_config(config)
        words = encoder.get_input_embeddings().num_embeddings
    if pooling == "cls" and first != [tokenizer.cls_token_id]:
        raise Mistake(f"argument --model: {source} puts no cls token first (a decoder?), and another one has not seen "
                      "the sentence; choose an encoder or --pooling mean")
    if len(tokenizer) > words:
        raise Mistake(f"argument --model: {source} has {words} word embeddings for the {len(tokenizer)} words of its "
                      "tokenizer; expected the tokenizer that it was trained with")
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_input(encoder))
    return tokenizer


def longest_input(encoder: transformers.PreTrainedModel) -> int:
    """In tokens, by its table of positions; RoBERTa and its kin count them from the one after padding."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - before
    limit = getattr(encoder.config, "max_position_embeddings", None)
    return limit if limit and limit > 0 else sys.maxsize  # XLNet has no limit


def check_vocabulary(tokenizer, texts: list[tuple[str, ...]], source: str) -> None:
    """Refuses a tokenizer that does not know these texts: without files, transformers makes one of a few tokens."""
    tokens = tokenizer([" ".join(row) for row in texts[:200]], add_special_tokens=False)["input_ids"]
    known = [token != tokenizer.unk_token_id for row in tokens for token in row]
    if sum(known) <= len(known) / 2:
        raise Mistake(f"argument --model: the tokenizer of {source} knows {sum(known)} of {len(known)} tokens of the "
                      "texts; expected tokenizer files in the folder, for this language")


def load_model(source: str, pooling: str, label_names: tuple[str, ...], tokenizer, dropout: float,
               ce_temperature: float | None = None, max_length: int = 256) -> Model:  # fmt: skip
    """A model of transformers, or a checkpoint of ours, with a classifier for these labels.

    A classifier for the same names, in whatever order, is kept. What the source lacks comes from torch's random state.
    """
    own_classifier = pooling == "cls" and not ce_temperature
    auto = transformers.AutoModelForSequenceClassification if own_classifier else transformers.AutoModel
    if source == "demo":
        config = transformers.RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=66, type_vocab_size=1, initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id)
    else:
        config = load_config(source)
    names_of_source = tuple(dict(sorted(config.id2label.items())).values())
    adapt_config(config, label_names, dropout)

    if source == "demo":
        backbone, new_weights = auto.from_config(config), set()
    else:
        with blame("--model", source, "a folder that save_pretrained wrote, with model.safetensors"):
            backbone, info = auto.from_pretrained(
                source, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
                output_loading_info=True, trust_remote_code=False)
        lacking = (*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"]))
        new_weights = {f"backbone.{name}" for name in lacking}
    head = None if own_classifier else nn.Linear(config.hidden_size, len(label_names))
    model = Model(backbone, tokenizer, head, pooling, ce_temperature, min(max_length, tokenizer.model_max_length))

    encoder = {name for name, _ in model.named_parameters()} - model.classifier_names()
    if new_in_encoder := encoder & new_weights:
        one = min(new_in_encoder).removeprefix("backbone.")
        raise Mistake(f"argument --model: {source} lacks {len(new_in_encoder)} weights of its encoder, or has them in "
                      f"other shapes, such as {one}; save it anew by save_pretrained")
    if head:
        trained = load_head(source, head, pooling, ce_temperature)
    else:
        trained = source != "demo" and not new_weights
    model.classifier_is_new = not (trained and reorder_or_reset(model.last_layer(), names_of_source, label_names))
    check_model(model, source)
    return model


def adapt_config(config, label_names: tuple[str, ...], dropout: float) -> None:
    config.id2label = dict(enumerate(label_names))  # num_labels follows
    config.label2id = {name: number for number, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and type(value) in (int, float):
            setattr(config, name, dropout)
    if hasattr(config, "classifier_pooling"):  # it may be the mean, which is not what SCL would see
        config.classifier_pooling = "bos" if config.model_type == "eurobert" else "cls"


def load_head(source: str, head: nn.Linear, pooling: str, ce_temperature: float | None) -> bool:
    """The linear classifier of a checkpoint of ours, if it has one for such features and as many classes."""
    file = Path(source, "head.safetensors")
    if not file.is_file():
        return False
    with blame("--model", source, "a folder that finetune.py wrote"):
        record, weights = json.loads(Path(source, "record.json").read_text(encoding="utf-8")), load_file(file)
        reads_the_same = (record["pooling"], record["ce_temperature"]) == (pooling, ce_temperature)
        if not reads_the_same or weights["weight"].shape != head.weight.shape:
            return False
        head.load_state_dict(weights)
    return True


@torch.no_grad()
def reorder_or_reset(layer: nn.Linear, names: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Puts the rows of a trained classifier into the order wanted; for other names it becomes a new, random one."""
    if names == wanted:
        return True
    names, wanted = (tuple(str(name).casefold().replace("-", "_") for name in either) for either in (names, wanted))
    if len(set(names)) < len(names) or set(names) != set(wanted):
        layer.reset_parameters()
        return False
    order = [names.index(name) for name in wanted]
    layer.weight.copy_(layer.weight[order])
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[order])
    return True


def check_model(model: Model, source: str) -> None:
    """Sends one text through: the classifier must read the features, and what no output needs is not trained."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise Mistake(f"argument --model: {source} has weights that are NaN or infinite; expected a trained model")
    model.eval()
    with blame("--model", source, "an encoder for text"):
        class_logits, features = model(**model.tokenize([("a b c",)]))
    parameters = list(model.parameters())
    everything = class_logits.sum() + features.sum()
    gradients = torch.autograd.grad(everything, parameters, retain_graph=True, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)  # DistributedDataParallel would wait for it
    if model.head is None:
        (by_token,) = torch.autograd.grad(class_logits.sum(), model.hidden, allow_unused=True)  # (1, T, D)
        if by_token is None or by_token[:, 1:].any():
            raise Mistake(f"argument --model: the classifier of {source} reads other tokens than the first, which SCL "
                          "would not see; choose --pooling mean")
    model.hidden = None


# ------------------------------------------------------------ training

# torchrun starts several processes, the ranks. Each takes its share of every batch (`fit`), sees what all of them made
# of theirs (`Training.objective`), and takes its share of an evaluation (`predict`). The first alone writes.
RANK, WORLD_SIZE = 0, 1
if dist.is_torchelastic_launched():
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NO_BAR = True if RANK else None  # to tqdm, None means a bar on a terminal alone
TERMINATED: list[int] = []  # not empty: SIGTERM came; `fit` finishes the step, several ranks up to READ_EVERY of them


class Diverged(Exception):
    """What a run cannot go on from."""


def batches(labels: np.ndarray, size: int, sampler: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of one batch after another, epoch after epoch; a short last batch is dropped unless it is the only one."""
    n, size = len(labels), min(size, len(labels))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    while True:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            if sampler == "shuffled":
                yield order[start : start + size]
            else:  # two of each of as many classes as fit, the rest from anywhere
                chosen = [members[i] for i in rng.permutation(len(members))[: max(size // 2, 1)]]
                pairs = np.concatenate([rng.choice(rows, min(2, len(rows)), replace=False) for rows in chosen])
                others = rng.choice(n, min(2 * size, n), replace=False)
                yield np.concatenate([pairs, others[~np.isin(others, pairs)]])[:size]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@torch.inference_mode()
def predict(model: Model, split: Split, precision: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    """Class logits (N, C) and features (N, D) in the order of the rows; batches go by length, to pad little.

    The ranks share the batches out, and each ends with the rows of all.
    """
    model.eval()
    device, classes, width = model.backbone.device, model.backbone.config.num_labels, model.backbone.config.hidden_size
    order = np.argsort([sum(map(len, row)) for row in split.texts], kind="stable")
    outputs = torch.zeros(len(split), classes + width, device=device)
    starts = range(RANK * EVAL_BATCH, len(order), WORLD_SIZE * EVAL_BATCH)
    for start in tqdm(starts, "evaluating", disable=NO_BAR, leave=False, delay=5):
        rows = order[start : start + EVAL_BATCH]
        tokens = model.tokenize([split.texts[row] for row in rows])
        with autocast(device, precision):
            outputs[rows] = torch.cat(model(**tokens), dim=1).float()
    if WORLD_SIZE > 1:
        dist.all_reduce(outputs)  # zeros but on one rank: exact
    results = outputs.cpu().numpy()
    return results[:, :classes], results[:, classes:]


class Training:
    """A model in training, and all that changes; between two steps `save` writes it, and `load` goes on from there."""

    def __init__(self, model: Model, config: dict, classifier_only: bool = False):
        self.model, self.config, self.classifier_only = model, config, classifier_only
        self.device = model.backbone.device
        self.lam, self.tau = 0.0 if classifier_only else config["lam"], config["tau"]
        self.optimizer = make_optimizer(model, config, classifier_only)
        warmup = round(config["warmup_ratio"] * config["steps"])  # its first step has rate 0
        warmup = min(warmup, config["steps"] - 1)
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, warmup, config["steps"])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config["precision"] == "fp16")
        self.network = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
        if config["compile"]:
            self.network = torch.compile(self.network, dynamic=True)
        self.best_weights: dict[str, Tensor] = {}
        self.result: dict = {"best_step": None, "validation_accuracy": None, "validation_accuracies": []}
        self.step = 0  # the last that has begun
        self.sums: dict[str, Tensor] = {}  # of losses, since the last validation
        self.started = time.perf_counter()

    def forward(self, texts: list[tuple[str, ...]], piece: int = 0) -> tuple[Tensor, Tensor]:
        """Class logits (B, C) and features (B, D); dropout is a pure function of seed, step, rank and piece.

        So the same masks can be had again, and no random state is kept.
        """
        key = np.random.SeedSequence((self.config["seed"], self.step, RANK, piece))
        tokens = self.model.tokenize(texts)
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        with autocast(self.device, self.config["precision"]):
            return self.network(**tokens)

    def objective(self, class_logits: Tensor, features: Tensor, labels: np.ndarray) -> dict[str, Tensor]:
        """Eq. 1 on the batch of all ranks, as `ce_scl_loss` has it, and its parts."""
        own = class_logits.float(), features.float(), torch.from_numpy(labels).to(self.device)
        class_logits, features, classes = gather_batch(*own)
        ce = F.cross_entropy(class_logits, classes)  # Eq. 2
        if self.lam == 0:
            return {"loss": ce, "ce": ce}
        scl = scl_loss(features, classes, self.tau)  # Eq. 3
        loss = (1 - self.lam) * ce + self.lam * scl  # Eq. 1
        lowest, collapsed = scl_bounds(classes, self.tau)
        return {"loss": loss, "ce": ce, "scl": scl, "scl_lowest": lowest, "scl_collapsed": collapsed}

    def cached_backward(self, batch: Split, size: int) -> dict[str, Tensor]:
        """The gradient of Eq. 1 for a batch larger than memory, which comes in pieces (--micro-batch-size).

        Accumulating the gradients of the pieces would contrast each only within itself. So a first pass computes what
        all pieces give, without a graph; the loss of the whole batch yields the gradient of class logits and features;
        a second pass, under the same dropout, takes it on (gradient caching, Gao et al., 2021, arXiv 2101.06983).
        """
        pieces = [batch.texts[start : start + size] for start in range(0, len(batch), size)]
        with torch.no_grad():
            outputs = [self.forward(texts, number) for number, texts in enumerate(pieces)]
        whole_batch = [torch.cat(parts).requires_grad_() for parts in zip(*outputs, strict=True)]  # (B, C), (B, D)
        losses = self.objective(*whole_batch, batch.labels)
        gradients = torch.autograd.grad(self.scaler.scale(losses["loss"]), whole_batch, materialize_grads=True)
        of_pieces = zip(*(gradient.split(size) for gradient in gradients), strict=True)
        for number, (texts, cached) in enumerate(zip(pieces, of_pieces, strict=True)):
            # DistributedDataParallel averages over the ranks once, with the last piece.
            early = WORLD_SIZE > 1 and number + 1 < len(pieces)
            with self.network.no_sync() if early else contextlib.nullcontext():
                again = self.forward(texts, number)
                surrogate = sum((output * gradient).sum() for output, gradient in zip(again, cached, strict=True))
                surrogate.backward()  # it has the gradient of Eq. 1
        return losses

    def mean_losses(self) -> dict[str, float]:
        """Mean over the steps since the last validation; reading it waits for the device."""
        every = self.config["eval_every"]
        steps = self.step % every or every
        means = (torch.stack(list(self.sums.values())) / steps).tolist()  # all at once: the device is waited for once
        means = dict(zip(self.sums, means, strict=True))
        if not math.isfinite(means["loss"]):
            raise Diverged("the loss is not finite")
        return means

    def validate(self, validation: Split) -> str:
        """Notes the losses, the accuracy, and the weights if they are the best so far; returns a line."""
        result, losses = self.result, self.mean_losses()
        self.sums = {}
        result |= {name: losses[name] for name in losses if name != "loss"}
        text = f"step {self.step}/{self.config['steps']}  ce {losses['ce']:.3f}"
        if self.lam:
            text += "  scl {scl:.3f} (lowest {scl_lowest:.3f}, collapsed {scl_collapsed:.3f})".format(**losses)
            if losses["scl_collapsed"] == 0:
                text += ": no batch of three or more held two of a class"
        if self.lam == 1:
            return text
        class_logits, _ = predict(self.model, validation, self.config["precision"])
        if not np.isfinite(class_logits).all():  # the last update did it: the next loss would tell
            raise Diverged("class logits are not finite")
        accuracy = float(accuracy_score(validation.labels, class_logits.argmax(axis=1)))
        result["validation_accuracies"].append([self.step, accuracy])
        if not self.best_weights or accuracy >= result["validation_accuracy"]:
            result |= {"best_step": self.step, "validation_accuracy": accuracy}
            self.best_weights = {name: weight.cpu().clone() for name, weight in self.model.state_dict().items()}
        return f"{text}  validation {accuracy:.3f}"

    def finish(self) -> None:
        if not any(moments["step"] > 0 for moments in self.optimizer.state.values()):
            raise Diverged("no step changed a weight, since every gradient overflowed")  # fp16
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)

    def save(self, file: Path) -> None:
        """In one file, whole or not at all."""
        modules = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule", "scaler")}
        plain = {name: getattr(self, name) for name in ("classifier_only", "step", "sums", "result", "best_weights")}
        seconds = time.perf_counter() - self.started
        with whole(file) as part, open(part, "wb") as opened:
            torch.save({"modules": modules, "plain": plain, "seconds": seconds}, opened)

    @classmethod
    def load(cls, file: Path, model: Model, config: dict) -> "Training":
        with blame("--save-every", file, "the state of this run; delete it to begin anew"):
            if damaged := zipfile.ZipFile(file).testzip():  # each part has a checksum
                raise ValueError(f"{damaged} is damaged")
            state = torch.load(file, map_location="cpu", weights_only=True)
            self = cls(model, config, state["plain"]["classifier_only"])
            for name, values in state["modules"].items():
                getattr(self, name).load_state_dict(values)
            vars(self).update(state["plain"], started=self.started - state["seconds"])
            self.sums = {name: total.to(self.device) for name, total in self.sums.items()}
        return self


def make_optimizer(model: Model, config: dict, classifier_only: bool) -> torch.optim.Optimizer:
    """AdamW with fairseq's settings for GLUE: no decay of biases and layer norms, the classifier at its own rate."""
    classifier, groups = model.classifier_names(), dict[tuple[float, float], dict]()
    for name, parameter in model.named_parameters():
        if classifier_only and name not in classifier:
            parameter.requires_grad_(False)
        lr = config["head_lr" if name in classifier else "lr"]
        left_alone = name in classifier and config["lam"] == 1 and not classifier_only  # SCL does not reach it
        decay = 0.0 if left_alone or parameter.ndim == 1 else config["weight_decay"]
        groups.setdefault((lr, decay), {"lr": lr, "weight_decay": decay, "params": []})["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), betas=(0.9, 0.98), eps=1e-6, fused=True)


def fit(training: Training, train: Split, validation: Split, state: Path | None = None,
        save_every: int | None = None) -> None:  # fmt: skip
    """Trains, and leaves in the model the weights of the best validation accuracy (the later, if equal).

    With lam = 1 nothing trains the classifier, so validation cannot choose, and the last step stays.
    """
    config, steps, done = training.config, training.config["steps"], training.step
    order = batches(train.labels, config["batch_size"], config["sampler"], np.random.default_rng(config["seed"]))
    order = itertools.islice(order, done, None)
    bar = tqdm(range(done + 1, steps + 1), config["run"], steps, initial=done, disable=NO_BAR, leave=False)
    for step in bar:
        training.step = step
        training.model.train(not training.classifier_only)
        batch = train.take(np.split(next(order), WORLD_SIZE)[RANK])  # this process's share

        # forward and backward: of the batch at once, or in pieces
        size = config["micro_batch_size"] or len(batch)
        if size < len(batch):
            losses = training.cached_backward(batch, size)
        else:
            class_logits, features = training.forward(batch.texts)  # (B, C), (B, D)
            losses = training.objective(class_logits, features, batch.labels)
            training.scaler.scale(losses["loss"]).backward()

        # update
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.schedule.step()
        training.optimizer.zero_grad()
        for name, loss in losses.items():
            training.sums[name] = training.sums.get(name, 0) + loss.detach()

        # now and then: look at the loss, validate, save
        validate = step % config["eval_every"] == 0 or step == steps
        save = bool(save_every) and step % save_every == 0
        look = validate or save or step % READ_EVERY == 0
        if look:
            loss = training.mean_losses()["loss"]
            bar.set_postfix(loss=f"{loss:.3f}", validation=training.result["validation_accuracy"])
        if validate:
            bar.write(training.validate(validation))
        terminated = (look or WORLD_SIZE == 1) and anywhere(bool(TERMINATED), training.device)
        if state and (save or terminated) and not RANK:
            training.save(state)
        if terminated:
            if WORLD_SIZE > 1:
                dist.barrier()  # until it is written, since torchrun ends all soon after the first
            bar.write(f"terminated after step {step}, which {state} has; the same command goes on", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
    training.finish()


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is set on any rank, so that all do the same."""
    if WORLD_SIZE == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)


# ------------------------------------------------------------ one run: train, test, one record, one checkpoint


def run(config: dict, model: Model, splits: tuple[Split, ...], folder: Path | None, state: Path,
        save_every: int | None) -> dict:  # fmt: skip
    """The record. What is random comes from config["seed"], so a sweep changes nothing.

    lam = 1 has a second training, of the classifier alone: cross-entropy on frozen features, without dropout.
    """
    train, validation, test = splits
    device = model.backbone.device
    if anywhere(state.is_file(), device):
        training = Training.load(state, model, config)
        print(f"going on from step {training.step}, which {state} has")
    else:
        training = Training(model, config)
    signal.signal(signal.SIGTERM, lambda number, _: TERMINATED.append(number))  # elsewhere it ends the process at once
    try:
        fit(training, train, validation, state, save_every)
        if config["lam"] == 1 and not training.classifier_only:
            print("lam 1 left the classifier untrained: now fitting it alone, on the frozen features")
            started, result = training.started, training.result
            training = Training(model, config, classifier_only=True)
            training.started, training.result = started, result
            fit(training, train, validation, state, save_every)
    except Diverged as diverged:
        kept, best_step = "", training.result["best_step"]
        if folder and best_step and not RANK:
            model.load_state_dict(training.best_weights)
            save_checkpoint(folder, model, config | training.result)
            kept = f"; {folder} keeps step {best_step}, the best before"
        raise Diverged(f"{config['run']}: {diverged} by step {training.step}{kept}") from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    record = config | training.result | test_metrics(model, test, config["precision"])
    record |= {
        "seconds": round(time.perf_counter() - training.started, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": COMMIT,
    }
    if folder and not RANK:
        save_checkpoint(folder, model, record)
    return record


def test_metrics(model: Model, test: Split, precision: str) -> dict:
    class_logits, _ = predict(model, test, precision)
    predicted = class_logits.argmax(axis=1)
    return {
        "test_accuracy": float(accuracy_score(test.labels, predicted)),
        "test_macro_f1": float(f1_score(test.labels, predicted, average="macro")),
        "test_mcc": float(matthews_corrcoef(test.labels, predicted)),
        "test_correct": np.packbits(test.labels == predicted).tobytes().hex(),  # a bit an example, in order
    }


def cpu_capability() -> str:
    """Such as "AVX512, bfloat16": where the latter is missing, bfloat16 is several times slower than float32."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    computes_bf16 = any("bf16" in name and has_it for name, has_it in known.items())
    return torch.backends.cpu.get_cpu_capability() + (", bfloat16" if computes_bf16 else "")


def git_commit() -> str | None:
    """Of the repository that this file belongs to, not of one that it was copied into."""
    here = Path(__file__)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(here.parent)]
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        return subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return None


COMMIT = git_commit()  # of the code as it was loaded: a long sweep may see another one

MODEL_CARD = """# {run}

{model}, fine-tuned on {task} by {method}: {train_size} training examples, seed {seed}, {pooling} pooling. Best
validation accuracy {validation}, at step {best_step} of {steps}; test accuracy {test}, on {test_size} examples.
`record.json` has all settings. {loading}
SCL, the supervised contrastive loss: Gunel, Du, Conneau, Stoyanov, ICLR 2021, https://arxiv.org/abs/2011.01403
"""
LOADING = {
    True: '`transformers.pipeline("text-classification", model=FOLDER)` loads it.',
    False: "The linear classifier is in `head.safetensors`: a `pipeline` would not find it, and answer at random.",
}  # whether the classifier is the model's own


def save_checkpoint(folder: Path, model: Model, record: dict) -> None:
    """A folder that transformers loads, its record and a model card beside the weights."""
    accuracy = {split: "none" if (value := record.get(f"{split}_accuracy")) is None else f"{value:.3f}"
                for split in ("validation", "test")}
    facts = record | accuracy | {"method": data.method_name(record), "loading": LOADING[model.head is None]}
    card = MODEL_CARD.format(**facts)
    with whole(folder) as part:
        part.mkdir()
        model.backbone.save_pretrained(part)
        if model.head:
            save_file(model.head.state_dict(), part / "head.safetensors")
        model.tokenizer.save_pretrained(part)
        (part / "record.json").write_text(json.dumps(record) + "\n")
        (part / "README.md").write_text(card, encoding="utf-8")
        for file in part.iterdir():
            shutil.copymode(part / "record.json", file)  # safetensors writes for the owner alone


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file or folder, which then takes the place of `path`: a kill leaves no half of it."""
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(part)  # of one who was killed here
    try:
        yield part
        if path.is_dir():  # which another cannot replace
            remove(path)
        part.replace(path)
    except Exception as error:  # whatever a library makes of a full disk
        raise Mistake(f"{path} cannot be written ({reason(error)}); the same command goes on") from error
    finally:
        remove(part)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def append_record(file: Path, record: dict) -> None:
    """One line, unless another process was faster; a torn line before it is ended first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as results:
        fcntl.flock(results, fcntl.LOCK_EX)
        if record["run"] in {other["run"] for other in data.read_records(file, quiet=True)}:
            return
        torn = file.stat().st_size and not file.read_bytes().endswith(b"\n")
        results.write(b"\n" * bool(torn) + json.dumps(record).encode() + b"\n")


# ------------------------------------------------------------ a sweep of runs


def configure(args: argparse.Namespace, lam: float, tau: float | None, seed: int, splits: tuple[Split, ...]) -> dict:
    """All that determines a run, every default resolved; the digest of it is in the run's name."""
    per_epoch = max(1, len(splits[0]) // args.batch_size)
    by_epochs = math.ceil(args.epochs * per_epoch) if args.epochs else max(10 * per_epoch, 200)
    steps, lr = args.max_steps or by_epochs, args.lr or (1e-3 if args.model == "demo" else 1e-5)
    config = {name: value for name, value in vars(args).items() if name not in ("epochs", "max_steps", *MACHINE_FLAGS)}
    config |= {"lam": lam, "tau": tau, "seed": seed, "lr": lr, "head_lr": args.head_lr or (1e-3 if lam == 1 else lr)}
    config |= {"steps": steps, "eval_every": args.eval_every or math.ceil(steps / 10), "processes": WORLD_SIZE}
    for name, split in zip(("train", "validation", "test"), splits, strict=True):
        config |= {f"{name}_size": len(split), f"{name}_checksum": split.checksum}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:6]
    method = f"lam{lam:g}-tau{tau:g}" if lam else "lam0"
    task = Path(args.task).resolve().name.encode()[:100].decode(errors="ignore")  # a file's name has 255 bytes at most
    name = f"{task}-n{len(splits[0])}-{method}-seed{seed}-{digest}"
    return {"run": name} | config | {"data_dir": args.data_dir, "num_texts": len(splits[0].texts[0])}


def draw_splits(args: argparse.Namespace, rows: data.Data, seed: int, device: torch.device) -> tuple[Split, ...]:
    """Train, validation and test of a seed, with what noise there is."""
    train, validation, test = data.sample(rows, args.shots, args.shots_per_class, seed)
    if args.noise == "backtranslation":
        train = data.back_translate(train, args.noise_level, args.translators, Path(args.out), seed, device)
    elif args.noise:
        train = data.add_noise(train, args.noise, args.noise_level, len(rows.label_names), seed)
    size = min(args.batch_size, len(train))
    if size % WORLD_SIZE:
        all_there_are = f", all there are of {args.batch_size}" if size < args.batch_size else ""
        raise Mistake(f"argument --batch-size: expected a multiple of {WORLD_SIZE}, one share a process, "
                      f"got {size}{all_there_are}")
    return train, validation, test


def sweep(args: argparse.Namespace) -> None:
    """Loads the data once, then runs what has no record yet: lam x tau for one seed after another."""
    device = pick_device(args.device, args.precision)
    rows = data.load_data(args.task, args.data_dir, few_shot=bool(args.shots or args.shots_per_class))
    source = fetch_model(args.model)
    tokenizer = load_tokenizer(source, args.pooling)
    args.max_length = min(args.max_length, tokenizer.model_max_length)
    seeds = dict.fromkeys(args.seed)
    settings = dict.fromkeys((lam, tau if lam else None) for lam in args.lam for tau in args.tau)
    keep = args.save or len(settings) * len(seeds) == 1
    results, failures = Path(args.out, "results.jsonl"), []
    data.read_records(results)  # says which lines are none
    for seed in seeds:
        splits = draw_splits(args, rows, seed, device)
        check_vocabulary(tokenizer, splits[0].texts, source)
        for lam, tau in settings:
            config = configure(args, lam, tau, seed, splits)
            folder, state = Path(args.out, config["run"]), Path(args.out, f"{config['run']}.state.pt")
            if is_done(config["run"], results, folder, state, device):
                continue
            if folder.is_file():
                raise Mistake(f"argument --out: {folder} is a file; move it, or choose another")
            torch.manual_seed(seed)
            model = load_model(source, args.pooling, rows.label_names, tokenizer, args.dropout, args.ce_temperature,
                               args.max_length).to(device)
            describe(config, model, splits, rows.label_names)
            try:
                record = run(config, model, splits, folder if keep else None, state, args.save_every)
            except Diverged as diverged:
                print(f"{diverged}")
                failures.append(str(diverged))
                if not RANK:
                    state.unlink(missing_ok=True)  # it would diverge again
                continue
            if not RANK:
                append_record(results, record)
                state.unlink(missing_ok=True)
            conclude(record, splits[2], rows.label_names)
            print(f"record in {results}, checkpoint {f'in {folder}' if keep else 'not kept, for want of --save'}")
    if failures:
        raise Mistake("; ".join(failures) + "; try a smaller --lr")


def is_done(run: str, results: Path, folder: Path, state: Path, device: torch.device) -> bool:
    """Whether it has a record, which is then told; asked before each run, since other processes may share OUT."""
    records = [record for record in data.read_records(results, quiet=True) if record["run"] == run]
    if not anywhere(bool(records), device):
        return False
    kept = f"in {folder}" if folder.exists() else "not kept"
    print(json.dumps(records[0]) if records else "")
    print(f"{run} is done: its record above, its checkpoint {kept}; to run it anew, delete that line of {results} or "
          "choose another --out")
    if not RANK:
        state.unlink(missing_ok=True)  # of one who was killed between the two
    return True


def describe(config: dict, model: Model, splits: tuple[Split, ...], names: tuple[str, ...]) -> None:
    train = splits[0]
    parameters = sum(p.numel() for p in model.parameters())
    classifier = "a new classifier" if model.classifier_is_new else "its classifier"
    noise = f" with {config['noise']} noise {config['noise_level']:g}" if config["noise"] else ""
    print(f"\n{config['run']}\n{config['model']} with {classifier}, {parameters / 1e6:.1f} M parameters, on "
          f"{model.backbone.device}; {config['pooling']} pooling, lr {config['lr']:g}, {config['steps']} steps of "
          f"{min(config['batch_size'], len(train))}")
    for split, part in zip((f"train{noise}", "validation", "test"), splits, strict=True):
        sizes = np.bincount(part.labels, minlength=len(names))
        counts = ", ".join(f"{size} {printable(name)}" for name, size in zip(names[:9], sizes, strict=False))
        print(f"  {len(part)} {split}: {counts}")
    for text, label in zip(train.texts[:3], train.labels, strict=False):
        print(f"  {printable(names[label])}: {printable(' | '.join(text), 100)}")
    sizes = np.bincount(train.labels, minlength=len(names))
    if not sizes.all():
        name = printable(names[sizes.argmin()])
        print(f"  warning: no training example of {name}, so no batch will teach it")
    if len(splits[1]) < 50:
        print(f"  warning: only {len(splits[1])} validation examples, which choose the checkpoint")
    if config["model"] == "demo":
        print("  a smoke run, not a result: this tiny encoder starts from random weights")


def conclude(record: dict, test: Split, names: tuple[str, ...]) -> None:
    sizes = np.bincount(test.labels, minlength=len(names))
    largest, share = printable(names[sizes.argmax()]), sizes.max() / len(test)
    print("test accuracy {test_accuracy:.3f}, validation {validation_accuracy:.3f} at step {best_step}, "
          "{seconds:.0f} s".format(**record) + f"; of test {share:.3f} are {largest}")
    if record["lam"]:
        scl, lowest, collapsed = (record[name] for name in ("scl", "scl_lowest", "scl_collapsed"))
        if collapsed - scl < 0.1 * (collapsed - lowest):
            print("  warning: scl ended near its collapsed value, and was hardly fitted: more steps, or a higher --lr")


def pick_device(name: str | None, precision: str = "fp32") -> torch.device:
    has_mps = torch.backends.mps.is_available() and WORLD_SIZE == 1  # no backend of torch.distributed moves its tensors
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and dist.is_torchelastic_launched() else name
    with blame("--device", name, "cpu, or a device that torch sees"):
        device = torch.empty(1, device=name).device
        autocast(device, "fp32")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu" and precision == "bf16" and "bfloat16" not in cpu_capability():
        print("warning: this CPU does not compute bfloat16 itself, so --precision bf16 may be much slower than fp32",
              file=sys.stderr)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the first tells what all do
    return device


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.model == "demo":
        torch.set_num_threads(1)  # so small that more threads only wait for each other
    try:
        sweep(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except Mistake as mistake:
        message = str(mistake)
    except OSError as error:
        message = f"{error}; {args.out} has what was finished, the same command goes on"
    except Exception as error:
        if not data.is_out_of_memory(error):
            raise
        message = "out of memory; --micro-batch-size with a smaller number needs less, for the same batch"
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on with the runs that {args.out} lacks, in this one from where "
              "--save-every saved it last, else from its start", file=sys.stderr)
        return 130
    print(f"finetune.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is None:  # closed by who started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # a log grows line by line, piped too
    sys.exit(main())
