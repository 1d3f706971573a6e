"""Runs the user's own command against a local hub: with an empty cache, then from the cache, then without either."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import hub
from parts.records import read_records

COMMAND = "finetune.py --task sst2 --shots 20 --lam 0.9 --tau 0.3"
EMBEDDINGS = "roberta.embeddings.word_embeddings.weight"
MESSAGES = {  # flags -> the start of the message, and its end
    "--task sst2": ("--task: the hub", "nyu-mll/glue; give --data-dir with the files in GLUE's layout"),
    "--task demo --model FacebookAI/roberta-large":
        ("--model: the hub", "FacebookAI/roberta-large; give --model a local folder"),
    "--task demo --noise backtranslation --noise-level 0.7":
        ("--translators: the hub", "Helsinki-NLP/opus-mt-en-de; give two local folders with such models"),
}


def run(command, home, url):
    """Runs Python with the hub at this URL. Requests to other servers go there, too, because it is also the proxy."""
    environment = {name: value for name, value in os.environ.items() if not re.match("HF_|.*_PROXY", name.upper())}
    environment |= {"HF_ENDPOINT": url, "HTTPS_PROXY": url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
                    "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    repository = Path(__file__).parents[1]
    return subprocess.run([sys.executable, *command], env=environment, cwd=repository, capture_output=True, text=True)


def test_the_command_downloads_only_safetensors_and_then_works_from_the_cache(tmp_path):
    model, home, out = tmp_path / "models" / "FacebookAI" / "roberta-large", tmp_path / "home", tmp_path / "out"
    hub.write_roberta(model)
    hub.write_sst2(tmp_path / "datasets" / "nyu-mll" / "glue")
    command = [*COMMAND.split(), "--max-steps", "2", "--out", str(out)]
    with hub.Hub(tmp_path) as server:
        done = run(command, home, server.url)
    assert done.returncode == 0, done.stderr

    (record,) = read_records(out / "results.jsonl")
    assert (record["train_size"], record["validation_size"], record["test_size"]) == (20, 20, 20)
    trained, served = (load_file(folder / "model.safetensors")[EMBEDDINGS] for folder in (out / record["run"], model))
    torch.testing.assert_close(trained, served, rtol=0, atol=1e-3)  # two steps with a learning rate of 1e-5

    downloads = {url.split("/")[-1] for url in server.requests if url.startswith("GET /FacebookAI/roberta-large/")}
    assert downloads == {file.name for file in model.iterdir()} - {"pytorch_model.bin"}
    assert not [url for url in server.requests if "pytorch_model.bin" in url or url.startswith("CONNECT")]

    done = run([*command, "--seed", "1"], home, server.url)  # the server has stopped
    assert done.returncode == 0, done.stderr
    assert [record["seed"] for record in read_records(out / "results.jsonl")] == [0, 1]


def test_without_hub_and_cache_the_message_names_the_flag_and_its_alternative(tmp_path):
    """Runs all commands in one process, because the imports take most of the time."""
    with hub.Hub(tmp_path) as server:
        pass  # after this block, no program answers at server.url
    code = "import sys, finetune; print([finetune.main([*flags.split(), *sys.argv[1:3]]) for flags in sys.argv[3:]])"
    done = run(["-c", code, "--out", str(tmp_path / "out"), *MESSAGES], tmp_path / "home", server.url)
    assert done.stdout.endswith("[2, 2, 2]\n"), done.stderr
    for line, (start, end) in zip(done.stderr.splitlines(), MESSAGES.values(), strict=True):
        assert line.startswith(f"finetune.py: error: argument {start}") and line.endswith(f"does not hold {end}")
    assert not (tmp_path / "out").exists()
