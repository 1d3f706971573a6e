#!/usr/bin/env bash
# Prints one command per line for each experiment that is named, or for all experiments. The last lines of this file
# have their names. The records of an experiment are in NAME.jsonl or NAME/results.jsonl in this folder.
#
#     bash results/experiments.sh tuning | bash
#     bash results/experiments.sh few-shot grid | OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c "{}"    # two at a time
#
# A run is skipped if runs/NAME has its record, so an interrupted experiment continues after its last record. `glue`,
# `transfer`, `own`, `all-MiniLM-L6-v2` and `all-mpnet-base-v2` must be folders, or links to folders.
set -euo pipefail

# Prints a training command. The variables `script`, `data`, `model` and `precision` replace the values below. An empty
# `data` or `precision` removes its flag.
run() {
    echo "python ${script:-finetune.py} ${data---data-dir glue} --model ${model:-all-MiniLM-L6-v2}" \
        "${precision---precision bf16} --out runs/$experiment $*" | tr -s " "
}

seeds() { seq -s " " 0 $(($1 - 1)); }

# Trials for learning rate, steps and pooling, and for the temperature of the control: eight for each method. No other
# experiment uses these seeds.
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

# For each method, the trial with the best mean validation accuracy.
ce="--lam 0 --pooling mean --lr 1e-4 --max-steps 100"
control="--lam 0 --ce-temperature 0.2 --pooling mean --lr 1e-4 --max-steps 100"
scl="--lam 0.9 --tau 0.3 --pooling mean --lr 1e-4 --max-steps 200"

few-shot() { # CE has as many steps as CE + SCL
    for task in sst2 qnli mnli; do
        for shots in 20 100; do
            for method in "${ce/100/200}" "$scl"; do
                run --task $task --shots $shots --seed $(seeds 10) $method $([ $task = sst2 ] && echo --save)
            done
        done
        run --task $task --shots 1000 --seed $(seeds 5) --lam 0 0.9 --tau 0.3 --pooling mean --lr 1e-4 --epochs 10
    done
}

few-shot-cls() {
    run --task sst2 --shots 100 --seed $(seeds 10) --lam 0 0.9 --tau 0.3 --pooling cls --lr 1e-4 --max-steps 100
}

# CE and the control have the number of steps of their own trials. CE + SCL is as in few-shot.
chosen-steps() {
    for task in sst2 qnli mnli; do
        for shots in 20 100; do
            for method in "$ce" "$scl"; do
                run --task $task --shots $shots --seed $(seeds 10) $method $([ $task = sst2 ] && echo --save)
            done
        done
    done
    run --task sst2 --shots 100 --seed $(seeds 10) $control
}

# Tests the last step, because the only validation is at the last step.
last-step() {
    for shots in 20 100; do
        for method in "${ce/100/200}" "$scl"; do
            run --task sst2 --shots $shots --seed $(seeds 10) $method --eval-every 200
        done
    done
}

grid() {
    run --task sst2 --shots 100 --seed $(seeds 3) ${ce/100/200} # these runs are also in few-shot
    for seed in $(seeds 3); do
        run --task sst2 --shots 100 --seed $seed ${scl/--lam 0.9 --tau 0.3/--lam 0.1 0.3 0.5 0.7 0.9 1 --tau 0.1 0.3 0.5 0.7}
    done
}

noise() {
    for noise in "" "--noise label --noise-level "{0.1,0.2,0.3} "--noise word --noise-level 0.3"; do # "" is also in chosen-steps
        for method in "$ce" "$scl"; do
            run --task sst2 --shots 100 --seed $(seeds 10) $method $noise
        done
    done
}

full() { # the records of rte, mrpc and cola are in unfitted/results.jsonl
    for task in rte mrpc cola; do
        run --task $task --seed $(seeds 3) --lam 0 0.9 --tau 0.3 --pooling mean --lr 1e-4 --epochs 3
    done
    for lam in 0 0.9; do
        run --task sst2 --seed 0 --lam $lam --pooling mean --lr 1e-4 --epochs 1 --save
    done
}

transfer() { # each method starts from its own SST-2 checkpoint
    for task in amazon_polarity yelp_polarity; do
        for method in "$ce" "$scl"; do
            lam=$(awk '{print $2}' <<< "$method")
            data="--data-dir transfer" model="runs/full/sst2-*-lam$lam-*" \
                run --task $task --shots-per-class 20 --seed $(seeds 10) $method --max-length 128
        done
    done
}

batch-size() {
    for size in 16 "64 --micro-batch-size 16" "256 --micro-batch-size 16"; do # size 16 is also in few-shot
        run --task sst2 --shots 1000 --seed $(seeds 3) --lam 0 0.9 --tau 0.3 --pooling mean --lr 1e-4 --epochs 10 \
            --batch-size $size
    done
}

# The base-size encoder. Both methods have the same number of steps, and the learning rates of their own trials. No other
# experiment with this encoder uses the seeds of the trials.
of_base="--max-steps 150 --eval-every 30"
high_head_lr="--head-lr 1e-3 --max-steps 100 --eval-every 20"

base-tuning() {
    for trial in "100 --lr "{5e-6,1e-5,2e-5,5e-5} "20 --lr "{1e-5,2e-5,5e-5}; do
        model=all-mpnet-base-v2 run --task sst2 --shots $trial --seed 100 101 --lam 0 0.9 --tau 0.3 $of_base
    done
    for lr in 1e-5 2e-5 5e-5; do # these trials are in float32
        precision= model=all-mpnet-base-v2 run --task sst2 --shots 20 --seed 100 101 --lam 0 0.9 --tau 0.3 \
            --lr $lr $high_head_lr
    done
}

base() { # pair by pair, so that an interrupted experiment has complete pairs
    for seed in $(seeds 10); do
        for shots in 100 20; do
            model=all-mpnet-base-v2 run --task sst2 --shots $shots --seed $seed --lam 0 --lr 2e-5 $of_base --save
            model=all-mpnet-base-v2 run --task sst2 --shots $shots --seed $seed --lam 0.9 --tau 0.3 --lr 1e-5 $of_base --save
        done
    done
}

base-qnli() { # the first two of ten
    for seed in 9 8; do
        model=all-mpnet-base-v2 run --task qnli --shots 100 --seed $seed --lam 0 --lr 2e-5 $of_base
        model=all-mpnet-base-v2 run --task qnli --shots 100 --seed $seed --lam 0.9 --tau 0.3 --lr 1e-5 $of_base
    done
}

# The experiments below ran on a CPU without bfloat16 instructions, so they are in float32.

noise-steps() { # the settings of `noise`, but CE has as many steps as CE + SCL
    for seed in $(seeds 10); do
        for noise in "" "--noise label --noise-level "{0.1,0.2,0.3} "--noise word --noise-level 0.3"; do
            for method in "${ce/100/200}" "$scl"; do
                precision= run --task sst2 --shots 100 --seed $seed $method $noise
            done
        done
    done
}

base-head-lr() { # tests whether the gain comes from the low learning rate of the classifier
    for shots_and_lr in "20 --lr 2e-5" "20 --lr 5e-5" "100 --lr 2e-5"; do
        for seed in $(seeds 10); do
            for lam in 0 0.9; do
                script=results/last_step.py precision= model=all-mpnet-base-v2 run --task sst2 --shots $shots_and_lr \
                    --seed $seed --lam $lam --tau 0.3 $high_head_lr --save
            done
        done
    done
}

base-control() { # tests whether the gain comes from normalised features
    for seed in $(seeds 10); do
        precision= model=all-mpnet-base-v2 run --task sst2 --shots 20 --seed $seed --lam 0 --ce-temperature 0.1 \
            --lr 2e-5 $high_head_lr
    done
}

trec6() {
    for head_lr in 1e-3 1e-4; do
        for seed in $(seeds 10); do
            precision= data= run --task own/TREC6 --shots-per-class 10 --seed $seed --lam 0 0.9 --tau 0.3 --pooling mean \
                --lr 1e-4 --head-lr $head_lr --max-steps 200 --eval-every 40
        done
    done
    for seed in $(seeds 5); do # the control
        precision= data= run --task own/TREC6 --shots-per-class 10 --seed $seed --lam 0 --ce-temperature 0.2 \
            --pooling mean --lr 1e-4 --head-lr 1e-3 --max-steps 200 --eval-every 40
    done
}

of_own_task() { # $1 is the name of a folder in `own`
    for seed in $(seeds 10); do
        precision= data= model=all-mpnet-base-v2 run --task own/$1 --shots-per-class 10 --seed $seed --lam 0 0.9 \
            --tau 0.3 --lr 2e-5 $high_head_lr
    done
}

base-trec6() { of_own_task TREC6; }

base-cr() { of_own_task CR; }

all="tuning few-shot few-shot-cls chosen-steps last-step grid noise full transfer batch-size base-tuning base base-qnli
    noise-steps base-head-lr base-control trec6 base-trec6 base-cr"
for experiment in ${*:-$all}; do
    [[ " $(echo $all) " = *" $experiment "* ]] || { echo "no experiment $experiment; expected one of" $all >&2; exit 2; }
    $experiment
done
