#!/usr/bin/env bash
# Prints the commands behind the records of this folder, one a line, those of the experiments named (default: all):
#
#     bash results/experiments.sh tuning | bash
#     bash results/experiments.sh | OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c "{}"    # two at a time
#
# A record that exists is not computed again, so a cut-off run goes on where it stopped. `glue`, `transfer` and
# `all-MiniLM-L6-v2` are folders, or links to them.
set -euo pipefail

run() {
    echo "python finetune.py --data-dir ${data:-glue} --model ${model:-all-MiniLM-L6-v2} --precision bf16" \
        "--out runs/$experiment $*"
}

seeds() { seq -s " " 0 $(($1 - 1)); }

# lr, steps and pooling, and the temperature of the control: eight trials for each method, on seeds of their own.
tuning() {
    for pooling in cls mean; do
        for lr in 1e-4 2e-4; do
            for steps in 100 200; do
                run --task sst2 --shots 100 --seed 100 101 102 --lam 0 0.9 --pooling $pooling --lr $lr --max-steps $steps
            done
        done
    done
    for temperature in 0.05 0.1 0.2 0.3; do
        for steps in 100 200; do
            run --task sst2 --shots 100 --seed 100 101 102 --lam 0 --ce-temperature $temperature --pooling mean --lr 1e-4 \
                --max-steps $steps
        done
    done
}

# What these trials chose, each method by its own mean validation accuracy.
ce="--lam 0 --pooling mean --lr 1e-4 --max-steps 100"
scl="--lam 0.9 --tau 0.3 --pooling mean --lr 1e-4 --max-steps 200"

few-shot() {
    for task in sst2 qnli mnli; do
        for shots in 20 100; do
            for method in "$ce" "$scl"; do
                run --task $task --shots $shots --seed $(seeds 10) $method $([ $task = sst2 ] && echo --save)
            done
        done
    done
}

for experiment in ${*:-tuning few-shot}; do
    $experiment
done
