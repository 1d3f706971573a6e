"""Fine-tunes an encoder with cross-entropy + supervised contrastive loss (Gunel et al., ICLR 2021).

    python finetune.py --task demo --shots 20 --lam 0.9 --tau 0.3       # made-up sentences, no network, ten seconds
    python finetune.py --task sst2 --shots 20 --lam 0.9 --tau 0.3       # RoBERTa-Large and SST-2 from the hub
    python finetune.py --task sst2 --shots 20 --lam 0 0.9 --seed 0 1 2  # a sweep of six runs, paired by seed
    torchrun --nproc-per-node 8 finetune.py --task mnli --batch-size 256 --micro-batch-size 16 --save-every 500

Each finished run appends one JSON line to OUT/results.jsonl. A single run also writes a checkpoint to OUT/<run>/; a
sweep writes checkpoints only with --save. This file has the flags, the training loop (`fit`) and the sweep of runs.
"""

import argparse
import contextlib
import itertools
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from parts.errors import UserError, explain_errors, first_line, is_out_of_memory, one_line, prepare_stdout
from parts.flags import COUNT, DEFAULT_MODEL, FRACTION, NOT_NEGATIVE, POSITIVE, TRANSLATORS, Parser, complete, number
from parts.tasks import TASKS, load_data

# ------------------------------------------------------------ flags


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--task", required=True, help=f"{', '.join(TASKS)}; demo; or a folder with train.*, test.* and optionally "
        "validation.* (tsv, csv, jsonl, parquet; columns text, label and optionally text_pair)")
    add("--data-dir", help="folder with local files in GLUE's layout, such as DIR/SST-2/train.tsv (default: the hub)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--shots", type=COUNT, help="total number of training examples, stratified by class (default: all)")
    add("--shots-per-class", type=COUNT, help="number of training examples for each class")
    add = group.add_argument
    add("--noise", choices=("label", "word", "backtranslation"), help="noise in the training examples: wrong labels, "
        "dropped and swapped words, or three added back-translations per example (default: no noise)")
    add("--noise-level", type=NOT_NEGATIVE, help="strength of the noise (no default): the fraction of changed "
        "labels or words, or the sampling temperature of back-translation")
    add("--translators", nargs=2, metavar=("EN_DE", "DE_EN"), help="hub ids or folders of two translation models, "
        f"English to German and German to English (default: {' '.join(TRANSLATORS)})")
    add("--max-length", type=number(int, "[8, 1e9]"), default=256, help="maximum number of tokens per example; cannot "
        "exceed the limit of the model (default: %(default)s)")


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method (with several values, every combination is run)").add_argument
    add("--lam", type=FRACTION, nargs="+", default=[0.9], help="weight of SCL in Eq. 1. With 0, "
        "the loss is only cross-entropy. With 1, SCL trains the encoder, then cross-entropy trains the classifier "
        "(default: 0.9, the paper's choice for few shots)")
    add("--tau", type=number(float, "[1e-6, 1e6]"), nargs="+", default=[0.3], help="temperature of SCL (default: 0.3, "
        "the paper's choice for few shots)")
    add("--lr", type=POSITIVE, nargs="+", default=[None], help="peak learning rate (default: 1e-5 as in the paper; "
        "1e-3 for the demo model)")
    add("--seed", type=number(int, "[0, 4294967295]"), nargs="+", default=[0], help="random seed of the k-shot sample, "
        "the initialisation of new weights, the batch order and dropout (default: 0)")
    add("--ce-temperature", type=POSITIVE, metavar="T", help="control experiment, only with --lam 0: a linear "
        "classifier on l2-normalised features divided by T")

    add = parser.add_argument_group("model").add_argument
    add("--model", help=f"hub id or folder of an encoder (default: {DEFAULT_MODEL}; tiny encoder for --task demo)")
    add("--pooling", choices=("cls", "mean"), default="cls", help="cls: the model's own classifier reads the "
        "first token, as in the paper. mean: a linear classifier reads the mean of all tokens (default: %(default)s)")
    add("--dropout", type=number(float, "[0, 1)"), default=0.1, help="dropout rate of the model (default: %(default)s)")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training (defaults from the paper, otherwise from fairseq for GLUE)")
    add = group.add_argument
    add("--head-lr", type=POSITIVE, help="peak learning rate of the classifier (default: --lr; 1e-3 if --lam is 1)")
    add("--batch-size", type=COUNT, default=16, help="number of examples that SCL contrasts per step, summed over all "
        "processes (default: %(default)s)")
    add("--micro-batch-size", type=COUNT, help="number of examples that a process holds in memory at once; a small "
        "value saves memory but costs a second forward pass (default: the whole batch)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--epochs", type=number(float, "(0, 1e9]"), help="training length in epochs (default: 10, at least 200 steps)")
    add("--max-steps", type=COUNT, help="training length in steps")
    add = group.add_argument
    add("--eval-every", type=COUNT, help="number of steps between two validations (default: a tenth of all steps)")
    add("--weight-decay", type=NOT_NEGATIVE, default=0.1, help="weight decay, only for matrices (default: %(default)s)")
    add("--warmup-ratio", type=FRACTION, default=0.06, help="fraction of the steps in which the learning rate rises "
        "(warm-up); in the other steps, the learning rate falls (default: %(default)s)")
    add("--sampler", choices=("shuffled", "balanced"), default="shuffled", help="balanced: a batch has two or more "
        "examples of each class, or of as many classes as fit; useful for many or rare classes (default: %(default)s)")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine and output").add_argument
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="precision of the encoder; the loss is "
        "always in float32 (default: %(default)s)")
    add("--compile", action="store_true", help="compile the encoder with torch.compile; useful for long runs")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: the fastest available device)")
    add("--out", default="runs", help="folder for records and checkpoints (default: %(default)s)")
    add("--save", action="store_true", help="keep the checkpoint of every run in a sweep")
    add("--save-every", type=COUNT, metavar="S", help="save the training state every S steps, to resume a stopped run")
    add("--dry-run", action="store_true", help="load and check the data and the model, print a summary, and stop")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for add_flags in (add_data_flags, add_method_flags, add_training_flags, add_machine_flags):
        add_flags(parser)
    try:
        args = parser.parse_args(argv)
        complete(args)
        return args
    except (UserError, OSError) as error:  # OSError for a path that cannot be read
        parser.exit(2, f"finetune.py: error: {one_line(error)}\n")


if __name__ == "__main__":
    parse_args()  # a wrong flag ends the program here, before torch is imported
    with contextlib.suppress(ValueError):  # raised outside the main thread
        # Ctrl-C during the imports prints a line instead of a traceback.
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

from parts import pretrained, ranks, records
from parts.data import Split, draw_splits
from parts.model import Model, classification_metrics, predict, save_checkpoint
from parts.ranks import autocast, join_ranks, machine_facts, pick_device, rank, warn_if_slow, world_size
from parts.state import Diverged, Training
from scl import gather_batch, scl_bounds, scl_loss

COMMIT = records.git_commit()  # read at the start, because the repository may change during a sweep

# ------------------------------------------------------------ the training loop and the functions it calls


def fit(training: Training, train: Split, validation: Split, state_file: Path | None = None,
        save_every: int | None = None) -> None:
    """Trains for all steps, then restores the weights with the best validation accuracy (in a tie, the latest).

    With lam = 1, the first stage trains no classifier, so `fit` measures no accuracy and keeps the last weights.
    """
    config, first, last = training.config, training.step + 1, training.config["steps"]
    all_batches = batches(train.labels, config["batch_size"], config["sampler"], config["seed"])
    remaining = itertools.islice(all_batches, training.step, None)  # a resumed run skips its finished steps
    bar = tqdm(range(first, last + 1), config["run"], last, initial=first - 1, disable=rank() > 0 or None, leave=False)
    for step in bar:
        training.step = step
        training.model.train(not training.classifier_only)  # a frozen encoder runs without dropout
        shares = np.split(next(remaining), world_size())
        batch = train.take(shares[rank()])  # each rank trains on its share of the batch

        # forward and backward
        if (size := config["micro_batch_size"]) and size < len(batch):
            losses = cached_backward(training, batch, size)
        else:
            class_logits, features = forward(training, batch.texts)  # (B, C), (B, D)
            losses = objective(training, class_logits, features, batch.labels)
            training.scaler.scale(losses["loss"]).backward()

        # update
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.schedule.step()
        training.optimizer.zero_grad()
        for name, loss in losses.items():  # the sums stay on the device
            training.sums[name] = training.sums.get(name, 0) + loss.detach()

        # validate, and save the training state
        if step % config["eval_every"] == 0 or step == last:
            bar.write(validate(training, validation))
        if save_every and step % save_every == 0 and rank() == 0:
            training.save(state_file)
    if not any(moments["step"] > 0 for moments in training.optimizer.state.values()):
        raise Diverged("every gradient overflowed in fp16, so no step changed a weight")
    training.restore_best()


def batches(labels: np.ndarray, size: int, sampler: str, seed: int) -> Iterator[np.ndarray]:
    """Yields batches forever. A batch is an array with the indices of its examples. Each epoch has a new random order.

    Drops the last examples of an epoch if they do not fill a batch. With the sampler "balanced", each batch is drawn
    independently of the other batches. A training set smaller than `size` is one batch.
    """
    rng = np.random.default_rng(seed)
    n, size = len(labels), min(size, len(labels))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    while True:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            if sampler == "shuffled":
                yield order[start : start + size]
            else:  # two examples of each chosen class, then random examples until the batch is full
                chosen = [members[i] for i in rng.permutation(len(members))[: max(size // 2, 1)]]
                pairs = np.concatenate([rng.choice(rows, min(2, len(rows)), replace=False) for rows in chosen])
                others = rng.choice(n, min(2 * size, n), replace=False)
                yield np.concatenate([pairs, others[~np.isin(others, pairs)]])[:size]


def forward(training: Training, texts: list[tuple[str, ...]], index: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the class logits (B, C) and features (B, D) of the texts of a batch or a micro-batch.

    The dropout mask depends only on the seed, the step, the rank and the index of the micro-batch. So both forward
    passes of a micro-batch have the same mask, and a resumed run has the same masks as an uninterrupted run.
    """
    key = np.random.SeedSequence((training.config["seed"], training.step, rank(), index))
    tokens = training.model.tokenize(texts)
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
    with autocast(training.device, training.config["precision"]):
        return training.network(**tokens)


def objective(training: Training, class_logits: Tensor, features: Tensor, labels: np.ndarray) -> dict[str, Tensor]:
    """Returns the loss (Eq. 1) and the terms of the loss for the batch of all ranks.

    `ce_scl_loss` in scl.py computes the same loss. This function also returns the terms of the loss, which `validate`
    prints. If you change the loss, choose a new --out, because finetune.py skips finished runs with the same flags.
    """
    share = class_logits.float(), features.float(), torch.from_numpy(labels).to(training.device)
    class_logits, features, targets = gather_batch(*share)  # global batch: (N, C), (N, D), (N,)
    ce = F.cross_entropy(class_logits, targets)  # Eq. 2
    if training.lam == 0:
        return {"loss": ce, "ce": ce}
    scl = scl_loss(features, targets, training.tau)  # Eq. 3
    loss = (1 - training.lam) * ce + training.lam * scl  # Eq. 1
    lowest, collapsed = scl_bounds(targets, training.tau)
    return {"loss": loss, "ce": ce, "scl": scl, "scl_lowest": lowest, "scl_collapsed": collapsed}


def cached_backward(training: Training, batch: Split, size: int) -> dict[str, Tensor]:
    """Computes the exact gradient of Eq. 1 for a batch that does not fit into memory (--micro-batch-size).

    Gradient caching (Gao et al., 2021, arXiv 2101.06983) divides the batch into micro-batches. A first forward pass
    computes the class logits and features of all micro-batches. The loss of the whole batch is computed from these
    outputs, and the gradients of the outputs are cached. Then each micro-batch has a second forward pass, and
    backpropagation starts from the cached gradients. Plain gradient accumulation would be wrong, because SCL would
    contrast only examples of the same micro-batch.
    """
    micro_batches = [batch.texts[start : start + size] for start in range(0, len(batch), size)]
    with torch.no_grad():
        first_pass = [forward(training, texts, i) for i, texts in enumerate(micro_batches)]
    outputs = [torch.cat(column).requires_grad_() for column in zip(*first_pass, strict=True)]  # (B, C), (B, D)
    losses = objective(training, *outputs, batch.labels)
    gradients = torch.autograd.grad(training.scaler.scale(losses["loss"]), outputs, materialize_grads=True)
    for i, texts in enumerate(micro_batches):
        # DistributedDataParallel must average the gradients over the ranks only once, after the last micro-batch.
        wait = world_size() > 1 and i + 1 < len(micro_batches)
        with training.network.no_sync() if wait else contextlib.nullcontext():
            second_pass = forward(training, texts, i)
            cached = [gradient[i * size : (i + 1) * size] for gradient in gradients]
            # The gradient of `surrogate` with respect to the outputs is the cached gradient.
            surrogate = sum((output * gradient).sum() for output, gradient in zip(second_pass, cached, strict=True))
            surrogate.backward()
    return losses


def validate(training: Training, validation: Split) -> str:
    """Averages the losses since the last validation, computes the validation accuracy, and returns a line to print."""
    means = training.mean_losses()
    if not math.isfinite(means["loss"]):
        raise Diverged("the loss is not finite")
    training.sums = {}
    training.result |= {name: mean for name, mean in means.items() if name != "loss"}
    line = f"step {training.step}/{training.config['steps']}  ce {means['ce']:.3f}"
    if training.lam:
        line += "  scl {scl:.3f} (lowest {scl_lowest:.3f}, collapsed {scl_collapsed:.3f})".format(**means)
        if means["scl_collapsed"] == 0:
            line += ": no batch of three or more examples had two examples of one class"
    if training.lam == 1:
        return line
    class_logits, _ = predict(training.model, validation, training.config["precision"])
    if not np.isfinite(class_logits).all():  # the last update may have made weights infinite
        raise Diverged("the class logits are not finite")
    accuracy = classification_metrics(validation.labels, class_logits.argmax(axis=1))["accuracy"]
    training.record_accuracy(accuracy)
    return f"{line}  validation {accuracy:.3f}"


# ------------------------------------------------------------ one run: train, test, write a record and a checkpoint


def run(config: dict, model: Model, splits: tuple[Split, ...], out: Path, keep: bool, save_every: int | None) -> dict:
    """Trains and tests one model, returns the record of the run, and writes a checkpoint if `keep` is true.

    With lam = 1, a second stage trains only the classifier, with cross-entropy on frozen features.
    """
    train, validation, test = splits
    folder, state_file = out / config["run"], out / f"{config['run']}.state.pt"
    training = Training.start_or_resume(model, config, state_file)
    try:
        fit(training, train, validation, state_file, save_every)
        if config["lam"] == 1 and not training.classifier_only:
            print("lam 1: SCL did not train the classifier; a second stage trains the classifier on frozen features")
            first_stage, training = training, Training(model, config, classifier_only=True)
            training.started, training.result = first_stage.started, first_stage.result
            fit(training, train, validation, state_file, save_every)
    except Diverged as diverged:
        message = f"{config['run']}: {diverged} by step {training.step}"
        if keep and training.best_weights and rank() == 0:
            training.restore_best()
            save_checkpoint(folder, model, config | training.result)
            message += f"; the checkpoint in {folder} is from step {training.result['best_step']}, the best step"
        if rank() == 0:
            records.remove(state_file)  # a resumed run would diverge again
        raise Diverged(message) from None

    predicted = predict(model, test, config["precision"])[0].argmax(axis=1)
    metrics = classification_metrics(test.labels, predicted)
    record = config | training.result | {f"test_{name}": value for name, value in metrics.items()}
    record["test_correct"] = np.packbits(test.labels == predicted).tobytes().hex()  # one bit per test example
    record["seconds"] = round(time.perf_counter() - training.started, 1)
    record |= {**machine_facts(training.device), "commit": COMMIT}
    if rank() == 0:
        if keep:
            save_checkpoint(folder, model, record)
        records.append_record(out / "results.jsonl", record)
        records.remove(state_file)
    return record


# ------------------------------------------------------------ a sweep of runs


def sweep(args: argparse.Namespace, device: torch.device) -> None:
    """Loads the data. For each seed, runs every combination of lam, tau and lr that has no record in results.jsonl."""
    data = load_data(args.task, args.data_dir, few_shot=bool(args.shots or args.shots_per_class))
    print(f"loading {args.model}")
    source = pretrained.fetch_model(args.model)
    tokenizer = pretrained.load_tokenizer(source, args.pooling, args.max_length)
    if args.pooling == "cls" and pretrained.was_trained_with_mean(source):
        print(f"note: {args.model} was trained with mean pooling; also try --pooling mean", file=sys.stderr)

    combinations = dict.fromkeys((lam, tau if lam else None, lr)
                                 for lam, tau, lr in itertools.product(args.lam, args.tau, args.lr))
    seeds, out = dict.fromkeys(args.seed), Path(args.out)
    records.read_records(out / "results.jsonl")  # prints a message for each line that is not a record
    total, failures, durations = len(combinations) * len(seeds), [], []
    for i, seed in enumerate(seeds):
        splits = draw_splits(args, data, seed, device)
        warnings = pretrained.check_vocabulary(tokenizer, splits[0].texts, source)
        for current, (lam, tau, lr) in enumerate(combinations, start=i * len(combinations) + 1):
            config = records.configure(args, lam, tau, lr, seed, splits, data.label_names, tokenizer.model_max_length,
                                       world_size())
            ranks.check_same_run(config["run"])
            print(f"\nrun {current} of {total}: {config['run']}{records.time_left(durations, total - current + 1)}")
            if not args.dry_run and skip_finished(config, out, splits[2], data.label_names):
                continue
            torch.manual_seed(seed)
            model = pretrained.load_model(source, args.pooling, data.label_names, tokenizer, args.dropout,
                                          args.ce_temperature).to(device)
            records.print_setting(config, splits, data.label_names, model.summary(), warnings)
            if args.dry_run:
                return
            records.open_results(out)
            keep = args.save or total == 1
            try:
                record = run(config, model, splits, out, keep, args.save_every)
            except Diverged as diverged:
                print(diverged)
                failures.append(str(diverged))
                continue
            durations.append(record["seconds"])
            records.print_result(record, splits[2], data.label_names)
            print(records.checkpoint_note(out / record["run"], keep))
    print(f"\nthe records are in {out / 'results.jsonl'}; this command prints a table: "
          f"python eval.py table {shlex.quote(str(out))}")
    if failures:
        raise UserError("; ".join(failures) + "; try a smaller --lr")


def skip_finished(config: dict, out: Path, test: Split, label_names: tuple[str, ...]) -> bool:
    """Returns whether the run has a record. If so, prints the recorded result and removes an old saved state."""
    results = out / "results.jsonl"
    found = records.find_record(results, config)
    if not any(ranks.from_all_ranks(bool(found))):
        return False
    if found:
        with explain_errors("--out", results, "records that finetune.py wrote; delete the line of this run"):
            records.print_result(found, test, label_names)
        finished = "finished" if (out / config["run"]).is_dir() else "finished and has no checkpoint"
        print(f"this run is {finished}; to repeat the run, delete its line in {results} or choose another --out")
    if rank() == 0:
        records.remove(out / f"{config['run']}.state.pt")  # a killed process may have left this file
    return True


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.model == "demo":
        torch.set_num_threads(1)  # more threads would slow this tiny model down
    try:
        device = pick_device(args.device)
        warn_if_slow(device, args.precision)
        join_ranks(device)
        with contextlib.redirect_stdout(open(os.devnull, "w")) if rank() else contextlib.nullcontext():
            sweep(args, device)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error}; {args.out} keeps the finished runs, and the same command continues"
    except KeyboardInterrupt:
        print(f"interrupted; {args.out} keeps the finished runs. The same command runs the rest. An unfinished run "
              "resumes from its last saved state (--save-every) or starts again", file=sys.stderr)
        return 130
    except Exception as error:
        if is_out_of_memory(error):
            message = "out of memory; a smaller --micro-batch-size needs less memory for the same batch"
        elif args.compile and type(error).__module__.startswith("torch._"):
            message = f"argument --compile: {first_line(error)}; leave it out, or install what torch.compile needs"
        else:
            raise
    print(f"finetune.py: error: {one_line(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    with contextlib.suppress(ValueError):  # raised outside the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_stdout()
    sys.exit(main())
