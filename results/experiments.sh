#!/usr/bin/env bash
# Prints the commands behind every record of this folder, one a line, those of the experiments named (default: all):
#
#     bash results/experiments.sh tuning | bash
#     bash results/experiments.sh | OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c "{}"    # two at a time
#
# A record that exists is not computed again, so a cut-off run goes on where it stopped.
set -euo pipefail

run() {
    echo "python finetune.py --data-dir ${data:-glue} --model ${model:-all-MiniLM-L6-v2} --precision bf16" \
        "--out runs/$experiment $*"
}

# lr, steps and pooling: the same eight trials for CE and for CE + SCL, on seeds that no other experiment uses
tuning() {
    for pooling in cls mean; do
        for lr in 1e-4 2e-4; do
            for steps in 100 200; do
                run --task sst2 --shots 100 --seed 100 101 102 --lam 0 0.9 --pooling $pooling --lr $lr --max-steps $steps
            done
        done
    done
}

for experiment in ${*:-tuning}; do
    $experiment
done
