"""Runs finetune.py, and also saves a checkpoint of the last step of each run, in the folder OUT-last.

    python results/last_step.py --task demo --shots 20 --out runs-demo    # the flags of finetune.py

finetune.py itself tests and saves the best step. The best step may be the last one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import finetune

out = Path(f"{finetune.parse_args().out.rstrip('/')}-last")
restore_best = finetune.Training.restore_best


def save_and_restore(training: finetune.Training) -> None:
    out.mkdir(parents=True, exist_ok=True)
    finetune.save_checkpoint(out / training.config["run"], training.model, training.config | training.result)
    restore_best(training)


finetune.Training.restore_best = save_and_restore
sys.exit(finetune.main())
