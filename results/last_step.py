"""Runs finetune.py, and also saves a checkpoint of the last step of each run, in the folder OUT-last.

    python results/last_step.py --task demo --shots 20 --out runs-demo    # the flags of finetune.py

finetune.py itself tests and saves the best step, which may be the last step. The record in a checkpoint of the last
step has the validation accuracy of this step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import finetune

out = Path(f"{finetune.parse_args().out.rstrip('/')}-last")
restore_best = finetune.Training.restore_best


def save_and_restore(training: finetune.Training) -> None:
    accuracies = training.result["validation_accuracies"]
    if accuracies and accuracies[-1][0] == training.config["steps"]:  # false if the loss diverged at this step
        step, accuracy = accuracies[-1]
        record = training.config | training.result | {"best_step": step, "validation_accuracy": accuracy}
        finetune.save_checkpoint(out / training.config["run"], training.model, record)
    restore_best(training)


finetune.Training.restore_best = save_and_restore
sys.exit(finetune.main())
