"""A local server that speaks the protocol of the Hugging Face hub. It serves a tiny RoBERTa and a made-up SST-2.

The variable HF_ENDPOINT directs the libraries to this server. The files of a model are in ROOT/models/OWNER/NAME, the
files of a data set are in ROOT/datasets/OWNER/NAME. Each model and each data set has one commit.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import transformers

from conftest import sentences

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CALL = re.compile(r"/api/(models/|datasets/)([^/]+/[^/]+)/(revision|tree)/[^/]+/?(.*)")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")
SST2_CARD = """---
dataset_info:
- config_name: sst2
  features:
  - {name: sentence, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': negative, '1': positive}}}}
  - {name: idx, dtype: int32}
  splits:
  - {name: train, num_bytes: 9000, num_examples: 120}
  - {name: validation, num_bytes: 9000, num_examples: 40}
  - {name: test, num_bytes: 9000, num_examples: 40}
configs:
- config_name: sst2
  data_files:
  - {split: train, path: sst2/train-*}
  - {split: validation, path: sst2/validation-*}
  - {split: test, path: sst2/test-*}
---
"""


class Hub(ThreadingHTTPServer):
    """Serves the files below `root` inside a `with` block. Lists each request, such as "GET /api/models/..."."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)  # the system chooses a free port
        self.root, self.requests = root, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        content = self.read()
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("X-Repo-Commit", COMMIT)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if content and self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_CONNECT = do_GET  # CONNECT asks a proxy for a connection to another server

    def read(self) -> bytes | None:
        """Returns a file, or the JSON list of a folder. Returns None if neither exists."""
        path = unquote(urlsplit(self.path).path)
        if match := FILE.fullmatch(path):
            file = self.server.root / (match[1] or "models") / match[2] / match[3]
            return file.read_bytes() if file.is_file() else None
        match = CALL.fullmatch(path)
        if not match or not (repository := self.server.root / match[1] / match[2]).is_dir():
            return None
        if match[3] == "revision":
            return json.dumps({"id": match[2], "sha": COMMIT}).encode()
        paths = repository.joinpath(match[4]).glob("*" if "recursive=false" in self.path else "**/*")
        return json.dumps([{"type": "directory" if path.is_dir() else "file", "size": path.stat().st_size,
                            "path": path.relative_to(repository).as_posix(), "oid": COMMIT}
                           for path in sorted(paths)]).encode()

    def log_message(self, *_: object) -> None:
        """Keeps the requests out of the output of the tests."""


def write_sst2(folder: Path) -> None:
    """Writes SST-2 in the format of nyu-mll/glue: parquet files, and a README that declares configs and splits."""
    folder.joinpath("sst2").mkdir(parents=True)
    folder.joinpath("README.md").write_text(SST2_CARD)
    for split, start, size in (("train", 0, 120), ("validation", 200, 40), ("test", 400, 40)):
        texts = [f"{text} " for text in sentences(size, start)]
        labels = [-1 if split == "test" else i % 2 for i in range(size)]  # GLUE does not publish its test labels
        table = pa.table({"sentence": texts, "label": labels, "idx": pa.array(range(size), pa.int32())})
        pq.write_table(table, folder / "sst2" / f"{split}-00000-of-00001.parquet")


def write_roberta(folder: Path) -> None:
    """Writes a pretrained RoBERTa with random weights, as safetensors. `pytorch_model.bin` is a decoy."""
    tokenizer = transformers.RobertaTokenizer(model_max_length=64).train_new_from_iterator(
        sentences(200), vocab_size=400, show_progress=False)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, type_vocab_size=1)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.joinpath("pytorch_model.bin").write_bytes(b"a pickle that must not be downloaded")
